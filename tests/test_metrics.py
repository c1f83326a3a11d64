"""Metrics against scikit-learn, and the collector in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import psla_sb
from psla_sb.metrics import CLASS_BLOCK, MeanScores, TaggingStats, average_precision, d_prime, roc_auc, summarize
from runs import TRAIN, command, run


def sklearn_per_class(function, scores, targets, needs_negative):
    values = []
    for score, target in zip(scores.T, targets.T, strict=True):
        defined = target.any() and not (needs_negative and target.all())
        values.append(function(target, score) if defined else np.nan)
    return np.array(values)


def random_case(seed, n_clips=200, n_classes=11, levels=None, rate=0.1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scores = rng.random((n_clips, n_classes)) if levels is None else rng.integers(0, levels, (n_clips, n_classes)) / levels
    return scores.astype(dtype), (rng.random((n_clips, n_classes)) < rate).astype(dtype)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_clips=st.integers(1, 60),
    n_classes=st.sampled_from([1, 5, CLASS_BLOCK + 3]),
    levels=st.sampled_from([None, 1, 2, 7]),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_equal_to_sklearn(seed, n_clips, n_classes, levels, rate, dtype):
    scores, targets = random_case(seed, n_clips, n_classes, levels, rate, dtype)
    before = scores.copy()
    expected = sklearn_per_class(average_precision_score, scores, targets, needs_negative=False)
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=0, atol=1e-12)
    expected = sklearn_per_class(roc_auc_score, scores, targets, needs_negative=True)
    np.testing.assert_allclose(roc_auc(scores, targets), expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(scores, before)


def test_undefined_classes():
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    targets = np.array([[0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(average_precision(scores, targets), [np.nan, 1.0, 0.5])
    np.testing.assert_array_equal(roc_auc(scores, targets), [np.nan, np.nan, 0.0])


def test_neighbouring_float32_scores_are_not_tied():
    low = np.float32(0.9999998)
    scores = np.array([[low], [np.nextafter(low, np.float32(1))]])
    assert average_precision(scores, np.array([[0], [1]])) == 1
    assert roc_auc(scores, np.array([[1], [0]])) == 0
    assert roc_auc(np.array([[low], [low]]), np.array([[1], [0]])) == 0.5


@pytest.mark.parametrize("function", [average_precision, roc_auc])
def test_input_types_and_memory_layouts(function):
    scores, targets = random_case(0, levels=9)
    expected = function(scores, targets)
    assert expected.dtype == np.float64
    for other in [
        (torch.tensor(scores, requires_grad=True), torch.tensor(targets)),
        (np.asfortranarray(scores), targets.astype(bool)),
        (np.repeat(scores, 2, axis=0)[::2], targets.astype(int)),
    ]:
        np.testing.assert_array_equal(function(*other), expected)
    sorted_layout = np.asfortranarray(scores)
    function(sorted_layout, targets)
    np.testing.assert_array_equal(sorted_layout, scores)  # nothing is sorted in place in the caller's array


@pytest.mark.parametrize("function", [average_precision, roc_auc, summarize])
def test_bad_input(function):
    scores, targets = random_case(0, n_clips=5, n_classes=3)
    with pytest.raises(ValueError, match=r"\[clips, classes\]"):
        function(scores, targets[:, :2])
    with pytest.raises(ValueError, match=r"\[clips, classes\]"):
        function(scores[0], targets[0])
    for wrong in (0.5, 2, -1, np.nan):
        with pytest.raises(ValueError, match="0 or 1"):
            function(scores, np.where(np.arange(3) == 2, wrong, targets))
    scores[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        function(scores, targets)


def test_d_prime():
    auc = np.linspace(0.001, 0.999, 97)
    expected = [2**0.5 * NormalDist().inv_cdf(x) for x in auc]
    np.testing.assert_allclose(d_prime(auc), expected, rtol=1e-9, atol=1e-12)
    assert isinstance(d_prime(0.9), float)
    # PSLA's table, from an AUC rounded to three digits
    for area, published in [(0.974, 2.749), (0.978, 2.854), (0.979, 2.872), (0.981, 2.936)]:
        assert d_prime(area) == pytest.approx(published, abs=0.02)


def test_summarize():
    scores = np.array([[0.9, 0.2, 0.0, 0.4], [0.8, 0.6, 1.0, 0.4], [0.3, 0.1, 0.5, 0.4]], np.float32)
    targets = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    figures = summarize(scores, targets)
    # Last class: no positive. Third: the worst ranking, with scores of exactly 0 and 1 that are wrong.
    assert figures["mAP"] == pytest.approx((5 / 6 + 1 + 1 / 3) / 3)
    assert figures["mAUC"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert figures["d_prime"] == pytest.approx(0)
    assert figures["n_classes_left_out"] == 1
    clamped = np.clip(scores, np.float32(1e-7), np.float32(1 - 1e-7)).astype(np.float64)
    loss = -np.log(np.where(targets == 1, clamped, 1 - clamped)).mean()
    assert loss > 2 * 15.9 / 12
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)


def test_summarize_without_a_defined_class():
    figures = summarize(np.full((2, 3), 0.5), np.zeros((2, 3)))
    assert np.isnan([figures[name] for name in ("mAP", "mAUC", "d_prime")]).all()
    assert figures["n_classes_left_out"] == 3
    assert figures["loss"] == pytest.approx(np.log(2))


def test_stats_put_rows_where_they_belong():
    scores, targets = random_case(3, n_clips=50, levels=20)
    order = np.random.default_rng(0).permutation(50)
    stats = TaggingStats(50, 11)
    for rows in np.split(order, [7, 30]):
        stats.append(torch.tensor(rows), torch.tensor(scores[rows], requires_grad=True), targets[rows].astype(int))
    assert stats.summarize() == summarize(scores, targets)
    np.testing.assert_array_equal(stats.scores, scores)
    np.testing.assert_array_equal(stats.ap, average_precision(scores, targets))
    np.testing.assert_array_equal(stats.auc, roc_auc(scores, targets))


def test_stats_refuse_incomplete_collections():
    stats = TaggingStats(4, 2)
    stats.append([0, 1, 3], torch.zeros(3, 2), torch.zeros(3, 2))
    for finish in (stats.reduce, stats.summarize):
        with pytest.raises(RuntimeError, match=r"1 were not scored and 0 were scored more than once: rows \[2\]"):
            finish()
    stats.append([2, 3], torch.zeros(2, 2), torch.zeros(2, 2))
    for finish in (stats.reduce, stats.summarize):
        with pytest.raises(RuntimeError, match=r"0 were not scored and 1 were scored more than once: rows \[3\]"):
            finish()
    stats = TaggingStats(4, 2)
    stats.append([1, 1], torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"3 were not scored and 1 were scored more than once"):
        stats.reduce()


def test_stats_refuse_wrong_shapes():
    stats = TaggingStats(4, 2)
    for index, scores, targets in [
        ([0, 1], torch.zeros(2, 3), torch.zeros(2, 2)),
        ([0, 1], torch.zeros(2, 2), torch.zeros(1, 2)),
        ([0], torch.zeros(2), torch.zeros(2)),
    ]:
        with pytest.raises(ValueError, match=r"\[batch, classes\]"):
            stats.append(index, scores, targets)


RANK = """
import json, sys
import numpy as np, torch
from psla_sb.metrics import TaggingStats
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
case = np.load(f"{folder}/case.npz")
for share in ("shared", "all_on_one", "overlap"):
    stats = TaggingStats(*case["scores"].shape)
    rows = case[f"{share}_{rank}"]
    stats.append(rows, case["scores"][rows], case["targets"][rows])
    try:
        stats.reduce()
        print(json.dumps([share, stats.summarize(), stats.scores.numpy().tobytes() == case["scores"].tobytes()]))
    except RuntimeError as error:
        print(json.dumps([share, str(error)]))
torch.distributed.destroy_process_group()  # a process that ends with gloo's threads running may abort
"""


def test_two_processes_equal_one_to_the_last_bit(tmp_path):
    scores, targets = random_case(5, n_clips=31, levels=50, rate=0.3)
    rows = np.random.default_rng(0).permutation(31)
    shares = {
        "shared_0": rows[:13],
        "shared_1": rows[13:],
        "all_on_one_0": rows,
        "all_on_one_1": rows[:0],
        "overlap_0": rows[:13],
        "overlap_1": rows[12:],
    }
    np.savez(tmp_path / "case.npz", scores=scores, targets=targets, **shares)
    environment = {**os.environ, "PYTHONPATH": str(Path(psla_sb.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    figures = repr_json(summarize(scores, targets))
    assert outputs[0].splitlines() == [
        f'["shared", {figures}, true]',
        f'["all_on_one", {figures}, true]',
        f'["overlap", "of 31 clips, 0 were not scored and 1 were scored more than once: rows [{rows[12]}]"]',
    ]


def repr_json(figures):
    return "{" + ", ".join(f'"{name}": {value!r}' for name, value in figures.items()) + "}"


def test_mean_of_scores_is_numpys_in_double_precision():
    scores = np.random.default_rng(0).random((5, 7, 3), dtype=np.float32)
    mean = MeanScores()
    found = [mean.add(one) for one in scores]
    for n, one in enumerate(found, 1):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, scores[:n].mean(axis=0, dtype=np.float64), rtol=1e-15)


ADDED = """
import sys
import numpy as np
from psla_sb import metrics

metrics.METRICS["median_AP"] = metrics.Metric(lambda e: float(np.nanmedian(e.ap)), "median over the classes", "median", "9.4f")
metrics.FIGURES = tuple(metrics.METRICS)

from psla_sb.experiment.train import main

main(sys.argv[1], sys.argv[2:])
"""


def test_a_metric_that_is_added_in_one_place_is_in_every_row_and_table(mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run")
    done = run([sys.executable, "-c", ADDED, *argv[1:]], env={"PYTHONPATH": str(TRAIN.parent)})
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = [*results["epochs"], *(row for name, row in results["evaluation"].items() if name != "chance")]
    assert len(rows) == 7
    assert all(0 < row["median_AP"] <= 1 for row in rows)
    assert results["meaning"]["median_AP"] == "median over the classes"
    assert "mAP    mAUC  d-prime   median" in done.stdout
    assert "median_AP" in (tmp_path / "run" / "train_log.txt").read_text()
