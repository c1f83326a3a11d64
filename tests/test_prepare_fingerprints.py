"""Sounds that are there twice are found: louder, compressed, at another rate, with other edges; and no others are."""

import io

import numpy as np
import pytest
import scipy.signal
from sounds import encoded

from psla_sb.dataio.audio import read_audio
from psla_sb.prepare import fingerprints
from psla_sb.prepare.fingerprints import Fingerprint, alike, fingerprint

RATE = 16000


def textured(seed, seconds=4.0, rate=RATE):
    """Noise that is louder here and there, with calls of some pitches: like outdoors."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.02 * scipy.signal.lfilter([1], [1, -0.9], rng.standard_normal(len(t)))
    for _ in range(6):
        begin, pitch, glide = rng.uniform(0, seconds - 0.4), rng.uniform(400, 3000), rng.uniform(-800, 800)
        at = np.clip((t - begin) / 0.4, 0, 1)
        wave += 0.2 * np.sin(np.pi * at) * np.sin(2 * np.pi * (pitch * t + glide * at**2))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def stationary(seed, kind):
    """Noise as rain and wind have it, all from the same spectrum."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(5 * RATE)
    if kind == "pink":
        noise = scipy.signal.lfilter([1], [1, -0.97], noise)
    if kind == "hum":
        noise += 10 * np.sin(2 * np.pi * 100 * np.arange(5 * RATE) / RATE + rng.uniform(0, 6))
    if kind == "band":
        noise = scipy.signal.sosfilt(scipy.signal.butter(4, [800, 1200], "band", fs=RATE, output="sos"), noise)
    return (0.1 * noise / noise.std()).astype(np.float32)


def copies(wave):
    """The same sound in other forms, and their rates."""
    yield "quieter", 0.03 * wave, RATE
    yield "in 16 bits", np.round(0.02 * wave * 2**15) / 2**15, RATE
    yield "at 44.1 kHz", scipy.signal.resample_poly(wave, 441, 160), 44100
    yield "at 22.05 kHz", scipy.signal.resample_poly(wave, 441, 320), 22050
    yield "trimmed", wave[round(0.31 * RATE) : -round(0.5 * RATE)], RATE
    yield "later", np.concatenate([np.zeros(777, np.float32), wave]), RATE
    yield "with silence around", np.pad(wave, RATE), RATE
    yield "with some noise", wave + 0.002 * np.random.default_rng(9).standard_normal(len(wave)), RATE
    for name in ("mp3", "vorbis", "m4a"):
        yield name, read_audio(io.BytesIO(encoded(name, wave, rate=RATE)), RATE).numpy(), RATE


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_are_found(seed):
    wave = textured(seed)
    others = [fingerprint(textured(100 + other), RATE) for other in range(10)]
    for name, copy, rate in copies(wave):
        found = alike([*others, fingerprint(wave, RATE), fingerprint(copy, rate)])
        assert [pair[:2] for pair in found] == [(10, 11)], name
        assert found[0][2] < 0.3, name


@pytest.mark.parametrize("kind", ["white", "pink", "hum", "band"])
def test_noises_that_sound_the_same_are_none(kind):
    prints = [fingerprint(stationary(seed, kind), RATE) for seed in range(25)]
    assert alike(prints) == []


@pytest.mark.parametrize("low", [440, 400])
def test_tones_without_noise_are_none(low):
    # where there is no energy, bits would be of rounding and of the windows' edges
    rng = np.random.default_rng(0)
    t = np.arange(2 * RATE) / RATE
    waves = [0.3 * np.sin(2 * np.pi * rng.uniform(low, 440) * t + rng.uniform(0, 6)) for _ in range(30)]
    assert alike([fingerprint(wave.astype(np.float32), RATE) for wave in waves]) == []


def test_a_noise_and_its_copy_are():
    wave = stationary(0, "white")
    prints = [fingerprint(stationary(seed, "white"), RATE) for seed in range(1, 10)]
    found = alike([fingerprint(wave, RATE), *prints, fingerprint(0.5 * wave[1000:], RATE)])
    assert [pair[:2] for pair in found] == [(0, 10)]


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6])
def test_short_sounds(seconds):
    rng = np.random.default_rng(0)
    n = round(seconds * RATE)
    waves = [(0.1 * rng.standard_normal(n)).astype(np.float32) for _ in range(60)]
    prints = [fingerprint(wave, RATE) for wave in waves]
    assert alike(prints) == []
    found = [pair[:2] for pair in alike([*prints, fingerprint(0.2 * waves[7], RATE)])]
    assert found == ([(7, 60)] if seconds > 0.2 else found)


def test_silence_that_clips_share_is_none():
    # clips of ESC-50 are filled up with zeros
    waves = [np.pad(textured(seed, 1.0), (0, 4 * RATE)) for seed in range(10)]
    assert alike([fingerprint(wave, RATE) for wave in waves]) == []


def test_silence_is_not_compared():
    print_ = fingerprint(np.pad(textured(0, 2.0), (0, 2 * RATE)), RATE)
    assert print_.sure[:110].all()
    assert not print_.sure[145:].any()
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 2**32, (2, 300), dtype=np.uint32)
    other[:240] = one[:240]
    other[280] = one[280]
    active = np.where(np.arange(300) >= 240, np.uint32(0xFFFFFFFF), np.uint32(0))
    assert alike([Fingerprint(one, active), Fingerprint(other, active)]) == []
    assert len(alike([Fingerprint(one, ~active), Fingerprint(other, ~active)])) == 1


@pytest.mark.parametrize(("n_frames", "n_found"), [(12, 0), (400, 1)])
def test_few_frames_must_be_more_alike(n_frames, n_found):
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2**32, n_frames, dtype=np.uint32)
    wrong = np.packbits(rng.random((n_frames, 32)) < 0.3, axis=1).view(np.uint32)[:, 0]
    wrong[5] = 0
    active = np.full(n_frames, 0xFFFFFFFF, np.uint32)
    assert len(alike([Fingerprint(one, active), Fingerprint(one ^ wrong, active)])) == n_found


def test_those_of_one_recording_are_not_compared():
    wave = textured(0)
    prints = [fingerprint(wave, RATE), fingerprint(0.5 * wave, RATE)]
    assert len(alike(prints)) == 1
    assert alike(prints, np.array([3, 3])) == []


def test_many_copies_are_connected():
    wave = textured(0, 2.0)
    rng = np.random.default_rng(0)
    prints = [fingerprint(wave + 1e-4 * rng.standard_normal(len(wave)), RATE) for _ in range(60)]
    pairs = [pair[:2] for pair in alike(prints)]
    from psla_sb.prepare.splits import joined_groups

    assert joined_groups(np.arange(60), pairs).max() == 0


def test_memory_is_bounded(monkeypatch):
    waves = [textured(seed) for seed in range(6)]
    prints = [fingerprint(wave, RATE) for wave in [*waves, 0.5 * waves[2][2000:], waves[5][::-1].copy()]]
    whole = alike(prints)
    monkeypatch.setattr(fingerprints, "FRAMES_AT_ONCE", 200)
    monkeypatch.setattr(fingerprints, "MOST_KEYS", 100)
    assert alike(prints) == whole
    assert [pair[:2] for pair in whole] == [(2, 6)]


def test_rates_that_nearly_are_others():
    wave = textured(0)
    assert [pair[:2] for pair in alike([fingerprint(wave, RATE), fingerprint(wave, 16001)])] == [(0, 1)]


def test_nothing_to_compare():
    assert alike([]) == []
    assert alike([fingerprint(np.zeros(1000, np.float32), RATE)] * 2) == []
