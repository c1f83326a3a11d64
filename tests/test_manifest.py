"""Annotations: what goes in comes out, also through SpeechBrain; and what a faulty file says."""

import gc
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary

HEADER = "ID,wav,duration,labels\n"
CLASSES = Vocabulary(["/m/1", "/m/2", "/t/dd3"], ["Bell", "Rain", "Wind"])
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=12)
ids = texts | st.sampled_from(["007", "-_abc", "1e5", "NA", "null", "true", "nan", "2020-01-01", " x ", '"', ",", "é"])
clips = st.tuples(ids, texts, st.none() | st.floats(0, 1e5), st.lists(st.sampled_from(CLASSES.mids), max_size=4))
annotations = st.lists(clips, min_size=1, max_size=8, unique_by=lambda clip: clip[0])


def from_rows(rows):
    names, wavs, durations, labels = zip(*rows, strict=True)
    return Manifest.from_columns(names, wavs, durations, map(";".join, labels))


def from_text(path, text, **kwargs):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Manifest.from_csv(path, **kwargs)


@settings(deadline=None, max_examples=50)
@given(rows=annotations)
def test_csv_round_trip(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    from_rows(rows).to_csv(path)
    assert [tuple(row.values()) for row in Manifest.from_csv(path)] == rows


@settings(deadline=None, max_examples=50)
@given(rows=annotations)
def test_speechbrain_reads_the_same(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "speechbrain.csv"
    rows = [(name, wav.replace("$", "S"), *rest) for name, wav, *rest in rows]  # $name is to be replaced in SpeechBrain's CSVs
    from_rows(rows).to_csv(path)
    data = DynamicItemDataset.from_csv(str(path)).data
    assert list(data) == [row[0] for row in rows]
    for name, wav, duration, labels in rows:
        assert data[name]["wav"] == wav
        assert data[name]["labels"] == ";".join(labels)
        assert data[name]["duration"] == duration or (duration is None and np.isnan(data[name]["duration"]))


def test_data_root_as_in_speechbrain(tmp_path):
    path = tmp_path / "a.csv"
    text = HEADER + "a,$data_root/x/a.wav,1.5,/m/1\nb,/abs/b.wav,2,\n"
    manifest = from_text(path, text, data_root="/data")
    speechbrain = DynamicItemDataset.from_csv(str(path), {"data_root": "/data"})
    assert [row["wav"] for row in manifest] == ["/data/x/a.wav", "/abs/b.wav"]
    assert [speechbrain.data[row["id"]]["wav"] for row in manifest] == ["/data/x/a.wav", "/abs/b.wav"]
    path = tmp_path / "as_in_json.csv"
    manifest = from_text(path, text.replace("$data_root", "{data_root}"), data_root=tmp_path)
    assert manifest[0]["wav"] == f"{tmp_path}/x/a.wav"
    assert Manifest.from_csv(path)[0]["wav"] == "{data_root}/x/a.wav"
    manifest.to_csv(tmp_path / "copy.csv")
    assert "{data_root}/x/a.wav" in (tmp_path / "copy.csv").read_text()


@settings(deadline=None, max_examples=60)
@given(rows=annotations)
def test_label_sets_are_those_of_the_rows(rows):
    labels = from_rows(rows).label_sets(CLASSES)
    assert [clip.tolist() for clip in labels] == [sorted({CLASSES.index(mid) for mid in row[3]}) for row in rows]
    assert labels.indices.dtype == np.int32


def test_stray_semicolons_are_no_labels(tmp_path):
    manifest = from_text(tmp_path / "a.csv", HEADER + "a,a.wav,1,;/m/2;;/m/1;\n")
    assert manifest[0]["labels"] == ["/m/2", "/m/1"]
    assert manifest.label_sets(CLASSES)[0].tolist() == [0, 1]


@pytest.mark.parametrize("labels", ["/m/1;Bell", "/m/1 ; /m/2", "/m/1,/m/2"])
def test_unknown_label(labels, tmp_path):
    manifest = from_text(tmp_path / "a.csv", HEADER + f'a,a.wav,1,/m/1\nb,b.wav,1,"{labels}"\n')
    with pytest.raises(InputError, match=r"a\.csv, clip 'b': the label '.*' is not in the class list"):
        manifest.label_sets(CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Empty CSV"),
        ("\n\n", "Empty CSV"),
        (HEADER, "no clips in it"),
        (HEADER + "a,a.wav,1,x\nb,b.wav,1,x\na,c.wav,1,x\n", "1 IDs occur more than once, the first is 'a'"),
        (HEADER + "a,a.wav,1,x\n,b.wav,1,x\n", "clip 2: the column 'ID' is empty"),
        (HEADER + "a,,1,x\n", "clip 1: the column 'wav' is empty"),
        (HEADER + "a,a.wav,1,x\nb,b.wav,1\n", "Expected 4 columns, got 3: b,b.wav,1"),
        (HEADER + "a,a.wav,1,x\nb,b.wav,1,x,y\n", "Expected 4 columns, got 5: b,b.wav,1,x,y"),
        (HEADER + 'a,"a.wav,1,x\nb,b.wav,1,x\n', "Expected 4 columns"),
        (HEADER + "a,a.wav,long,x\n", "invalid value 'long'"),
        ("wav,duration,labels\na,1,x\n", "no column ID;"),
        ("ID,duration\na,1\n", "no column wav, labels;"),
        ("ID;wav;duration;labels\na;b;1;x\n", "no column ID, wav, labels;"),
        ((HEADER + "é,a.wav,1,x\n").encode("latin-1"), "invalid UTF8"),
        ((HEADER + "a,a.wav,1,x\n").encode("utf-16"), "cannot be read as an annotation CSV"),
    ],
)
def test_faulty_file_is_named_and_its_fault(text, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        from_text(tmp_path / "clips.csv", text)
    assert str(caught.value).startswith(str(tmp_path / "clips.csv"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such annotation file"):
        Manifest.from_csv(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is a directory"):
        Manifest.from_csv(tmp_path)


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_windows_files(prefix, newline, tmp_path):
    text = prefix + (HEADER + "007,a.wav,1.5,/m/1;/m/2\n").encode().replace(b"\n", newline)
    row = {"id": "007", "wav": "a.wav", "duration": 1.5, "labels": ["/m/1", "/m/2"]}
    assert list(from_text(tmp_path / "a.csv", text)) == [row]


def test_duration_and_further_columns_are_optional(tmp_path):
    manifest = from_text(tmp_path / "a.csv", "fold,labels,wav,ID\n3,/m/1,a.wav,a\n")
    assert manifest[-1] == {"id": "a", "wav": "a.wav", "duration": None, "labels": ["/m/1"]}
    with pytest.raises(IndexError):
        manifest[1]


def test_psla_json_both_ways(tmp_path):
    path, copy = tmp_path / "train.json", tmp_path / "copy.json"
    data = {"data": [{"wav": "/d/-a.flac", "labels": "/m/1,/m/2"}, {"wav": '/d/é, "b".wav', "labels": ""}]}
    path.write_text(json.dumps(data))
    manifest = Manifest.from_file(path)
    assert [row["id"] for row in manifest] == ["-a", 'é, "b"']
    assert [row["labels"] for row in manifest] == [["/m/1", "/m/2"], []]
    manifest.to_psla_json(copy)
    assert json.loads(copy.read_text()) == data
    manifest.to_csv(tmp_path / "copy.csv")
    assert list(Manifest.from_file(tmp_path / "copy.csv")) == list(manifest)


def test_psla_json_with_file_names_that_repeat(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"data": [{"wav": "/d/1/a.wav", "labels": "x"}, {"wav": "/d/2/a.wav", "labels": "x"}]}')
    assert [row["id"] for row in Manifest.from_psla_json(path)] == ["/d/1/a.wav", "/d/2/a.wav"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", '{"data": 3}', '{"data": [{"wav": "a.wav"}]}', '{"data": [{"wav": 1, "labels": "x"}]}'),
        *('{"data": [{"wav": "a.wav", "labels": ["x"]}]}', '{"data": [{"wav": "a.wav", "labels": null}]}', '{"data": []}'),
    ],
)
def test_faulty_psla_json(text, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"train\.json: (not a PSLA data file .*the layout is|no clips)"):
        Manifest.from_psla_json(path)


def test_missing_psla_json(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        Manifest.from_psla_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a PSLA data file"):
        Manifest.from_psla_json(tmp_path)


def test_no_python_objects_for_rows(tmp_path):
    def objects_kept(n_clips):
        path = tmp_path / f"{n_clips}.csv"
        path.write_text(HEADER + "".join(f"id{i},{{data_root}}/{i}.wav,10,/m/1;/m/2\n" for i in range(n_clips)))
        gc.collect()
        before = len(gc.get_objects())
        manifest = Manifest.from_csv(path)
        labels = manifest.label_sets(CLASSES)
        gc.collect()
        kept = len(gc.get_objects()) - before
        assert len(manifest) == len(labels) == n_clips
        assert manifest[n_clips - 1]["id"] == f"id{n_clips - 1}"
        return kept

    objects_kept(10)
    assert objects_kept(100_000) < objects_kept(100) + 200


def test_no_python_memory_for_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "".join(f"id{i},{i}.wav,10,/m/1\n" for i in range(100_000)))
    tracemalloc.start()
    manifest = Manifest.from_csv(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == 100_000
    assert kept < 1_000_000
