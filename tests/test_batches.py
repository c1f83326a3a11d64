"""Batches that come from worker processes in memory which the workers use again."""

import copy
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from psla_sb.dataio import batches
from psla_sb.dataio.batches import ClipBatch

N_BATCHES, PREFETCH = 30, 2


class CountedBatch(ClipBatch):
    """It tells how many pieces of memory its worker shares, and which process that is."""

    def __init__(self, items):
        super().__init__(items)
        self.n_shared, self.worker = len(batches._shared), os.getpid()


class Ramps:
    """Item `i` is `i`, `i + 1`, ..., of different lengths."""

    def __init__(self, dtype=torch.int16):
        self.dtype = dtype

    def __len__(self):
        return 2 * N_BATCHES

    def __getitem__(self, i):
        return {"samples": ramp(i).to(self.dtype), "mean": 0.0, "target": torch.full((3,), float(i))}


def ramp(i):
    return torch.arange(i, i + 200 - 37 * i % 90)


def loader(dtype=torch.int16, **kwargs):
    return DataLoader(Ramps(dtype), 2, collate_fn=CountedBatch, num_workers=1, prefetch_factor=PREFETCH, **kwargs)


def check(number, batch):
    samples, lens = batch.samples
    for row, i in enumerate((2 * number, 2 * number + 1)):
        clip = ramp(i)
        assert torch.equal(samples[row, : len(clip)].long(), clip)
        assert not samples[row, len(clip) :].any()
        assert lens[row] == len(clip) / samples.shape[1]
        assert batch.target.data[row].tolist() == [i] * 3


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_memory_is_used_again_when_a_batch_is_gone(dtype):
    for number, batch in enumerate(loader(dtype)):
        check(number, batch)
        # this batch, the last one, which lives until this one has its name, and those that wait
        assert batch.n_shared <= PREFETCH + 2
    assert number == N_BATCHES - 1


def test_a_worker_that_lives_on_uses_it_in_the_next_epoch():
    same = loader(persistent_workers=True)
    assert max(batch.n_shared for _ in range(3) for batch in same) <= PREFETCH + 2


def test_memory_received_in_inference_mode_is_used_again():
    batches_left = iter(loader())
    for _ in range(N_BATCHES):
        with torch.inference_mode():
            batch = next(batches_left)
    assert batch.n_shared <= PREFETCH + 2


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory cannot be listed here")
@pytest.mark.parametrize("strategy", sorted(torch.multiprocessing.get_all_sharing_strategies()))
def test_a_worker_leaves_no_memory_behind(strategy):
    usual = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        workers = {batch.worker for batch in loader()}
    finally:
        torch.multiprocessing.set_sharing_strategy(usual)
    assert len(workers) == 1
    assert not list(Path("/dev/shm").glob(f"torch_{workers.pop()}_*"))


def test_batches_that_are_kept_stay_as_they_are():
    kept = list(loader())
    assert kept[-1].n_shared == N_BATCHES
    for number, batch in enumerate(kept):
        check(number, batch)


def test_a_view_of_the_samples_keeps_them():
    views = [batch.samples.data[1, 3:] for batch in loader()]
    for number, view in enumerate(views):
        clip = ramp(2 * number + 1)[3:]
        assert torch.equal(view[: len(clip)].long(), clip)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_duplicates_leave_the_memory_alone(duplicate):
    kept = []
    for number, batch in enumerate(loader()):
        kept.append(duplicate(batch))
        check(number, duplicate(batch))
        check(number, batch)
    for number, batch in enumerate(kept):
        check(number, batch)


def test_a_batch_made_in_this_process_shares_nothing():
    batch = CountedBatch([Ramps()[0], Ramps()[1]])
    check(0, batch)
    assert batch.n_shared == 0
    assert not batch.samples.data.is_shared()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_forked_process_does_not_give_back_what_is_in_use():
    batches_left = iter(loader())
    batch = next(batches_left)
    held = [batch]

    def drop():
        nonlocal batch
        del batch
        held.clear()

    child = multiprocessing.get_context("fork").Process(target=drop)
    child.start()
    child.join()
    assert child.exitcode == 0
    for _ in batches_left:
        pass
    check(0, batch)
