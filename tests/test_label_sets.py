"""LabelSets against plain Python sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.labels.label_sets import LabelSets

N_CLASSES = 9
lists_of_labels = st.lists(st.lists(st.integers(0, N_CLASSES - 1), max_size=5), max_size=12)


@settings(deadline=None, max_examples=60)
@given(lists=lists_of_labels, data=st.data())
def test_equal_to_lists(lists, data):
    labels = LabelSets.from_lists(lists)
    assert labels.offsets.dtype == np.int64
    assert labels.indices.dtype == np.int32
    assert len(labels) == len(lists)
    assert [labels[i].tolist() for i in range(-len(lists), len(lists))] == lists + lists
    assert [clip.tolist() for clip in labels] == lists
    clips, classes = labels.pairs(N_CLASSES)
    assert list(zip(clips, classes, strict=True)) == [(i, c) for i, clip in enumerate(lists) for c in sorted(set(clip))]
    counts = labels.counts(N_CLASSES)
    assert counts.dtype == np.int64
    assert counts.tolist() == [sum(c in clip for clip in lists) for c in range(N_CLASSES)]
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6)) if lists else []
    targets = labels.to_multi_hot(rows, N_CLASSES)
    assert targets.dtype == np.float32
    assert targets.shape == (len(rows), N_CLASSES)
    assert targets.tolist() == [[float(c in lists[row]) for c in range(N_CLASSES)] for row in rows]


def test_wrong_offsets():
    indices = np.arange(3, dtype=np.int32)
    for offsets in ([], [0, 2], [1, 3], [0, 2, 1, 3], [0, 4]):
        with pytest.raises(ValueError, match="offsets"):
            LabelSets(np.array(offsets, np.int64), indices)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_class_out_of_range(wrong):
    labels = LabelSets.from_lists([[0], [2, wrong]])
    for call in (labels.pairs, labels.counts, lambda n_classes: labels.to_multi_hot([1], n_classes)):
        with pytest.raises(ValueError, match="same vocabulary"):
            call(3)


def test_clip_out_of_range():
    labels = LabelSets.from_lists([[0], [1]])
    for row in (-1, 2):
        with pytest.raises(IndexError):
            labels.to_multi_hot([0, row], 3)
    with pytest.raises(IndexError):
        labels[2]
