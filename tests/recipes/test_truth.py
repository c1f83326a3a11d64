"""What a run says of itself: speed, classes, clips, what it does not reach; and who is told of it."""

import csv
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from psla_sb.checkpoints.run_folder import read_results, write_results
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment import aggregate, evaluation, pace, remarks
from psla_sb.experiment.hparams import CommandLine, read_settings
from psla_sb.experiment.identity import MAY_CHANGE
from psla_sb.experiment.schedules import ExponentialLinearScheduler, WarmupDecayScheduler
from psla_sb.experiment.train import main
from psla_sb.labels.enhancement import warn_of_classes_without_clips
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import best_f1
from runs import REPOSITORY, TRAIN, command, differences, finish, run, serve


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def test_results_are_json_and_say_how_fast(tiny_run):
    folder, results, done = tiny_run
    text = (folder / "results.json").read_text()
    assert json.loads(text, parse_constant=no_constant) == results
    assert [timing["epoch"] for timing in results["timing"]] == [1, 2]
    for timing in results["timing"]:
        assert timing["seconds"] > 0
        assert 100 < timing["peak_memory_MiB"] < 10_000
        assert timing["clips_per_second"] > 1
    assert results["timing"][0]["eta_seconds"] == pytest.approx(results["timing"][0]["seconds"], rel=0.01)
    assert results["timing"][1]["eta_seconds"] == 0
    lines = (folder / "train_log.txt").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"epoch: \d, lr: \S+, seconds: [\d.]+, clips/s: [\d.]+, ETA: \d+ s, memory: \d+ MiB - train loss: ", line)
        assert line in done.stderr + done.stdout


def test_what_is_no_number_is_null_and_read_as_nan(tmp_path):
    write_results(tmp_path, {"epochs": [{"mAP": float("nan"), "d_prime": [float("inf"), -1.5]}]})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=no_constant) == {"epochs": [{"mAP": None, "d_prime": [None, -1.5]}]}
    (epoch,) = read_results(tmp_path)["epochs"]
    assert np.isnan([epoch["mAP"], epoch["d_prime"][0]]).all()


def test_classes_and_clips_of_the_evaluation(tiny_run, mini_data):
    folder, results, _ = tiny_run
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    clips = Manifest.from_csv(folder / "eval.csv", mini_data)
    scores, targets = np.load(folder / "predictions" / "valid_weight_average.npy"), clips.targets(vocabulary)
    with open(folder / "classes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mid"], row["display_name"]) for row in rows] == list(zip(vocabulary.mids, vocabulary.names, strict=True))
    for c, row in enumerate(rows):
        assert int(row["positive_clips"]) == int(row["official_clips"]) == targets[:, c].sum()
        if targets[:, c].any():
            assert float(row["AP"]) == pytest.approx(average_precision_score(targets[:, c], scores[:, c]))
        else:
            assert row["AP"] == row["F1"] == ""
    with open(folder / "predictions" / "valid_clips.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == clips.table["ID"].to_pylist()
    assert [row["labels"] for row in rows] == clips.table["labels"].to_pylist()
    n_labels = int(targets.sum())
    said = {"set": "valid", "annotation": clips.source, "found": 20, "ids": clips.digest(("ID",)), "classes_with_fewer": 0}
    assert results["clips"] == {**said, "labels_found": n_labels, "labels_official": n_labels}


@pytest.mark.parametrize("levels", [None, 4])
def test_the_best_threshold_is_sklearns(levels):
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 5)) < [0.02, 0.2, 0.5, 1.0, 0.0]).astype(int)
    targets[3, 0] = 1
    scores = rng.random((60, 5)).astype(np.float32)
    scores = scores if levels is None else np.round(scores * levels) / levels
    thresholds, best = best_f1(scores, targets)
    assert np.isnan([thresholds[4], best[4]]).all()
    for c in range(4):
        precision, recall, cuts = precision_recall_curve(targets[:, c], scores[:, c])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert best[c] == pytest.approx(f1.max())
        assert thresholds[c] in cuts[np.isclose(f1[:-1], f1.max())]


def test_a_heartbeat_where_there_is_no_bar(mini_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "HEARTBEAT", -1.0)
    main(str(TRAIN), command(TRAIN, "hparams/mini.yaml", "--dry_run", data_folder=mini_data, output_folder=tmp_path / "run")[2:])
    said = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"Epoch \d: step \d of 5, [\d.]+ clips/s, loss [\d.]+, \d+ s to the end of the epoch's training", said)


def test_a_dry_run_trains_nothing(mini_data, tmp_path):
    folder = tmp_path / "run"
    done = run(command(TRAIN, "hparams/mini.yaml", "--dry_run", data_folder=mini_data, output_folder=folder), cwd=tmp_path)
    for said in (
        "n_mels: 32",
        "clips       40 train, 20 valid",
        "classes     39",
        "5 an epoch, 10 in 2 epochs",
        "MiB at most",
        "the run ",
    ):
        assert said in done.stdout
    assert not any((folder / name).exists() for name in ("results.json", "identity.json", "snapshots", "predictions", "tagger"))
    assert not list((folder / "save").iterdir())
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder)
    assert finish(argv, tmp_path / "log") == 0
    whole = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "whole")
    assert finish(whole, tmp_path / "log") == 0
    assert differences(tmp_path / "whole", folder) == []


def test_what_has_no_dry_run_refuses_it(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        aggregate.main(
            str(TRAIN), ["hparams/aggregate.yaml", "--dry_run", f"--runs={tiny_run[0]}", f"--output_folder={tmp_path / 'x'}"]
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: --dry_run is an option of train.py, ablate.py and out_of_fold.py\n")


def test_trackers_are_told_and_go_on(mini_data, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    settings = {"data_folder": mini_data, "output_folder": folder, "track": "tensorboard,wandb"}
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for epochs in (1, 2):
        run(command(TRAIN, "hparams/mini.yaml", **settings, number_of_epochs=epochs), env=environment, cwd=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    results = json.loads((folder / "results.json").read_text())
    steps = {event.step: event.value for event in events.Scalars("mAP/valid")}
    assert steps == pytest.approx({epoch["epoch"]: epoch["mAP"] for epoch in results["epochs"]})
    assert [event.step for event in events.Scalars("lr")] == [1, 2]
    assert events.Scalars("final/ensemble_mAP")[-1].value == pytest.approx(results["evaluation"]["ensemble"]["mAP"])
    assert {"training_curves", "class_ap", "examples"} <= set(events.Tags()["images"])
    # both processes belong to one run there
    offline = [path.name.rpartition("-run")[2] for path in (folder / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert len({name.partition("-")[2].partition("-")[2] for name in offline}) == 1
    assert len((folder / "train_log.txt").read_text().splitlines()) == 2


def test_a_tracker_that_is_not_there(mini_data, tmp_path, capsys):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", track="mlflow")
    assert finish(argv, tmp_path / "log") == 2
    assert (tmp_path / "log").read_text().splitlines()[-1] == "error: track must be of tensorboard, wandb, not 'mlflow'"


def test_what_a_short_run_never_reaches():
    hparams = {"epoch_counter": SimpleNamespace(limit=3), "average_start": 16, "schedule": WarmupDecayScheduler(1e-4, 10)}
    said = list(remarks.on_schedule(hparams, 90))
    assert len(said) == 3
    assert "average_start is 16, but the last epoch is 3" in said[0]
    assert "it has 90 steps, warmup_steps is 1000" in said[1]
    assert "0 in the first 50 of 90 steps" in said[2]
    hparams = {"epoch_counter": SimpleNamespace(limit=30), "average_start": 16, "schedule": WarmupDecayScheduler(1e-4, 10)}
    assert list(remarks.on_schedule(hparams, 30 * 19_530)) == []
    assert list(remarks.on_schedule({**hparams, "schedule": object()}, 1)) == []
    (said,) = remarks.on_schedule({**hparams, "schedule": ExponentialLinearScheduler(1e-4, warmup_epochs=30)}, 1000)
    assert "it has 30 epochs, warmup_epochs is 30" in said


def test_clips_that_are_never_drawn(mini_data, tiny_run, tmp_path):
    clips = Manifest.from_columns("abc", "abc", [1.0] * 3, ["/m/1", "", ""])
    labels = LabelSets.from_lists([[0], [], []])
    (said,) = remarks.on_labels("train", clips, labels, balanced=True)
    assert "2 of 3 clips have no label; balanced sampling never draws them" in said
    assert list(remarks.on_labels("train", clips, labels, balanced=False)) == []
    rows = (tiny_run[0] / "train.csv").read_text().splitlines(keepends=True)
    unlabelled = [row.rpartition(",")[0] + ',""\n' for row in rows[1:]]
    files = {"train_annotation": tmp_path / "some.csv", "valid_annotation": tiny_run[0] / "eval.csv", "skip_prep": True}
    (tmp_path / "some.csv").write_text("".join([*rows[:-2], *unlabelled[-2:]]))
    argv = command(TRAIN, "hparams/mini.yaml", "--dry_run", data_folder=mini_data, output_folder=tmp_path / "run", **files)
    assert finish(argv, tmp_path / "log") == 0
    assert "2 of 40 clips have no label; balanced sampling never draws them" in (tmp_path / "log").read_text()
    (tmp_path / "train.csv").write_text("".join([rows[0], *unlabelled]))
    files = {"train_annotation": tmp_path / "train.csv", "valid_annotation": tiny_run[0] / "eval.csv", "skip_prep": True}
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", **files)
    assert finish(argv, tmp_path / "log") == 2
    assert "none of its 40 clips has a label" in (tmp_path / "log").read_text().splitlines()[-1]


def test_published_figures_stand_beside_the_published_setting_alone(tmp_path):
    file = TRAIN.parent / "hparams" / "psla.yaml"
    sets = {}
    for name, n_official in (("train", 100), ("valid", 10)):
        n = n_official * 9 // 10
        sets[name] = Manifest.from_columns(map(str, range(n)), ["a"] * n, [1.0] * n, ["/m/1"] * n, source=tmp_path / f"{name}.csv")
        (tmp_path / f"{name}_official.csv").write_text(f"mid,clips\n/m/1,{n_official}\n")

    run_opts = CommandLine.from_command_line_args([str(file)])[1]

    def why(*arguments):
        _, run_opts, overrides = CommandLine.from_command_line_args([str(file), *arguments])
        return remarks.why_not_published(file, overrides, run_opts, sets)

    assert why("--data_folder=/data", "--output_folder=x", "--seed=3", "--num_workers=2", "--device=cpu", "--n_heads=4") is None
    assert why("--variant=b0") == "variant differs from the published setting"
    assert why("--number_of_epochs=3", "--debug") == "number_of_epochs, debug differ from the published setting"
    edited = tmp_path / "psla.yaml"
    edited.write_text(file.read_text().replace("\nvariant: b2", "\nvariant: b0").replace("\nlr: 1.0e-4", "\nlr: 0.001"))
    assert remarks.why_not_published(edited, {}, run_opts, sets) == "variant, lr differ from the published setting"
    (tmp_path / "train_official.csv").write_text("mid,clips\n/m/1,2000000\n")
    assert why() == "train_annotation has 90 of the published set's 2000000 labels"
    assert remarks.why_not_published(file, {}, run_opts, sets, epochs_to_go=2) == "2 epochs are not trained yet"
    (tmp_path / "train_official.csv").unlink()
    assert "is not known" in why()


def test_every_recipe_saves_within_an_epoch_and_knows_trackers():
    for file in [*REPOSITORY.glob("recipes/*/hparams/*.yaml")]:
        if file.stem != "aggregate":
            overrides = dict.fromkeys(("class_list", "train_annotation", "valid_annotation", "n_classes"), "x")
            overrides = {"data_folder": str(file.parent), **(overrides if file.stem == "own" else {})}
            settings = read_settings(file, overrides)
            assert settings["ckpt_interval_minutes"] == 15
            assert settings["track"] == []
            # what a folder may change is spelled as the recipes do
            assert {"number_of_epochs", "num_workers", "published"} <= MAY_CHANGE & set(settings)


def test_a_data_folder_that_is_not_there_is_said_before_weights_are_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("weights were fetched"))
    with pytest.raises(SystemExit) as ended:
        main(str(TRAIN), ["hparams/psla.yaml", "--data_folder=/nope", f"--output_folder={tmp_path / 'run'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: /nope: no such folder, which --data_folder names\n")
    assert not (tmp_path / "run").exists()


def test_weights_to_start_from_are_not_fetched_to_go_on(tiny_run, mini_data, tmp_path):
    """A run that was begun from a file of weights goes on without it."""
    from efficientnet_pytorch import EfficientNet

    weights, folder = tmp_path / "b0.pth", tmp_path / "run"
    torch.save(EfficientNet.from_name("efficientnet-b0").state_dict(), weights)
    settings = {"data_folder": mini_data, "output_folder": folder, "pretrained": weights, "width": "null", "depth": "null"}
    log = tmp_path / "log"
    assert finish(command(TRAIN, "hparams/mini.yaml", **settings, number_of_epochs=1), log) == 0, log.read_text()
    weights.unlink()
    assert finish(command(TRAIN, "hparams/mini.yaml", **settings), log) == 0, log.read_text()
    assert len(read_results(folder)["epochs"]) == 2


def test_what_is_printed_first_and_env_log(tiny_run):
    folder, _, done = tiny_run
    printed = done.stdout + done.stderr
    assert "torchvision" not in printed
    assert printed.count("No GPU can be used") == (not torch.accelerator.is_available())
    lines = (folder / "env.log").read_text().splitlines()
    assert lines[1] == sys.executable
    assert f"torch=={version('torch')}" in lines
    assert "The learning rate is still rising when the run ends: it has 10 steps, warmup_steps is 20." in printed
    # names have commas in them
    assert re.search(r"its labels: [^;]+; ", printed)


def test_the_example_is_of_the_runs_device_and_modules(tiny_run, mini_data, tmp_path, monkeypatch):
    opened, from_source = [], evaluation.AudioTagger.from_source
    monkeypatch.setattr(
        evaluation.AudioTagger,
        "from_source",
        lambda source, **kwargs: (opened.append((source, kwargs)), from_source(source, **kwargs))[1],
    )
    folder = shutil.copytree(tiny_run[0], tmp_path / "run")
    arguments = ["--test_only", "--device=cpu"]
    main(str(TRAIN), command(TRAIN, "hparams/mini.yaml", *arguments, data_folder=mini_data, output_folder=folder)[2:])
    ((source, kwargs),) = opened
    assert kwargs == {"run_opts": {"device": "cpu"}}
    assert source.built["embedding_model"] is not None


FETCH = """
import sys
import torch
from psla_sb.lobes import efficientnet
folder, url = sys.argv[1:]
torch.hub.set_dir(folder)
efficientnet.URLS["imagenet"] = {"efficientnet-b0": url}
efficientnet.EfficientNetEncoder("b0", pretrained="imagenet")
"""


def test_processes_that_start_together_fetch_weights_once(tmp_path):
    from efficientnet_pytorch import EfficientNet

    (tmp_path / "www").mkdir()
    torch.save(EfficientNet.from_name("efficientnet-b0").state_dict(), tmp_path / "www" / "b0.pth")
    with serve(tmp_path / "www") as (address, asked):
        argv = [sys.executable, "-c", FETCH, str(tmp_path / "hub"), f"{address}/b0.pth"]
        processes = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert asked == ["/b0.pth"]


def test_help_is_of_the_script(capsys):
    with pytest.raises(SystemExit) as ended:
        aggregate.main(str(TRAIN), ["--help"])
    assert ended.value.code == 0
    assert "Trains" not in capsys.readouterr().out


def test_a_few_classes_are_named_and_others_counted(caplog):
    vocabulary = Vocabulary([f"/m/{i}" for i in range(527)], [f"a name of a class, {i}" for i in range(527)])
    with caplog.at_level("WARNING"):
        warn_of_classes_without_clips(LabelSets.from_lists([[0]]), vocabulary)
    assert "526 classes are on no clip" in caplog.text
    assert "and 521 others" in caplog.text
    assert len(caplog.text) < 500


def test_files_have_the_modes_that_the_umask_gives(mini_data, tmp_path):
    mask = os.umask(0o027)
    try:
        argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", number_of_epochs=1)
        run(argv, cwd=tmp_path, fresh=True)
    finally:
        os.umask(mask)
    # SpeechBrain's copy of the script has the script's own
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "train.py"]
    assert len(files) > 20
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files if stat.S_IMODE(path.stat().st_mode) != 0o640} == {}


def test_world_size_alone_is_one_process(tiny_run, mini_data, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder)
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    assert finish(argv, log, env=env) == 0, log.read_text()
    assert "WORLD_SIZE is 2, but RANK or LOCAL_RANK is not set: this process works alone" in log.read_text()
    assert differences(tiny_run[0], folder) == []


SLURM = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.mark.parametrize(
    ("srun", "requeued"),
    [
        ("exit 0", False),
        # bad input, a full disk or NaN; the same by way of torchrun; out of memory; stopped by a person
        ("exit 2", False),
        ("exit 1", False),
        ("exit 137", False),
        ("exit 75", False),
        # the recipe's own train.py, where there is no such data
        ('shift; exec "$@" > $(dirname $0)/said 2>&1', False),
        # the warning, and a job that saves and leaves, as torchrun and as train.py end
        ('kill -TERM $PPID; trap "exit 1" TERM; sleep 5 & wait', True),
        ('kill -TERM $PPID; trap "exit 75" TERM; sleep 5 & wait', True),
        # the warning came when it was done
        ('trap "" TERM; kill -TERM $PPID; sleep 0.2; exit 0', False),
    ],
)
def test_the_slurm_script_starts_again_after_an_interruption_alone(srun, requeued, tmp_path):
    commands = {
        "srun": f"echo $$ > {tmp_path}/pid\n{srun}",
        "scancel": f"kill -TERM $(cat {tmp_path}/pid) 2> /dev/null; true",
        # one process in place of eight
        "torchrun": f'while [ "${{1%.py}}" = "$1" ]; do shift; done\nexec {sys.executable} "$@"',
        "scontrol": f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued; echo node1',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(SLURM)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, timeout=60, check=False, cwd=REPOSITORY)
    if (tmp_path / "said").exists():
        assert (tmp_path / "said").read_text() == "error: /data/audioset: no such folder, which --data_folder names\n"
    assert (tmp_path / "requeued").exists() == requeued
