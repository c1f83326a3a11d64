"""psla-compare: the bootstrap against plain resampling, the reading of what others have written, the command."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from test_plots import LONGEST, assert_fit_to_print

from psla_sb.aggregation import bootstrap as statistics
from psla_sb.aggregation.bootstrap import ClassFigures, bootstrap, interval, means, two_sided_p, weighted_figures
from psla_sb.aggregation.compare import compare, comparison_table
from psla_sb.aggregation.predictions import find_clips, find_scores, match, named, open_all, open_predictions
from psla_sb.checkpoints.run_folder import CLASSES, write_results, write_scores
from psla_sb.cli.compare import compare as command
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision, d_prime, roc_auc, summarize
from psla_sb.plots.compare import comparison

VOCABULARY = Vocabulary([f"/m/{c}" for c in range(6)], ["Speech", LONGEST, "Dog", "Cat", "Rain", "Never"])


def generated(n_clips=120, n_systems=2, seed=0, ties=False):
    """Scores of systems, the later the worse, and targets; the last class has no positive clip."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n_clips, 6)) < [0.5, 0.3, 0.1, 0.1, 0.03, 0]
    systems = [targets + rng.normal(0, 0.5 + 0.3 * k, targets.shape) for k in range(n_systems)]
    return [np.float32(np.round(one, 1) if ties else one) for one in systems], targets


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))
def test_resamples_are_the_figures_of_drawn_rows(n_clips, n_classes, n_levels, share, seed):
    """With and without ties, classes that a resample leaves without a positive or without a negative clip."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n_clips, n_classes)) < share
    systems = [rng.integers(n_levels, size=targets.shape).astype(np.float32), rng.standard_normal(targets.shape)]
    found = bootstrap(systems, targets.astype(np.float32), n_resamples=5, seed=seed)
    rng = np.random.default_rng(seed)
    for b in range(5):
        rows = rng.integers(n_clips, size=n_clips)
        for system, scores in enumerate(systems):
            np.testing.assert_allclose(found.ap[system, b], average_precision(scores[rows], targets[rows]), rtol=1e-12)
            np.testing.assert_allclose(found.auc[system, b], roc_auc(scores[rows], targets[rows]), rtol=1e-12)


def test_means_are_those_of_each_resample():
    systems, targets = generated(40)
    found = means(bootstrap(systems, targets, n_resamples=20, seed=3))
    rng = np.random.default_rng(3)
    for b in range(20):
        rows = rng.integers(40, size=40)
        for system, scores in enumerate(systems):
            figures = summarize(scores[rows], targets[rows])
            for name in ("mAP", "mAUC", "d_prime"):
                assert found[name][system, b] == pytest.approx(figures[name], rel=1e-9)


def test_weights_are_those_of_scikit_learn():
    systems, targets = generated(200, ties=True)
    rng = np.random.default_rng(1)
    sheets = [rng.integers(0, 4, (200, n)).astype(np.float32) for n in (3, 2)]
    weights = np.concatenate(sheets, axis=1).T
    for c in range(5):
        label, score = targets[:, c], systems[0][:, c]
        ap, auc = weighted_figures(score, label, sheets)
        np.testing.assert_allclose(ap, [average_precision_score(label, score, sample_weight=w) for w in weights], rtol=1e-12)
        np.testing.assert_allclose(auc, [roc_auc_score(label, score, sample_weight=w) for w in weights], rtol=1e-12)


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    systems, targets = generated(50)
    whole = bootstrap(systems, targets, n_resamples=30)
    monkeypatch.setattr(statistics, "HELD_WEIGHTS", 50 * 7)
    monkeypatch.setattr(statistics, "SHEET_WEIGHTS", 50 * 3)
    for one, other in zip(whole, bootstrap(systems, targets, n_resamples=30), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_intervals_and_p_of_a_normal_difference():
    """Of resamples that are normal, off by 3: the normal interval about the value, and its p."""
    resampled = np.random.default_rng(0).normal(5, 1, 200_000)
    low, high = interval(np.array(2.0), resampled)
    assert (low, high) == pytest.approx((2 - 1.96, 2 + 1.96), abs=0.02)
    assert two_sided_p(2.0, resampled) == pytest.approx(0.0455, abs=0.003)
    assert two_sided_p(0.0, resampled) == pytest.approx(1, abs=0.01)
    assert np.isnan(two_sided_p(np.inf, resampled))
    with_gaps = np.stack([resampled, np.where(resampled > 4.9, np.nan, resampled)], axis=1)[:1000]
    assert np.isfinite(interval(np.zeros(2), with_gaps)).all()


def test_the_interval_has_the_figure_in_it_where_plain_percentiles_do_not():
    """Average precision of a resample, with its repeated clips, is too high: why percentiles are moved."""
    rng = np.random.default_rng(0)
    targets = rng.random((600, 200)) < 0.01
    scores = targets + rng.normal(0, 1, targets.shape)
    value = np.nanmean(average_precision(scores, targets))
    resampled = means(bootstrap([scores], targets, 100))["mAP"][0]
    assert np.quantile(resampled, 0.025) > value
    low, high = interval(np.array(value), resampled)
    assert low < value < high


def write(path, scores, ids, labels=None, classes=True):
    """A .npy file, with its clips in X.csv and its classes beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, scores)
    columns = {"ID": ids} if labels is None else {"labels": labels, "ID": ids}
    pyarrow.csv.write_csv(pa.table(columns), path.with_suffix(".csv"))
    if classes:
        VOCABULARY.to_csv(path.with_name(CLASSES))
    return str(path)


def labels_of(targets):
    return [";".join(f"/m/{c}" for c in np.flatnonzero(row)[::-1]) for row in targets]


IDS = np.array([f"{i:03d}" for i in range(120)])


@pytest.fixture
def pair(tmp_path):
    """Two systems of other clips, in other orders of clips and classes, and the clips that both have."""
    systems, targets = generated()
    rng = np.random.default_rng(5)
    one, two, columns = rng.permutation(120)[:110], rng.permutation(120)[:100], rng.permutation(6)
    first = write(tmp_path / "a" / "one.npy", systems[0][one], IDS[one], labels_of(targets[one]))
    second = write(tmp_path / "b" / "two.npy", systems[1][two][:, columns], IDS[two])
    Vocabulary([VOCABULARY.mids[c] for c in columns], [VOCABULARY.names[c] for c in columns]).to_csv(tmp_path / "b" / CLASSES)
    common = [i for i in one if i in two]
    return [first, second], [scores[common] for scores in systems], targets[common]


def test_systems_are_matched_by_clips_and_classes(pair):
    paths, systems, targets = pair
    matched = match(open_all(paths))
    np.testing.assert_array_equal(matched.targets, targets)
    for found, expected in zip(matched.scores, systems, strict=True):
        np.testing.assert_array_equal(found, expected)
    found = compare(matched, n_resamples=50, top=3)
    report = found.report
    assert (report["n_clips"], report["n_classes"], report["n_classes_left_out"]) == (len(targets), 6, 1)
    assert [system["n_clips"] for system in report["systems"]] == [110, 100]
    first, second = (summarize(scores, targets) for scores in systems)
    for name in ("mAP", "mAUC", "d_prime"):
        assert report["systems"][1]["figures"][name]["value"] == pytest.approx(second[name])
        difference = report["systems"][1]["difference"][name]
        assert difference["value"] == pytest.approx(second[name] - first[name])
        assert difference["low"] < difference["value"] < difference["high"]
    size = np.nan_to_num(np.abs(average_precision(systems[1], targets) - average_precision(systems[0], targets)))
    assert [row["index"] for row in report["systems"][1]["classes"]] == np.argsort(-size)[:3].tolist()


def test_a_system_compared_with_itself_does_not_differ(pair):
    paths, *_ = pair
    report = compare(match(open_all([f"x={paths[0]}", f"y={paths[0]}"])), n_resamples=20).report
    for difference in report["systems"][1]["difference"].values():
        assert (difference["value"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, 1)


def test_a_perfect_system_has_no_infinite_figures_in_json(tmp_path):
    targets = generated()[1]
    path = write(tmp_path / "perfect.npy", targets.astype(np.float32), IDS, labels_of(targets))
    report = compare(match(open_all([path, f"same={path}"])), n_resamples=10).report
    json.dumps(report, allow_nan=False)
    assert report["systems"][0]["figures"]["mAP"]["low"] == 1
    assert report["systems"][0]["figures"]["d_prime"]["value"] is None
    assert "- [-, -]" in comparison_table(report)


def test_targets_are_of_the_annotation_if_one_is_given(pair, tmp_path):
    paths, _, targets = pair
    others = ~generated()[1]
    # as far as the annotation goes, which has the header of one or only what is needed
    pyarrow.csv.write_csv(pa.table({"ID": IDS[:60], "labels": labels_of(others[:60])}), tmp_path / "annotation.csv")
    matched = match(open_all(paths), annotation=tmp_path / "annotation.csv")
    assert 0 < len(matched.targets) < 60
    np.testing.assert_array_equal(matched.targets, ~targets[[i in IDS[:60] for i in common_ids(paths)]])
    (tmp_path / "annotation.json").write_text(json.dumps({"data": [{"wav": f"/d/{i}.wav", "labels": "/m/1,/m/2"} for i in IDS]}))
    np.testing.assert_array_equal(match(open_all(paths), annotation=tmp_path / "annotation.json").targets[:, [0, 1, 2]].T[1:], 1)


def common_ids(paths):
    first, second = (open_predictions(path).ids.to_pylist() for path in paths)
    return [name for name in first if name in second]


def test_where_clips_are_found(tmp_path):
    folder = tmp_path / "run" / "predictions"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "clips.csv").write_text("ID\nNA\n")
    names = ["ids.txt", "ids.csv", "clips.csv", "test_clips.csv", "test_epoch_03.txt", "test_epoch_03.csv"]
    scores = folder / "test_epoch_03.npy"
    np.save(scores, np.zeros((1, 6)))
    assert find_clips(scores) == tmp_path / "run" / "clips.csv"
    for name in names:
        (folder / name).write_text("007\n" if name.endswith(".txt") else "name,ID\nx,007\n")
        assert find_clips(scores) == folder / name
        assert open_predictions(scores).ids.to_pylist() == ["007"]
    (folder / "test_epoch_03.csv").unlink()
    (folder / "test_epoch_03.txt").write_text('a "b", c; d\r\n')
    assert open_predictions(scores).ids.to_pylist() == ['a "b", c; d']
    with pytest.raises(InputError, match=r"other\.npy: nothing says of which clips"):
        find_clips(tmp_path / "other.npy")


def test_which_scores_of_a_run(tmp_path):
    results = {"epochs": [{"epoch": 1, "mAP": 0.3}, {"epoch": 2, "mAP": 0.2}]}
    write_results(tmp_path, results)
    (tmp_path / "predictions").mkdir()
    with pytest.raises(InputError, match="a run that is not finished"):
        find_scores(tmp_path)
    write_results(tmp_path, {**results, "evaluation": {}})
    for name in ("ensemble", "weight_average", "epoch_01", "epoch_02"):
        write_scores(tmp_path, f"valid_{name}", np.zeros((2, 6)))
    expected = {"ensemble": "ensemble", "weight_average": "weight_average", "best": "epoch_01", "last": "epoch_02"}
    for row, name in expected.items():
        assert find_scores(tmp_path, row) == tmp_path / "predictions" / f"valid_{name}.npy"
        write_scores(tmp_path, f"test_{name}", np.zeros((2, 6)))
        assert find_scores(tmp_path, row) == tmp_path / "predictions" / f"test_{name}.npy"
    # what an earlier test set has left
    write_results(tmp_path, {**results, "evaluation": {}, "clips": {"set": "valid"}})
    assert find_scores(tmp_path).name == "valid_ensemble.npy"
    write_results(tmp_path, {**results, "evaluation": {}, "clips": {"set": "test"}})
    VOCABULARY.to_csv(tmp_path / CLASSES)
    (tmp_path / "predictions" / "test_clips.csv").write_text("ID,labels\na,/m/1\nb,\n")
    run = open_predictions(tmp_path)
    assert (run.vocabulary, run.has_labels) == (VOCABULARY, True)
    np.save(tmp_path / "ensemble.npy", np.zeros((2, 6)))
    assert find_scores(tmp_path, "best") == tmp_path / "ensemble.npy"


def test_names():
    assert list(named(["r/psla/1", "r/psla/2"])) == ["psla/1", "psla/2"]
    assert list(named(["r/a/x.npy", "q/a/y.npy", "my own=z.npy"])) == ["x", "y", "my own"]
    assert list(named(["r/a/x.npy", "q/a/x.npy", "runs/3"])) == ["r/a/x", "q/a/x", "runs/3"]
    with pytest.raises(InputError, match="two systems are called 'x'"):
        named(["x=a.npy", "x=b.npy"])
    with pytest.raises(InputError, match="two systems are called"):
        named(["a.npy", "a.npy"])


def break_labels(folder):
    table = pyarrow.csv.read_csv(folder / "a" / "one.csv").to_pydict()
    i = common_ids([folder / "a" / "one.npy", folder / "b" / "two.npy"])[3]
    labels = ["/m/5" if name == int(i) else "" for name in table["ID"]]
    scores = np.load(folder / "a" / "one.npy")
    write(folder / "b" / "two.npy", scores, [f"{i:03d}" for i in table["ID"]], labels)


def break_score(folder):
    scores = np.load(folder / "b" / "two.npy")
    scores[:, 2] = np.inf
    np.save(folder / "b" / "two.npy", scores)


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "labels": (break_labels, r"one.csv and .*two.csv: the labels of .* clips differ, first of '"),
    "infinite": (break_score, r"two.npy, clip '\d+': a score is NaN or infinite"),
    "repeated": (rewrite("b/two.csv", "ID\n" + "x\n" * 100), "two.csv: 1 IDs occur more than once"),
    "too few": (rewrite("b/two.csv", "ID\nx\n"), "two.csv has 1 IDs for the 100 rows of"),
    "no ID": (rewrite("b/two.csv", "name\n" + "x\n" * 100), "two.csv: no column 'ID'"),
    "no clips": (rewrite("b/two.csv", ""), "two.csv: cannot be read as a list of clips"),
    "none common": (rewrite("b/two.csv", "ID\n" + "\n".join(f"x{i}" for i in range(100))), "have no clip in common"),
    "no labels": (rewrite("a/one.csv", "ID\n" + "\n".join(IDS[:110])), "no column 'labels'"),
    "other classes": (rewrite(f"b/{CLASSES}", "".join(f"{c},/n/{c},n{c}\n" for c in range(6))), "has no class '/m/0'"),
    "more classes": (rewrite(f"b/{CLASSES}", "".join(f"{c},/m/{c},n{c}\n" for c in range(7))), "scores of 6 classes, but .* has 7"),
    "no array": (rewrite("b/two.npy", "no array"), "two.npy: not a whole .npy file of scores"),
    "no file": (lambda folder: (folder / "b" / "two.npy").unlink(), "two.npy: no such file of scores"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_ends_with_status_2(case, pair, tmp_path, capsys):
    do, message = BROKEN[case]
    do(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command([*pair[0], "--resamples", "10"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err.split("psla-compare: error: ")
    assert len(errors) == 2
    assert errors[1].count("\n") == 1
    with pytest.raises(InputError, match=message):
        match(open_all(pair[0]))


def test_a_class_list_for_those_without_one(tmp_path):
    systems, targets = generated()
    paths = [write(tmp_path / f"{i}.npy", systems[i], IDS, labels_of(targets) if i else None, classes=False) for i in range(2)]
    with pytest.raises(InputError, match=r"0\.npy: no class_labels_indices\.csv beside it .* --classes"):
        match(open_all(paths))
    VOCABULARY.to_csv(tmp_path / "classes.csv")
    np.testing.assert_array_equal(match(open_all(paths), tmp_path / "classes.csv").targets, targets)


def test_command(pair, tmp_path, capsys):
    paths, systems, targets = pair
    command([f"base={paths[0]}", paths[1], "--resamples", "40", "--top", "4", "--level", "90", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    n_clips = len(targets)
    assert lines[0] == f"{n_clips} clips that all have, 5 classes (1 of 6 have no positive clip there, and are left out)"
    assert lines[1] == "intervals of 90 % from 40 paired resamples of the clips"
    figures = [summarize(scores, targets) for scores in systems]
    assert lines[4].startswith(f"base{f'{n_clips} of 110':>28}{figures[0]['mAP']:>11.4f} [")
    assert "difference to base" in lines
    assert sum(LONGEST in line for line in lines) <= 1
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (report["level"], report["n_resamples"], len(report["systems"][1]["classes"])) == (0.9, 40, 4)
    with open(tmp_path / "out" / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ap, auc = average_precision(systems[1], targets), roc_auc(systems[1], targets)
    for c, row in enumerate(rows):
        assert (row["mid"], row["display_name"], row["positive_clips"]) == (
            VOCABULARY.mids[c],
            VOCABULARY.names[c],
            str(targets[:, c].sum()),
        )
        assert [row["two_AP"], row["two_AUC"]] == ["" if np.isnan(value) else str(value) for value in (ap[c], auc[c])]
    assert (tmp_path / "out" / "compare.png").is_file()
    for wrong in (["--level", "0"], ["--resamples", "1"], ["--row", "none"]):
        with pytest.raises(SystemExit) as caught:
            command([*paths, *wrong])
        assert caught.value.code == 2


@pytest.mark.parametrize("n_systems", [1, 2, 5])
def test_picture_is_fit_to_print(n_systems, tmp_path):
    systems, targets = generated(n_systems=n_systems)
    names = ["baseline", "a run with a name that nobody can remember, without mixup", "b$x$", "ensemble", "z"]
    paths = [f"{names[i]}={write(tmp_path / f'{i}.npy', systems[i], IDS, labels_of(targets))}" for i in range(n_systems)]
    report = compare(match(open_all(paths)), n_resamples=20).report
    figure = comparison(report, tmp_path / "compare.png")
    assert_fit_to_print(figure, tmp_path / "compare.png")
    values = figure.axes[-2 if n_systems > 1 else -1].lines[n_systems].get_xdata()
    np.testing.assert_array_equal(values, [system["figures"]["mAP"]["value"] for system in report["systems"]])


def test_d_prime_is_of_the_mean_area():
    figures = ClassFigures(np.full((1, 1, 2), 0.5), np.array([[[0.9, 0.8]]]))
    assert means(figures)["d_prime"][0, 0] == pytest.approx(d_prime(0.85))
