"""16-bit FLAC by miniaudio's decoder, against libsndfile."""

import io
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from psla_sb.dataio import flac
from psla_sb.dataio.audio import AudioError, read_audio

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


def promising(n_samples, channels=1):
    """A file of 5000 samples whose header says that it has so many."""
    data = encoded(5000, channels)
    header = int.from_bytes(data[18:26], "big")
    assert header % 2**36 == 5000
    return data[:18] + (header - 5000 + n_samples).to_bytes(8, "big") + data[26:]


@pytest.mark.parametrize("n_samples", [1, 4999, 5001, flac.MOST_FRAMES, flac.MOST_FRAMES + 1, 2**36 - 1])
def test_a_header_with_another_length_is_left(n_samples):
    assert flac.read_flac(io.BytesIO(promising(n_samples))) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is not known here")
def test_what_there_is_no_room_for_is_an_error_of_the_file(tmp_path):
    (tmp_path / "a.flac").write_bytes(promising(flac.MOST_FRAMES, channels=8))

    def read():
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(AudioError, match=r"a\.flac: cannot be decoded"):
            read_audio(tmp_path / "a.flac")

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_default_device_does_not_matter():
    data = io.BytesIO(encoded(100))
    expected, _ = flac.read_flac(data)
    with torch.device("meta"):
        samples, _ = flac.read_flac(data)
    assert torch.equal(samples, expected)


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
