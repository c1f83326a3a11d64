"""Two processes on the CPU train together, score as one process does, and resume exactly."""

import json
import signal

import numpy as np
import pytest
import torch
from speechbrain import Stage

from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_into, load_weights, trained_modules
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.hparams import load_hparams
from psla_sb.experiment.train import tagging_dataset
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import FIGURES
from runs import TINY, TRAIN, command, differences, finish, torchrun, two_ranks

# 20 evaluation clips in batches of 6: four batches, the last one short
BATCH = 6


def test_two_gloo_ranks_train_and_score_like_one_process(mini_data, tmp_path, monkeypatch):
    folder = tmp_path / "two"
    settings = {"data_folder": mini_data, "valid_batch_size": BATCH}
    argv = command(TRAIN, "hparams/mini.yaml", "--distributed_backend=gloo", **settings, output_folder=folder)
    torchrun(argv, fresh=True)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["epochs"]) == 2
    assert np.isfinite(results["epochs"][1]["train_loss"])
    weights = load_weights(snapshot_path(folder, 2))
    assert (
        weights["embedding_model._bn0.num_batches_tracked"] == 2 * 2
    )  # 40 clips: 5 batches of 8, of which each rank trains on 2 an epoch
    two = np.load(folder / "predictions" / "valid_weight_average.npy")
    (folder / "predictions" / "valid_weight_average.json").unlink()
    argv = command(TRAIN, "hparams/mini.yaml", "--test_only", **settings, output_folder=folder)
    assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    one = np.load(folder / "predictions" / "valid_weight_average.npy")
    assert one.tobytes() == two.tobytes()
    assert json.loads((folder / "results.json").read_text()) == results

    # validation, epoch by epoch
    overrides = {
        **TINY,
        "data_folder": str(mini_data),
        "output_folder": str(tmp_path / "one"),
        "valid_annotation": str(folder / "eval.csv"),
    }
    hparams = load_hparams(TRAIN.parent / "hparams" / "mini.yaml", overrides)
    brain = TaggingBrain(hparams["modules"], hparams=hparams, run_opts={"device": "cpu"})
    dataset, _ = tagging_dataset("valid", hparams, Vocabulary.from_csv(folder / "class_labels_indices.csv"))
    loader = brain.make_dataloader(dataset, Stage.VALID, ckpt_prefix=None, batch_size=BATCH)
    monkeypatch.setattr(brain, "on_epoch_end", lambda epoch: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for record in results["epochs"]:
        path = snapshot_path(folder, record["epoch"])
        load_into(trained_modules(hparams["modules"]), load_weights(path))
        brain._fit_valid(loader, record["epoch"], enable=False)
        scores = np.load(folder / "predictions" / f"valid_{path.stem}.npy")
        assert brain.stats.scores.numpy().tobytes() == scores.tobytes()
        figures = brain.stats.summarize()
        assert record["valid_loss"] == figures["loss"]
        assert {name: record[name] for name in FIGURES} == {name: figures[name] for name in FIGURES}
    torch.set_num_threads(threads)


def test_two_ranks_killed_or_stopped_and_resumed_are_bit_exact(mini_data, tmp_path):
    settings = {"data_folder": mini_data, "batch_size": 4, "ckpt_interval_steps": 2, "drop_connect": 0.2, "device": "cpu"}
    argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=tmp_path / "whole")
    assert two_ranks(argv, tmp_path / "whole_log") == [0, 0], (tmp_path / "whole_log.0").read_text()
    argv, log = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=tmp_path / "stopped"), tmp_path / "log"
    # each rank has five batches of its own in an epoch: the fourth of the first epoch
    fit_batch = "psla_sb.experiment.brain:TaggingBrain.fit_batch"
    assert two_ranks(argv, log, at=(signal.SIGKILL, fit_batch, 4)) == [-signal.SIGKILL] * 2
    assert not snapshot_path(tmp_path / "stopped", 1).exists()
    # one rank alone is asked to stop, in the second epoch
    assert two_ranks(argv, log, at=(signal.SIGTERM, fit_batch, 6), rank_of_event=1) == [75, 75]
    assert not snapshot_path(tmp_path / "stopped", 2).exists()
    assert two_ranks(argv, log) == [0, 0]
    said = log.with_suffix(".0").read_text()
    assert (said.count("Going into epoch 1"), said.count("Going into epoch 2")) == (2, 2)
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


@pytest.mark.slow
def test_a_compiled_training_of_two_processes_that_accumulate_and_go_on(mini_data, tmp_path):
    """What is compiled changes no weight and no name; here by a compiler that changes nothing either, and takes no minutes."""
    script, folders = tmp_path / "train.py", {}
    script.write_text(
        "import functools, runpy, torch\n"
        "from psla_sb.lobes import on_cpu\n"
        "torch.compile = functools.partial(torch.compile, backend='eager')\n"
        # what is compiled is rounded as PyTorch's own operations are
        "on_cpu.trains = lambda x, *modules: False\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    for compiled in (True, False):
        folder = folders[compiled] = tmp_path / f"run_{compiled}"
        settings = {"data_folder": mini_data, "output_folder": folder, "grad_accumulation_factor": 2, "compile_model": compiled}
        # a used folder may change it, as it may be gone on with
        for epochs in (1, 2):
            log = tmp_path / f"log_{compiled}_{epochs}"
            argv = command(script, str(TRAIN.parent / "hparams" / "mini.yaml"), **{**settings, "number_of_epochs": epochs})
            assert two_ranks(argv, log) == [0, 0], log.with_suffix(".0").read_text()
            assert ("Compiling EfficientNetEncoder" in log.with_suffix(".0").read_text()) == compiled
    assert differences(*folders.values()) == []
    assert not any("_orig_mod" in key for key in load_weights(snapshot_path(folders[True], 2)))
