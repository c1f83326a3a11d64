"""A run that is killed, stopped or out of disk space, and started again, ends as one that was not."""

import signal

import pytest

from psla_sb.checkpoints.run_folder import snapshot_path
from runs import TRAIN, command, differences, finish

SETTINGS = {"batch_size": 4, "grad_accumulation_factor": 2, "drop_connect": 0.2, "ckpt_interval_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def settings(mini_data):
    return {**SETTINGS, "data_folder": mini_data}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The output folder of a run that was left alone: two epochs of ten batches."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log"
    assert finish(command(TRAIN, "hparams/mini.yaml", **settings, output_folder=folder), log) == 0, log.read_text()
    return folder


def test_killed_at_any_moment_and_resumed_is_bit_exact(whole, settings, tmp_path):
    folder, log = tmp_path / "killed", tmp_path / "log"
    argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=folder)
    moments = {
        "a step": ("psla_sb.experiment.brain:TaggingBrain.fit_batch", 6),
        "a save": ("torch:save", 2),
        "validation": ("psla_sb.experiment.brain:TaggingBrain.evaluate_batch", 2),
        "the end of epoch 2": ("psla_sb.experiment.brain:write_results", 2),
        "scoring": ("psla_sb.aggregation.scoring:flush", 1),
        "export": ("psla_sb.checkpoints.tagger_folder:write_tensors", 2),
    }
    for moment, (target, count) in moments.items():
        status = finish(argv, log, at=(signal.SIGKILL, target, count))
        assert status == -signal.SIGKILL, f"{moment}: {status}\n{log.read_text()}"
        if moment == "a save":
            # what SpeechBrain would take for a checkpoint
            (unfinished,) = (folder / "save").glob("tmp+CKPT*")
            assert (unfinished / "CKPT.yaml").exists()
            assert not (unfinished / "optimizer.ckpt").exists()
    assert finish(argv, log) == 0, log.read_text()
    # epoch 1 was begun by the first three runs, and epoch 2 by the fourth and the fifth, which redid its end
    assert log.read_text().count("Going into epoch 1") == 4
    assert log.read_text().count("Going into epoch 2") == 2
    assert differences(whole, folder) == []


def test_stopped_by_a_signal_and_resumed_is_bit_exact(whole, settings, tmp_path):
    folder, log = tmp_path / "stopped", tmp_path / "log"
    argv = command(TRAIN, "hparams/mini.yaml", **{**settings, "num_workers": 2, "ckpt_interval_steps": 0}, output_folder=folder)
    for signum, target, count in [
        (signal.SIGTERM, "psla_sb.experiment.brain:TaggingBrain.evaluate_batch", 2),
        # in the middle of an accumulation, in the second epoch
        (signal.SIGINT, "psla_sb.experiment.brain:TaggingBrain.fit_batch", 3),
        (signal.SIGTERM, "psla_sb.aggregation.scoring:flush", 1),
    ]:
        # it reaches the workers as well: they leave it to the process that trains
        status = finish(argv, log, at=(signum, target, count))
        assert status == 75, f"{target}: {status}\n{log.read_text()}"
        assert log.read_text().endswith("Interrupted, and saved. The same command goes on from here.\n")
        assert snapshot_path(folder, 1).exists()
    assert finish(argv, log) == 0, log.read_text()
    assert log.read_text().count("Going into epoch 1") == 1
    assert log.read_text().count("Going into epoch 2") == 2
    assert differences(whole, folder) == []


def test_full_disk_loses_nothing(whole, settings, tmp_path):
    folder, log = tmp_path / "full", tmp_path / "log"
    argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=folder)
    for target, count, what in [
        ("psla_sb.experiment.brain:TaggingBrain._save_intra_epoch_ckpt", 2, "save"),
        ("psla_sb.experiment.brain:save_weights", 1, "epoch_01.safetensors"),
        ("psla_sb.experiment.brain:TaggingBrain.on_epoch_end", 2, "epoch_02.safetensors"),
        ("psla_sb.experiment.evaluation:save_weights", 1, "average.safetensors"),
        ("psla_sb.checkpoints.tagger_folder:write_tensors", 1, "embedding_model.ckpt"),
    ]:
        before = log.read_text() if log.exists() else ""
        status = finish(argv, log, at=("disk full", target, count))
        said = log.read_text().removeprefix(before)
        assert status == 2, said
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert f"{what}: cannot be written (" in error
        assert "make room, and the same command goes on" in error
        assert "Traceback" not in said
    assert finish(argv, log) == 0, log.read_text()
    assert log.read_text().count("Going into epoch 2") == 2
    assert differences(whole, folder) == []


def test_same_seed_same_run(tiny_run, mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "again", num_workers=2)
    assert finish(argv, tmp_path / "log") == 0
    assert differences(tiny_run[0], tmp_path / "again") == []
