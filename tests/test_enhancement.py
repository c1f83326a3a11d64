"""Label enhancement: each rule by hand, and all of them against a slow restatement on random ontologies."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels import enhancement
from psla_sb.labels.enhancement import (
    NEVER_GENERATE,
    candidate_matrix,
    class_thresholds,
    enhance,
    enhance_annotation,
    enhance_labels,
)
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.report import added_labels
from psla_sb.labels.teacher_scores import read_scores
from psla_sb.labels.vocabulary import Vocabulary


def make_ontology(children, restrictions=None):
    """children: dict of mid to child mids; mids that are only children get an entry too."""
    mids = dict.fromkeys([*children, *(c for below in children.values() for c in below)])
    restrictions = restrictions or {}
    return Ontology(
        [{"id": m, "name": m, "child_ids": list(children.get(m, ())), "restrictions": restrictions.get(m, [])} for m in mids]
    )


def make_vocabulary(mids):
    return Vocabulary(list(mids), list(mids))


def on_one_clip(labels, mids, ontology, types=("I", "II")):
    """What is added to a clip on which every class scores high, each other class being carried by a quiet clip."""
    mids = list(mids)
    label_sets = [list(labels), *([m] for m in mids)]
    scores = np.concatenate([np.full((1, len(mids)), 0.9), np.full((len(mids), len(mids)), 0.1)])
    return enhance_labels(label_sets, scores, make_vocabulary(mids), ontology, 10, types)[0]


# animal > pet > dog > puppy
CHAIN = make_ontology({"animal": ["pet"], "pet": ["dog"], "dog": ["puppy"]})
CHAIN_MIDS = ["puppy", "dog", "pet", "animal"]


@pytest.mark.parametrize(
    ("label", "types", "added"),
    [
        ("animal", ("I",), ["pet"]),
        ("pet", ("I",), ["dog"]),
        ("puppy", ("I",), []),
        ("puppy", ("II",), ["dog", "pet", "animal"]),
        ("animal", ("II",), []),
        ("dog", ("I", "II"), ["puppy", "pet", "animal"]),
        ("dog", "II", ["pet", "animal"]),
    ],
)
def test_type_one_adds_direct_children_and_type_two_all_ancestors(label, types, added):
    assert on_one_clip([label], CHAIN_MIDS, CHAIN, types) == [label, *added]


def test_ancestors_are_reached_through_classes_outside_the_vocabulary():
    assert on_one_clip(["puppy"], ["puppy", "animal"], CHAIN, ("II",)) == ["puppy", "animal"]
    assert on_one_clip(["animal"], ["puppy", "animal"], CHAIN, ("I",)) == ["animal"]


def test_labels_outside_the_ontology_generate_nothing():
    assert on_one_clip(["other"], ["other", *CHAIN_MIDS], CHAIN) == ["other"]


def test_original_labels_keep_their_order_and_repetitions():
    assert on_one_clip(["pet", "dog", "pet"], CHAIN_MIDS, CHAIN) == ["pet", "dog", "pet", "puppy", "animal"]


def test_abstract_entries_separate_and_blacklisted_ones_do_not():
    for restrictions, below, above in [(["abstract"], [], []), (["blacklist", "abstract"], ["rock"], ["genre", "music"])]:
        ontology = make_ontology({"music": ["genre"], "genre": ["rock"]}, {"genre": restrictions})
        mids = ["rock", "genre", "music"]
        assert on_one_clip(["genre"], mids, ontology, ("I",)) == ["genre", *below]
        assert on_one_clip(["rock"], mids, ontology, ("II",)) == ["rock", *above]


@pytest.mark.parametrize("mid", ["/m/09l8g", "/m/0bm0k", "/t/dd00012", "/m/09hlz4", "/t/dd00071"])
def test_five_mids_generate_nothing_but_can_be_added(mid):
    assert mid in NEVER_GENERATE
    ontology = make_ontology({"above": [mid], mid: ["below"]})
    mids = [mid, "above", "below"]
    assert on_one_clip([mid], mids, ontology) == [mid]
    assert on_one_clip(["above"], mids, ontology) == ["above", mid]
    assert on_one_clip(["below"], mids, ontology) == ["below", mid, "above"]


def test_the_score_must_be_strictly_greater_and_thresholds_are_of_original_labels():
    vocabulary = make_vocabulary(["dog", "animal"])
    ontology = make_ontology({"animal": ["dog"]})
    labels = [["animal"], ["dog"], ["dog"], ["dog"]]
    # The threshold of "animal" is its score on the first clip, 0.5, though it is added to the last one.
    scores = np.array([[0, 0.5], [0, 0.5], [0, 0.49], [0, np.nextafter(0.5, 1)]])
    assert enhance_labels(labels, scores, vocabulary, ontology, types=("II",)) == [*labels[:3], ["dog", "animal"]]


def test_a_class_that_no_clip_carries_is_never_added():
    vocabulary = make_vocabulary(["dog", "animal"])
    scores = np.array([[0.9, 0.9]])
    assert np.isnan(class_thresholds(scores, LabelSets.from_lists([[0]]))).tolist() == [False, True]
    assert enhance_labels([["dog"]], scores, vocabulary, make_ontology({"animal": ["dog"]})) == [["dog"]]


@pytest.mark.parametrize("kind", ["mean", "median", 25, 10, 5, 0, 100.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_thresholds_are_numpys_own(kind, dtype, monkeypatch):
    monkeypatch.setattr(enhancement, "_BLOCK_BYTES", 200)  # many blocks
    rng = np.random.default_rng(0)
    scores, targets = rng.random((300, 6)).astype(dtype), rng.random((300, 6)) < [0.9, 0.5, 0.1, 0.02, 0, 1]
    label_sets = LabelSets.from_lists([[*np.flatnonzero(row), *np.flatnonzero(row)[:1]] for row in targets])
    found = class_thresholds(scores, label_sets, kind)
    for c in range(6):
        carried = scores[targets[:, c], c].astype(np.float64)
        if carried.size == 0:
            assert np.isnan(found[c])
        else:
            average = np.percentile(carried, kind) if isinstance(kind, (int, float)) else getattr(np, kind)(carried)
            assert found[c] == average
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, class_thresholds(scores, targets.astype(np.float32), kind))


def restated(label_sets, scores, mids, children, restrictions, threshold, types):
    """The rules of label enhancement, clip by clip and label by label."""

    def is_abstract(mid):
        return restrictions.get(mid) == ["abstract"]

    def parents_of(mid):
        return [p for p, below in children.items() if mid in below and not is_abstract(p)]

    def ancestors_of(mid):
        return set(parents_of(mid)).union(*(ancestors_of(p) for p in parents_of(mid)))

    enhanced = []
    for clip, labels in enumerate(label_sets):
        added = set()
        for label in labels:
            if label in NEVER_GENERATE:
                continue
            candidates = set()
            if "I" in types and not is_abstract(label):
                candidates |= set(children.get(label, ()))
            if "II" in types:
                candidates |= ancestors_of(label)
            for candidate in candidates:
                if candidate not in mids or candidate in labels:
                    continue
                j = mids.index(candidate)
                usual = [float(scores[i, j]) for i, other in enumerate(label_sets) if candidate in other]
                if not usual:
                    continue
                limit = {"mean": np.mean, "median": np.median}.get(threshold, lambda x: np.percentile(x, threshold))(usual)
                if float(scores[clip, j]) > limit:
                    added.add(candidate)
        enhanced.append([*labels, *(mid for mid in mids if mid in added)])
    return enhanced


@st.composite
def cases(draw):
    nodes = draw(st.permutations([*NEVER_GENERATE[:2], *"abcdefg"]))
    children, restrictions = {}, {}
    for i, node in enumerate(nodes):
        below = st.lists(st.sampled_from(nodes[i + 1 :]), max_size=3, unique=True) if nodes[i + 1 :] else st.just([])
        children[node] = draw(below)
        restrictions[node] = draw(st.sampled_from([[], [], ["abstract"], ["blacklist"], ["abstract", "blacklist"]]))
    mids = draw(st.lists(st.sampled_from([*nodes, "outside"]), min_size=2, unique=True))
    label_sets = draw(st.lists(st.lists(st.sampled_from(mids), max_size=4), min_size=1, max_size=12))
    # Few distinct scores, so that equality with a threshold happens.
    levels = draw(st.lists(st.integers(0, 4), min_size=len(label_sets) * len(mids), max_size=len(label_sets) * len(mids)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    scores = (np.array(levels).reshape(len(label_sets), len(mids)) / 4).astype(dtype)
    threshold = draw(st.sampled_from(["mean", "median", 25, 10, 5]))
    return label_sets, scores, mids, children, restrictions, threshold, draw(st.sampled_from(["I", "II", ("I", "II")]))


@settings(deadline=None, max_examples=100)
@given(cases())
def test_agrees_with_the_rules_restated(case):
    label_sets, scores, mids, children, restrictions, threshold, types = case
    ontology = make_ontology(children, restrictions)
    found = enhance_labels(label_sets, scores, make_vocabulary(mids), ontology, threshold, types)
    assert found == restated(
        label_sets, scores, mids, children, restrictions, threshold, (types,) if types in ("I", "II") else types
    )


def random_case(n_clips=500):
    rng = np.random.default_rng(1)
    mids = CHAIN_MIDS
    label_sets = LabelSets.from_lists([rng.choice(4, size=rng.integers(0, 3)) for _ in range(n_clips)])
    return label_sets, rng.random((n_clips, 4)).astype(np.float16), make_vocabulary(mids)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_mapped_files_and_blocks_change_nothing(tmp_path, monkeypatch, mode):
    label_sets, scores, vocabulary = random_case()
    whole = enhance(label_sets, scores, vocabulary, CHAIN)
    assert added_labels(label_sets, whole)[0].size > 100
    np.save(tmp_path / "scores.npy", scores)
    mapped = np.load(tmp_path / "scores.npy", mmap_mode=mode)
    if mode == "c":
        mapped[:] = 0  # changes that are only in memory must not be lost
        assert added_labels(label_sets, enhance(label_sets, mapped, vocabulary, CHAIN))[0].size == 0
        mapped[:] = scores
    monkeypatch.setattr(enhancement, "_BLOCK_BYTES", 1000)
    before = [label_sets.offsets.copy(), label_sets.indices.copy()]
    found = enhance(label_sets, mapped, vocabulary, CHAIN)
    np.testing.assert_array_equal(found.offsets, whole.offsets)
    np.testing.assert_array_equal(found.indices, whole.indices)
    np.testing.assert_array_equal(mapped, scores)
    np.testing.assert_array_equal(label_sets.offsets, before[0])
    np.testing.assert_array_equal(label_sets.indices, before[1])


def test_no_clips_and_no_labels():
    vocabulary = make_vocabulary(CHAIN_MIDS)
    assert enhance_labels([], np.zeros((0, 4)), vocabulary, CHAIN) == []
    assert enhance_labels([[], []], np.ones((2, 4)), vocabulary, CHAIN) == [[], []]


@pytest.mark.parametrize(
    ("labels", "scores", "options", "message"),
    [
        ([["dog"], ["cow"]], np.ones((2, 4)), {}, "labels of clip 1: no class 'cow'"),
        ([["dog"]], np.ones((2, 4)), {}, r"shape \[2, 4\], not \[clips, classes\] = \[1, 4\]"),
        ([["dog"]], np.ones((1, 5)), {}, r"shape \[1, 5\]"),
        ([["dog"]], np.ones(4), {}, r"shape \[4\]"),
        ([["dog"]], np.ones((1, 4), dtype=int), {}, "must be floating-point numbers, not int64"),
        ([["dog"], []], np.array([[0, 0, 0, 0], [0, 0, np.nan, 0]]), {}, "scores of clip 1 are not all finite"),
        ([["dog"]], np.ones((1, 4)), {"threshold": "max"}, "threshold must be .* not 'max'"),
        ([["dog"]], np.ones((1, 4)), {"threshold": 101}, "threshold must be .* not 101"),
        ([["dog"]], np.ones((1, 4)), {"types": ("I", "III")}, r"types must be .* not \['I', 'III'\]"),
        ([["dog"]], np.ones((1, 4)), {"types": ()}, "types must be"),
    ],
)
def test_bad_input_is_refused(labels, scores, options, message):
    with pytest.raises(InputError, match=message):
        enhance_labels(labels, scores, make_vocabulary(CHAIN_MIDS), CHAIN, **options)


def test_label_indices_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="from 0 to 3"):
        enhance(LabelSets.from_lists([[4]]), np.ones((1, 4)), make_vocabulary(CHAIN_MIDS), CHAIN)


def test_candidate_matrix_unites_the_types():
    vocabulary = make_vocabulary(CHAIN_MIDS)
    one, two = (candidate_matrix(vocabulary, CHAIN, (kind,)) for kind in ("I", "II"))
    assert one.sum() == 3
    assert two.sum() == 6
    np.testing.assert_array_equal(candidate_matrix(vocabulary, CHAIN), one | two)


class Files:
    """Scores, IDs and ontology as files, and an annotation of the same clips in another order."""

    def __init__(self, folder, n_clips=300):
        self.folder, self.rng = folder, np.random.default_rng(2)
        self.label_sets, self.scores, self.vocabulary = random_case(n_clips)
        self.ids = [f"clip{i}" for i in range(n_clips)]
        self.ontology = folder / "ontology.json"
        entries = [{"id": mid, "name": mid, "child_ids": CHAIN.children(mid)} for mid in CHAIN_MIDS]
        self.ontology.write_text(json.dumps(entries))
        self.write(self.ids, self.scores)
        self.order = self.rng.permutation(n_clips)

    def write(self, ids, scores):
        np.save(self.folder / "scores.npy", scores)
        (self.folder / "ids.csv").write_text("ID\n" + "".join(f"{i}\n" for i in ids))

    def enhance(self, order=None, scores=None, **options):
        order = self.order if order is None else order
        labels = self.label_sets.take(order)
        text = [";".join(self.vocabulary.mids[c] for c in row) for row in labels]
        ids = [self.ids[i] for i in order]
        manifest = Manifest.from_columns(ids, ids, [1.0] * len(ids), text, source="train.csv")
        return enhance_annotation(manifest, labels, self.vocabulary, scores or self.folder, self.ontology, **options)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def as_lists(label_sets):
    return [row.tolist() for row in label_sets]


@pytest.mark.parametrize("options", [{}, {"threshold": 25, "types": ["I"]}, {"threshold": "median", "types": "II"}])
def test_annotation_and_scores_meet_by_id(files, options):
    usual = enhance(files.label_sets, files.scores, files.vocabulary, CHAIN, **options)
    assert added_labels(files.label_sets, usual)[0].size > 20
    expected = [as_lists(usual)[i] for i in files.order]
    assert as_lists(files.enhance(**options)) == expected
    shuffled = files.rng.permutation(len(files.ids))
    files.write([files.ids[i] for i in shuffled], files.scores[shuffled])
    assert as_lists(files.enhance(**options)) == expected
    (files.folder / "scores.npy").rename(files.folder / "other.npy")
    assert as_lists(files.enhance(scores=files.folder / "other.npy", **options)) == expected


def test_scores_of_other_clips_do_not_matter(files):
    part = files.order[:100]
    expected = enhance(files.label_sets.take(part), files.scores[part], files.vocabulary, CHAIN)
    assert added_labels(files.label_sets.take(part), expected)[0].size > 20
    assert as_lists(files.enhance(part)) == as_lists(expected)


def test_the_log_says_what_was_added_and_which_classes_have_no_threshold(files, caplog):
    caplog.set_level("INFO")
    without_dog = [i for i in range(len(files.ids)) if 1 not in files.label_sets[i]]
    before = files.label_sets.take(without_dog)
    clips = added_labels(before, files.enhance(without_dog))[0]
    assert clips.size > 20
    said = f"{clips.size} labels added to {before.indices.size}, on {np.unique(clips).size} of {len(before)} clips"
    assert said in caplog.text
    assert "1 classes are on no clip, so they have no threshold and are not added: dog" in caplog.text
    caplog.clear()
    files.enhance()
    assert "no threshold" not in caplog.text


def break_missing_ids(files):
    files.write(files.ids[2:], files.scores[2:])


def break_repeated_ids(files):
    files.write([*files.ids[1:], files.ids[-1]], files.scores)


def break_number_of_ids(files):
    files.write(files.ids[1:], files.scores)


def break_nan(files):
    files.scores[7, 2] = np.nan
    files.write(files.ids, files.scores)


def break_classes(files):
    files.write(files.ids, files.scores[:, :3])


def break_dimensions(files):
    files.write(files.ids, files.scores[:, 0])


def break_whole_numbers(files):
    files.write(files.ids, (100 * files.scores).astype(int))


def break_npy(files):
    (files.folder / "scores.npy").write_bytes((files.folder / "scores.npy").read_bytes()[:500])


def break_pickle(files):
    np.save(files.folder / "scores.npy", np.array([{}], dtype=object), allow_pickle=True)


def break_no_scores(files):
    (files.folder / "scores.npy").unlink()


def break_no_ids(files):
    (files.folder / "ids.csv").unlink()


def break_ids_header(files):
    (files.folder / "ids.csv").write_text("clip\na\n")


def break_no_ontology(files):
    files.ontology.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_missing_ids, r"scores\.npy: lacks 2 of the 300 clips of train\.csv, first 'clip[01]'"),
        (break_repeated_ids, r"scores\.npy: some IDs .* more than once"),
        (break_number_of_ids, r"ids\.csv has 299 IDs for the scores in scores\.npy, whose shape is \[300, 4\]"),
        (break_nan, r"scores\.npy: the teacher's scores of clip 7 are not all finite"),
        (break_classes, r"scores\.npy: the teacher's scores have the shape \[300, 3\].* \[300, 4\]"),
        (break_dimensions, r"ids\.csv has 300 IDs .*whose shape is \[300\]"),
        (break_whole_numbers, r"scores\.npy: .* must be floating-point numbers, not int64"),
        (break_npy, r"scores\.npy: not a whole \.npy file"),
        (break_pickle, r"scores\.npy: not a whole \.npy file"),
        (break_no_scores, r"scores\.npy: no such file of a teacher's scores; .*enhance_labels\.py"),
        (break_no_ids, r"ids\.csv: no such file"),
        (break_ids_header, r"ids\.csv: not a CSV file with a column 'ID'"),
        (break_no_ontology, r"ontology\.json: cannot read"),
    ],
)
def test_broken_files_of_scores_are_refused_by_name(files, spoil, message):
    files.enhance()
    spoil(files)
    with pytest.raises(InputError, match=message):
        files.enhance()


@pytest.mark.parametrize("options", [{"threshold": "max"}, {"threshold": 101}, {"types": ["III"]}])
def test_wrong_options_are_refused(files, options):
    with pytest.raises(InputError, match="must be"):
        files.enhance(**options)


def test_ids_are_text(files):
    """Clips numbered 007 are not clips numbered 7, nor are NA and null missing values."""
    ids = ["007", "7", "NA", "null", "1e5"]
    files.write(ids, files.scores[:5])
    assert read_scores(files.folder)[1].to_pylist() == ids
