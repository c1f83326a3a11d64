"""Rows of many files in one table: formats alike, resumed, killed, by several processes; and what is refused."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from psla_sb.cli.tag import tag
from psla_sb.inference import bulk
from psla_sb.inference.bulk import BulkRows, PathList
from psla_sb.inference.rows import FileRows, Tags
from psla_sb.inference.tagger import AudioTagger
from runs import rows_by_file, start, two_ranks

N_FILES = 40
# parts of few files, so that there are many of them
SCRIPT = """
from psla_sb.cli.tag import tag
from psla_sb.inference import bulk

bulk.FILES, write = 3, bulk.BulkRows.write


def begun(self, *args, **kwargs):
    with open(f"{self.out}.begun", "a") as marks:
        marks.write(".")
    return write(self, *args, **kwargs)


bulk.BulkRows.write = begun
tag()
"""


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
    marks = folder / f"{seed}.parquet.begun"
    kills, longest = 0, 0.8
    while True:
        begun = marks.stat().st_size if marks.exists() else 0
        process = start([*argv, str(table)], log)
        while process.is_alive() and (marks.stat().st_size if marks.exists() else 0) == begun:
            time.sleep(0.01)
        process.join(rng.uniform(0, longest) if kills < 3 else None)
        if process.is_alive():
            signum = rng.choice([signal.SIGKILL, signal.SIGTERM])
            os.kill(process.pid, signum)
            kills += 1
            process.join()
        if process.exitcode == 1:
            assert table.exists(), log.read_text()
            if kills:
                break
            # it was done before it could be killed
            table.unlink()
            longest /= 2
            continue
        assert process.exitcode in (-signal.SIGKILL, 75), log.read_text()
    assert_alike(rows_in(table), rows_in(whole))
    assert sorted(file.name for file in folder.glob(f"{seed}.*")) == [table.name, marks.name]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_no_row_is_lost_or_twice(argv, whole, tmp_path, seed):
    killed_at_a_random_moment(argv, whole, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
def test_killed_at_any_moment_often(argv, whole, tmp_path, seed):
    killed_at_a_random_moment(argv, whole, tmp_path, seed)


def test_killed_between_the_table_and_the_end_of_its_parts(tagger, archive, tmp_path, monkeypatch):
    table, files = tmp_path / "tags.parquet", PathList(sorted(map(str, archive.rglob("*.wav"))))
    monkeypatch.setattr(bulk, "FILES", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **_: 1 / 0 if self.suffix == ".parquet" and self.exists() else None)
        with pytest.raises(ZeroDivisionError):
            BulkRows(Tags(tagger), table).write(files, progress=False)
    first = rows_in(table)
    next(table.with_name("tags.parquet.parts").glob("*.parquet")).unlink()
    more = PathList([*files, str(archive / "3.flac")])
    assert BulkRows(Tags(tagger), table).write(more, progress=False) == (len(more), 1, 0, 0)
    rows = rows_in(table)
    assert sorted(map(str, rows[:-5])) == sorted(map(str, first))
    assert [row["file"] for row in rows[-5:]] == [str(archive / "3.flac")] * 5


def test_processes_of_torchrun_share_the_files(argv, whole, tmp_path):
    table = tmp_path / "table" / "tags.parquet"
    table.parent.mkdir()
    # two of the files are broken, which whoever ends last says
    assert 1 in two_ranks([*argv, str(table)], tmp_path / "log")
    said = "".join((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert f"{table} has the rows of {N_FILES + 3} files" in said
    both = [sorted(rows_in(one), key=lambda row: (row["file"], -(row["score"] or 0))) for one in (table, whole)]
    assert_alike(*both)
    assert sorted(file.name for file in table.parent.iterdir()) == [".lock", table.name, f"{table.name}.begun"]


def test_a_process_alone_leaves_the_table_to_the_last_one(tagger, archive, tmp_path):
    files = PathList(sorted(map(str, archive.rglob("*.wav"))))
    table = tmp_path / "tags.parquet"
    first = BulkRows(Tags(tagger), table).write(files, rank=1, world_size=2, progress=False)
    assert first.n_left > 0
    assert not table.exists()
    # this one finds a file that came meanwhile
    more = PathList([str(archive / "3.flac"), *files])
    last = BulkRows(Tags(tagger), table).write(more, rank=0, world_size=2, progress=False)
    assert last.n_left in (0, 1)
    assert BulkRows(Tags(tagger), table).write(more, progress=False) == (len(more), 1, 0, 0)
    assert sorted({row["file"] for row in rows_in(table)}) == sorted(more)


def test_processes_that_begin_and_end_together(archive, tmp_path):
    """Many times, and with another one besides, without a model, whose answers would take too long."""

    class Names(FileRows):
        def __init__(self):
            self.settings, self.thresholds = {"schema": 1}, None
            self.tagger = SimpleNamespace(labels=["a"], hparams=SimpleNamespace(mids=["a"]))

        def _answers(self, files, batch_size, num_workers):
            yield from ((i, [{"label": "a", "mid": "a", "score": 0.5}], None) for i in range(len(files)))

    files = PathList(f"{i}.wav" for i in range(60))
    for trial in range(15):
        table, found, barrier = tmp_path / f"{trial}.csv", [], threading.Barrier(5)

        def work(rank, world_size, table=table, found=found, barrier=barrier):
            rows = BulkRows(Names(), table)
            barrier.wait()
            found.append(rows.write(files, rank=rank, world_size=world_size, progress=False))

        threads = [threading.Thread(target=work, args=args) for args in ((0, 4), (1, 4), (2, 4), (3, 4), (0, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 5
        assert sorted(row["file"] for row in rows_in(table)) == sorted(files)
    assert not list(tmp_path.glob("*.parts/*.parquet"))


def test_text_of_any_kind_comes_back(tmp_path):
    odd = ["a\rb", "a\r\nb", 'q"q', ",", "NA", "null", "1e5", "True", " ", "\x00\x1f", "ä\u2028"]

    class Odd(FileRows):
        def __init__(self):
            self.settings, self.thresholds = {"schema": 1}, None
            self.tagger = SimpleNamespace(labels=odd, hparams=SimpleNamespace(mids=odd))

        def _answers(self, files, batch_size, num_workers):
            for i, file in enumerate(files):
                tags = [{"label": odd[i % len(odd)], "mid": odd[-1 - i % len(odd)], "score": 0.1}]
                yield i, [] if i == 3 else tags, f"{file} \r " * 4000 if i == 3 else None

    for suffix in (".csv", ".jsonl", ".parquet"):
        table = tmp_path / f"a{suffix}"
        assert BulkRows(Odd(), table).write(PathList(f"{one}.wav" for one in odd), progress=False).n_left == 0
        before = rows_in(table)
        assert BulkRows(Odd(), table).write(PathList([*(f"{one}.wav" for one in odd), "more.wav"]), progress=False).n_left == 0
        assert rows_in(table)[: len(before)] == before
        assert [row["file"] for row in before] == [f"{one}.wav" for one in odd]
        assert [row["label"] for row in before] == [*odd[:3], None, *odd[4:]]
        assert len(before[3]["error"]) == 10_000


def test_errors_are_tried_again_if_asked_for(model, archive, tmp_path, capsys):
    folder = shutil.copytree(archive, tmp_path / "in")
    for name in ("tags.parquet", "tags.csv"):
        (folder / "broken.wav").write_text("no sound")
        options = [folder, "--model", model, "--out", tmp_path / name]
        assert status_of(*options) == 1
        shutil.copy(folder / "3.flac", folder / "broken.wav")
        assert status_of(*options) == 1
        assert [row["error"] is None for row in rows_in(tmp_path / name) if row["file"] == str(folder / "broken.wav")] == [False]
        assert status_of(*options, "--retry") == 1
        assert [row["error"] is None for row in rows_in(tmp_path / name) if row["file"] == str(folder / "broken.wav")] == [True] * 5
        capsys.readouterr()
        assert status_of(folder / "broken.wav", "--model", model, "--out", tmp_path / name) == 0
        assert f"and of {N_FILES + 2} that were not named now" in capsys.readouterr().err


def test_nothing_to_tag_is_no_table(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert status_of(tmp_path / "empty", tmp_path / "slip", "--model", model, "--out", tmp_path / "a.parquet") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'empty'}: no sound files there" in said
    assert f"{tmp_path / 'slip'}: no such file or folder" in said
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]
    assert status_of(tmp_path, "--model", model, "--out", tmp_path / "empty.parquet") == 1
    (tmp_path / "d.csv").mkdir()
    assert status_of(tmp_path, "--model", model, "--out", tmp_path / "d.csv") == 2
    assert "is a folder" in capsys.readouterr().err


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
        for _ in range(2):
            # the broken ones are tried, and named, each time
            assert status_of(archive, "--model", model, "--out-dir", out, "--format", form) == 1
        (out / f"3.flac.{form}").unlink()
        assert status_of(archive, "--model", model, "--out-dir", out, "--format", form) == 1
        named = [file for file in out.rglob(f"*.{form}") if not file.name.startswith("psla-tag.")]
        assert len(named) == len(expected) - 2
    errors = json.loads((tmp_path / "json" / "psla-tag.errors.json").read_text(encoding="utf-8"))["rows"]
    assert errors == [rows[0] for rows in expected.values() if rows[0]["error"]]
    rows = json.loads((tmp_path / "json" / "deep" / "ä 0.wav.json").read_text(encoding="utf-8"))["rows"]
    assert_alike(rows, expected[f"{archive}/deep/ä 0.wav"])
    assert status_of(archive, "--model", model, "--out-dir", tmp_path / "json", "--top-k", 2) == 2
    assert "top_k: 5 there, 2 now" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert status_of(archive, "--model", model, "--out-dir", tmp_path / "mine") == 2
    same = [archive / "3.flac", tmp_path / "3.flac"]
    shutil.copy(*same)
    assert status_of(*same, "--model", model, "--out-dir", tmp_path / "both") == 2
    assert "two of the sounds would have the same name" in capsys.readouterr().err
    assert status_of(same[0], "--model", model, "--out-dir", tmp_path / "vectors", "--scores", "float32") == 0
    (row,) = json.loads((tmp_path / "vectors" / "3.flac.json").read_text())["rows"]
    assert len(row["scores"]) == 39


def test_lists_and_annotations(model, archive, tmp_path, capsys, monkeypatch):
    latin = os.path.join(os.fsencode(archive), b"latin-\xe9.flac")
    (tmp_path / "list.txt").write_bytes(os.fsencode(archive / "3.flac") + b"\n\n" + latin + b"\n")
    (tmp_path / "clips.csv").write_text("ID,wav,duration,labels\na,{data_root}/3.flac,1,x\nb,{data_root}/11.flac,1,x\n")
    ways = {"list.txt": ["3.flac", "latin-\\xe9.flac"], "clips.csv": ["3.flac", "11.flac"]}
    for name, expected in ways.items():
        options = ["--list", tmp_path / name, "--data-folder", archive, "--top-k", 1, "--model", model]
        assert status_of(*options, "--format", "jsonl") == 0
        assert list(rows_by_file(capsys.readouterr().out)) == [f"{archive}/{one}" for one in expected]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode(archive / "3.flac") + b"\nno[n]e*.wav\n")
    assert status_of("--list", tmp_path / "marked.txt", "--model", model, "--format", "jsonl") == 1
    assert list(rows_by_file(capsys.readouterr().out)) == [f"{archive}/3.flac", "no[n]e*.wav"]
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
