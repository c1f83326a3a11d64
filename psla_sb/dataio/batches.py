"""Batches of clips on their way from worker processes to the device, in memory that is used again, and what comes back from it."""

import os
import weakref
from collections.abc import Sequence
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from torch.utils.data import default_collate, get_worker_info

from psla_sb.dataio.audio import centred

# of a batch, what goes to the device
DEVICE_KEYS = ["samples", "target", "teacher"]
# To be given fresh memory by the system takes as long as to read uncompressed clips. So a worker lends its own:
#
#   |<----- HEADER bytes ----->|
#   | mark | unused            | clip 0 ... 0 0 | clip 1 ...... | clip 2 ... 0 |     one piece of shared memory
#     ^ 1: in use                ^ `samples` of the batch, in the process that trains
#     |__ 0, when that process has dropped the batch and all views of it: the worker fills the piece with another batch
#
# A worker keeps as much as there were batches in use at a time.
HEADER = 64
_shared: list[torch.Tensor] = []  # the pieces of this worker process


def pad_right(tensors: Sequence[torch.Tensor], lend: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks vectors, with zeros after the shorter ones, to `[batch, most samples]`, and gives relative lengths `[batch]`.

    It is SpeechBrain's `batch_pad_right`, but a worker copies each vector only once, into memory that it shares. What it lends, the
    receiver must give back, as `ClipBatch` does.
    """
    most = max(map(len, tensors))
    padded = [t if len(t) == most else torch.nn.functional.pad(t, (0, most - len(t))) for t in tensors]
    together = _in_lent_memory if lend and get_worker_info() else default_collate
    return together(padded), torch.tensor([len(t) / most for t in tensors])


class ClipBatch(PaddedBatch):
    """Collates items of a compact `TaggingDataset` to a `PaddedBatch` that is half as large on its way to the device.

    What travels are 16-bit samples, if all of its files are of that kind, and `sig` makes the waveforms of them, the same to the
    last bit as those of a `TaggingDataset` that is not compact. It is this object that a loader's `collate_fn` must return, because
    it tells the worker when its memory can be used again. A process forked off by the receiver must clone what it keeps of a batch.

    >>> samples = torch.tensor([1, -2, 4], dtype=torch.int16)
    >>> batch = ClipBatch([{"samples": samples, "mean": 1 / 2**15}, {"samples": samples[:1], "mean": 0.0}])
    >>> batch.samples.data.dtype, batch.sig.data * 2**15
    (torch.int16, tensor([[ 0., -3.,  3.],
            [ 1.,  0.,  0.]]))
    """

    samples: PaddedData
    mean: torch.Tensor

    def __init__(self, items: list[dict[str, Any]]) -> None:
        if any(item["samples"].dtype != torch.int16 for item in items):
            items = [{**item, "samples": centred(item["samples"], item["mean"]), "mean": 0.0} for item in items]
        first = items[0]["samples"]
        # of the vectors only samples are lent, not targets: nothing tells when those are dropped
        super().__init__(items, device_prep_keys=DEVICE_KEYS, padding_func=lambda batch: pad_right(batch, batch[0] is first))
        self._lent = get_worker_info() is not None
        # relative lengths in float32 are not exact for clips of minutes
        self.mean, self.n_samples = self.mean.float(), torch.tensor([len(item["samples"]) for item in items])

    def pin_memory(self) -> "ClipBatch":
        """Moves what goes to the device into pinned memory."""
        super().pin_memory()
        self.mean, self.n_samples = self.mean.pin_memory(), self.n_samples.pin_memory()
        return self

    def to(self, *args: Any, **kwargs: Any) -> "ClipBatch":
        """Moves or casts what goes to the device, as SpeechBrain's batch does."""
        super().to(*args, **kwargs)
        device = self.samples.data.device
        self.mean, self.n_samples = (one.to(device, non_blocking=True) for one in (self.mean, self.n_samples))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the receiver's side: pickle calls it, and once only for what was lent
        self.__dict__.update(state)
        if self._lent:
            self.samples, self._lent = PaddedData(_to_give_back(self.samples.data), self.samples.lengths), False

    @property
    def sig(self) -> PaddedData:
        """Makes waveforms `[batch, samples]`, float32, less their means, zeros after the shorter ones; and relative lengths."""
        samples, lens = self.samples
        if samples.dtype != torch.int16:
            return self.samples
        n_samples = self.n_samples[:, None]
        past_end = torch.arange(samples.shape[1], device=samples.device) >= n_samples
        return PaddedData(centred(samples, self.mean[:, None], n_samples).masked_fill_(past_end, 0.0), lens)

    def __getitem__(self, key: str) -> Any:
        return self.sig if key == "sig" else super().__getitem__(key)


def _in_lent_memory(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape, dtype = (len(tensors), len(tensors[0])), tensors[0].dtype
    size = HEADER + shape[0] * shape[1] * dtype.itemsize
    memory = next((memory for memory in _shared if len(memory) >= size and not memory[0]), None)
    if memory is None:
        if not _shared:
            # a worker ends without clearing up, and not every system counts who shares memory
            Finalize(None, _shared.clear, exitpriority=0)
        # those that are free are too small
        _shared[:] = [other for other in _shared if other[0]]
        memory = torch.zeros(size, dtype=torch.uint8, device="cpu").share_memory_()
        _shared.append(memory)
    memory[0] = 1
    return torch.stack(tensors, out=memory[HEADER:size].view(dtype).view(shape))


def _to_give_back(tensor: torch.Tensor) -> torch.Tensor:
    """Gives the same tensor of lent memory, which goes back when nobody has the tensor or a view of it any more."""
    # NumPy's arrays can be written to in every mode of autograd
    mark = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage(), 0, (1,), (1,)).numpy()
    array = tensor.numpy()
    # tensors that share memory with `array` keep it alive, so its end is theirs
    weakref.finalize(array, _give_back, mark, os.getpid()).atexit = False
    return torch.from_numpy(array)


def _give_back(mark: np.ndarray, borrower: int) -> None:
    # it is not for a process that was forked off to say
    if os.getpid() == borrower:
        mark[0] = 0


class Reading:
    """Takes tensors to the CPU; `values` waits for these alone, not for what the device has been given to do since.

    Example
    -------
    >>> Reading(torch.ones(2), torch.tensor(True)).values()
    [tensor([1., 1.]), tensor(True)]
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        # into pinned memory, which the device itself writes
        self._tensors = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]
        self._event = None
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[torch.Tensor]:
        """Gives the tensors on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
