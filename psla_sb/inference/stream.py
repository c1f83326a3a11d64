"""Scores along a sound that has no end yet: a microphone, a radio, a pipe."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from psla_sb.dataio.audio import SAMPLE_RATES, AudioError, mono, sample_values
from psla_sb.dataio.resampling import Resampling
from psla_sb.dataio.windows import Overlap, Windows, batches
from psla_sb.errors import InputError
from psla_sb.inference.encoder import MOST_CHANNELS, taking
from psla_sb.lobes import chain

if TYPE_CHECKING:
    from psla_sb.inference.tagger import AudioTagger

NAME = "the stream"  # in messages


class Steps(NamedTuple):
    """Holds the scores of all classes at the next steps of a stream."""

    times: np.ndarray  # [steps], the middles of the steps in seconds since the stream's first sample
    scores: np.ndarray  # [steps, classes], in [0, 1]


def check_segment_scores(classifier: Any) -> None:
    """Refuses a classifier that has no scores along the time."""
    if not chain.has_segment_scores(classifier):
        kind = type(classifier).__qualname__
        reason = "it tells what is in a clip, not when, so there is no timeline"
        raise InputError(f"this model's classifier ({kind}) has no segment_scores: {reason}")


def window_scores(
    tagger: "AudioTagger", pieces: Iterable[Tensor], n_samples: int, batch_size: int, source: str | Path
) -> Iterator[Tensor]:
    """Yields the scores `[steps, classes]` of each of a sound's windows, of `n_samples` but for the last."""
    check_segment_scores(tagger.mods.classifier)
    for wavs in batches(pieces, batch_size):
        feature_map = tagger.encode_features(*tagger.checked_features(*tagger.whole_window(wavs, n_samples), source))
        with torch.inference_mode(), taking(tagger.mods.classifier, wavs):
            scores = chain.segment_scores(tagger.mods, feature_map)
        yield from scores[..., : tagger.n_steps_of(wavs.shape[1])].transpose(1, 2).cpu()


class AudioStream:
    """Scores all classes along a sound that comes in blocks of any size: what `AudioTagger.tag_timeline` gives of the whole.

    `AudioTagger.stream` makes one; its memory does not grow. A step is scored in all windows that it is in, so it is given when the
    last of these is complete, `delay` seconds of sound after it at most; `finish` gives the steps that are left at the end.
    """

    def __init__(self, tagger: "AudioTagger", sample_rate: int, window: float, hop: float, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        if sample_rate not in SAMPLE_RATES:
            raise ValueError(f"sample_rate must be from {SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} Hz, not {sample_rate}")
        check_segment_scores(tagger.mods.classifier)
        self._tagger, self._batch_size = tagger, batch_size
        self._n_samples, hop_samples, hop_steps = tagger.window_and_hop(window, hop)
        self._resampling = Resampling(int(sample_rate), tagger.hparams.sample_rate)
        self._windows, self._overlap = Windows(self._n_samples, hop_samples), Overlap(hop_steps)
        self._n_channels: int | None = None
        self._n_steps, self._finished = 0, False

    @property
    def delay(self) -> float:
        """Says after how many seconds of sound the scores of a moment are given at the latest; computing them comes on top."""
        # a window is known not to be the last, which `finish` gives, from the first sample after it
        return (self._n_samples + 1) / self._tagger.hparams.sample_rate + self._resampling.delay

    def push(self, block: Any) -> Steps:
        """Takes the next samples, and gives the steps that they make complete, often none.

        They are `[samples]` or `[samples, channels]`, as many channels in each block, of any type that
        `psla_sb.dataio.audio.to_waveform` takes; there may be none. Samples that cannot be used are an InputError, and the stream
        is as it was before them.
        """
        if self._finished:
            raise ValueError("this stream has been finished; take a new one for another sound")
        if np.shape(block)[:1] == (0,):
            return self._scored([])
        values = sample_values(block)
        n_channels = 1 if values.dim() == 1 else values.shape[1]
        if n_channels > max(MOST_CHANNELS, len(values)):
            raise InputError(f"{NAME}: a block is [samples, channels], but {list(values.shape)} looks the wrong way round")
        if n_channels != (self._n_channels or n_channels):
            raise InputError(f"{NAME}: began with {self._n_channels} channels, but a block is {list(values.shape)}")
        wave = mono(NAME, values.reshape(len(values), n_channels))
        self._n_channels = n_channels
        return self._scored(window for piece in self._resampling.push(wave) for window in self._windows.push(piece))

    def finish(self) -> Steps:
        """Ends the stream, and gives the rest of the steps; an AudioError if there was no sample at all."""
        if self._n_channels is None:
            raise AudioError(f"{NAME}: has no samples")
        if self._finished:
            raise ValueError("this stream has been finished already")
        pieces = [window for piece in self._resampling.finish() for window in self._windows.push(piece)]
        self._finished = True
        return self._scored([*pieces, *self._windows.finish()])

    def _scored(self, pieces: Iterable[Tensor]) -> Steps:
        parts = window_scores(self._tagger, pieces, self._n_samples, self._batch_size, NAME)
        found = [steps for part in parts for steps in self._overlap.push(part)]
        found += self._overlap.finish() if self._finished else []
        if not found:
            return Steps(np.zeros(0), np.zeros((0, len(self._tagger.hparams.mids)), np.float32))
        scores = self._tagger.raised(torch.cat(found)).numpy()
        first, self._n_steps = self._n_steps, self._n_steps + len(scores)
        # the time of a step depends on whether it is the only one, which is known at the end
        times = self._tagger.step_times(self._n_steps if self._finished else self._n_steps + 1, first)[: len(scores)]
        return Steps(times.numpy(), scores)
