"""Processes that torchrun starts: on two machines with one network file system, with unequal memory, with other files."""

import csv
import json
import re
import sys

import numpy as np
import pytest

from psla_sb.dataio.manifest import Manifest
from runs import TRAIN, at_start, command, differences, finish, torchrun, two_ranks

AGGREGATE = TRAIN.with_name("aggregate.py")
CLIENT = """
import network_folder
network_folder.mount(os.environ["FOLDER"], int(os.environ["RANK"]))
"""


def settings_with_bad_clips(tiny_run, mini_data, folder):
    """Of a run whose validation set, two batches of 100 clips, has a file that cannot be read in each."""
    clips = Manifest.from_csv(tiny_run[0] / "eval.csv", mini_data)
    bad = folder / "bad.flac"
    bad.write_bytes(b"fLaC, but no sound")
    wavs = [str(bad) if i in (3, 103) else clips[i % 20]["wav"] for i in range(200)]
    labels = [";".join(clips[i % 20]["labels"]) for i in range(200)]
    Manifest.from_columns([f"c{i}" for i in range(200)], wavs, [0.5] * 200, labels).to_csv(folder / "eval.csv")
    return {
        "data_folder": mini_data,
        "skip_prep": True,
        "train_annotation": tiny_run[0] / "train.csv",
        "valid_annotation": folder / "eval.csv",
        "valid_batch_size": 100,
        "on_bad_audio": "skip",
    }


def test_training_and_going_on(tiny_run, mini_data, tmp_path):
    (tmp_path / "shared").mkdir()
    settings = settings_with_bad_clips(tiny_run, mini_data, tmp_path / "shared")
    folder, here, log = tmp_path / "shared" / "run", tmp_path / "run", tmp_path / "log"
    assert two_ranks(command(TRAIN, "hparams/mini.yaml", **settings, output_folder=here), log) == [0, 0]
    env = at_start(tmp_path, CLIENT, FOLDER=tmp_path / "shared")
    for epochs in (1, 2):
        argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=folder, number_of_epochs=epochs)
        assert torchrun(argv, env=env).stdout.count("Going into epoch") == 1
    assert differences(folder, here) == []
    with open(folder / "bad_clips.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["set", "ID", "error"]
    assert b"\r" not in (folder / "bad_clips.csv").read_bytes()
    assert sorted(row[:2] for row in rows) == [["valid", "c103"], ["valid", "c3"]]


def aggregation(lively_runs, folder):
    """The command line of an aggregation of four members, picked on other clips than are reported on."""
    runs = f'--runs=["{lively_runs / "a"}","{lively_runs / "b"}"]'
    selection = ["--select=greedy", f"--selection_annotation={lively_runs / 'a' / 'train.csv'}"]
    options = ["--device=cpu", "--batch_size=6", "--num_workers=0", f"--output_folder={folder}"]
    return [sys.executable, str(AGGREGATE), "hparams/aggregate.yaml", runs, *selection, *options]


@pytest.fixture(scope="module")
def alone(lively_runs, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(aggregation(lively_runs, folder), folder / "log") == 0, (folder / "log").read_text()
    return folder


def others(folder, alone):
    """The files of an aggregation that are not as one process writes them."""
    files = [path.relative_to(alone) for pattern in ("*scores/*", "ensemble.*") for path in alone.glob(pattern)]
    assert len(files) == 2 * 4 + 2 * 5 + 3
    return [file for file in files if file.suffix != ".png" and (folder / file).read_bytes() != (alone / file).read_bytes()]


def test_scoring_and_a_second_time(lively_runs, alone, tmp_path):
    env = at_start(tmp_path, CLIENT, FOLDER=tmp_path / "shared")
    folder = tmp_path / "shared" / "ensemble"
    folder.mkdir(parents=True)
    torchrun(aggregation(lively_runs, folder), env=env)
    assert others(folder, alone) == []
    written = [path.stat().st_mtime_ns for path in sorted(folder.glob("*scores/*.npy"))]
    torchrun(aggregation(lively_runs, folder), env=env)
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*scores/*.npy"))] == written
    assert others(folder, alone) == []


ROOM = """
from psla_sb.aggregation import report, scoring
rank, average_precision, greedy_selection = int(os.environ["RANK"]), report.average_precision, report.greedy_selection
# the first process has room for one model at a time, the other for all
scoring._has_room = lambda taggers: len(taggers) < (1, 9)[rank]
def selected(scores, targets):
    print(f"process {rank} selects")
    def counted(*args):
        print("tried", flush=True)
        return average_precision(*args)
    report.average_precision = counted
    found = greedy_selection(scores, targets)
    report.average_precision = average_precision
    return found
report.greedy_selection = selected
"""


def test_one_process_decides_what_fits_and_selects(lively_runs, alone, tmp_path):
    folder = tmp_path / "ensemble"
    said = torchrun(aggregation(lively_runs, folder), env=at_start(tmp_path, ROOM), fresh=True).stdout
    assert others(folder, alone) == []
    for file in folder.glob("*scores/*.npy"):
        assert np.isfinite(np.load(file)).all()
    assert "process 0 selects" in said
    assert "process 1 selects" not in said
    # it has stopped at the first round in which none gained
    chosen = json.loads((folder / "ensemble.json").read_text())["chosen"]
    assert len(chosen) < 4
    assert said.count("tried") == 4 * (len(chosen) + 1)


# the second process has an older copy of the annotation, or of the sounds, on its own disk
OTHER_CLIPS = """
from psla_sb.dataio.manifest import Manifest
from_file = Manifest.from_file.__func__
def less(cls, *args):
    manifest = from_file(cls, *args)
    manifest.table = manifest.table.slice(0, len(manifest) - int(os.environ["RANK"]))
    return manifest
Manifest.from_file = classmethod(less)
"""
OTHER_SOUNDS = """
from psla_sb.dataio import loudness
if os.environ["RANK"] == "1":
    read_blocks = loudness.read_blocks
    loudness.read_blocks = lambda *args: (block * 0.1 for block in read_blocks(*args))
"""


@pytest.mark.parametrize("code", [OTHER_CLIPS, OTHER_SOUNDS])
def test_processes_that_read_other_files_do_not_train_together(code, tiny_run, mini_data, tmp_path):
    files = {"train_annotation": tiny_run[0] / "train.csv", "valid_annotation": tiny_run[0] / "eval.csv", "skip_prep": True}
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", **files)
    done = torchrun(argv, env=at_start(tmp_path, code), check=False)
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the processes have read different annotations, class lists or sounds; ")
    assert not (tmp_path / "run" / "results.json").exists()


ONE_FAILS = """
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from_csv = Vocabulary.from_csv
def cannot_be_read(path):
    if os.environ["RANK"] == "1":
        raise InputError(f"{path}: cannot read this class list")
    return from_csv(path)
Vocabulary.from_csv = cannot_be_read
"""


def test_what_one_process_alone_has_found_is_said(mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run")
    done = torchrun(argv, env=at_start(tmp_path, ONE_FAILS), check=False)
    assert done.returncode != 0
    assert re.search(r"^error: \S+: cannot read this class list$", done.stderr, re.MULTILINE), done.stderr
