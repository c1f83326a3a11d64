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
from psla_sb.dataio.windows import Overlap, windows
from psla_sb.errors import InputError
from psla_sb.inference.stream import check_segment_scores, window_scores
from psla_sb.lobes.features import true_lengths

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


class Curve:
    """Joins the scores `[steps, classes]` of a sound's windows, which come one after the other, `hop` steps apart."""

    def __init__(self, hop: int) -> None:
        self._overlap, self._values, self._shape = Overlap(hop), bytearray(), torch.Size([0])

    def add(self, values: Tensor) -> None:
        """Takes the scores of the next window."""
        self._shape = values.shape[1:]
        self._keep(self._overlap.push(values))

    def result(self) -> Tensor:
        """Gives the scores of all steps."""
        self._keep(self._overlap.finish())
        return torch.frombuffer(self._values, dtype=torch.float32).reshape(-1, *self._shape)

    def _keep(self, parts: list[Tensor]) -> None:
        # as bytes: see `psla_sb.dataio.windows.joined`
        for part in parts:
            self._values += part.numpy().tobytes()


def timelines_of_files(
    tagger: Any, sounds: Sequence[Any], window: float = 10.0, hop: float = 1.0, batch_size: int = 16, num_workers: int = 0
) -> Iterator[Answer]:
    """Computes the scores along sounds, `[steps, classes]`, as `AudioTagger.tag_timeline` does, in the sounds' order."""
    n_samples, hop_samples, hop_steps = tagger.window_and_hop(window, hop)
    check_segment_scores(tagger.mods.classifier)

    def values_of(wavs: Tensor, lens: Tensor | None) -> list[Tensor]:
        lengths = [wavs.shape[1]] * len(wavs) if lens is None else true_lengths(wavs, lens).tolist()
        pieces = (wav[:length] for wav, length in zip(wavs, lengths, strict=True))
        return list(window_scores(tagger, pieces, n_samples, len(wavs), "waveforms"))

    pieces = Pieces(sounds, tagger.hparams.sample_rate, partial(windows, length=n_samples, hop=hop_samples))
    for row, scores, error in in_order(_answers(tagger, pieces, values_of, partial(Curve, hop_steps), batch_size, num_workers)):
        yield row, None if scores is None else tagger.raised(scores), error


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
    with shared_memory(), _living_workers():
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


def _values(batch: Any, values_of: Callable[[Tensor, Tensor | None], Any], device: Any) -> list[Tensor | str | None]:
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
        for row, values in zip(good, together.float().cpu() if isinstance(together, Tensor) else together, strict=True):
            answers[row] = values
        return answers
    # of a batch that is refused, each piece by itself
    for row in good:
        try:
            answers[row] = values_of(wavs[row : row + 1, : lengths[row]], None)[0].float().cpu()
        except InputError as error:
            answers[row] = str(error).removeprefix("waveforms: ")
    return answers


@contextlib.contextmanager
def _living_workers() -> Iterator[None]:
    """Turns what PyTorch says when a worker was killed into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "most often for lack of memory: give fewer --workers; what is done is kept, and the same command goes on"
        raise InputError(f"a process that reads sounds was killed, {remedy} ({str(error).strip().splitlines()[-1]})") from error


def workers_for(n_sounds: int) -> int:
    """Says how many processes should decode so many sounds: none of few, whose start takes longer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if n_sounds < 16 else min(8, cores)
