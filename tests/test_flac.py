"""16-bit FLAC by miniaudio's decoder, against libsndfile."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from psla_sb.dataio import flac
from psla_sb.dataio.audio import read_audio

pytestmark = pytest.mark.skipif(flac.lib is None, reason="miniaudio is not installed")


def encoded(n_samples, channels=1, rate=16000, seed=0, scale=0.3, level=0.5, subtype="PCM_16"):
    wave = np.random.default_rng(seed).normal(0, scale, (n_samples, channels)).clip(-1, 1)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype=subtype, compression_level=level)
    return file.getvalue()


@given(
    n_samples=st.integers(1, 20_000),
    channels=st.integers(1, 8),
    rate=st.sampled_from([8000, 11025, 16000, 44100, 48000, 96000]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0, 10.0]),
    level=st.floats(0, 1),
)
def test_the_same_samples_as_libsndfile(n_samples, channels, rate, seed, scale, level):
    data = encoded(n_samples, channels, rate, seed, scale, level)
    samples, found = flac.read_flac(io.BytesIO(data))
    expected, expected_rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    assert found == expected_rate
    assert np.array_equal(samples.numpy(), expected)


@given(data=st.data())
def test_damaged_files_give_their_right_samples_or_none(data):
    whole = encoded(5000, seed=1)
    frames = 4 + 4 + 34  # the header says how many there are: damage there is not told from another file
    start = data.draw(st.integers(frames, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    new = data.draw(st.binary(max_size=100))
    result = flac.read_flac(io.BytesIO(whole[:start] + new + whole[end:]))
    assert result is None or np.array_equal(result[0].numpy(), flac.read_flac(io.BytesIO(whole))[0].numpy())


def test_half_a_file_is_not_taken_for_sound():
    data = encoded(5000)
    assert flac.read_flac(io.BytesIO(data)) is not None
    assert flac.read_flac(io.BytesIO(data[: len(data) // 2])) is None


def test_a_header_that_promises_too_much_is_left():
    data = bytearray(encoded(5000))
    assert int.from_bytes(data[21:26], "big") & 2**36 - 1 == 5000
    data[21] |= 15
    data[22:26] = b"\xff" * 4
    assert flac.read_flac(io.BytesIO(bytes(data))) is None


def test_other_files_are_left(tmp_path):
    assert flac.read_flac(io.BytesIO(encoded(100, subtype="PCM_24"))) is None
    assert flac.read_flac(io.BytesIO(b"RIFF")) is None
    assert flac.read_flac(io.BytesIO(b"fLaC")) is None
    assert flac.read_flac(io.BytesIO()) is None
    assert flac.read_flac(str(tmp_path / "nowhere.flac")) is None
    assert flac.read_flac(str(tmp_path)) is None


def test_without_miniaudio_the_waveforms_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(encoded(5000, channels=2, rate=44100))
    wave = read_audio(tmp_path / "a.flac")
    monkeypatch.setattr(flac, "lib", None)
    assert flac.read_flac(str(tmp_path / "a.flac")) is None
    assert np.array_equal(read_audio(tmp_path / "a.flac").numpy(), wave.numpy())
