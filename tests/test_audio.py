"""Sound files of every kind, and broken ones."""

import numpy as np
import pytest
import soundfile
import torch

from psla_sb.dataio.audio import AudioError, read_audio, read_clip

RATE = 16000


def sine(rate, seconds=1.0, frequency=1000.0, level=0.5):
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 2**-24), ("DOUBLE", 2**-24)],
)
def test_wav_subtypes(subtype, tolerance, tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(RATE), RATE, subtype=subtype)
    wave = read_audio(tmp_path / "a.wav")
    assert wave.dtype == torch.float32
    np.testing.assert_allclose(wave, sine(RATE), atol=tolerance, rtol=0)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", ["WAV", "WAVEX", "FLAC", "AIFF"])
def test_16_bits_are_the_floats_that_libsndfile_makes_of_them(container, channels, tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, channels)).astype(np.int16)
    samples[:2] = [[-(2**15)], [2**15 - 1]]
    soundfile.write(tmp_path / "a", samples, RATE, subtype="PCM_16", format=container)
    expected = torch.from_numpy(soundfile.read(tmp_path / "a", dtype="float32", always_2d=True)[0]).mean(dim=1)
    assert torch.equal(read_audio(tmp_path / "a"), expected)


def test_flac(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(RATE), RATE, subtype="PCM_16")
    np.testing.assert_allclose(read_audio(tmp_path / "a.flac"), sine(RATE), atol=2**-15, rtol=0)


def peak_of(wave, rate=RATE):
    """Frequency in Hz and amplitude of the strongest component of the middle of a waveform."""
    middle = np.asarray(wave)[len(wave) // 4 : -len(wave) // 4]
    window = np.hanning(len(middle))
    spectrum = np.abs(np.fft.rfft(middle * window)) * 2 / window.sum()
    return np.argmax(spectrum) * rate / len(middle), spectrum.max()


@pytest.mark.parametrize("ending", ["mp3", "ogg"])
def test_lossy_formats(ending, tmp_path):
    soundfile.write(tmp_path / f"a.{ending}", sine(RATE), RATE)
    frequency, level = peak_of(read_audio(tmp_path / f"a.{ending}"))
    assert frequency == pytest.approx(1000, abs=4)
    assert level == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels, tmp_path):
    waves = np.random.default_rng(0).uniform(-1, 1, (1000, channels))
    soundfile.write(tmp_path / "a.wav", waves, RATE, subtype="DOUBLE")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), waves.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000, 15999])
def test_resampling_keeps_frequency_level_and_duration(rate, tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(rate), rate, subtype="FLOAT")
    wave = read_audio(tmp_path / "a.wav")
    assert len(wave) == pytest.approx(RATE, abs=2)
    frequency, level = peak_of(wave)
    assert frequency == pytest.approx(1000, abs=2.1)
    assert level == pytest.approx(0.5, rel=0.01)


def test_resampling_to_another_rate_leaves_out_what_is_above_nyquist(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(48000) + sine(48000, frequency=12000.0, level=0.3), 48000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[2000:-2000], sine(RATE)[2000:-2000], atol=5e-3)
    assert read_audio(tmp_path / "a.wav", sample_rate=32000).shape == (32000,)


def write(path, wave, **kwargs):
    soundfile.write(path, wave, kwargs.pop("rate", RATE), **kwargs)


def write_cut(path, n_bytes):
    write(path, sine(RATE))
    path.write_bytes(path.read_bytes()[:n_bytes])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.wav", lambda path: None, "no such file"),
        ("folder.wav", lambda path: path.mkdir(), "is a folder"),
        (
            "text.wav",
            lambda path: path.write_text("these are no sounds " * 99),
            "cannot be decoded as sound .Format not recognised",
        ),
        ("empty.wav", lambda path: path.write_bytes(b""), "cannot be decoded"),
        ("headerless.raw", lambda path: path.write_bytes(b"abc"), "cannot be decoded"),
        ("cut.flac", lambda path: write_cut(path, 3000), "cannot be decoded"),
        ("cut.ogg", lambda path: write_cut(path, 60), "cannot be decoded"),
        ("cut.wav", lambda path: write_cut(path, 20), "cannot be decoded"),
        ("header_only.wav", lambda path: write_cut(path, 44), "has no samples"),
        ("no_samples.wav", lambda path: write(path, np.zeros(0)), "has no samples"),
        ("nan.wav", lambda path: write(path, np.array([0.0, np.nan]), subtype="FLOAT"), "not finite"),
        ("inf.wav", lambda path: write(path, np.array([0.0, -np.inf]), subtype="FLOAT"), "not finite"),
        ("slow.wav", lambda path: write(path, np.zeros(9), rate=1), "sample rate of 1 Hz"),
        ("fast.wav", lambda path: write(path, np.zeros(9), rate=2_000_000_000), "sample rate of 2000000000 Hz"),
    ],
)
def test_unusable_file_is_named(name, make, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(AudioError, match=message) as caught:
        read_clip(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert str(caught.value).count(name) == 1


def test_cut_wav_is_read_as_far_as_it_goes(tmp_path):
    write_cut(tmp_path / "a.wav", 44 + 2 * 500)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), sine(RATE)[:500], atol=2**-15)


def test_clip_is_cut_after_its_mean_is_subtracted(tmp_path):
    wave = np.concatenate([np.full(300, 0.75), np.full(700, -0.25)])
    write(tmp_path / "a.wav", wave, subtype="DOUBLE")
    assert wave.mean() == pytest.approx(0.05)
    np.testing.assert_allclose(read_clip(tmp_path / "a.wav", n_samples=400), wave[:400] - 0.05, atol=1e-6)
    np.testing.assert_allclose(read_clip(tmp_path / "a.wav", n_samples=5000), wave - 0.05, atol=1e-6)
    np.testing.assert_allclose(read_clip(tmp_path / "a.wav"), wave - 0.05, atol=1e-6)
