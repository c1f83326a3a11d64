"""Batches of clips on their way from a loader's worker processes to the device.

The waveforms lie in memory that a worker shares with the process that trains. When that has dropped the batch, the worker uses the
memory for another one: to be given fresh memory by the system takes as long as to read uncompressed clips. A worker keeps as much
as there were batches in use at a time.
"""

import os
import weakref
from multiprocessing.util import Finalize

import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from torch.utils.data import default_collate, get_worker_info

from psla_sb.dataio.audio import centred

# of a batch, what goes to the device
DEVICE_KEYS = ["samples", "target", "teacher"]
# bytes before the samples in shared memory; the first one is 1 while the batch is in use
HEADER = 64
# what this worker process shares
_shared = []


def pad_right(tensors, lend=False):
    """SpeechBrain's `batch_pad_right` for vectors, but a worker copies each only once, into memory that it shares.

    Arguments
    ---------
    tensors : list of torch.Tensor
        `[samples]` each.
    lend : bool
        Whether a worker wants its memory back: the receiver must tell when it is done, as `ClipBatch` does.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        `[batch, most samples]`, with zeros after the shorter ones; and relative lengths `[batch]`.

    Example
    -------
    >>> pad_right([torch.ones(1), torch.ones(2)])
    (tensor([[1., 0.], [1., 1.]]), tensor([0.5000, 1.0000]))
    """
    most = max(map(len, tensors))
    padded = [t if len(t) == most else torch.nn.functional.pad(t, (0, most - len(t))) for t in tensors]
    together = _in_lent_memory if lend and get_worker_info() else default_collate
    return together(padded), torch.tensor([len(t) / most for t in tensors])


class ClipBatch(PaddedBatch):
    """A `PaddedBatch` of a compact `TaggingDataset`: half as large on its way from a worker process to the device.

    What travels are 16-bit samples, if all of its files are of that kind, and `sig` makes the waveforms of them, the same to the
    last bit as those of a `TaggingDataset` that is not compact. It is this object that a loader's `collate_fn` must return, because
    it tells the worker when its memory can be used again. A process forked off by the receiver must clone what it keeps of a batch.

    Arguments
    ---------
    items : list of dict
        Items of the data set.

    Example
    -------
    >>> samples = torch.tensor([1, -2, 4], dtype=torch.int16)
    >>> batch = ClipBatch([{"samples": samples, "mean": 1 / 2**15}, {"samples": samples[:1], "mean": 0.0}])
    >>> batch.samples.data.dtype, batch.sig.data * 2**15
    (torch.int16, tensor([[ 0., -3.,  3.],
            [ 1.,  0.,  0.]]))
    """

    def __init__(self, items):
        if any(item["samples"].dtype != torch.int16 for item in items):
            items = [{**item, "samples": centred(item["samples"], item["mean"]), "mean": 0.0} for item in items]
        first = items[0]["samples"]
        super().__init__(items, device_prep_keys=DEVICE_KEYS, padding_func=lambda batch: pad_right(batch, batch[0] is first))
        self._lent = get_worker_info() is not None
        # relative lengths in float32 are not exact for clips of minutes
        self.mean, self.n_samples = self.mean.float(), torch.tensor([len(item["samples"]) for item in items])

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._lent:
            self.samples, self._lent = PaddedData(_to_give_back(self.samples.data), self.samples.lengths), False

    @property
    def sig(self):
        """The waveforms `[batch, samples]`, float32, their means subtracted, with zeros after the shorter ones; and relative
        lengths `[batch]`."""
        samples, lens = self.samples
        if samples.dtype != torch.int16:
            return self.samples
        n_samples = self.n_samples.to(samples.device)[:, None]
        past_end = torch.arange(samples.shape[1], device=samples.device) >= n_samples
        return PaddedData(centred(samples, self.mean[:, None], n_samples).masked_fill_(past_end, 0.0), lens)

    def __getitem__(self, key):
        return self.sig if key == "sig" else super().__getitem__(key)


def _in_lent_memory(tensors):
    """The tensors stacked; `HEADER` bytes before them is the mark of whether they are in use."""
    shape, dtype = (len(tensors), len(tensors[0])), tensors[0].dtype
    size = HEADER + shape[0] * shape[1] * dtype.itemsize
    memory = next((memory for memory in _shared if len(memory) >= size and not memory[0]), None)
    if memory is None:
        if not _shared:
            # a worker ends without clearing up, and not every system counts who shares memory
            Finalize(None, _shared.clear, exitpriority=0)
        _shared[:] = [other for other in _shared if other[0]]
        memory = torch.zeros(size, dtype=torch.uint8, device="cpu").share_memory_()
        _shared.append(memory)
    memory[0] = 1
    return torch.stack(tensors, out=memory[HEADER:size].view(dtype).view(shape))


def _to_give_back(tensor):
    """The same tensor of lent memory, which goes back when nobody has the tensor or a view of it any more."""
    # NumPy's arrays can be written to in every mode of autograd
    mark = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage(), 0, (1,)).numpy()
    array = tensor.numpy()
    weakref.finalize(array, _give_back, mark, os.getpid()).atexit = False
    return torch.from_numpy(array)


def _give_back(mark, borrower):
    # it is not for a process that was forked off to say
    if os.getpid() == borrower:
        mark[0] = 0
