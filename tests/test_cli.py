"""psla-tag, on the tagger of a tiny run."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from psla_sb.cli.tag import tag
from psla_sb.dataio.manifest import Manifest
from psla_sb.inference.tagger import AudioTagger
from psla_sb.inference.timeline import events, top_classes
from runs import rows_by_file

N_CLASSES = 39


@pytest.fixture(scope="module")
def model(tiny_run):
    return str(tiny_run[0] / "tagger")


@pytest.fixture(scope="module")
def sounds(tiny_run, mini_data):
    manifest = Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)
    return [manifest[0]["wav"], manifest[1]["wav"]]


def status_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        tag([str(argument) for argument in arguments])
    return caught.value.code


def tag_row(file, tag):
    return {"file": str(file), "start": None, "end": None, **tag._asdict(), "error": None}


def test_table(model, sounds, tmp_path, capsys):
    # a tagger without thresholds; tests/test_decisions.py has those with
    model = shutil.copytree(model, tmp_path / "tagger")
    (model / "calibration.json").unlink()
    assert status_of(*sounds, "--model", model, "--top-k", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    tags = AudioTagger.from_folder(model).tag_file(sounds[1], top_k=3)
    assert len(lines) == 8
    assert [lines[0], lines[4]] == sounds
    assert lines[5:] == [f"  {tag.score:.3f}  {tag.label}" for tag in tags]


def test_json(model, sounds, capsys):
    assert status_of("--model", model, "--format", "json", *sounds) == 0
    answers = rows_by_file(capsys.readouterr().out)
    assert list(answers) == sounds
    for sound in sounds:
        tags = AudioTagger.from_folder(model).tag_file(sound)
        assert answers[sound] == [tag_row(sound, tag) for tag in tags]
        assert len(tags) == 5


@pytest.mark.parametrize("form", ["table", "json"])
def test_broken_files_among_others(form, model, sounds, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty").mkdir()
    files = [tmp_path / "none.wav", sounds[0], tmp_path / "empty", tmp_path / "text.wav", sounds[1]]
    assert status_of(*files, "--model", model, "--format", form) == 1
    done = capsys.readouterr()
    for sound in sounds:
        assert sound in done.out
    if form == "table":
        assert str(tmp_path) not in done.out
    else:
        answers = rows_by_file(done.out)
        assert list(answers) == [str(file) for file in files if str(file) != str(tmp_path / "empty")]
        for file in (files[0], files[3]):
            (row,) = answers[str(file)]
            assert row.pop("error").startswith(f"{file}: ")
            assert row.pop("file") == str(file)
            assert set(row.values()) == {None}
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert {line.split(": ")[1] for line in errors} == {str(file) for file in files} - set(sounds)
    assert len(errors) == 3
    assert "Traceback" not in done.err


def test_more_tags_than_classes(model, sounds, capsys):
    assert status_of(sounds[0], "--model", model, "--top-k", 1000) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + N_CLASSES


def test_truncated_weights_are_named(model, sounds, tmp_path, capsys):
    folder = tmp_path / "tagger"
    shutil.copytree(model, folder)
    weights = folder / "classifier.ckpt"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert status_of(sounds[0], "--model", folder) == 2
    assert f"{weights}: not a whole safetensors file" in capsys.readouterr().err


def test_folders_patterns_and_stdin(model, sounds, tmp_path, capsys, monkeypatch):
    for name in ("a.flac", "deep/er/b.FLAC", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sounds[0], tmp_path / name)
    (tmp_path / "deep/c.txt").write_text("no sound")
    files = [str(tmp_path / "a.flac"), str(tmp_path / "deep/er/b.FLAC")]
    for argument in (tmp_path, f"{tmp_path}/**/*[a-zA-Z].[fF]*"):
        assert status_of(argument, "--model", model, "--format", "json", "--top-k", 1) == 0
        answers = rows_by_file(capsys.readouterr().out)
        assert list(answers) == files
        assert answers[files[0]] == [{**row, "file": files[0]} for row in answers[files[1]]]
    assert status_of(f"{tmp_path}/*.none", "--model", model) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/*.none: no sound files")
    for content, status in ((Path(sounds[0]).read_bytes(), 0), (b"no sound", 1)):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        assert status_of("-", "--model", model, "--format", "jsonl", "--top-k", 1) == status
        done = capsys.readouterr()
        if status == 0:
            assert json.loads(done.out) == {**answers[files[0]][0], "file": "-"}
        else:
            assert done.err.startswith("error: -: cannot be decoded as sound")


def test_jsonl_csv_and_threshold(model, sounds, capsys):
    assert status_of(*sounds, "--model", model, "--format", "jsonl") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [sound for sound in sounds for _ in range(5)]
    assert status_of(*sounds, "--model", model, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows == [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines]
    threshold = lines[1]["score"]
    assert status_of(sounds[0], "--model", model, "--format", "jsonl", "--threshold", threshold) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_timeline_events_and_plot(model, sounds, tmp_path, capsys):
    timeline = AudioTagger.from_folder(model).tag_timeline(sounds[0])
    assert status_of(sounds[0], "--model", model, "--format", "jsonl", "--timeline", "--top-k", 2) == 0
    (rows,) = rows_by_file(capsys.readouterr().out).values()
    best, half = top_classes(timeline, 2), timeline.step / 2
    assert [(row["start"], row["end"], row["label"], row["mid"]) for row in rows] == [
        (round(t - half, 3), round(t + half, 3), timeline.labels[c], timeline.mids[c])
        for t in timeline.times.tolist()
        for c in best
    ]
    np.testing.assert_allclose([row["score"] for row in rows], timeline.scores[:, best].ravel(), atol=1e-6)
    threshold = float(np.median(timeline.scores.max(0)))
    picture = tmp_path / "picture.png"
    options = ["--format", "jsonl", "--events", "--threshold", threshold, "--plot", picture]
    assert status_of(sounds[0], "--model", model, *options) == 0
    (rows,) = rows_by_file(capsys.readouterr().out).values()
    assert [(row["label"], row["start"], row["end"], row["score"]) for row in rows] == [
        (one.label, round(one.start, 3), round(one.end, 3), one.score) for one in events(timeline, threshold)
    ]
    assert rows
    assert all(timeline.mids[timeline.labels.index(row["label"])] == row["mid"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert status_of(*sounds, "--model", model, "--plot", picture) == 2
    assert "--plot draws one recording, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav"], "--model FOLDER, the folder of a trained tagger. A training run writes one:"),
        (["a.wav"], "make demo"),
        (["a.wav", "--model", "/nowhere"], "/nowhere: not the folder of a tagger"),
        (["a.wav", "--model", "/"], "/: not the folder of a tagger"),
        (["a.wav", "--model", "x", "--top-k", "0"], "--top-k must be 1 or more"),
        (["a.wav", "--model", "x", "--top-k", "many"], "invalid int value: 'many'"),
        (["a.wav", "--model", "x", "--threshold", "2"], "--threshold must be above 0 and at most 1"),
        (["a.wav", "--model", "x", "--timeline", "--events"], "not allowed with"),
        (["a.wav", "--model", "x", "--plot", "a.pdf"], "a.pdf: pictures are PNG files"),
        (["a.wav", "--model", "x", "--format", "xml"], "invalid choice: 'xml'"),
        (["a.wav", "--model", "x", "--device", "qpu"], "--device qpu cannot be used"),
        (["a.wav", "--model", "x", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--model", "x"], "FILE"),
        (["a.wav", "--model", "x", "--out", "a.parquet", "--format", "csv"], "leave --format out"),
        (["-", "--model", "x", "--out", "a.parquet"], "the sound on stdin has no name"),
        (["a.wav", "--model", "x", "--scores", "float16"], "give --out NAME.parquet"),
        (["a.wav", "--model", "x", "--out", "a.csv", "--plot", "a.png"], "--plot draws what is printed"),
        (["a.wav", "--model", "x", "--out-dir", "a", "--format", "table"], "--out-dir writes json, jsonl or csv"),
        (["a.wav", "--model", "x", "--retry"], "--retry is of --out"),
        (["a.wav", "--model", "x", "--events", "--top-k", "2"], "--top-k changes nothing of events; it is of tags, timeline"),
        (["a.wav", "--model", "x", "--timeline", "--pool", "mean"], "--pool changes nothing of timeline"),
        (["a.wav", "--model", "x", "--data-folder", "b"], "--data-folder is of the annotation"),
        (["a.wav", "--model", "x", "--workers", "-1"], "--workers 0 or more"),
        (["a.wav", "--model", "x", "--out", "a.csv", "--out-dir", "a"], "not allowed with"),
    ],
)
def test_wrong_command_line(arguments, message, capsys):
    assert status_of(*arguments) == 2
    done = capsys.readouterr()
    assert message in done.err
    assert done.out == ""


def test_help_imports_nothing_slow():
    code = """
import sys
from psla_sb.cli.tag import tag
try:
    tag(["--help"])
except SystemExit as stop:
    assert stop.code == 0
try:
    tag(["a.wav"])
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "speechbrain", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in (
        "FILE",
        "--model",
        "--top-k",
        "--threshold",
        "--format",
        "--timeline",
        "--events",
        "--plot",
        "--device",
        "--hierarchy",
        "--out",
        "--list",
        "--workers",
    ):
        assert option in done.stdout


def test_is_installed_as_psla_tag():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="psla-tag")
    assert script.load() is tag


def test_names_of_any_kind(model, sounds, tmp_path, monkeypatch, capfd):
    names = [b"-dash.wav", b"--x.wav", b"latin-\xe9.flac", b"line\nbreak.flac"]
    for name in names:
        shutil.copy(sounds[0], os.path.join(os.fsencode(tmp_path), name))
    monkeypatch.chdir(tmp_path)
    expected = None
    for form in ("table", "json", "jsonl", "csv"):
        for name in names:
            assert status_of(os.fsdecode(name), "--model", model, "--format", form, "--top-k", 1) == 0
            printed = capfd.readouterr().out
            if form == "jsonl":
                line = json.loads(printed)
                # a byte that is not UTF-8 stands as in Python's source
                assert line.pop("file") == name.decode("utf-8", "backslashreplace")
                assert expected in (None, line)
                expected = line
    assert status_of(".", "--model", model, "--format", "json") == 0
    assert len(rows_by_file(capfd.readouterr().out)) == 4


def test_what_a_folder_has_that_cannot_be_read_is_named_and_counted(model, sounds, tmp_path, capsys):
    shutil.copy(sounds[0], tmp_path / "a")
    (tmp_path / "b.wma").write_bytes(b"0&\xb2u\x8ef\xcf\x11" + bytes(100))
    (tmp_path / "c.m4a").write_text("no sound")
    (tmp_path / "notes.md").write_text("no sound")
    assert status_of(tmp_path, "--model", model) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == str(tmp_path / "a")
    assert [line.split(": ")[1] for line in printed.err.splitlines()[:2]] == [str(tmp_path / "b.wma"), str(tmp_path / "c.m4a")]
    assert printed.err.splitlines()[-1] == "2 of 3 files could not be tagged"


def test_pool(model, sounds, tmp_path, capsys):
    wave, rate = soundfile.read(sounds[0])
    soundfile.write(tmp_path / "long.wav", np.concatenate([np.zeros(3 * rate), wave, np.zeros(rate)]), rate)
    tagger = AudioTagger.from_folder(model)
    for pool in ("max", "mean", "first"):
        assert status_of(tmp_path / "long.wav", "--model", model, "--format", "jsonl", "--pool", pool) == 0
        (rows,) = rows_by_file(capsys.readouterr().out).values()
        expected = [tag_row(tmp_path / "long.wav", tag) for tag in tagger.tag_file(tmp_path / "long.wav", pool=pool)]
        # the command has more windows in a batch, which changes sums in their last digit
        for row, one in zip(rows, expected, strict=True):
            numbers = {key: pytest.approx(one[key], abs=tolerance) for key, tolerance in (("score", 1e-6), ("probability", 1e-4))}
            assert row == {**one, **numbers}
