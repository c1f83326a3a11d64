"""How own clips are shared out to training, validation and test: groups whole, classes everywhere, shares as asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from psla_sb.prepare.splits import fold_parts, joined_groups, share_out

SHARES = [0.7, 0.15, 0.15]


@st.composite
def data_sets(draw):
    """Labels `[clips, classes]`, of one or several labels a clip and classes of very different sizes, and groups."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_clips, n_classes = draw(st.integers(30, 300)), draw(st.integers(2, 12))
    chances = rng.dirichlet(np.full(n_classes, draw(st.sampled_from([0.3, 1.0, 10.0]))))
    labels = np.eye(n_classes, dtype=int)[rng.choice(n_classes, n_clips, p=chances)]
    if draw(st.booleans()):
        labels |= rng.random(labels.shape) < 0.1
    groups = rng.integers(0, draw(st.integers(10, n_clips)), n_clips) if draw(st.booleans()) else np.arange(n_clips)
    return labels, np.unique(groups, return_inverse=True)[1]


def groups_with(labels, groups):
    return np.array([len(np.unique(groups[labels[:, c] > 0])) for c in range(labels.shape[1])])


@given(data_sets(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_groups_are_whole_and_each_class_is_trained(data, seed):
    labels, groups = data
    parts = share_out(csr_array(labels), groups, SHARES, seed)
    assert parts.shape == groups.shape
    for group in np.unique(groups):
        assert len(np.unique(parts[groups == group])) == 1
    assert labels[parts == 0].any(axis=0)[labels.any(axis=0)].all()
    assert np.array_equal(parts, share_out(csr_array(labels), groups, SHARES, seed))


@given(data_sets())
@settings(max_examples=100, deadline=None)
def test_single_labels_are_in_each_part(data):
    labels, groups = data
    # one label a clip, and a group has one class
    classes = labels.argmax(axis=1)
    labels, groups = np.eye(labels.shape[1], dtype=int)[classes], np.unique(groups * 100 + classes, return_inverse=True)[1]
    parts = share_out(csr_array(labels), groups, SHARES)
    enough = groups_with(labels, groups) >= 3
    for part in range(3):
        assert labels[parts == part].any(axis=0)[enough].all()


@pytest.mark.parametrize("n_labels", [1, 3])
def test_shares_of_each_class_are_close(n_labels):
    rng = np.random.default_rng(0)
    labels = np.zeros((5000, 30), int)
    for _ in range(n_labels):
        labels[np.arange(5000), np.minimum(rng.geometric(0.12, 5000) - 1, 29)] = 1
    parts = share_out(csr_array(labels), np.arange(5000), SHARES)
    np.testing.assert_allclose(np.bincount(parts) / 5000, SHARES, atol=0.01)
    counts = np.stack([labels[parts == part].sum(axis=0) for part in range(3)])
    wanted = np.outer(SHARES, labels.sum(axis=0))
    distance = np.abs(counts - wanted)
    assert distance.max() <= (1.5 if n_labels == 1 else 10)
    assert distance.mean() < 1
    random = np.random.default_rng(1).choice(3, 5000, p=SHARES)
    assert np.abs(np.stack([labels[random == part].sum(axis=0) for part in range(3)]) - wanted).mean() > 2.5


def test_shares_are_close_with_groups_of_all_sizes():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), rng.geometric(0.1, 400))
    classes = rng.integers(0, 10, 400)[groups]
    parts = share_out(csr_array(np.eye(10, dtype=int)[classes]), groups, SHARES)
    np.testing.assert_allclose(np.bincount(parts) / len(parts), SHARES, atol=0.03)


def test_rare_classes():
    # 1, 2, 3 and 4 clips
    labels = np.eye(4, dtype=int)[[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    parts = share_out(csr_array(labels), np.arange(10), SHARES)
    counts = np.stack([labels[parts == part].sum(axis=0) for part in range(3)])
    assert counts[0].tolist() == [1, 1, 1, 2]
    assert (counts[1:, 2:] == 1).all()


def test_a_class_is_trained_though_rarer_ones_take_its_clips():
    # classes 0 and 1 each have a clip of their own, and one that is of class 2 as well: often both of these are not for training
    labels = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], *[[0, 0, 0, 1]] * 20])
    for seed in range(20):
        parts = share_out(csr_array(labels), np.arange(len(labels)), SHARES, seed)
        assert labels[parts == 0].any(axis=0).all()


def test_no_class_is_taken_from_training_for_another_set():
    # of class 0, each clip is the only one of another class
    labels = np.hstack([np.ones((3, 1), int), np.eye(3, dtype=int)])
    labels = np.vstack([np.pad(labels, ((0, 0), (0, 1))), [[0, 0, 0, 0, 1]] * 20])
    parts = share_out(csr_array(labels), np.arange(len(labels)), SHARES)
    assert parts[:3].tolist() == [0, 0, 0]


def test_a_large_group_is_for_training():
    groups = np.array([0] * 50 + list(range(1, 51)))
    parts = share_out(csr_array(np.ones((100, 1), int)), groups, SHARES)
    assert set(parts[:50]) == {0}


def test_clips_without_labels_are_shared_out():
    parts = share_out(csr_array(np.zeros((100, 2), int)), np.arange(100), SHARES)
    assert np.bincount(parts).tolist() == [70, 15, 15]


def test_folds_of_equal_size_with_all_classes():
    labels = np.eye(7, dtype=int)[np.arange(350) % 7]
    folds = share_out(csr_array(labels), np.arange(350), [0.2] * 5, train=None)
    for fold in range(5):
        assert labels[folds == fold].sum(axis=0).tolist() == [10] * 7
    for k in range(5):
        parts = fold_parts(folds, 5, k)
        assert np.array_equal(parts == 2, folds == k)
        assert np.array_equal(parts == 1, folds == (k + 1) % 5)


def test_seeds_differ():
    labels = csr_array(np.ones((100, 1), int))
    assert not np.array_equal(share_out(labels, np.arange(100), SHARES, 0), share_out(labels, np.arange(100), SHARES, 1))


def test_groups_that_pairs_connect():
    groups = np.array([0, 0, 1, 2, 2, 3])
    assert joined_groups(groups, []).tolist() == [0, 0, 1, 2, 2, 3]
    assert joined_groups(groups, [(1, 3), (5, 4)]).tolist() == [0, 0, 1, 0, 0, 0]
