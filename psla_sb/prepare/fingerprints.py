"""Finds recordings that are there twice: also louder, in another format or at another rate, or with other edges.

A fingerprint has 32 bits for each frame: whether the difference of the energies of two neighbouring bands grows or falls (Haitsma
and Kalker, "A highly robust audio fingerprinting system", ISMIR 2002). Noises that sound the same have different ones.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.fft
from scipy.signal import resample_poly

# frames of 256 ms every 16 ms, bands from 300 to 3500 Hz
RATE, FRAME, HOP = 8000, 2048, 128
EDGES = np.geomspace(300, 3500, 34)
# of a clip, its first seconds are compared
SECONDS = 30.0
# A frame is compared if it is not quieter than the loudest one by this factor of energy, nor than the rounding of 16 bits.
QUIET, FLOOR = 1e-5, 1e-4
# A bit is compared if its difference is larger than this share of the energy of all bands: in sounds that were made without noise,
# others are of rounding, and of the windows' edges.
SURE = 3e-6
# Frames are found by three quarters of their bits, of which mostly some few frames' are right after compression.
KEY_BITS = np.uint32(0x77777777)
# Equal bits are looked for among so many neighbours in the order of bits: what is everywhere need not be compared with all.
NEIGHBOURS = 16
FRAMES_AT_ONCE, MOST_KEYS, MOST_PAIRS = 4_000_000, 20_000_000, 200_000
# Bits that may differ, where half of them do in unrelated sounds; and which part of the shorter clip must be there in both.
MOST_WRONG, LEAST_OVERLAP = 0.35, 0.5
LEAST_FRAMES = 8
# Of few frames, many bits are equal by chance, and more in sounds that have the same course, such as two sirens, unless few differ.
CHANCE, COURSE, CERTAIN = 1.7, 3.3, 0.12
ONES = np.array([value.bit_count() for value in range(2**16)], np.uint8)


class Fingerprint(NamedTuple):
    """Holds the bits of each frame, uint32 `[frames]`, and ones for the bits that can be compared, in the same form."""

    bits: np.ndarray
    sure: np.ndarray


def _band_matrix() -> np.ndarray:
    frequencies = np.fft.rfftfreq(FRAME, 1 / RATE)
    return np.stack([(frequencies >= low) & (frequencies < high) for low, high in itertools.pairwise(EDGES)], 1)


BANDS = _band_matrix().astype(np.float32)


def fingerprint(wave: np.ndarray, sample_rate: int) -> Fingerprint:
    """Computes the fingerprint of the beginning of a sound, `[samples]`."""
    ratio = np.array([RATE, sample_rate]) // np.gcd(RATE, sample_rate)
    if ratio.max() > 1000:
        # rates that are nearly another one: a filter for the exact ratio would be as long as the sound
        ratio = np.array([1000, max(1, round(1000 * sample_rate / RATE))])
    wave = resample_poly(wave[: int(SECONDS * sample_rate)].astype(np.float32), *ratio)
    framed = np.lib.stride_tricks.sliding_window_view(np.pad(wave, FRAME // 2), FRAME)[::HOP]
    spectra = scipy.fft.rfft(framed * np.hanning(FRAME).astype(np.float32), axis=1)
    energies = (spectra.real**2 + spectra.imag**2) @ BANDS
    total = energies.sum(axis=1)
    loud = total > max(QUIET * total.max(), FLOOR)
    differences = np.diff(np.diff(energies, axis=1), axis=0)
    sure = (np.abs(differences) > SURE * np.maximum(total[1:], total[:-1])[:, None]) & (loud[1:] & loud[:-1])[:, None]
    return Fingerprint(_packed(differences > 0), _packed(sure))


def _packed(bits: np.ndarray) -> np.ndarray:
    """Packs 32 bits of each frame into a number."""
    return np.packbits(bits, axis=1).view(np.uint32)[:, 0]


def _n_ones(numbers: np.ndarray) -> int:
    return int(ONES[numbers.view(np.uint16)].sum(dtype=np.int64))


def alike(prints: Sequence[Fingerprint], recordings: np.ndarray | None = None) -> list[tuple[int, int, float]]:
    """Finds pairs of sounds that are alike: (first, second, share of bits that differ).

    Of sounds of one recording, by its number in `recordings`, none are compared.
    """
    best: dict[tuple[int, int], float] = {}
    for a, b, offset in _candidates(prints, recordings):
        wrong = min(_distance(prints[a], prints[b], shift) for shift in (offset - 1, offset, offset + 1))
        if wrong < 1:
            best[a, b] = min(wrong, best.get((a, b), 1.0))
    return [(a, b, wrong) for (a, b), wrong in sorted(best.items())]


def _candidates(prints: Sequence[Fingerprint], recordings: np.ndarray | None) -> Iterator[tuple[int, int, int]]:
    """Yields pairs of sounds in which the same bits occur, and how many frames later they do in the second one."""
    active = [np.flatnonzero(one.sure) for one in prints]
    lengths = np.array([len(frames) for frames in active], int)
    if not lengths.sum():
        return
    clips = np.repeat(np.arange(len(prints), dtype=np.int32), lengths)
    frames = np.concatenate(active).astype(np.int32)
    bits = np.concatenate([one.bits[rows] for one, rows in zip(prints, active, strict=True)]) & KEY_BITS
    reach = int(SECONDS * RATE / HOP) + 2
    keys, votes = np.zeros(0, np.int64), np.zeros(0, np.int64)
    n_parts = -(-len(bits) // FRAMES_AT_ONCE)
    for part in range(n_parts):
        rows = np.flatnonzero(bits % n_parts == part)
        rows = rows[np.argsort(bits[rows], kind="stable")]
        found = []
        for distance in range(1, NEIGHBOURS):
            same = np.flatnonzero(bits[rows[distance:]] == bits[rows[:-distance]])
            first, second = rows[same], rows[same + distance]
            a, b = clips[first].astype(np.int64), clips[second]
            other = a != b if recordings is None else (a != b) & (recordings[a] != recordings[b])
            pairs = (a * len(prints) + b)[other]
            found.append(pairs * 2 * reach + (frames[second] - frames[first])[other] + reach)
        # votes of the same pair and offset are in several parts
        keys, rows = np.unique(np.concatenate([keys, *found]), return_inverse=True)
        votes = np.bincount(rows, weights=np.concatenate([votes, np.ones(len(rows) - len(votes))])).astype(np.int64)
        if len(keys) > MOST_KEYS:
            keys, votes = keys[votes > 1], votes[votes > 1]
    # of each pair the two offsets with most votes
    pairs = keys // (2 * reach)
    order = np.lexsort((-votes, pairs))
    rank = np.arange(len(order)) - np.searchsorted(pairs[order], pairs[order])
    chosen = order[rank < 2]
    if len(chosen) > MOST_PAIRS:
        # of so many sounds, frames are equal by chance
        chosen = chosen[votes[chosen] > 1]
    for row in chosen:
        yield *divmod(int(pairs[row]), len(prints)), int(keys[row] % (2 * reach)) - reach


def _distance(one: Fingerprint, other: Fingerprint, offset: int) -> float:
    """The share of bits that differ if `other` is so many frames late; 1 if the sounds are not alike, or share too little."""
    first, last = max(0, -offset), min(len(one.bits), len(other.bits) - offset)
    if last - first < LEAST_FRAMES:
        return 1.0
    both = one.sure[first:last] & other.sure[first + offset : last + offset]
    # in frames of 32 bits
    n_frames = _n_ones(both) / 32
    if n_frames < max(LEAST_FRAMES, LEAST_OVERLAP * min(_n_ones(one.sure), _n_ones(other.sure)) / 32):
        return 1.0
    wrong = _n_ones((one.bits[first:last] ^ other.bits[first + offset : last + offset]) & both) / 32 / n_frames
    return wrong if wrong <= most_wrong(n_frames) else 1.0


def most_wrong(n_frames: float) -> float:
    """The share of bits that may differ between the same sounds, of so many frames: more bits are equal by chance in short ones.

    >>> [round(most_wrong(n_frames), 2) for n_frames in (9, 30, 125, 312)]
    [-0.07, 0.12, 0.2, 0.31]
    """
    return min(MOST_WRONG, max(0.5 - COURSE / math.sqrt(n_frames), min(CERTAIN, 0.5 - CHANCE / math.sqrt(n_frames))))
