"""Rows of many files in one table: formats alike, resumed, killed, by several processes; and what is refused."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from psla_sb.cli.tag import tag
from psla_sb.inference import bulk
from psla_sb.inference.bulk import BulkRows, PathList
from psla_sb.inference.rows import Tags
from psla_sb.inference.tagger import AudioTagger
from runs import rows_by_file, start, two_ranks

N_FILES = 40
# parts of few files, so that there are many of them
SCRIPT = "from psla_sb.cli.tag import tag\nfrom psla_sb.inference import bulk\nbulk.FILES = 3\ntag()\n"


@pytest.fixture(scope="module")
def model(tiny_run):
    return str(tiny_run[0] / "tagger")


@pytest.fixture(scope="module")
def tagger(model):
    return AudioTagger.from_folder(model)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A folder of sounds: short and long ones, in folders, names of any kind, and two that are none."""
    folder, rng = tmp_path_factory.mktemp("archive"), np.random.default_rng(0)
    (folder / "deep").mkdir()
    for i in range(N_FILES):
        name = ["deep/ä {}.wav", "line\nbreak,{}.flac", '"{}".wav', "{}.flac"][i % 4].format(i)
        length = 9 if i == 7 else 0.2 + 0.5 * rng.random()
        soundfile.write(folder / name, 0.1 * rng.standard_normal(round(16000 * length)), 16000)
    shutil.copy(folder / "3.flac", os.path.join(os.fsencode(folder), b"latin-\xe9.flac"))
    (folder / "broken.wav").write_text("no sound")
    (folder / "empty.flac").touch()
    return folder


def status_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        tag([str(argument) for argument in arguments])
    return caught.value.code


def rows_in(table):
    if table.suffix == ".parquet":
        return pq.read_table(table).to_pylist()
    with open(table, encoding="utf-8", newline="") as text:
        if table.suffix == ".jsonl":
            return [json.loads(line) for line in text.read().splitlines()]
        types = {"start": float, "end": float, "score": float, "probability": float, "decision": "True".__eq__}
        return [
            {key: None if cell == "" else types.get(key, str)(cell) for key, cell in row.items()} for row in csv.DictReader(text)
        ]


def assert_alike(rows, expected):
    """Other batches change scores in their last digits, and nothing else."""
    numbers = {"score": 1e-5, "probability": 1e-3}
    plain = [[{key: value for key, value in row.items() if key not in numbers} for row in each] for each in (rows, expected)]
    assert plain[0] == plain[1]
    for key, tolerance in numbers.items():
        both = np.array([[row[key] for row in each] for each in (rows, expected)], float)
        np.testing.assert_allclose(*both, atol=tolerance)


@pytest.fixture(scope="module")
def whole(model, archive, tmp_path_factory):
    """The table of an uninterrupted run."""
    table = tmp_path_factory.mktemp("whole") / "tags.parquet"
    assert status_of(archive, "--model", model, "--out", table, "--workers", 0) == 1
    return table


def test_every_form_has_the_same_rows(model, tagger, archive, whole, tmp_path, capsys):
    expected = rows_in(whole)
    assert list(expected[0]) == ["file", "start", "end", "label", "mid", "score", "probability", "decision", "error"]
    files = {row["file"] for row in expected}
    assert len(files) == N_FILES + 3
    assert f"{archive}/latin-\\xe9.flac" in files
    bad = [row for row in expected if row["error"]]
    assert {Path(row["file"]).name for row in bad} == {"broken.wav", "empty.flac"}
    assert all(row["error"].startswith(row["file"]) and row["label"] is None for row in bad)
    for name in ("tags.csv", "tags.jsonl"):
        assert status_of(archive, "--model", model, "--out", tmp_path / name, "--workers", 2) == 1
        assert rows_in(tmp_path / name) == expected
    for form in ("json", "jsonl"):
        capsys.readouterr()
        assert status_of(archive, "--model", model, "--format", form) == 1
        printed = rows_by_file(capsys.readouterr().out)
        assert [row for rows in printed.values() for row in rows] == expected
    about = json.loads(pq.read_schema(whole).metadata[b"psla_sb"])
    assert about["schema"] == 1
    assert about["labels"] == tagger.labels
    for file in (f"{archive}/3.flac", f"{archive}/line\nbreak,{9}.flac"):
        scores = [row["score"] for row in expected if row["file"] == file]
        np.testing.assert_allclose(scores, [one.score for one in tagger.tag_file(file)], atol=1e-5)


def test_what_is_done_is_skipped_and_new_files_are_added(model, archive, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(archive, tmp_path / "in")
    for name in ("tags.parquet", "tags.csv", "tags.jsonl"):
        table = tmp_path / name
        (folder / "new.wav").unlink(missing_ok=True)
        assert status_of(folder, "--model", model, "--out", table) == 1
        first = rows_in(table)
        with monkeypatch.context() as patch:
            # nothing is tagged again
            patch.setattr(Tags, "_answers", lambda self, files, *_: iter(() if not len(files) else [1 / 0]))
            assert status_of(folder, "--model", model, "--out", table) == 1
        assert rows_in(table) == first
        shutil.copy(folder / "3.flac", folder / "new.wav")
        assert status_of(folder, "--model", model, "--out", table) == 1
        rows = rows_in(table)
        assert rows[: len(first)] == first
        assert {row["file"] for row in rows[len(first) :]} == {str(folder / "new.wav")}
        assert not table.with_name(table.name + ".parts").exists()


@pytest.fixture(scope="module")
def argv(model, archive, tmp_path_factory):
    """The command line, but for the table, as `runs.start` has it."""
    script = tmp_path_factory.mktemp("script") / "psla_tag.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script), str(archive), "--model", model, "--workers", "1", "--out"]


def killed_at_a_random_moment(argv, whole, folder, seed):
    """Kills the command again and again, at moments drawn from the seed, until it ends by itself."""
    rng = random.Random(seed)
    table, log = folder / f"{seed}.parquet", folder / "log"
    about = table.with_name(table.name + ".parts") / "about.json"
    kills = 0
    while True:
        begun = about.stat().st_mtime_ns if about.exists() else None
        process = start([*argv, str(table)], log)
        # each one writes this anew before it begins
        while process.is_alive() and (about.stat().st_mtime_ns if about.exists() else None) == begun:
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.8) if kills < 3 else None)
        if process.is_alive():
            signum = rng.choice([signal.SIGKILL, signal.SIGTERM])
            os.kill(process.pid, signum)
            kills += 1
            process.join()
        if process.exitcode == 1:
            assert table.exists(), log.read_text()
            break
        assert process.exitcode in (-signal.SIGKILL, 75), log.read_text()
    assert kills
    assert_alike(rows_in(table), rows_in(whole))
    assert [file.name for file in folder.glob(f"{seed}.*")] == [table.name]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_no_row_is_lost_or_twice(argv, whole, tmp_path, seed):
    killed_at_a_random_moment(argv, whole, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
def test_killed_at_any_moment_often(argv, whole, tmp_path, seed):
    killed_at_a_random_moment(argv, whole, tmp_path, seed)


def test_killed_between_the_table_and_the_end_of_its_parts(tagger, archive, whole, tmp_path, monkeypatch):
    table, files = tmp_path / "tags.parquet", PathList(sorted(map(str, archive.rglob("*.wav"))))
    monkeypatch.setattr(bulk.shutil, "rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BulkRows(Tags(tagger), table).write(files, progress=False)
    first = rows_in(table)
    monkeypatch.undo()
    more = PathList([*files, str(archive / "3.flac")])
    assert BulkRows(Tags(tagger), table).write(more, progress=False) == 1
    rows = rows_in(table)
    assert rows[: len(first)] == first
    assert [row["file"] for row in rows[len(first) :]] == [str(archive / "3.flac")] * 5


def test_processes_of_torchrun_share_the_files(argv, whole, tmp_path):
    table = tmp_path / "table" / "tags.parquet"
    # two of the files are broken, which whoever ends last says
    assert 1 in two_ranks([*argv, str(table)], tmp_path / "log")
    said = "".join((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert f"{table} has the rows of {N_FILES + 3} files" in said
    assert_alike(rows_in(table), rows_in(whole))
    assert [file.name for file in table.parent.iterdir()] == [table.name]


def test_a_process_alone_leaves_the_table_to_the_last_one(tagger, archive, tmp_path):
    files = PathList(sorted(map(str, archive.rglob("*.wav"))))
    table = tmp_path / "tags.parquet"
    assert BulkRows(Tags(tagger), table).write(files, rank=1, world_size=2, progress=False) is None
    assert not table.exists()
    assert BulkRows(Tags(tagger), table).write(files, rank=0, world_size=2, progress=False) == 1
    assert list(dict.fromkeys(row["file"] for row in rows_in(table))) == list(files)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--top-k", 3], "top_k: 5 there, 3 now"),
        (["--threshold", 0.5], "threshold: None there, 0.5 now"),
        (["--pool", "mean"], "pool: max there, mean now"),
        (["--events"], "rows: tags there, events now"),
        (["--scores", "float16"], "rows: tags there, scores now"),
    ],
)
def test_other_settings_are_refused(model, archive, whole, tmp_path, capsys, changed, message):
    table = shutil.copy(whole, tmp_path / "tags.parquet")
    before = table.read_bytes()
    assert status_of(archive, "--model", model, "--out", table, *changed) == 2
    assert message in capsys.readouterr().err
    assert table.read_bytes() == before


def test_another_model_and_what_is_not_ours_are_refused(model, tagger, archive, whole, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    weights = other / "classifier.ckpt"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    table = shutil.copy(whole, tmp_path / "tags.parquet")
    assert status_of(archive, "--model", other, "--out", table) == 2
    assert "model: " in capsys.readouterr().err
    for name in ("mine.parquet", "mine.csv", "mine.jsonl"):
        (tmp_path / name).write_text("mine")
        assert status_of(archive, "--model", model, "--out", tmp_path / name) == 2
        assert f"{tmp_path / name}: is there already, and not by psla-tag" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
    assert status_of(archive, "--model", model, "--out", tmp_path / "tags.xlsx") == 2
    assert "give a name that ends with .parquet, .csv, .jsonl" in capsys.readouterr().err


def test_scores_and_embeddings(model, tagger, archive, tmp_path, capsys):
    short = [str(archive / "3.flac"), str(archive / "deep" / "ä 0.wav"), str(archive / "broken.wav")]
    assert status_of(*short, "--model", model, "--out", tmp_path / "a.parquet", "--scores", "float16") == 1
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("scores").type.list_size == len(tagger.labels)
    assert str(table.schema.field("scores").type.value_type) == "halffloat"
    rows = table.to_pylist()
    for row, file in zip(rows, short[:2], strict=False):
        by_mid = {one.mid: one.score for one in tagger.tag_file(file, top_k=1000)}
        np.testing.assert_allclose(row["scores"], [by_mid[mid] for mid in tagger.hparams.mids], atol=1e-3)
    assert rows[2]["scores"] is None
    assert rows[2]["error"]
    long = str(archive / "line\nbreak,1.flac")
    assert status_of(*short, long, "--model", model, "--out", tmp_path / "b.parquet", "--embeddings") == 1
    vectors = [row["embedding"] for row in pq.read_table(tmp_path / "b.parquet").to_pylist()]
    from psla_sb.dataio.audio import read_clip

    expected = tagger.scene_embeddings(read_clip(short[0]))[0].numpy()
    np.testing.assert_allclose(vectors[0], expected, atol=1e-4)
    assert len(vectors[3]) == len(expected)
    assert status_of(*short, "--model", model, "--out", tmp_path / "a.csv", "--embeddings") == 2
    assert "a table must be .parquet" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["--events", "--timeline"])
def test_events_and_timelines_in_a_table_are_those_that_are_printed(model, archive, tmp_path, capsys, what):
    options = [archive / "3.flac", archive / "broken.wav", "--model", model, what, "--threshold", 0.3]
    assert status_of(*options, "--out", tmp_path / "a.parquet") == 1
    capsys.readouterr()
    assert status_of(*options, "--format", "json") == 1
    assert json.loads(capsys.readouterr().out)["rows"] == rows_in(tmp_path / "a.parquet")


def test_one_file_each(model, archive, whole, tmp_path, capsys):
    expected = {}
    for row in rows_in(whole):
        expected.setdefault(row["file"], []).append(row)
    for form in ("json", "csv"):
        out = tmp_path / form
        for status in (1, 0):
            assert status_of(archive, "--model", model, "--out-dir", out, "--format", form) == status
        (out / f"3.flac.{form}").unlink()
        assert status_of(archive, "--model", model, "--out-dir", out, "--format", form) == 0
        assert len([file for file in out.rglob(f"*.{form}") if file.name != "about.json"]) == len(expected)
    rows = json.loads((tmp_path / "json" / "deep" / "ä 0.wav.json").read_text(encoding="utf-8"))["rows"]
    assert rows == expected[f"{archive}/deep/ä 0.wav"]
    assert status_of(archive, "--model", model, "--out-dir", tmp_path / "json", "--top-k", 2) == 2
    assert "top_k: 5 there, 2 now" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert status_of(archive, "--model", model, "--out-dir", tmp_path / "mine") == 2
    same = [archive / "3.flac", tmp_path / "3.flac"]
    shutil.copy(*same)
    assert status_of(*same, "--model", model, "--out-dir", tmp_path / "both") == 2
    assert "two of the sounds would have the same name" in capsys.readouterr().err


def test_lists_and_annotations(model, archive, tmp_path, capsys, monkeypatch):
    latin = os.path.join(os.fsencode(archive), b"latin-\xe9.flac")
    (tmp_path / "list.txt").write_bytes(os.fsencode(archive / "3.flac") + b"\n\n" + latin + b"\n")
    (tmp_path / "clips.csv").write_text("ID,wav,duration,labels\na,{data_root}/3.flac,1,x\nb,{data_root}/11.flac,1,x\n")
    ways = {"list.txt": ["3.flac", "latin-\\xe9.flac"], "clips.csv": ["3.flac", "11.flac"]}
    for name, expected in ways.items():
        options = ["--list", tmp_path / name, "--data-folder", archive, "--top-k", 1, "--model", model]
        assert status_of(*options, "--format", "jsonl") == 0
        assert list(rows_by_file(capsys.readouterr().out)) == [f"{archive}/{one}" for one in expected]
    assert status_of("--list", tmp_path / "none.txt", "--model", model) == 2
    assert "none.txt: cannot be read as a list of files" in capsys.readouterr().err
    (tmp_path / "segments.csv").write_text("ID,wav,duration,labels,start\na,{data_root}/3.flac,0.1,x,0.1\n")
    assert status_of("--list", tmp_path / "segments.csv", "--model", model) == 2
    assert "segments of recordings" in capsys.readouterr().err


def test_two_names_that_would_be_one_in_the_table_are_refused(model, archive, tmp_path, capsys):
    for name in (b"\xe9.flac", rb"\xe9.flac"):
        shutil.copy(archive / "3.flac", os.path.join(os.fsencode(tmp_path), name))
    assert status_of(tmp_path, tmp_path, "--model", model, "--out", tmp_path / "a.parquet") == 2
    assert "would have the same name in the table; rename one of them" in capsys.readouterr().err


def test_pandas_and_duckdb_read_the_tables(whole, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(whole)
    assert frame.file.nunique() == N_FILES + 3
    duckdb = pytest.importorskip("duckdb")
    query = f"SELECT label, count(*) n FROM '{whole}' WHERE error IS NULL GROUP BY label ORDER BY n DESC, label"
    expected = frame[frame.error.isna()].groupby("label").size()
    assert dict(duckdb.sql(query).fetchall()) == expected.to_dict()
