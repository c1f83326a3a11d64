"""Thresholds and probabilities of a tagger, wherever it is used: tags, psla-tag, events, the page, exported folders, ONNX."""

import csv
import io
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from psla_sb import demo
from psla_sb.checkpoints.run_folder import CALIBRATION, average_path, snapshot_path
from psla_sb.checkpoints.sources import open_source
from psla_sb.cli.export import export
from psla_sb.cli.tag import tag
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger, Tag
from psla_sb.inference.timeline import Timeline, events
from psla_sb.labels.calibration import Calibration, expected_calibration_error, fit_calibration
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import best_f1, f1_of


@pytest.fixture(scope="module")
def sound(tiny_run, mini_data):
    return Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)[0]["wav"]


@pytest.fixture(scope="module")
def scores(tiny_run, sound):
    """What the tagger scores the sound."""
    tags = AudioTagger.from_folder(tiny_run[0] / "tagger").tag_file(sound, top_k=39)
    order = {label: c for c, label in enumerate(AudioTagger.from_folder(tiny_run[0] / "tagger").labels)}
    return np.array([one.score for one in sorted(tags, key=lambda one: order[one.label])])


@pytest.fixture(scope="module")
def model(tiny_run, scores, tmp_path_factory):
    """A tagger of which every other class is decided for the sound, and one of those never."""
    folder = shutil.copytree(tiny_run[0] / "tagger", tmp_path_factory.mktemp("decisions") / "tagger")
    threshold = np.where(np.arange(39) % 2, 1.01, 0.99) * scores
    threshold[np.argmax(scores)] = math.inf
    one = np.ones(39)
    calibration = Calibration(2 * one, -one, threshold, one > 0, one.astype(int), 20, 0.9)
    calibration.write(folder / CALIBRATION, Vocabulary.from_csv(tiny_run[0] / "class_labels_indices.csv"))
    return folder


def rows_of(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        tag([str(argument) for argument in arguments])
    assert caught.value.code == 0
    return capsys.readouterr().out


def jsonl_of(capsys, *arguments):
    return [json.loads(line) for line in rows_of(capsys, *arguments, "--format", "jsonl").splitlines()]


def test_a_tag_has_a_probability_and_a_decision(model, sound, scores):
    tags = AudioTagger.from_folder(model).tag_file(sound, top_k=39)
    for one in tags:
        c = AudioTagger.from_folder(model).labels.index(one.label) if one is tags[0] else None
        assert one.probability == pytest.approx(1 / (1 + math.exp(1) * (1 / one.score - 1) ** 2))
        if c is not None:
            # the best-scored is never decided
            assert not one.decision
    assert {one.decision for one in tags} == {True, False}
    assert sum(one.decision for one in tags) == sum((c % 2 == 0) and c != np.argmax(scores) for c in range(39))


@pytest.mark.parametrize("load", [AudioTagger.from_folder, AudioTagger.from_any, lambda f: AudioTagger.from_hparams(source=f)])
def test_however_it_is_loaded(load, model, sound):
    tagger = load(model)
    assert tagger.calibration.target_precision == 0.9
    (tags,) = (answer.tags for answer in tagger.tag_files([sound], top_k=39))
    assert {one.decision for one in tags} == {True, False}


def test_without_thresholds_nothing_is_decided(model, sound, tmp_path):
    shutil.copytree(model, tmp_path / "tagger")
    (tmp_path / "tagger" / CALIBRATION).unlink()
    for tagger in (AudioTagger.from_folder(tmp_path / "tagger"), AudioTagger.from_hparams(source=tmp_path / "tagger")):
        assert tagger.calibration is None
        assert {(one.probability, one.decision) for one in tagger.tag_file(sound)} == {(None, None)}
    assert Tag("Bell", "/m/1", 0.5) == ("Bell", "/m/1", 0.5, None, None)


def test_a_file_of_another_tagger_is_refused(model, tiny_run, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "tagger")
    vocabulary = Vocabulary.from_csv(tiny_run[0] / "class_labels_indices.csv")
    other = Vocabulary(vocabulary.mids[::-1], vocabulary.names[::-1])
    Calibration.read(model / CALIBRATION, vocabulary).write(tmp_path / "tagger" / CALIBRATION, other)
    with pytest.raises(InputError, match="made for other classes"):
        AudioTagger.from_hparams(source=tmp_path / "tagger")
    with pytest.raises(SystemExit) as caught:
        tag(["x.wav", "--model", str(tmp_path / "tagger")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"psla-tag: error: {tmp_path / 'tagger' / CALIBRATION}: made for")


def test_scores_do_not_depend_on_it(model, tmp_path):
    shutil.copytree(model, tmp_path / "tagger")
    before = open_source(tmp_path / "tagger").digest()
    (tmp_path / "tagger" / CALIBRATION).unlink()
    assert open_source(tmp_path / "tagger").digest() == before


def test_psla_tag_prints_decisions(model, sound, capsys):
    tags = AudioTagger.from_folder(model).tag_file(sound, top_k=6)
    lines = rows_of(capsys, sound, "--model", model, "--top-k", 6).splitlines()[1:]
    assert lines == [f"  {one.score:.3f}  {'yes' if one.decision else '-  '}  {one.label}" for one in tags]
    rows = json.loads(rows_of(capsys, sound, "--model", model, "--top-k", 6, "--format", "json"))["rows"]
    assert rows == [{"file": sound, "start": None, "end": None, **one._asdict(), "error": None} for one in tags]
    table = list(csv.DictReader(io.StringIO(rows_of(capsys, sound, "--model", model, "--top-k", 6, "--format", "csv"))))
    assert [row["decision"] for row in table] == [str(one.decision) for one in tags]
    said = jsonl_of(capsys, sound, "--model", model, "--top-k", 39, "--decided")
    assert all(row["decision"] for row in said)
    assert 0 < len(said) < 39


def test_decided_needs_thresholds(model, sound, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "tagger")
    (tmp_path / "tagger" / CALIBRATION).unlink()
    with pytest.raises(SystemExit) as caught:
        tag([sound, "--model", str(tmp_path / "tagger"), "--decided"])
    assert caught.value.code == 2
    assert "has no thresholds (calibration.json); give --threshold SCORE instead" in capsys.readouterr().err


def test_events_are_by_each_class_own_threshold(model, sound, capsys):
    tagger = AudioTagger.from_folder(model)
    timeline = tagger.tag_timeline(sound)
    rows = jsonl_of(capsys, sound, "--model", model, "--events")
    own = {event.label for event in events(timeline, tagger.calibration.threshold)}
    assert {row["label"] for row in rows} == own
    assert own == {tagger.labels[c] for c in np.flatnonzero(timeline.scores.max(axis=0) >= tagger.calibration.threshold)}
    lowest = float(timeline.scores.min())
    rows = jsonl_of(capsys, sound, "--model", model, "--events", "--threshold", lowest)
    assert {row["label"] for row in rows} == set(tagger.labels)
    rows = jsonl_of(capsys, sound, "--model", model, "--timeline", "--top-k", 39)
    threshold = dict(zip(tagger.labels, tagger.calibration.threshold, strict=True))
    assert [row["decision"] for row in rows] == [row["score"] >= threshold[row["label"]] for row in rows]


def test_events_of_several_thresholds():
    scores = np.array([[0.4, 0.9], [0.4, 0.1]])
    timeline = Timeline(np.array([0.5, 1.5]), scores, ["a", "b"], ["/a", "/b"])
    assert [event.label for event in events(timeline, np.array([0.3, 0.95]))] == ["a"]
    assert [event.label for event in events(timeline, np.array([math.inf, 0.5]))] == ["b"]
    assert len(events(timeline, np.zeros(2))) == 2
    for wrong in (np.array([0.5]), np.array([math.nan, 0.5]), np.array([-1.0, 0.5])):
        with pytest.raises(ValueError, match="thresholds must be 2 numbers"):
            events(timeline, wrong)


def test_the_page_marks_what_is_decided_and_has_events_by_it(model, sound, monkeypatch):
    pytest.importorskip("gradio")
    tagger = AudioTagger.from_folder(model)
    page = demo.build_page(tagger, "model")
    begin, hear, show = ([f.fn for f in page.fns.values() if f.name == name][-1] for name in ("begin", "hear", "show_events"))
    somebody = SimpleNamespace(session_hash="a")
    begin(sound, somebody)
    told, heard, *_, tags, _, table, _ = hear(sound, 6, 0.95, somebody, True)
    assert "reaches its own threshold" in told
    assert tags == {("\N{CHECK MARK} " * one.decision) + one.label: one.score for one in heard.tags[:6]}
    assert table.label == f"Events: {len(events(heard.timeline, tagger.calibration.threshold))}"
    assert show(heard, 0.95, False).label == f"Events: {len(events(heard.timeline, 0.95))}"
    assert table.label != show(heard, 0.95, False).label


def test_an_exported_folder_has_them_if_its_weights_are_those_they_were_fitted_on(tiny_run, model, tmp_path):
    run = tiny_run[0]
    for name, source, options in (
        ("average", run, []),
        ("snapshot", average_path(run), []),
        ("folder", model, []),
        ("epoch", run, ["--weights", "1"]),
        ("other", snapshot_path(run, 2), []),
    ):
        export([str(source), "--out", str(tmp_path / name), *options])
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        has = name in ("average", "snapshot", "folder")
        assert (tmp_path / name / CALIBRATION).is_file() == ("from which score on it is taken for heard" in card) == has
    assert (tmp_path / "average" / CALIBRATION).read_bytes() == (run / CALIBRATION).read_bytes()
    assert "by a precision of 0.9 at least on 20 clips" in (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    # over a folder that has some
    export([str(run), "--out", str(tmp_path / "average"), "--weights", "1"])
    assert not (tmp_path / "average" / CALIBRATION).exists()


def test_onnx_metadata(model, tiny_run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from psla_sb.inference.onnx_export import export_onnx

    tagger = AudioTagger.from_folder(model)
    export_onnx(tagger, tmp_path / "model.onnx")
    said = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert said["labels"] == tagger.labels
    assert [math.inf if t is None else t for t in said["thresholds"]] == tagger.calibration.threshold.tolist()
    assert said["calibration"] == {"slopes": [2.0] * 39, "biases": [-1.0] * 39}
    assert said["criterion"] == "a precision of 0.9 at least"
    tagger.hparams.calibration = None
    export_onnx(tagger, tmp_path / "none.onnx")
    props = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "none.onnx").metadata_props}
    about = {"labels": tagger.labels, "mids": list(tagger.hparams.mids), "sample_rate": 16000}
    assert props == {**about, "window": tagger.window, "longest": tagger.longest, "crop": "first"}


def test_a_run_fits_them_on_its_validation_clips(tiny_run, mini_data):
    folder, results, _ = tiny_run
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    targets = Manifest.from_csv(folder / "eval.csv", mini_data).targets(vocabulary)
    scores = np.load(folder / "predictions" / "valid_weight_average.npy")
    expected, found = fit_calibration(scores, targets), Calibration.read(folder / CALIBRATION, vocabulary)
    np.testing.assert_array_equal(found.threshold, expected.threshold)
    np.testing.assert_array_equal(found.slope, expected.slope)
    assert (folder / "tagger" / CALIBRATION).read_bytes() == (folder / CALIBRATION).read_bytes()
    said, f1 = results["calibration"], f1_of(found.decisions(scores), targets)
    assert said["same_clips"]
    assert said["fitted_on"] == {"set": "valid", "clips": 20}
    assert said["ECE_before"] == expected_calibration_error(scores, targets)
    assert said["ECE_after"] == expected_calibration_error(found.probabilities(scores), targets) < said["ECE_before"]
    assert said["macro_F1"] == pytest.approx(np.nanmean(f1))
    assert {"calibration", "ECE_before", "macro_F1", "same_clips"} <= set(results["meaning"])
    with open(folder / "classes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["threshold"] or "inf") for row in rows] == found.threshold.tolist()
    assert [float(row["F1"] or "nan") for row in rows] == pytest.approx(f1.tolist(), nan_ok=True)
    own = np.flatnonzero(found.own)
    assert [f1[c] for c in own] == pytest.approx(best_f1(scores, targets)[1][own].tolist())
