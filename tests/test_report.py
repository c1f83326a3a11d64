"""What is told about label enhancement, against plain counting."""

import numpy as np
import pytest
from test_enhancement import CHAIN, make_ontology, make_vocabulary, random_case

from psla_sb.dataio.manifest import Manifest
from psla_sb.labels.enhancement import candidate_matrix, class_thresholds, enhance
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.report import added_labels, audit, audit_table, class_table, clip_table, mended, mended_by_chance, pair_table


def test_added_labels_and_mended_count_pairs():
    clean = LabelSets.from_lists([[0, 1, 2], [3], [], [1, 0]])
    noisy = LabelSets.from_lists([[1], [3], [], [1]])
    enhanced = LabelSets.from_lists([[1, 0, 3], [3], [2], [1]])
    clips, classes = added_labels(noisy, enhanced)
    assert (clips.tolist(), classes.tolist()) == ([0, 0, 2], [0, 3, 2])
    assert mended(noisy, enhanced, clean) == (1 / 3, 1 / 3)
    assert np.isnan(mended(clean, clean, clean)).all()
    with pytest.raises(ValueError, match="different numbers of clips"):
        added_labels(clean, LabelSets.from_lists([[0]]))


def test_audit_counts_gaps():
    # cat and dog below pet, dog also below animal; "robot" is not in the ontology
    ontology = make_ontology({"pet": ["cat", "dog", "ant"], "animal": ["dog"]})
    vocabulary = make_vocabulary(["cat", "dog", "pet", "animal", "robot"])
    clips = [["cat"], ["cat", "pet"], ["dog", "pet"], ["dog", "pet", "animal", "dog"], ["dog"], ["pet"], ["robot"], []]
    found = audit(LabelSets.from_lists([[vocabulary.index(m) for m in clip] for clip in clips]), vocabulary, ontology)
    assert found.carried.tolist() == [2, 3, 4, 1, 1]
    assert found.without_parent.tolist() == [1, 2, 0, 0, 0]
    assert found.without_child.tolist() == [0, 0, 1, 0, 0]
    table = audit_table(found, vocabulary).to_pylist()
    assert table[0] == {"mid": "dog", "name": "dog", "clips": 3, "without_parent": 2, "without_child": 0}
    assert [row["mid"] for row in table] == ["dog", "cat", "pet", "animal", "robot"]


@pytest.fixture(scope="module")
def case():
    """Labels before and after enhancement, and what they came from."""
    label_sets, scores, vocabulary = random_case()
    thresholds = class_thresholds(scores, label_sets)
    return label_sets, enhance(label_sets, scores, vocabulary, CHAIN, thresholds), thresholds, vocabulary


def test_class_table_counts_clips(case):
    before, after, thresholds, vocabulary = case
    rows = class_table(before, after, np.append(thresholds[:3], np.nan), vocabulary).to_pylist()
    for c, row in enumerate(rows):
        assert (row["mid"], row["name"]) == (vocabulary.mids[c], vocabulary.names[c])
        assert row["before"] == sum(c in clip for clip in before)
        assert row["after"] == sum(c in clip for clip in after)
        assert row["added"] == row["after"] - row["before"] > 0
        assert row["threshold"] == (thresholds[c] if c < 3 else None)


@pytest.mark.parametrize("types", [("I", "II"), ("I",), ("II",)])
def test_pair_table_counts_what_brought_what(case, types):
    label_sets, scores, vocabulary = random_case()
    after = enhance(label_sets, scores, vocabulary, CHAIN, types=types)
    relation = candidate_matrix(vocabulary, CHAIN, types)
    expected = {}
    for old, new in zip(label_sets, after, strict=True):
        for carried in set(old.tolist()):
            for added in set(new.tolist()) - set(old.tolist()):
                if relation[carried, added]:
                    pair = vocabulary.mids[carried], vocabulary.mids[added]
                    expected[pair] = expected.get(pair, 0) + 1
    rows = pair_table(label_sets, after, vocabulary, CHAIN, types).to_pylist()
    assert {(row["carried_mid"], row["added_mid"]): row["clips"] for row in rows} == expected
    assert sorted((row["clips"] for row in rows), reverse=True) == [row["clips"] for row in rows]
    for row in rows:
        assert row["type"] == ("I" if row["added_mid"] in CHAIN.children(row["carried_mid"]) else "II")
        assert row["type"] in types


def test_clip_table_has_the_clips_with_most_additions(case):
    before, after, _, vocabulary = case
    ids = [f"clip{i}" for i in range(len(before))]
    manifest = Manifest.from_columns(ids, ids, [1.0] * len(ids), [""] * len(ids))
    rows = clip_table(manifest, before, after, vocabulary, 7).to_pylist()
    added = [len(new) - len(old) for old, new in zip(before, after, strict=True)]
    assert [row["n_added"] for row in rows] == sorted(added, reverse=True)[:7]
    for row in rows:
        clip = ids.index(row["ID"])
        assert row["carried"] == "; ".join(vocabulary.names[c] for c in before[clip])
        assert row["added"] == "; ".join(vocabulary.names[c] for c in after[clip][len(before[clip]) :])
    assert clip_table(manifest, before, before, vocabulary).num_rows == 0
    assert pair_table(before, before, vocabulary, CHAIN).num_rows == 0


def test_chance_is_the_mean_of_random_draws():
    rng = np.random.default_rng(3)
    noisy, _, vocabulary = random_case(60)
    noisy = LabelSets.from_lists([[c for c in clip if c != 2] for clip in noisy])  # no clip has "pet": not a candidate
    clean = LabelSets.from_lists([[*clip, *rng.choice(4, size=rng.integers(0, 3))] for clip in noisy])
    relation = candidate_matrix(vocabulary, CHAIN)
    candidates = [(i, c) for i, clip in enumerate(noisy) for c in range(4) if c not in clip and c != 2 and relation[clip, c].any()]
    n_added, found = len(candidates) // 3, []
    for _ in range(2000):
        drawn = np.sort(rng.choice(len(candidates), n_added, replace=False))
        clips, classes = np.array(candidates)[drawn].T
        found.append(mended(noisy, noisy.append(clips, classes), clean))
    assert mended_by_chance(noisy, noisy.append(clips, classes), clean, vocabulary, CHAIN) == pytest.approx(
        np.mean(found, axis=0), abs=0.01
    )
    assert np.isnan(mended_by_chance(noisy, noisy, clean, vocabulary, CHAIN)[0])
    assert np.isnan(mended_by_chance(noisy, clean, noisy, vocabulary, CHAIN)[1])


def test_a_teacher_that_hears_something_beats_chance():
    """Labels that were taken away come back, the more of them the lower the threshold."""
    rng = np.random.default_rng(4)
    mids = ["animal", "dog", "cat", "bird", "engine", "car", "bus"]
    ontology = make_ontology({"animal": ["dog", "cat", "bird"], "engine": ["car", "bus"]})
    vocabulary = make_vocabulary(mids)
    parent = [0, 0, 0, 0, 4, 4, 4]
    clean = [sorted({leaf, parent[leaf]}) for leaf in rng.choice([1, 2, 3, 5, 6], 2000)]
    noisy = [[c for c in clip if rng.random() > 0.3] or clip[:1] for clip in clean]
    clean, noisy = LabelSets.from_lists(clean), LabelSets.from_lists(noisy)
    scores = (0.4 * clean.to_multi_hot(range(2000), 7) + 0.6 * rng.random((2000, 7))).astype(np.float16)
    recalls = []
    for threshold in ("mean", 25, 5):
        enhanced = enhance(noisy, scores, vocabulary, ontology, threshold)
        precision, recall = mended(noisy, enhanced, clean)
        by_chance = mended_by_chance(noisy, enhanced, clean, vocabulary, ontology)
        assert precision > 1.5 * by_chance[0]
        assert recall > 1.5 * by_chance[1]
        recalls.append(recall)
    assert recalls == sorted(recalls)
    assert recalls[0] > 0.3
