"""The report of a run: its figures are the right ones, its pictures are fit to print, its page shows what there is."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import soundfile
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score
from test_plots import assert_fit_to_print

from psla_sb.checkpoints.run_folder import CALIBRATION, write_results, write_scores
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.evaluation import calibration_figures
from psla_sb.experiment.report import _sound, confusions, curve_rows, hardest_clips, headline, reliability_rows, write_report
from psla_sb.labels.calibration import Calibration, fit_calibration, reliability
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision, f1_of
from psla_sb.plots.report import confusion_picture, curves, reliability_diagram
from runs import TRAIN, command, run

MARKUP, LONG = '<b>Rock & "roll"</b>', "A very long name " * 8 + "end"


def a_set(n_clips, n_classes, single, seed=0):
    """Scores and targets `[clips, classes]`, and classes with names that are hard to show."""
    rng = np.random.default_rng(seed)
    if single:
        targets = np.eye(n_classes)[np.arange(n_clips) % n_classes]
    else:
        targets = (rng.random((n_clips, n_classes)) < 0.3).astype(float)
    heard = np.exp(4 * targets + 2 * rng.normal(size=targets.shape))
    scores = heard / (heard.sum(axis=1, keepdims=True) if single else 20 + heard)
    names = [f"Class {c}" for c in range(n_classes)]
    names[0], names[-1] = MARKUP, LONG
    return scores.astype(np.float32), targets, Vocabulary([f"/m/{c}" for c in range(n_classes)], names)


def a_run(folder, n_clips, n_classes, single, more=None, seed=0, deaf_to=()):
    """What a finished run has left, as far as a report needs it, and the report: (JSON, page)."""
    scores, targets, vocabulary = a_set(n_clips, n_classes, single, seed)
    scores[:, deaf_to] = 0.5
    soundfile.write(folder / "a.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 12 * 16000), 16000)
    labels = [";".join(vocabulary.mids[c] for c in np.flatnonzero(row)) for row in targets]
    wavs = [str(folder / name) for name in (["a.flac"] * 3 + ["none.wav"]) * n_clips][:n_clips]
    manifest = Manifest.from_columns([f"clip <{i}>" for i in range(n_clips)], wavs, [12.0] * n_clips, labels, source="eval.csv")
    write_scores(folder, "valid_weight_average", scores)
    calibration = fit_calibration(scores, targets)
    calibration.write(folder / CALIBRATION, vocabulary)
    epoch = {"epoch": 1, "lr": 0.1, "train_loss": 0.2, "valid_loss": 0.2, "mAP": 0.3, "ensemble_mAP": 0.3}
    results = {"epochs": [epoch], "evaluation": {"weight_average": {"epochs": [1]}}, **(more or {})}
    f1 = f1_of(calibration.decisions(scores), targets)
    write_results(folder, {**results, "calibration": calibration_figures(calibration, scores, targets, f1, True)})
    page = write_report(folder, "valid", manifest, vocabulary, manifest.label_sets(vocabulary))
    assert page == folder / "report.html"
    return json.loads((folder / "report" / "report.json").read_text(), parse_constant=pytest.fail), page.read_text("utf-8")


class Page(HTMLParser):
    """The tags of a page, what they refer to, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.said = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_clips_of_one_label(tmp_path):
    report, page = a_run(tmp_path, 90, 6, single=True)
    scores, targets, vocabulary = a_set(90, 6, True)
    true, heard = targets.argmax(1), scores.argmax(1)
    assert report["single_label"]
    assert report["figures"]["accuracy"]["value"] == accuracy_score(true, heard)
    matrix = confusion_matrix(true, heard)
    with open(tmp_path / "report" / "confusion.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head[1:] == [row[0] for row in rows] == vocabulary.names
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in rows], matrix)
    first = report["confusions"][0]
    wrong = matrix - np.diag(np.diag(matrix))
    assert first["clips"] == wrong.max()
    assert wrong[vocabulary.names.index(first["class"]), vocabulary.names.index(first["heard_instead"])] == wrong.max()
    assert (tmp_path / "report" / "confusion.png").is_file()
    decided = fit_calibration(scores, targets).decisions(scores)
    for c, row in enumerate(report["classes"]):
        assert row["precision"] == pytest.approx(precision_score(targets[:, c], decided[:, c]))
        assert row["recall"] == pytest.approx(recall_score(targets[:, c], decided[:, c]))
    for figure in report["figures"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert 0.01 < report["figures"]["mAP"]["high"] - report["figures"]["mAP"]["low"] < 0.3
    shown = Page(page)
    assert f"{report['figures']['mAP']['value']:.3f}" in shown.text
    assert "accuracy" in shown.text
    assert shown.tags.count("img") == 4


def test_clips_of_several_labels(tmp_path):
    report, page = a_run(tmp_path, 60, 5, single=False)
    assert not report["single_label"]
    assert "accuracy" not in report["figures"]
    rows = rows_of(tmp_path / "report" / "confusion.csv")
    assert [row["heard_instead"] for row in rows] == [row["heard_instead"] for row in report["confusions"]]
    assert Page(page).tags.count("img") == 3
    assert "which wrong class is the most probable there" in Page(page).text


def test_what_is_heard_in_place_of_a_missed_class():
    one = np.ones(3)
    calibration = Calibration(one, 0 * one, 0.5 * one, one > 0, one.astype(int), 4, None)
    scores = np.array([[0.4, 0.9, 0.1], [0.3, 0.8, 0.2], [0.2, 0.1, 0.3], [0.9, 0.1, 0.8], [0.1, 0.1, 0.1]])
    targets = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]) == 1
    found = confusions(Vocabulary("abc", ["A", "B", "C"]), scores, targets, calibration, None)
    assert [tuple(row.values()) for row in found] == [("A", "B", 2, 2, 3), ("A", "C", 1, 0, 3)]


def test_the_page_is_one_file_whose_names_are_text(tmp_path):
    report, page = a_run(tmp_path, 30, 4, single=False)
    shown = Page(page)
    assert MARKUP in shown.text
    assert report["hardest_clips"][0]["ID"] in shown.text
    assert re.fullmatch("clip <\\d+>", report["hardest_clips"][0]["ID"])
    assert LONG in shown.text
    assert "b" in shown.tags
    assert "<b>Rock" not in page
    assert shown.sources
    assert all(source.startswith("data:") for source in shown.sources)
    assert str(tmp_path) not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # what cannot be read is said, and the rest can be played
    hardest = rows_of(tmp_path / "report" / "hardest_clips.csv")
    missing = sum(row["wav"].endswith("none.wav") for row in hardest)
    assert shown.text.count("none.wav: no such file") == missing
    assert shown.tags.count("audio") == len(hardest) - missing == 12 - missing
    flac = next(source for source in shown.sources if source.startswith("data:audio/flac;base64,"))
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(flac.partition(",")[2])))
    assert (len(wave), rate) == (160_000, 16_000)
    losses = [float(row["loss"]) for row in hardest]
    assert losses == sorted(losses, reverse=True)
    assert [clip["loss"] for clip in report["hardest_clips"]] == pytest.approx(losses)


@pytest.mark.parametrize(("n_clips", "n_classes", "single"), [(5, 2, True), (5, 3, False), (6, 1, False), (50, 45, True)])
def test_few_clips_and_many_classes(tmp_path, n_clips, n_classes, single):
    report, page = a_run(tmp_path, n_clips, n_classes, single, seed=3)
    assert len(report["classes"]) == n_classes
    # a matrix of 45 classes has no room
    assert (tmp_path / "report" / "confusion.png").is_file() == (single and n_classes < 40)
    for picture in (tmp_path / "report").glob("*.png"):
        assert matplotlib.image.imread(picture).shape[0] < 10.7 * 200
    assert ("nan" in Page(page).text.lower().split()) is False
    assert f"{n_clips} clips are few" in Page(page).text


def test_a_baseline_folds_and_broken_clips_are_shown(tmp_path):
    (tmp_path / "bad_clips.csv").write_text("set,ID,error\nvalid,x,x.wav: cannot be decoded\ntrain,y,y.wav: no such file\n")
    baseline = {"mAP": 0.123, "mAUC": 0.777, "d_prime": 1.1, "what": "logistic regression <of> statistics"}
    folds = {"n_folds": 3, "mAP": {"mean": 0.456, "std": 0.012, "each": [0.444, 0.456, 0.468]}, "pooled": {"mAP": 0.451}}
    report, page = a_run(tmp_path, 20, 3, single=True, more={"baseline": baseline, "folds": folds})
    shown = Page(page).text
    assert report["baseline"] == baseline
    assert report["folds"] == folds
    for said in ("0.123", "0.777", "logistic regression <of> statistics", "0.456 ± 0.012", "0.468", "Trained 3 times", "mAP 0.451"):
        assert said in shown, said
    assert report["bad_clips"] == [{"ID": "x", "error": "x.wav: cannot be decoded"}]
    assert "1 clips could not be read" in shown
    assert "y.wav" not in shown


def test_classes_that_are_as_good_as_always_decided_are_named(tmp_path):
    _, page = a_run(tmp_path, 80, 4, single=False, deaf_to=2)
    assert "F1 is hardly above what deciding the class for every clip would give: Class 2." in page


def test_intervals_are_of_the_clips():
    scores, targets, _ = a_set(200, 4, False)
    calibration = fit_calibration(scores, targets)
    figures = headline(scores, targets == 1, calibration, False)
    assert figures["macro_F1"]["value"] == pytest.approx(np.nanmean(f1_of(calibration.decisions(scores), targets)))
    rng = np.random.default_rng(1)
    drawn = [rng.integers(200, size=200) for _ in range(300)]
    f1 = [np.nanmean(f1_of(calibration.decisions(scores[rows]), targets[rows])) for rows in drawn]
    ap = [np.nanmean(average_precision(scores[rows], targets[rows])) for rows in drawn]
    for key, values in (("macro_F1", f1), ("mAP", ap)):
        width = figures[key]["high"] - figures[key]["low"]
        assert width == pytest.approx(np.subtract(*np.quantile(values, [0.975, 0.025])), rel=0.2)


def test_bins_hold_all_pairs():
    scores, targets, _ = a_set(50, 3, False)
    rows = reliability_rows(scores, targets == 1, fit_calibration(scores, targets))
    for of in ("score", "probability"):
        for bins in ("as many pairs each", "as wide each"):
            found = [row for row in rows if (row["of"], row["bins"]) == (of, bins)]
            assert sum(row["pairs"] for row in found) == 150
            assert sum(row["pairs"] * row["share_of_clips_with_the_class"] for row in found) == pytest.approx(targets.sum())
    assert [row["mean"] for row in rows[:15]] == pytest.approx(reliability(scores, targets)[0].tolist())


def test_curves_are_scikit_learns():
    scores, targets, vocabulary = a_set(80, 3, False)
    targets[:, 2] = 1
    rows = curve_rows(vocabulary, scores, targets == 1)
    from sklearn.metrics import precision_recall_curve, roc_auc_score

    points = np.array([[row["x"], row["y"]] for row in rows if row["curve"] == "precision-recall" and row["of"] == MARKUP])
    precision, recall, _ = precision_recall_curve(targets[:, 0], scores[:, 0])
    for x, y in points:
        assert y == max(precision[recall == min(recall[recall >= x])])
    points = np.array([[row["x"], row["y"]] for row in rows if row["curve"] == "ROC" and row["of"] == MARKUP])
    assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(roc_auc_score(targets[:, 0], scores[:, 0]), abs=0.01)
    # without a clip that lacks it, a class has no ROC curve
    assert not any(row["curve"] == "ROC" and row["of"] == LONG for row in rows)


def test_pictures_are_fit_to_print(tmp_path):
    path = tmp_path / "picture.png"
    for n_classes in (12, 40):
        scores, targets, vocabulary = a_set(400, n_classes, True)
        bins = reliability_rows(scores, targets == 1, fit_calibration(scores, targets))
        assert_fit_to_print(reliability_diagram(bins, {"score": 0.1, "probability": 0.01}, path), path)
        matrix = confusion_matrix(targets.argmax(1), scores.argmax(1))
        assert_fit_to_print(confusion_picture(matrix, vocabulary.names, path), path)
    assert_fit_to_print(curves(curve_rows(vocabulary, scores, targets == 1), path), path)


def test_a_run_that_is_not_evaluated_has_no_report(tmp_path):
    scores, _, vocabulary = a_set(10, 2, True)
    write_scores(tmp_path, "valid_weight_average", scores)
    manifest = Manifest.from_columns("abcdefghij", ["a.wav"] * 10, [1.0] * 10, ["/m/0"] * 10, source="eval.csv")
    with pytest.raises(InputError, match="not the folder of a run that has been evaluated"):
        write_report(tmp_path, "valid", manifest, vocabulary, manifest.label_sets(vocabulary))


def test_a_finished_run_gets_a_report_and_other_thresholds(tiny_run, mini_data, tmp_path):
    """As a user asks for them: the same command once more."""
    folder = shutil.copytree(tiny_run[0], tmp_path / "run")
    assert not (folder / "report.html").exists()
    settings = {"data_folder": mini_data, "output_folder": folder, "report": True, "target_precision": 0.9}
    done = run(command(TRAIN, "hparams/mini.yaml", **settings), cwd=tmp_path)
    assert re.search(r"The report: \S+report\.html", done.stdout + done.stderr)
    report = json.loads((folder / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    calibration = Calibration.read(folder / "tagger" / CALIBRATION, vocabulary)
    assert calibration.target_precision == 0.9
    assert report["calibration"]["criterion"] == "a precision of 0.9 at least"
    before, after = (json.loads((at / "results.json").read_text()) for at in (tiny_run[0], folder))
    assert before["evaluation"] == after["evaluation"]
    mAP = report["figures"]["mAP"]["value"]
    assert mAP == pytest.approx(after["evaluation"]["weight_average"]["mAP"])
    page = Page((folder / "report.html").read_text("utf-8"))
    assert page.tags.count("audio") == 12
    assert f"{mAP:.3f}" in page.text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("target_precision", 1.5, "mini.yaml: target_precision must be above 0 and at most 1"),
        ("target_precision", "high", "mini.yaml: target_precision must be above 0 and at most 1"),
        ("report", "maybe", "mini.yaml: report must be True or False, not 'maybe'"),
    ],
)
def test_wrong_values_are_said_in_one_line(mini_data, tmp_path, key, value, says):
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", key: value}
    done = run(command(TRAIN, "hparams/mini.yaml", **settings), check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_of_a_segment_it_is_the_segment_that_is_played(tmp_path):
    rate = 16000
    wave = np.concatenate([np.full(rate, level) for level in (0.1, 0.2, 0.3)]) * np.tile([1, -1], 3 * rate // 2)
    soundfile.write(tmp_path / "recording.wav", wave, rate)
    columns = [["a", "b"], [str(tmp_path / "recording.wav")] * 2, [0.5, 0.5], ["x", "y"]]
    manifest = Manifest.from_columns(*columns, starts=[2.25, 1.25])
    scores, targets = np.array([[0.1, 0.9], [0.6, 0.4]]), np.eye(2) == 1
    found = hardest_clips(manifest, Vocabulary(["x", "y"], ["X", "Y"]), scores, targets, fit_calibration(scores, targets))
    assert [(clip["ID"], clip["start"], clip["seconds"]) for clip in found] == [("a", 2.25, 0.5), ("b", 1.25, 0.5)]
    for clip, level in zip(found, (0.3, 0.2), strict=True):
        played, _ = soundfile.read(io.BytesIO(_sound(clip["wav"], clip["start"], clip["seconds"])))
        assert len(played) == rate // 2
        np.testing.assert_allclose(np.abs(played), level, atol=1e-3)
