"""A SpeechBrain data set over a `Manifest`: what a loader's worker process does with a clip.

A worker decodes and cuts; means are subtracted and features are computed on the device, a whole batch at a time.
"""

import ctypes
import gc
import signal

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline, provides, takes
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from psla_sb.dataio.audio import AudioError, centred, read_samples
from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.sampler import CROP, Draw, draw_rng
from psla_sb.labels.label_sets import LabelSets

STATIC_KEYS = ["id", "wav", "duration", "labels", "index", "epoch", "position", "partner"]
OUTPUT_KEYS = ["id", "index", "target", "partner", "error"]
COMPACT_KEYS = ["samples", "mean"]
CROPS = {"first": 0.0, "centre": 0.5, "random": None}
MAX_REDRAWS = 10
# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**28


class TaggingDataset(DynamicItemDataset):
    """Clips with their multi-hot targets.

    An item is asked for by its row, or by a `Draw` of a batch sampler. It has SpeechBrain's `id`, and `index` (the row), `sig`
    `[samples]`, `target` `[classes]`, `partner` (whether the clip is in the batch to be mixed into another) and `error`: what is
    wrong with the sound file, or None. The process that trains raises it, because an exception that crosses from a worker process
    arrives as a traceback.

    With `redraw`, an item that cannot be read is replaced by another draw, and `skipped` lists (ID, error) of what was replaced.

    Arguments
    ---------
    manifest : Manifest
        The clips.
    label_sets : LabelSets
        Their classes.
    n_classes : int
        Number of classes.
    sample_rate : int
        Of the waveforms, in Hz.
    n_samples : int, optional
        The most samples that are kept of a clip.
    teacher : np.ndarray, optional
        `[clips, classes]`, scores of other models, memory-mapped; an item then has its row of them as `teacher`.
    crop : str
        Which samples are kept of a longer clip: the "first", the "centre", or a "random" crop.
    seed : int
        Of random crops, with the epoch and the position of a draw.
    redraw : callable, optional
        Takes a Draw and the number of the attempt, from 1, and returns the Draw to replace it; such as `MixupBatchSampler.redraw`.
    compact : bool
        Whether items have, in place of `sig`, `samples` and `mean` (see `psla_sb.dataio.audio.read_samples`), for
        `psla_sb.dataio.batches.ClipBatch`.

    Raises
    ------
    ValueError
        There is no such crop.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> manifest = Manifest.from_columns(["a"], ["nowhere.wav"], [1.0], ["/m/1"])
    >>> item = TaggingDataset(manifest, LabelSets.from_lists([[1]]), n_classes=3)[0]
    >>> item["target"], item["error"]
    (tensor([0., 1., 0.]), 'nowhere.wav: no such file')
    """

    def __init__(
        self,
        manifest,
        label_sets,
        n_classes,
        sample_rate=16000,
        n_samples=None,
        teacher=None,
        crop="first",
        seed=0,
        redraw=None,
        compact=False,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, not {crop!r}")
        # SpeechBrain's own __init__ makes a dictionary of all rows
        self.data, self.data_ids, self.redraw, self.compact = manifest, range(len(manifest)), redraw, compact

        @takes("wav", "epoch", "position")
        @provides("samples", "mean", "error")
        def audio_pipeline(wav, epoch, position):
            place = draw_rng(seed, epoch, position, CROP).random() if crop == "random" else CROPS[crop]
            try:
                samples, mean = read_samples(wav, sample_rate, n_samples, place)
                error = None
            except AudioError as caught:
                samples, mean, error = torch.zeros(1, dtype=torch.int16), 0.0, str(caught)
            yield samples
            yield mean
            yield error

        @takes("samples", "mean")
        @provides("sig")
        def sig_pipeline(samples, mean):
            return centred(samples, mean)

        @takes("index")
        @provides("target")
        def label_pipeline(index):
            target = torch.zeros(n_classes)
            target[torch.from_numpy(label_sets[index]).long()] = 1.0
            return target

        @takes("index")
        @provides("teacher")
        def teacher_pipeline(index):
            return torch.from_numpy(np.array(teacher[index]))

        outputs = [*OUTPUT_KEYS, *(COMPACT_KEYS if compact else ["sig"]), *([] if teacher is None else ["teacher"])]
        self.pipeline = DataPipeline(STATIC_KEYS, [audio_pipeline, sig_pipeline, label_pipeline, teacher_pipeline], outputs)

    def __getitem__(self, key):
        draw = key if isinstance(key, Draw) else Draw(index=key, epoch=0, position=key, partner=False)
        item = self._item(draw)
        if self.redraw is None:
            return item
        skipped = []
        while item["error"] is not None and len(skipped) < MAX_REDRAWS:
            skipped.append((item["id"], item["error"]))
            item = self._item(self.redraw(draw, len(skipped)))
        return {**item, "skipped": skipped}

    def _item(self, draw):
        return self.pipeline.compute_outputs({**self.data[draw.index], **draw._asdict()})


def clip_loader(manifest, sample_rate, n_samples, batches, num_workers=0, crop="first"):
    """A loader of clips without their labels.

    Arguments
    ---------
    manifest : Manifest
        The clips.
    sample_rate : int
        In Hz.
    n_samples : int or None
        The most samples that are kept of a clip.
    batches : sequence of sequences of int
        The rows that make up each batch.
    num_workers : int
        Processes that decode.
    crop : str
        Which samples are kept: "first" or "centre".

    Returns
    -------
    torch.utils.data.DataLoader
        Of ClipBatch.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> manifest = Manifest.from_columns(["a"], ["nowhere.wav"], [1.0], ["/m/1"])
    >>> next(iter(clip_loader(manifest, 16000, None, [[0]]))).error
    ['nowhere.wav: no such file']
    """
    unlabelled = LabelSets(np.zeros(len(manifest) + 1, np.int64), np.zeros(0, np.int32))
    return DataLoader(
        TaggingDataset(manifest, unlabelled, 1, sample_rate, n_samples, crop=crop, compact=True),
        batch_sampler=batches,
        collate_fn=ClipBatch,
        num_workers=num_workers,
        worker_init_fn=init_worker,
    )


def init_worker(worker_id):
    """A loader's `worker_init_fn`: only the process that trains decides what an interrupt means. It must call `end_workers`.

    What the worker has inherited is left out of garbage collection, which writes to all objects, and so would copy their memory.
    Of the memory that clips have had, it keeps what the next batch needs: asking the system for it anew takes longer than decoding.

    Example
    -------
    >>> loader = torch.utils.data.DataLoader([1, 2], num_workers=1, worker_init_fn=init_worker)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def end_workers():
    """Ends the worker processes of all loaders, also in the middle of an epoch.

    Python ends those that are left at its exit by a signal, and waits for ever for those that ignore it.

    Example
    -------
    >>> loader = torch.utils.data.DataLoader([1, 2], num_workers=1, worker_init_fn=init_worker)
    >>> iterator = iter(loader)
    >>> end_workers()
    """
    for candidate in gc.get_objects():
        if type(candidate) is _MultiProcessingDataLoaderIter:
            candidate._shutdown_workers()
