"""The sounds of the embedded data set: one small synthesiser per AudioSet class.

Every synthesiser takes a random generator, a number of samples and a sample rate in Hz and returns a waveform `[samples]` of
any scale; pitch, tempo and timbre are drawn anew for each event, so that a class is a kind of sound and not one recording.
`SOUNDS` maps AudioSet's display names to them, and its order is the order of the long tail: the commonest class first.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.random import Generator

FADE = 0.01  # seconds; an event that began at full level would carry a click, which is a class of its own


def synthesise(name: str, rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Renders one event of a class of `SOUNDS`: `[samples]`, float64, with a peak of 1."""
    event = SOUNDS[name](rng, n_samples, sample_rate)
    ramp = np.minimum(np.arange(n_samples) / int(FADE * sample_rate), 1.0)
    event = event * ramp * ramp[::-1]
    return event / np.abs(event).max()


def coloured_noise(
    rng: Generator, n_samples: int, sample_rate: int, slope: float = 0.0, low: float = 0.0, high: float = np.inf
) -> np.ndarray:
    """Draws Gaussian noise `[samples]` of mean square 1 whose power falls as `1 / frequency ** slope` (0: white, 1: pink).

    At `low` and `high` in Hz its power has halved; beyond them it falls by 24 dB an octave.
    """
    n_fft = -(-n_samples // 1024) * 1024  # a length with large prime factors would take several times as long
    frequency = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    band = (1 + (low / np.maximum(frequency, 1e-9)) ** 8) * (1 + (frequency / high) ** 8)
    gain = np.maximum(frequency, 20.0) ** (-slope / 2) / np.sqrt(band)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n_fft)) * gain, n_fft)[:n_samples]
    return noise / np.sqrt(np.mean(noise**2))


def _seconds(n_samples: int, sample_rate: int) -> np.ndarray:
    return np.arange(n_samples) / sample_rate


def _phase(frequency: np.ndarray, sample_rate: int) -> np.ndarray:
    """Phase in radians of oscillators whose frequency in Hz moves, both `[..., samples]`."""
    return 2 * np.pi * np.cumsum(frequency, axis=-1) / sample_rate


def _harmonics(phase: np.ndarray, amplitudes: Iterable[float]) -> np.ndarray:
    """Sum of sines at 1, 2, ... times a phase `[samples]`, with the given amplitudes."""
    return np.polynomial.polynomial.polyval(np.exp(1j * phase), [0.0, *amplitudes]).imag


def _regular_onsets(rng: Generator, duration: float, rate: float, jitter: float = 0.0) -> np.ndarray:
    """Onset times in seconds, `rate` a second, each displaced by up to `jitter` of the interval."""
    onsets = np.arange(np.ceil(duration * rate)) / rate
    return onsets + rng.uniform(0, jitter + 1e-9, len(onsets)) / rate


def _add_at(onsets: np.ndarray, strokes: np.ndarray, n_samples: int, sample_rate: int) -> np.ndarray:
    """Adds strokes `[strokes, stroke samples]` at their onsets in seconds; what passes the end is cut."""
    position = (onsets * sample_rate).astype(int)[:, None] + np.arange(strokes.shape[1])
    inside = position < n_samples
    return np.bincount(position[inside], strokes[inside], minlength=n_samples)


def _swing(rng: Generator, n_samples: int, sample_rate: int, slowest: float, fastest: float) -> np.ndarray:
    """A curve that swings between 0 and 1, at a rate in Hz and from a phase that are drawn."""
    t = _seconds(n_samples, sample_rate)
    return 0.5 - 0.5 * np.cos(2 * np.pi * (rng.uniform(slowest, fastest) * t + rng.uniform(0, 1)))


def _pink_noise(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    return coloured_noise(rng, n_samples, sample_rate, slope=rng.uniform(1.0, 1.3))


def _static(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A bad radio: crackles over a hiss that drops out."""
    crackle = rng.uniform(-1, 1, n_samples) * (rng.random(n_samples) < rng.uniform(40, 120) / sample_rate)
    block = int(rng.uniform(0.015, 0.03) * sample_rate)
    gate = np.repeat(rng.random(n_samples // block + 1) < rng.uniform(0.3, 0.5), block)[:n_samples]
    return 5 * crackle + gate * coloured_noise(rng, n_samples, sample_rate, slope=-0.5, low=rng.uniform(500, 1500))


def _raindrop(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Drops at random times, each a short ring that rises in pitch."""
    n_drops = max(int(rng.uniform(7, 14) * n_samples / sample_rate), 2)
    t = _seconds(int(0.06 * sample_rate), sample_rate)
    pitch = rng.uniform(900, 2200, (n_drops, 1)) * (1 + rng.uniform(6, 14, (n_drops, 1)) * t)
    strokes = (
        np.exp(-t / rng.uniform(0.008, 0.016, (n_drops, 1)))
        * rng.uniform(0.3, 1.0, (n_drops, 1))
        * np.sin(_phase(pitch, sample_rate))
    )
    return _add_at(rng.uniform(0, n_samples / sample_rate - 0.06, n_drops), strokes, n_samples, sample_rate)


def _waves(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Noise that swells slowly and brightens at the crest."""
    crest = _swing(rng, n_samples, sample_rate, 0.5, 0.9)
    body = coloured_noise(rng, n_samples, sample_rate, slope=1.0, low=100, high=1200)
    spray = coloured_noise(rng, n_samples, sample_rate, slope=1.0, low=1200, high=rng.uniform(5000, 7000))
    return crest**1.5 * body + 0.8 * crest**4 * spray


def _thunder(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A crack that loses its high frequencies, then an uneven rumble."""
    t = _seconds(n_samples, sample_rate)
    strike = rng.uniform(0.05, 0.25) * t[-1]
    after = np.maximum(t - strike, 0)
    crack = (t > strike) * np.exp(-after / rng.uniform(0.04, 0.09)) * coloured_noise(rng, n_samples, sample_rate, 1.0)
    swell = np.abs(coloured_noise(rng, n_samples, sample_rate, slope=0.0, low=0.5, high=8))
    rumble = coloured_noise(rng, n_samples, sample_rate, slope=2.0, low=25, high=rng.uniform(180, 300))
    return crack + (0.3 + 0.7 * (t > strike) * np.exp(-after / 1.0)) * (0.4 + swell) * rumble


def _chirp_tone(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """One pure line that sweeps over octaves, up or down, once to three times."""
    sweep = (np.arange(n_samples) / n_samples * rng.integers(1, 4)) % 1.0
    sweep = sweep if rng.random() < 0.5 else 1 - sweep
    low, high = rng.uniform(200, 500), rng.uniform(3000, 6500)
    return np.sin(_phase(low * (high / low) ** sweep, sample_rate))


def _civil_defense_siren(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A rotor with many harmonics that winds up and down slowly."""
    wind = _swing(rng, n_samples, sample_rate, 0.3, 0.6)
    return _harmonics(_phase(rng.uniform(220, 320) * (1 + rng.uniform(0.7, 1.1) * wind), sample_rate), 1 / np.arange(1, 9))


def _police_siren(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """The yelp: from low to high and back several times a second."""
    yelp = _swing(rng, n_samples, sample_rate, 2.5, 4.5)
    return _harmonics(_phase(rng.uniform(550, 750) * rng.uniform(2.0, 2.5) ** yelp, sample_rate), [1.0, 0.3, 0.4, 0.1])


def _dial_tone(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """North America's 350 and 440 Hz, steady, from lines that are not quite in tune."""
    t = _seconds(n_samples, sample_rate) * rng.uniform(0.88, 1.12)
    return np.sin(2 * np.pi * 350 * t) + np.sin(2 * np.pi * 440 * t) + 0.05 * np.sin(2 * np.pi * 790 * t)


def _busy_signal(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """North America's 480 and 620 Hz, switched on and off (quickly: the fast busy signal)."""
    t = _seconds(n_samples, sample_rate)
    detune = rng.uniform(0.88, 1.12)
    gate = (rng.uniform(2.0, 3.5) * t) % 1.0 < 0.5
    return gate * (np.sin(2 * np.pi * 480 * detune * t) + np.sin(2 * np.pi * 620 * detune * t))


def _church_bell(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A bell's inharmonic partials (hum, prime, minor third, fifth, octave, ...), struck once or twice."""
    t = _seconds(n_samples, sample_rate)
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.1, 5.3, 6.7])[:, None]
    ring = rng.uniform(0.6, 1.2) / ratios**0.6
    partials = np.sin(2 * np.pi * rng.uniform(280, 560) * ratios * t + rng.uniform(0, 2 * np.pi, ratios.shape))
    strike = (rng.uniform(0.4, 1.0, ratios.shape) * np.exp(-t / ring) * partials).sum(0)
    onsets = np.arange(rng.integers(1, 3)) * 0.55 * t[-1]
    return _add_at(onsets, np.tile(strike, (len(onsets), 1)), n_samples, sample_rate)


def _banjo(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A run of bright plucked notes from a major pentatonic scale; high partials die first."""
    onsets = _regular_onsets(rng, n_samples / sample_rate, rng.uniform(5, 8))
    t = _seconds(int(0.35 * sample_rate), sample_rate)
    pitch = 2 ** (rng.choice([0, 2, 4, 7, 9, 12, 14, 16], len(onsets))[:, None] / 12) * rng.uniform(200, 300)
    strokes = sum(k**-0.7 * np.exp(-t * (5 + 3 * k)) * np.sin(2 * np.pi * k * pitch * t) * (k * pitch < 7500) for k in range(1, 13))
    return _add_at(onsets, strokes, n_samples, sample_rate)


def _organ(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Held major or minor chords through drawbars, with a vibrato; the chord changes now and then."""
    t = _seconds(n_samples, sample_rate)
    chord = np.floor(t * rng.uniform(1.0, 1.8)).astype(int)
    root = 130 * 2 ** (rng.choice([0, 2, 5, 7, 9, 12], chord[-1] + 1) / 12)[chord]
    vibrato = 1 + 0.004 * np.sin(2 * np.pi * rng.uniform(5, 7) * t)
    drawbars = np.array([1.0, 0.8, 0.6, 0.5, 0.0, 0.4, 0.0, 0.4]) * rng.uniform(0.5, 1.0, 8)
    third = rng.choice([1.2, 1.25])
    voices = (_harmonics(_phase(root * vibrato * ratio, sample_rate), drawbars) for ratio in (1.0, third, 1.5, 2.0))
    return sum(voices, np.zeros(n_samples))


def _drum(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """A beat: a falling low tone under a short burst of noise."""
    onsets = _regular_onsets(rng, n_samples / sample_rate, rng.uniform(2.5, 4.5))
    t = _seconds(int(0.2 * sample_rate), sample_rate)
    skin = np.sin(_phase(rng.uniform(90, 140) * (1 + 2.5 * np.exp(-t / 0.02)), sample_rate)) * np.exp(-t / 0.06)
    stick = 0.25 * rng.standard_normal((len(onsets), len(t))) * np.exp(-t / rng.uniform(0.015, 0.035))
    return _add_at(onsets, rng.uniform(0.6, 1.0, (len(onsets), 1)) * (skin + stick), n_samples, sample_rate)


def _heartbeat(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Lub-dub: pairs of dull thuds without high frequencies."""
    beats = _regular_onsets(rng, n_samples / sample_rate, rng.uniform(1.3, 2.0))
    t = _seconds(int(0.14 * sample_rate), sample_rate)
    lub, dub = (np.sin(2 * np.pi * f * t) * np.sin(np.pi * t / t[-1]) ** 2 for f in rng.uniform([50, 75], [70, 110]))
    onsets = np.concatenate([beats, beats + rng.uniform(0.18, 0.24)])
    strokes = np.repeat([lub, 0.7 * dub], len(beats), axis=0)
    return _add_at(onsets, strokes, n_samples, sample_rate)


def _tick_tock(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Even clicks, every other one lower."""
    onsets = _regular_onsets(rng, n_samples / sample_rate, rng.uniform(3, 5))
    t = _seconds(int(0.04 * sample_rate), sample_rate)
    pitch = rng.uniform(3500, 4500) * np.where(np.arange(len(onsets)) % 2 == 0, 1.0, 0.6)[:, None]
    strokes = np.exp(-t / 0.006) * (np.sin(2 * np.pi * pitch * t) + 0.6 * np.sin(2 * np.pi * 1.53 * pitch * t))
    return _add_at(onsets, strokes, n_samples, sample_rate)


def _tweet(rng: Generator, n_samples: int, sample_rate: int) -> np.ndarray:
    """Short whistles high up, each with a glide and a trill of its own."""
    onsets = _regular_onsets(rng, n_samples / sample_rate, rng.uniform(4, 7), jitter=0.3)
    t = _seconds(int(rng.uniform(0.07, 0.12) * sample_rate), sample_rate)
    glide = rng.uniform(-9000, 9000, (len(onsets), 1)) * (t - t[-1] / 2)
    trill = rng.uniform(0, 300) * np.sin(2 * np.pi * rng.uniform(25, 45) * t)
    pitch = rng.uniform(3200, 5200) + glide + trill
    strokes = np.sin(np.pi * t / t[-1]) * np.sin(_phase(pitch, sample_rate))
    return _add_at(onsets, strokes, n_samples, sample_rate)


def _engine(
    rng: Generator, n_samples: int, sample_rate: int, firing: tuple[float, float], slope: float, roughness: float
) -> np.ndarray:
    """Harmonics of a firing rate that wanders, drawn between two in Hz, and noise that pulses with it."""
    rate = rng.uniform(*firing)
    t = _seconds(n_samples, sample_rate)
    wander = 1 + 0.12 * np.sin(2 * np.pi * (rng.uniform(0.4, 1.2) * t + rng.uniform(0, 1)))
    phase = _phase(rate * wander, sample_rate)
    tone = _harmonics(phase, np.arange(1, 25) ** -slope * rng.uniform(0.4, 1.0, 24))
    exhaust = coloured_noise(rng, n_samples, sample_rate, slope=2 * slope, low=60, high=6000)
    return tone / np.sqrt(np.mean(tone**2)) + roughness * np.maximum(np.cos(phase), 0) ** 4 * exhaust


SOUNDS: dict[str, Callable[[Generator, int, int], np.ndarray]] = {
    "Heavy engine (low frequency)": partial(_engine, firing=(14, 26), slope=0.6, roughness=1.5),
    "Chirp, tweet": _tweet,
    "Civil defense siren": _civil_defense_siren,
    "Drum": _drum,
    "Raindrop": _raindrop,
    "Dial tone": _dial_tone,
    "Church bell": _church_bell,
    "Tick-tock": _tick_tock,
    "White noise": coloured_noise,
    "Waves, surf": _waves,
    "Organ": _organ,
    "Chirp tone": _chirp_tone,
    "Static": _static,
    "Banjo": _banjo,
    "Light engine (high frequency)": partial(_engine, firing=(140, 240), slope=0.4, roughness=0.6),
    "Busy signal": _busy_signal,
    "Thunder": _thunder,
    "Pink noise": _pink_noise,
    "Heart sounds, heartbeat": _heartbeat,
    "Police car (siren)": _police_siren,
}
