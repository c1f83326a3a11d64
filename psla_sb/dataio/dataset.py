"""A SpeechBrain data set over a `Manifest`: what a loader's worker process does with a clip.

A worker decodes and cuts; means are subtracted and features are computed on the device, a whole batch at a time.
"""

import atexit
import contextlib
import ctypes
import gc
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from psla_sb.dataio.audio import AudioError, centred, opened, read_blocks, read_if_short, read_samples
from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.manifest import START, Manifest
from psla_sb.dataio.sampler import CROP, Draw, draw_rng
from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets

STATIC_KEYS = ["id", "wav", "duration", "labels", "index", "epoch", "position", "partner", START]
OUTPUT_KEYS = ["id", "index", "target", "partner", "error"]
CROPS: dict[str, Any] = {"first": 0.0, "centre": 0.5, "random": None}
MAX_REDRAWS = 10
# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**28


class TaggingDataset(DynamicItemDataset):
    """Gives clips with their multi-hot targets, by row or by a `Draw` of a batch sampler.

    An item has SpeechBrain's `id`, and `index` (the row), `sig` `[samples]`, `target` `[classes]`, `partner` (whether the clip is
    there to be mixed into another) and `error`: what is wrong with the sound file, or None. The process that trains raises it,
    because an exception that crosses from a worker process arrives as a traceback.

    Arguments
    ---------
    manifest, label_sets, n_classes
        The clips and their classes.
    sample_rate, n_samples
        Of the waveforms, in Hz, and the most samples that are kept of a clip (None: all).
    teacher
        Scores of other models `[clips, classes]`, as `open_scores` maps them; an item then has its row of them as `teacher`,
        float32, all of NaN if the clip has none.
    crop, seed
        Which samples are kept of a longer clip: the "first", the "centre", or a "random" crop by seed, epoch and position.
    redraw
        Takes a Draw that cannot be read and the number of the attempt, from 1, and returns the Draw to replace it; such as
        `MixupBatchSampler.redraw`. An item then has `skipped`: (ID, error) of each clip that was replaced.
    compact
        Whether items have, in place of `sig`, `samples` and `mean` for a `ClipBatch` (see `read_samples`).

    Example
    -------
    >>> manifest = Manifest.from_columns(["a"], ["nowhere.wav"], [1.0], ["/m/1"])
    >>> item = TaggingDataset(manifest, LabelSets.from_lists([[1]]), n_classes=3)[0]
    >>> item["target"], item["error"]
    (tensor([0., 1., 0.]), 'nowhere.wav: no such file')
    """

    def __init__(
        self,
        manifest: Manifest,
        label_sets: LabelSets,
        n_classes: int,
        sample_rate: int = 16000,
        n_samples: int | None = None,
        teacher: Any = None,
        crop: str = "first",
        seed: int = 0,
        redraw: Callable[[Draw, int], Draw] | None = None,
        compact: bool = False,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, not {crop!r}")
        # SpeechBrain's own __init__ makes a dictionary of all rows
        self.data, self.data_ids, self.redraw, self.compact = manifest, range(len(manifest)), redraw, compact
        self.label_sets, self.n_classes, self.sample_rate, self.n_samples = label_sets, n_classes, sample_rate, n_samples
        self.teacher, self.crop, self.seed = teacher, crop, seed
        # methods, and no functions made here: those could not be sent to a worker that is not forked
        takes = ["wav", "epoch", "position", START, "duration"]
        items = [
            {"func": self._audio, "takes": takes, "provides": ["samples", "mean", "error"]},
            {"func": centred, "takes": ["samples", "mean"], "provides": "sig"},
            {"func": self._target, "takes": "index", "provides": "target"},
            {"func": self._scores, "takes": "index", "provides": "teacher"},
        ]
        outputs = [*OUTPUT_KEYS, *(["samples", "mean"] if compact else ["sig"]), *([] if teacher is None else ["teacher"])]
        self.pipeline = DataPipeline(STATIC_KEYS, items, outputs)

    def __getstate__(self) -> dict[str, Any]:
        # a mapped file would be sent with all that is in it
        mapped = isinstance(self.teacher, np.memmap)
        return {**self.__dict__, "teacher": self.teacher.filename} if mapped else self.__dict__

    def _audio(
        self, wav: str, epoch: int, position: int, start: float | None, duration: float | None
    ) -> tuple[torch.Tensor, float, str | None]:
        place = draw_rng(self.seed, epoch, position, CROP).random() if self.crop == "random" else CROPS[self.crop]
        try:
            return *read_samples(wav, self.sample_rate, self.n_samples, place, start, duration), None
        except AudioError as error:
            return torch.zeros(1, dtype=torch.int16), 0.0, str(error)

    def _target(self, index: int) -> torch.Tensor:
        return torch.zeros(self.n_classes).index_fill_(0, torch.from_numpy(self.label_sets[index]).long(), 1.0)

    def _scores(self, index: int) -> torch.Tensor:
        if isinstance(self.teacher, str | os.PathLike):
            self.teacher = np.load(self.teacher, mmap_mode="r")
        # a copy: the row of a memory-mapped file may be read-only
        return torch.from_numpy(np.array(self.teacher[index], np.float32))

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        draw = key if isinstance(key, Draw) else Draw(index=key, epoch=0, position=key, partner=False)
        item, skipped = self._item(draw), list[tuple[str, str]]()
        while self.redraw and item["error"] is not None and len(skipped) < MAX_REDRAWS:
            skipped.append((item["id"], item["error"]))
            item = self._item(self.redraw(draw, len(skipped)))
        return {**item, "skipped": skipped} if self.redraw else item

    def _item(self, draw: Draw) -> dict[str, Any]:
        item = self.pipeline.compute_outputs({START: None, **self.data[draw.index], **draw._asdict()})
        # a clip without scores has NaN throughout
        if self.teacher is not None and not (item["teacher"].isfinite().all() or item["teacher"].isnan().all()):
            item["error"] = item["error"] or f"clip '{item['id']}': the teacher's scores are not all finite numbers"
        return item


def clip_loader(
    manifest: Manifest,
    sample_rate: int,
    n_samples: int | None,
    batches: Iterable[Any],
    num_workers: int = 0,
    crop: str = "first",
    pin_memory: bool = False,
) -> DataLoader:
    """Makes a loader that gives a `ClipBatch` of clips, without their labels, for each sequence of rows in `batches`.

    `n_samples` is the most that is kept of a clip, its "first" ones or those in the "centre".
    """
    unlabelled = LabelSets(np.zeros(len(manifest) + 1, np.int64), np.zeros(0, np.int32))
    clips = TaggingDataset(manifest, unlabelled, 1, sample_rate, n_samples, crop=crop, compact=True)
    options: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": init_worker, "pin_memory": pin_memory}
    return DataLoader(clips, batch_sampler=batches, collate_fn=ClipBatch, **options)


class Pieces(IterableDataset):
    """Gives sounds in pieces that a model hears at a time, for a `ClipBatch`; worker processes take turns with the sounds.

    An item has the sound's `row`, its `samples` and their `mean` (see `centred`), whether it is the sound's `last`, and `error`:
    why there are no samples, or no more, or None.

    Arguments
    ---------
    sounds
        Paths; or, without workers, file objects and arrays of `array_rate`.
    cut
        Cuts a sound's blocks `[samples]` into pieces.
    longest
        A sound of at most so many samples is one piece, less its mean, as are the pieces of others; None: no mean is subtracted.
    most
        Pieces of a sound (None: all).
    """

    def __init__(
        self,
        sounds: Sequence[Any],
        sample_rate: int,
        cut: Callable[[Iterable[torch.Tensor]], Iterable[torch.Tensor]],
        longest: int | None = None,
        array_rate: int | None = None,
        most: int | None = None,
    ) -> None:
        self.sounds, self.sample_rate, self.cut, self.longest = sounds, sample_rate, cut, longest
        self.array_rate, self.most = array_rate, most

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for row in range(*((0, len(self.sounds)) if worker is None else (worker.id, len(self.sounds), worker.num_workers))):
            item: dict[str, Any] = {
                "row": row,
                "samples": torch.zeros(1, dtype=torch.int16),
                "mean": 0.0,
                "last": True,
                "error": None,
            }
            # a piece is given when the next one is there: only then it is known whether it is the last one
            before = None
            try:
                for samples, mean in islice(self._pieces(self.sounds[row]), self.most):
                    if before is not None:
                        yield {**before, "last": False}
                    before = {**item, "samples": samples, "mean": mean}
                item = before or item
            except InputError as error:
                item["error"] = str(error)
            yield item

    def _pieces(self, sound: Any) -> Iterator[tuple[torch.Tensor, float]]:
        source = opened(sound, self.array_rate, self.sample_rate)
        if self.longest is not None and (clip := read_if_short(source, self.sample_rate, self.longest)) is not None:
            yield clip
            return
        for piece in self.cut(read_blocks(source, self.sample_rate)):
            yield (piece if self.longest is None else piece - piece.mean()), 0.0


@contextlib.contextmanager
def shared_memory() -> Iterator[None]:
    """Turns what PyTorch says when workers have too little memory to share into an error that says what to do."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        if not re.search(r"shared memory|/torch_[0-9]+_[0-9]+|Bus error", text):
            raise
        remedy = "start the container with --shm-size=8g, or let the process itself read, with --num_workers=0"
        first = text.partition("\n")[0]
        raise InputError(f"the workers that read sounds have too little shared memory (/dev/shm): {remedy} ({first})") from error


def init_worker(worker_id: int) -> None:
    """Prepares a loader's worker process (`worker_init_fn`); the process that trains must then call `end_workers`."""
    # only the process that trains decides what an interrupt means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # garbage collection writes to all objects, and so would copy the memory of those that were inherited
    gc.freeze()
    # malloc keeps the memory that a clip has had for the next one: asking the system for it anew takes longer than decoding
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def end_workers() -> None:
    """Ends the worker processes of all loaders, also in the middle of an epoch."""
    # Python ends those that are left at its exit by a signal, and waits for ever for those that ignore it (see `init_worker`)
    for candidate in gc.get_objects():
        if type(candidate) is _MultiProcessingDataLoaderIter:
            candidate._shutdown_workers()


# A program that ends in the middle of a loader's batches: what Python does at its exit would wait for the workers for ever.
atexit.register(end_workers)
