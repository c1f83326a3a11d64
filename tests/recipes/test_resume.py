"""A run that is killed and started again ends as one that was not."""

import contextlib
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import yaml

from psla_sb.checkpoints import load_weights, snapshot_path
from runs import TRAIN, command, run


def same(folder, other):
    """Whether two runs ended with the same weights, predictions and figures, bit for bit."""
    for epoch in (1, 2):
        weights, others = (load_weights(snapshot_path(f, epoch)) for f in (folder, other))
        assert weights.keys() == others.keys()
        for key in weights:
            assert weights[key].numpy().tobytes() == others[key].numpy().tobytes(), (epoch, key)
    for path in (folder / "predictions").iterdir():
        assert np.load(path).tobytes() == np.load(other / "predictions" / path.name).tobytes(), path.name
    assert json.loads((folder / "results.json").read_text()) == json.loads((other / "results.json").read_text())


@pytest.mark.parametrize(("workers", "signum"), [(0, signal.SIGKILL), (2, signal.SIGTERM)])
def test_stopped_in_mid_epoch_and_resumed_is_bit_exact(workers, signum, mini_data, tmp_path):
    settings = {"data_folder": mini_data, "ckpt_interval_steps": 2, "num_workers": workers, "grad_accumulation_factor": 2}
    settings["batch_size"] = 4
    run(command(TRAIN, "hparams/mini.yaml", **settings, output_folder=tmp_path / "whole"))
    argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=tmp_path / "killed")
    process = subprocess.Popen(
        argv,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    save, deadline = tmp_path / "killed" / "save", time.time() + 300

    def in_second_epoch():
        metas = []
        for path in save.glob("CKPT*/CKPT.yaml"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                metas.append(yaml.safe_load(path.read_text()))
        ends = [meta["unixtime"] for meta in metas if meta["end-of-epoch"]]
        return ends and max(meta["unixtime"] for meta in metas) > max(ends)

    while not in_second_epoch():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    status = process.wait()
    # SIGTERM reaches the workers as well: they leave it to the process that trains, which saves and says so
    assert status == (-signal.SIGKILL if signum == signal.SIGKILL else 75)
    assert not snapshot_path(tmp_path / "killed", 2).exists()
    done = run(argv)
    assert "Going into epoch 2" in done.stdout
    assert "Going into epoch 1" not in done.stdout
    same(tmp_path / "whole", tmp_path / "killed")


def test_same_seed_same_run(tiny_run, mini_data, tmp_path):
    run(command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "again", num_workers=2))
    same(tiny_run[0], tmp_path / "again")
