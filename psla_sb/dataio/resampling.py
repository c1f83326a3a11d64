"""Waveforms at another sample rate, whole or as they come."""

from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torchaudio.transforms import Resample

# Of a resampler, also of what copies are made with. Up to 0.46 of the lower rate it keeps the level to 0.1 dB, and from 0.51 on
# what is there is under -100 dB; torchaudio's own settings let through a third of the level right above the half.
RESAMPLING: dict[str, Any] = {"lowpass_filter_width": 64, "rolloff": 0.96, "resampling_method": "sinc_interp_kaiser", "beta": 10.0}


@lru_cache(maxsize=16)
def resampler(from_rate: int, to_rate: int) -> Resample:
    """Makes what resamples whole waveforms `[samples]`; of two rates that are nearly the same, it leaves them as they are."""
    # The filter grows with both terms of the ratio: unrounded, a header with 44101 Hz in place of 44100 would cost gigabytes.
    terms = Fraction(*sorted((from_rate, to_rate))).limit_denominator(1000).as_integer_ratio()
    return Resample(*(terms if from_rate < to_rate else terms[::-1]), **RESAMPLING)


class Resampling:
    """Resamples a signal that comes in pieces `[samples]`, without seams.

    Example
    -------
    >>> resampling = Resampling(48000, 16000)
    >>> [len(piece) for piece in [*resampling.push(torch.zeros(1000)), *resampling.push(torch.zeros(1000)), *resampling.finish()]]
    [265, 333, 69]
    """

    # The filter repeats after a period: so many samples in, so many out. What it makes of a period depends on `context` periods
    # on either side, so each call gets these as well, and of its answer only periods are kept that saw no edge:
    #
    #   signal    |-- context --|-------- new --------|-- context --|    in periods; what is before it has been dropped
    #             0           done                  ready
    #   given                   |-------- new --------|
    #   next time                             |-- context --|--- ...

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self._resample = resampler(from_rate, to_rate)
        self._period_in, self._period_out = self._resample.orig_freq, self._resample.new_freq
        self._same = self._period_in == self._period_out
        self._context = 0 if self._same else self._resample.width // self._period_in + 2  # periods
        self.delay = 0.0 if self._same else (self._context + 1) * self._period_in / from_rate  # seconds
        self._signal, self._done = torch.zeros(0), 0

    def push(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Takes the next samples, and gives those that they make complete."""
        if self._same:
            return [block]
        self._signal = torch.cat([self._signal, block])
        ready = len(self._signal) // self._period_in - self._context
        if ready <= self._done:
            return []
        found = self._resample(self._signal)[self._done * self._period_out : ready * self._period_out]
        dropped = max(0, ready - self._context)
        self._signal, self._done = self._signal[dropped * self._period_in :], ready - dropped
        return [found]

    def finish(self) -> list[torch.Tensor]:
        """Gives the rest."""
        rest = self._resample(self._signal)[self._done * self._period_out :] if len(self._signal) else self._signal
        return [rest] if len(rest) else []
