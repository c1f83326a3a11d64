"""Many sounds, in batches: worker processes decode while the device computes."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from psla_sb.dataio.audio import named
from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.dataset import Pieces, init_worker, shared_memory
from psla_sb.errors import InputError

POOLS = ("max", "mean", "first")
Answer = tuple[int, Tensor | None, str | None]  # the sound's row, its values, why it has none


class Hearing(Protocol):
    """What `over_files` needs to know of a `SoundEncoder`."""

    longest: int
    cut: Callable[[Iterable[Tensor]], Iterator[Tensor]]
    hparams: Any
    device: Any


def check_pool(pool: str) -> None:
    """Refuses ways of pooling that there are not."""
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")


class Pooled:
    """Pools the values `[values]` of a sound's pieces, which come one after the other."""

    def __init__(self, pool: str) -> None:
        check_pool(pool)
        self.pool, self._n, self._total = pool, 0, torch.empty(0)

    def add(self, values: Tensor) -> None:
        """Takes the values of the next piece, or of pieces `[pieces, values]`."""
        values = torch.atleast_2d(values)
        pieces = values.sum(0) if self.pool == "mean" else values.amax(0)
        if not self._n:
            self._total = pieces.clone()
        else:
            # in place: small tensors that come and go between large ones would leave holes in the memory
            (self._total.add_ if self.pool == "mean" else partial(torch.maximum, self._total, out=self._total))(pieces)
        self._n += len(values)

    def result(self) -> Tensor:
        """Gives what the pieces come to."""
        return self._total / self._n if self.pool == "mean" else self._total


def over_files(
    model: Hearing,
    sounds: Sequence[Any],
    values_of: Callable[[Tensor, Tensor | None], Tensor],
    pool: str = "max",
    batch_size: int = 16,
    num_workers: int = 0,
    sample_rate: int | None = None,
) -> Iterator[Answer]:
    """Computes values of sounds of any length, and yields them in the sounds' order; what cannot be read has an error.

    Arguments
    ---------
    sounds
        Paths; with no workers also file objects, and arrays of `sample_rate`.
    values_of
        Computes `[batch, values]` of waveforms `[batch, samples]` less their means, and relative lengths
        `[batch]`; None if all are alike.
    pool
        What a sound's values are of those of its windows.
    batch_size, num_workers
        Pieces of sounds that are on the device together; processes that decode.
    """
    check_pool(pool)
    most = 1 if pool == "first" else None
    pieces = Pieces(sounds, model.hparams.sample_rate, model.cut, model.longest, sample_rate, most)
    yield from in_order(_answers(model, pieces, values_of, partial(Pooled, pool), batch_size, num_workers))


def in_order(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Yields answers in the order of their rows, which are 0, 1, ..."""
    early: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        early[answer[0]] = answer
        while following in early:
            yield early.pop(following)
            following += 1


def _answers(
    model: Hearing, pieces: Pieces, values_of: Any, collector: Callable[[], Any], batch_size: int, num_workers: int
) -> Iterator[Answer]:
    loader = DataLoader(pieces, batch_size, num_workers=num_workers, collate_fn=ClipBatch, worker_init_fn=init_worker)
    begun: dict[int, tuple[Any, list[str]]] = {}
    with shared_memory():
        for batch in loader:
            values = _values(batch, values_of, model.device)
            for row, last, error, value in zip(batch.row.tolist(), batch.last.tolist(), batch.error, values, strict=True):
                collected, errors = begun.setdefault(row, (collector(), []))
                if isinstance(value, Tensor):
                    collected.add(value)
                else:
                    errors.append(error or f"{named(pieces.sounds[row])}: {value}")
                if last:
                    del begun[row]
                    yield row, None if errors else collected.result(), errors[0] if errors else None


def _values(batch: Any, values_of: Callable[[Tensor, Tensor | None], Tensor], device: Any) -> list[Tensor | str | None]:
    """Gives each piece's values on the CPU, or why there are none; a piece with an error has none."""
    lengths = batch.n_samples.tolist()
    wavs, lens = batch.to(device).sig
    answers: list[Any] = [None] * len(lengths)
    good = [row for row, error in enumerate(batch.error) if error is None]
    if not good:
        return answers
    alike = len({lengths[row] for row in good}) == 1
    with contextlib.suppress(InputError):
        together = values_of(wavs[good, : lengths[good[0]]], None) if alike else values_of(wavs[good], lens[good])
        for row, values in zip(good, together.float().cpu(), strict=True):
            answers[row] = values
        return answers
    # of a batch that is refused, each piece by itself
    for row in good:
        try:
            answers[row] = values_of(wavs[row : row + 1, : lengths[row]], None).float().cpu()[0]
        except InputError as error:
            answers[row] = str(error).removeprefix("waveforms: ")
    return answers


def workers_for(n_sounds: int) -> int:
    """Says how many processes should decode so many sounds: none of few, whose start takes longer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if n_sounds < 16 else min(8, cores)
