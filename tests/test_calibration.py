"""Probabilities and thresholds that are fitted on held-out clips: the numbers, the file, and what is refused."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.metrics import f1_score, precision_score

from psla_sb.errors import InputError
from psla_sb.labels import calibration as module
from psla_sb.labels.calibration import (
    FEWEST,
    Calibration,
    check_target_precision,
    expected_calibration_error,
    fit_calibration,
    reliability,
)
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision, best_f1, f1_of, roc_auc, threshold_at_precision


def simulated(n_clips, prior, slope=0.5, bias=-1.0, n_classes=8, seed=0):
    """Scores whose true log odds are `slope * logit(score) + bias`, and targets."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n_clips, n_classes)) < prior
    distance = rng.uniform(1, 3, n_classes)
    heard = rng.normal(size=(n_clips, n_classes)) + distance * targets
    odds = distance * heard - distance**2 / 2 + logit(prior)
    return expit((odds - bias) / slope), targets


@pytest.mark.parametrize(("slope", "bias"), [(0.5, -1.0), (2.0, 0.0), (1.0, 1.5), (0.7, -2.0)])
def test_what_was_miscalibrated_is_mended_on_other_clips(slope, bias):
    scores, targets = simulated(8000, 0.1, slope, bias)
    calibration = fit_calibration(scores[:4000], targets[:4000])
    np.testing.assert_allclose(calibration.slope, slope, rtol=0.25)
    np.testing.assert_allclose(calibration.bias, bias, atol=0.4)
    before, after = (
        expected_calibration_error(s, targets[4000:]) for s in (scores[4000:], calibration.probabilities(scores[4000:]))
    )
    assert after < 0.01 < 0.6 * before


def test_the_fit_is_the_minimum_that_scipy_finds():
    scores, targets = simulated(400, 0.1, n_classes=3)
    calibration = fit_calibration(scores, targets)
    for c in range(3):

        def loss(x, y=targets[:, c], s=scores[:, c]):
            t = np.exp(x[0]) * logit(s) + x[1]
            prior = (x[0] / module.SLOPE_DEVIATION) ** 2 / 2 + (x[1] / module.BIAS_DEVIATION) ** 2 / 2
            return (np.logaddexp(0, t) - y * t).sum() + prior

        found = minimize(loss, [0, 0], tol=1e-10)
        np.testing.assert_allclose([np.log(calibration.slope[c]), calibration.bias[c]], found.x, atol=1e-4)


def test_two_positive_clips_hardly_move_a_class():
    # all that its scores promise; parted from the others, so that a fit without a prior would end at infinity
    scores = np.append(np.geomspace(0.001, 0.05, 98), [0.3, 0.4])[:, None]
    targets = scores > 0.2
    calibration = fit_calibration(scores, targets)
    assert calibration.own.tolist() == [False]
    assert calibration.bias.tolist() == [0]
    assert np.abs(calibration.probabilities(scores) - scores).max() < 0.05


def test_classes_with_few_positive_clips_share_one_temperature_and_one_threshold():
    scores, targets = simulated(3000, 0.01, slope=0.5, bias=0.0, n_classes=60)
    targets[:, :50] &= np.cumsum(targets[:, :50], axis=0) < FEWEST
    targets[:, 0] = False
    scores[:, :50] = np.where(targets[:, :50], 0.9, scores[:, :50])
    calibration = fit_calibration(scores, targets)
    few = np.arange(60) < 50
    assert calibration.own.tolist() == (~few).tolist()
    assert len(np.unique(calibration.slope[few])) == len(np.unique(calibration.threshold[few])) == 1
    assert not calibration.bias[few].any()
    assert len(np.unique(calibration.slope[~few])) == 10
    pooled = best_f1(scores.reshape(-1, 1), targets.reshape(-1, 1))
    f1 = f1_score(targets.ravel(), (scores >= calibration.threshold[0]).ravel())
    assert f1 == pytest.approx(pooled[1][0])


scores_and_targets = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(
            np.float32,
            (n, 3),
            elements=st.sampled_from(np.float32([0, 1e-9, 0.1, 0.3, 0.5, 0.7, 0.999, 1])) | st.floats(0, 1, width=32),
        ),
        arrays(bool, (n, 3)),
    )
)


@settings(max_examples=40, deadline=None)
@given(scores_and_targets, st.sampled_from([None, 0.5, 0.9, 1.0]))
def test_orders_stay_and_thresholds_are_the_best_for_all_there_is(data, target_precision):
    scores, targets = data
    calibration = fit_calibration(scores, targets, target_precision)
    probabilities, decided = calibration.probabilities(scores), calibration.decisions(scores)
    assert (calibration.slope > 0).all()
    assert np.isfinite(probabilities).all()
    assert ((probabilities > 0) & (probabilities < 1)).all()
    # orders and ties, but of scores that are beyond what is told apart
    for c in range(3):
        order = np.argsort(scores[:, c], kind="stable")
        assert (np.diff(probabilities[order, c]) >= 0).all()
    own = np.flatnonzero(targets.sum(axis=0) >= FEWEST)
    assert calibration.own.tolist() == (targets.sum(axis=0) >= FEWEST).tolist()
    for c in own:
        if target_precision is None:
            best = max(f1_score(targets[:, c], scores[:, c] >= cut) for cut in scores[:, c])
            assert f1_score(targets[:, c], decided[:, c]) == pytest.approx(best)
        else:
            cuts = [cut for cut in scores[:, c] if precision_score(targets[:, c], scores[:, c] >= cut) >= target_precision]
            expected = scores[:, c] >= min(cuts) if cuts else np.zeros(len(scores), bool)
            np.testing.assert_array_equal(decided[:, c], expected)


def test_ap_and_auc_do_not_change():
    scores, targets = simulated(500, 0.05)
    probabilities = fit_calibration(scores, targets).probabilities(scores)
    np.testing.assert_allclose(average_precision(probabilities, targets), average_precision(scores, targets))
    np.testing.assert_allclose(roc_auc(probabilities, targets), roc_auc(scores, targets))


def test_a_threshold_lies_between_two_scores():
    scores = np.array([0.9] * 6 + [0.8, 0.2, 0.1])[:, None]
    targets = np.array([1] * 6 + [1, 0, 0])[:, None]
    assert fit_calibration(scores, targets).threshold == pytest.approx([0.5])
    # where all clips are decided, half-way to 0
    assert fit_calibration(scores, np.ones_like(targets)).threshold == pytest.approx([0.05])


def test_a_precision_that_is_not_reached_decides_nothing():
    scores = np.linspace(0.1, 0.9, 20)[:, None].repeat(2, axis=1)
    targets = np.zeros((20, 2))
    targets[:10, 0] = targets[10:, 1] = 1
    calibration = fit_calibration(scores, targets, target_precision=0.9)
    assert calibration.threshold[0] == math.inf
    assert not calibration.decisions(scores)[:, 0].any()
    assert (calibration.decisions(scores)[:, 1] == targets[:, 1]).sum() >= 18
    assert calibration.criterion == "a precision of 0.9 at least"
    assert fit_calibration(scores, targets).criterion == "the best F1 score"
    # 55 of 100 are 55 %, whatever 0.55 * 100 is in binary
    targets = np.arange(100)[:, None] < 55
    assert threshold_at_precision(np.zeros((100, 1)), targets, 0.55) == [0]


def test_without_any_positive_clip_nothing_is_decided():
    calibration = fit_calibration(np.full((4, 2), 0.9), np.zeros((4, 2)))
    assert np.isinf(calibration.threshold).all()
    assert not calibration.own.any()
    assert not calibration.decisions(np.ones((1, 2))).any()


def plain_error(scores, targets, n_bins):
    """The definition, pair by pair; equal scores share their positives."""
    pairs = sorted(zip(np.ravel(scores).tolist(), np.ravel(targets).tolist(), strict=True))
    share = {s: np.mean([y for other, y in pairs if other == s]) for s, _ in pairs}
    pairs = [(s, share[s]) for s, _ in pairs]
    error, start = 0.0, 0
    for b in range(n_bins):
        size = len(pairs) // n_bins + (b < len(pairs) % n_bins)
        part = pairs[start : start + size]
        start += size
        if part:
            error += size / len(pairs) * abs(np.mean([s for s, _ in part]) - np.mean([y for _, y in part]))
    return error


@settings(max_examples=50, deadline=None)
@given(scores_and_targets, st.integers(1, 20))
def test_the_expected_calibration_error_is_that_of_a_plain_loop(data, n_bins):
    scores, targets = data
    assert expected_calibration_error(scores, targets, n_bins) == pytest.approx(plain_error(scores, targets, n_bins), abs=1e-6)
    mean, share, pairs = reliability(scores, targets, n_bins)
    assert pairs.sum() == scores.size
    assert (share * pairs).sum() == pytest.approx(targets.sum())
    assert (np.diff(mean) >= 0).all()


def test_f1_of_decisions_is_scikit_learns():
    rng = np.random.default_rng(0)
    decided, targets = rng.random((2, 50, 6)) < np.array([0.5, 0.1, 0.9, 0.3, 0.0, 1.0])
    targets[:, 4] = False
    found = f1_of(decided, targets)
    expected = f1_score(targets, decided, average=None, zero_division=0)
    np.testing.assert_allclose(found[:4], expected[:4])
    assert np.isnan(found[4])


@pytest.fixture
def vocabulary():
    return Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])


@pytest.fixture
def calibration():
    scores, targets = simulated(100, 0.3, n_classes=2)
    targets[:, 1] = False
    return fit_calibration(scores, targets, target_precision=0.99)


def test_the_file_says_the_same_as_json_knows_it(calibration, vocabulary, tmp_path):
    calibration.write(tmp_path / "calibration.json", vocabulary)

    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    said = json.loads((tmp_path / "calibration.json").read_text(), parse_constant=no_constant)
    assert [one["name"] for one in said["classes"]] == ["Bell", "Rain"]
    assert said["classes"][1]["own"] is False
    again = Calibration.read(tmp_path / "calibration.json", vocabulary)
    for name in ("slope", "bias", "threshold", "own", "positives"):
        np.testing.assert_array_equal(getattr(again, name), getattr(calibration, name))
    assert (again.n_clips, again.target_precision) == (100, 0.99)


def test_a_class_that_is_never_decided_is_null(vocabulary, tmp_path):
    fit_calibration(np.full((4, 2), 0.9), np.zeros((4, 2))).write(tmp_path / "calibration.json", vocabulary)
    assert json.loads((tmp_path / "calibration.json").read_text())["classes"][0]["threshold"] is None
    assert np.isinf(Calibration.read(tmp_path / "calibration.json", vocabulary).threshold).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-20], "not the thresholds of a tagger"),
        (lambda text: "[" * 100_000, "not the thresholds of a tagger"),
        (lambda text: "[]", "not the thresholds of a tagger"),
        (lambda text: text.replace('"slope": ', '"slope": -'), "is not a number that it can be"),
        (lambda text: text.replace('"bias": ', '"bias": NaN, "was": '), "is not a number that it can be"),
        (lambda text: text.replace('"threshold": ', '"threshold": -1, "was": '), "is not a number that it can be"),
        (lambda text: text.replace('"threshold": ', '"threshold": "x", "was": '), "not the thresholds of a tagger"),
        (lambda text: text.replace('"classes"', '"others"'), "not the thresholds of a tagger"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(calibration, vocabulary, tmp_path, change, says):
    path = tmp_path / "calibration.json"
    calibration.write(path, vocabulary)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=says) as raised:
        Calibration.read(path, vocabulary)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("mids", [["/m/2", "/m/1"], ["/m/1", "/m/3"], ["/m/1", "/m/2", "/m/3"]])
def test_a_file_of_other_classes_is_refused(calibration, vocabulary, tmp_path, mids):
    calibration.write(tmp_path / "calibration.json", vocabulary)
    with pytest.raises(InputError, match="made for other classes, or in another order"):
        Calibration.read(tmp_path / "calibration.json", Vocabulary(mids, [f"name {mid}" for mid in mids]))


def test_wanted_precisions():
    assert [check_target_precision(value, "x.yaml") for value in (None, 0.9, 1)] == [None, 0.9, 1.0]
    for value in (0, 1.5, -0.1, "high", True, math.nan):
        with pytest.raises(InputError, match=r"x\.yaml: target_precision must be above 0 and at most 1"):
            check_target_precision(value, "x.yaml")
