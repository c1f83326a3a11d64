"""Workers that read sounds: however they are started, with too little shared memory, and in programs that end early."""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader

from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.dataset import TaggingDataset, init_worker, shared_memory
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler
from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets


@pytest.fixture
def sounds(tmp_path):
    paths = [str(tmp_path / f"{i}.wav") for i in range(6)]
    for i, path in enumerate(paths):
        soundfile.write(path, np.random.default_rng(i).normal(0, 0.1, 4000 + 100 * i), 16000)
    return paths


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("compact", [True, False])
def test_workers_that_are_not_forked(method, compact, sounds, tmp_path):
    n = len(sounds)
    manifest = Manifest.from_columns([str(i) for i in range(n)], sounds, [1.0] * n, [""] * n)
    np.save(tmp_path / "teacher.npy", np.arange(3 * n, dtype=np.float32).reshape(n, 3))
    teacher = np.load(tmp_path / "teacher.npy", mmap_mode="r")
    clips = TaggingDataset(manifest, LabelSets.from_lists([[i % 3] for i in range(n)]), 3, teacher=teacher, compact=compact)
    # the scores stay in their file
    assert len(pickle.dumps(clips)) < 20_000
    batches = MixupBatchSampler(BalancedSampler(np.ones(n), replacement=False), n, 3, 0.5)
    clips.redraw = batches.redraw
    settings = {"batch_sampler": batches, "worker_init_fn": init_worker, "collate_fn": ClipBatch if compact else PaddedBatch}
    expected = list(DataLoader(clips, **settings))
    found = DataLoader(clips, num_workers=1, multiprocessing_context=method, **settings)
    for one, other in zip(expected, found, strict=True):
        for key in ("target", "teacher", "sig"):
            assert torch.equal(one[key].data, other[key].data)


def run(program, tmp_path, **environment):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=variables, timeout=100, check=False)


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit(3)", "next(tags); sys.exit(3)", "del tagger; sys.exit(3)"])
def test_a_program_that_ends_early_ends(ending, sounds, tmp_path):
    done = run(
        f"""
        import sys
        from stubs import band_tagger

        if __name__ == "__main__":
            tagger = band_tagger()
            tags = tagger.tag_files({sounds * 30}, batch_size=2, num_workers=2)
            next(tags)
            {ending}
        """,
        tmp_path,
    )
    assert done.returncode == 3, done.stderr


def test_files_are_tagged_by_spawned_workers(sounds, tmp_path):
    done = run(
        f"""
        import multiprocessing
        from stubs import band_tagger

        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            print(len([one for one in band_tagger().tag_files({sounds}, batch_size=2, num_workers=1) if one.error is None]))
        """,
        tmp_path,
    )
    assert done.stdout == "6\n", done.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
            "memory. Please try to raise your shared memory limit."
        ),
        RuntimeError("unable to write to file </torch_7_123_0>: No space left on device (28)"),
    ],
)
def test_too_little_shared_memory(error):
    with pytest.raises(InputError, match=r"--shm-size=8g.*--num_workers=0"), shared_memory():
        raise error
    with pytest.raises(RuntimeError, match="something else"), shared_memory():
        raise RuntimeError("something else")
