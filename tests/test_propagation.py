"""Labels and scores propagated to parents: the counts on AudioSet's lists, the rule restated slowly, taggers, psla-tag."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.cli.tag import tag
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.inference.timeline import events
from psla_sb.labels.enhancement import propagate_annotation, propagate_to_parents, propagation_matrix
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.vocabulary import Vocabulary
from runs import REPOSITORY, rows_by_file
from stubs import band_tagger

METADATA = REPOSITORY.parent / "shared" / "metadata"


def entries(children, abstract=()):
    mids = dict.fromkeys([*children, *(child for below in children.values() for child in below)])
    return [
        {"id": m, "name": m, "child_ids": list(children.get(m, ())), "restrictions": ["abstract"] * (m in abstract)} for m in mids
    ]


def make_vocabulary(mids):
    return Vocabulary(list(mids), list(mids))


@pytest.mark.skipif(not METADATA.is_dir(), reason="AudioSet's lists are not beside the repository")
@pytest.mark.parametrize(
    ("name", "clips", "before", "after"),
    [
        ("balanced_train", 22160, 2.386, {"ontology": 3.347, "vocabulary": 3.380}),
        ("eval", 20371, 2.543, {"ontology": 3.565, "vocabulary": 3.613}),
    ],
)
def test_labels_a_clip_on_audiosets_lists(name, clips, before, after):
    vocabulary = Vocabulary.from_csv(METADATA / "class_labels_indices.csv")
    ontology = Ontology.from_json(METADATA / "ontology.json")
    with open(METADATA / f"{name}_segments.csv", encoding="utf-8") as file:
        rows = list(csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True))
    lists = [[vocabulary.index(mid) for mid in row[3].split(",")] for row in rows]
    assert len(lists) == clips
    assert round(np.mean([*map(len, lists)]), 3) == before
    for parents, mean in after.items():
        propagated = propagate_to_parents(lists, vocabulary, ontology, parents)
        assert round(np.mean([*map(len, propagated)]), 3) == mean
        flat = propagate_to_parents(LabelSets.from_lists(lists), vocabulary, ontology, parents)
        assert [flat[i].tolist() for i in range(0, clips, 100)] == propagated[::100]


# thing > (group) > animal > beast > dog > puppy; (group) is abstract, "beast" no class; "toy" has two parents, one of them a class
ONTOLOGY = entries(
    {
        "thing": ["group"],
        "group": ["animal"],
        "animal": ["beast"],
        "beast": ["dog", "toy"],
        "dog": ["puppy", "toy"],
        "puppy": ["pup"],
    },
    abstract=["group"],
)
MIDS = ["puppy", "pup", "dog", "toy", "animal", "thing"]


@pytest.mark.parametrize(
    ("labels", "parents", "expected"),
    [
        ("pup", "ontology", "pup puppy dog animal thing"),
        ("toy", "ontology", "toy"),
        ("thing", "ontology", "thing"),
        ("animal pup animal", "ontology", "animal pup animal puppy dog thing"),
        ("toy dog", "ontology", "toy dog animal thing"),
        ("outside", "ontology", "outside"),
        ("pup", "vocabulary", "pup puppy dog"),
        ("toy", "vocabulary", "toy dog"),
        ("animal", "vocabulary", "animal"),
    ],
)
def test_by_hand(labels, parents, expected):
    vocabulary = make_vocabulary([*MIDS, "outside"])
    (found,) = propagate_to_parents([[vocabulary.index(mid) for mid in labels.split()]], vocabulary, Ontology(ONTOLOGY), parents)
    assert [vocabulary.mids[i] for i in found] == expected.split()


def restated(lists, mids, children, parents):
    """The rule, clip by clip and label by label."""
    propagated = []
    for labels in lists:
        added = set()
        for label in labels:
            mid = mids[label]
            while True:
                above = [p for p, below in children.items() if mid in below and (parents == "ontology" or p in mids)]
                if len(above) != 1:
                    break
                mid = above[0]
                added |= {mid} & set(mids)
        propagated.append([*labels, *(i for i, mid in enumerate(mids) if mid in added and i not in labels)])
    return propagated


@st.composite
def cases(draw):
    nodes = draw(st.permutations("abcdefghi"))
    children = {
        node: draw(st.lists(st.sampled_from(nodes[i + 1 :]), max_size=3)) if i + 1 < len(nodes) else []
        for i, node in enumerate(nodes)
    }
    abstract = draw(st.sets(st.sampled_from(nodes), max_size=3))
    mids = draw(st.lists(st.sampled_from([*nodes, "outside"]), min_size=2, unique=True))
    lists = draw(st.lists(st.lists(st.integers(0, len(mids) - 1), max_size=4), max_size=8))
    return lists, mids, children, abstract, draw(st.sampled_from(["ontology", "vocabulary"]))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_as_a_slow_restatement(case):
    lists, mids, children, abstract, parents = case
    ontology, vocabulary = Ontology(entries(children, abstract)), make_vocabulary(mids)
    expected = restated(lists, mids, children, parents)
    if not any(len(row) > 1 for row in restated([[i] for i in range(len(mids))], mids, children, parents)):
        with pytest.raises(InputError, match=f"no parent follows from any of the {len(mids)} classes"):
            propagate_to_parents(lists, vocabulary, ontology, parents)
        return
    assert propagate_to_parents(lists, vocabulary, ontology, parents) == expected
    flat = propagate_to_parents(LabelSets.from_lists(lists), vocabulary, ontology, parents)
    assert isinstance(flat, LabelSets)
    assert [flat[i].tolist() for i in range(len(flat))] == expected
    # once more adds nothing
    assert propagate_to_parents(expected, vocabulary, ontology, parents) == expected


@pytest.mark.parametrize(
    ("lists", "parents", "message"),
    [
        ([[0]], "classes", "parents must be 'ontology' or 'vocabulary', .* not 'classes'"),
        ([[0]], ["ontology"], "parents must be"),
        ([[0], [6]], "ontology", "class indices must be from 0 to 5, got 0 to 6"),
        ([[-1]], "ontology", "class indices must be from 0 to 5"),
        ([["dog"]], "ontology", r"as class indices, which Vocabulary\.index gives"),
        (["dog"], "ontology", "as class indices"),
        ([[0.5]], "ontology", "as class indices"),
        ([[2**40]], "ontology", "as class indices"),
        ([0, 1], "ontology", "as class indices"),
    ],
)
def test_bad_input_is_refused(lists, parents, message):
    with pytest.raises(ValueError, match=message):
        propagate_to_parents(lists, make_vocabulary(MIDS), Ontology(ONTOLOGY), parents)


def test_an_annotation_is_propagated_and_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    file, vocabulary = tmp_path / "ontology.json", make_vocabulary(MIDS)
    file.write_text(json.dumps(ONTOLOGY))
    manifest = Manifest.from_columns(["a", "b", "c"], ["a", "b", "c"], [1.0] * 3, ["pup;thing", "toy", "dog"])
    labels = manifest.label_sets(vocabulary)
    found = propagate_annotation(manifest, labels, vocabulary, file)
    assert [found[i].tolist() for i in range(3)] == [[1, 5, 0, 2, 4], [3], [2, 4, 5]]
    assert "parents (counted in the ontology): 5 labels added to 4, on 2 of 3 clips" in caplog.text
    with pytest.raises(InputError, match=r"label enhancement with .*ontology\.json: parents must be"):
        propagate_annotation(manifest, labels, vocabulary, file, parents="all")
    with pytest.raises(InputError, match=r"none\.json: cannot read.*https://github\.com/audioset/ontology"):
        propagate_annotation(manifest, labels, vocabulary, tmp_path / "none.json")


def raised(scores, vocabulary, ontology, parents="ontology"):
    """What scores `[..., classes]` are to become."""
    matrix, out = propagation_matrix(vocabulary, ontology, parents), scores.copy()
    for child, parent in zip(*matrix.nonzero(), strict=True):
        out[..., parent] = np.maximum(out[..., parent], scores[..., child])
    return out


@pytest.fixture(scope="module")
def model(tiny_run, tmp_path_factory):
    """A tagger whose scores differ much, and the ontology in its folder."""
    folder = shutil.copytree(tiny_run[0] / "tagger", tmp_path_factory.mktemp("hierarchy") / "tagger")
    (folder / "calibration.json").unlink()
    return folder


@pytest.fixture(scope="module")
def parts(model, mini_data, tiny_run):
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    ontology = Ontology.from_json(mini_data / "ontology.json")
    manifest = Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)
    return AudioTagger.from_folder(model), vocabulary, ontology, [manifest[i]["wav"] for i in range(3)]


@pytest.mark.parametrize("parents", ["ontology", "vocabulary"])
def test_scores_of_a_tagger_follow_the_hierarchy(parts, parents):
    tagger, vocabulary, ontology, sounds = parts
    wavs = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (3, 8000)).astype(np.float32))
    long = torch.cat([wavs, wavs.flip(0), wavs], dim=1)
    lens = torch.tensor([1.0, 0.5, 0.7])

    def everything():
        batches = [tagger.score_batch(wavs), tagger.score_batch(wavs[0]), tagger.score_batch(wavs, lens)]
        batches += [tagger.score_batch(long, pool=pool) for pool in ("max", "mean", "first")]
        batches += [tagger.classify_batch(wavs)[0], tagger.classify_file(sounds[0])[0]]
        tags = [tagger.tag_file(sounds[0], 39), *(one.tags for one in tagger.tag_files(sounds, 2, top_k=39, progress=False))]
        tags += [*tagger.tag_batch(wavs, top_k=39), tagger.tag_file(long[0].numpy(), 39, pool="mean", sample_rate=16000)]
        by_class = [[{one.mid: one.score for one in sound}[mid] for mid in vocabulary.mids] for sound in tags]
        curves = [tagger.tag_timeline(sounds[1]).scores, tagger.tag_timeline(long[0].numpy(), sample_rate=16000).scores]
        return [*(scores.numpy() for scores in batches), np.float32(by_class), *curves]

    feats, _ = tagger.features_and_lens(wavs)
    before, own = everything(), tagger.tag_features(feats)
    tagger.use_hierarchy(ontology, parents)
    after, still = everything(), tagger.tag_features(feats)
    tagger.use_hierarchy(None)
    for then, now in zip(before, after, strict=True):
        np.testing.assert_allclose(now, raised(then, vocabulary, ontology, parents), atol=1e-6)
        assert (now > then).any()
    torch.testing.assert_close(still, own)
    for then, now in zip(before, everything(), strict=True):
        np.testing.assert_allclose(now, then, atol=1e-6)


def test_an_ontology_of_other_classes_is_refused_and_the_one_before_stays(tmp_path):
    tagger = band_tagger()
    tagger.use_hierarchy(Ontology(entries({"/m/high": ["/m/low"]})))
    with pytest.raises(InputError, match="no parent follows from any of the 2 classes; is it that of this data set"):
        tagger.use_hierarchy(Ontology(ONTOLOGY))
    with pytest.raises(InputError, match="parents must be"):
        tagger.use_hierarchy(Ontology(entries({"/m/high": ["/m/low"]})), "all")
    low, high = tagger.score_batch(0.1 * torch.sin(torch.arange(16000) * 0.1))[0].tolist()
    assert low == high


def status_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        tag([str(argument) for argument in arguments])
    return caught.value.code


def test_psla_tag_raises_parents_before_its_threshold(parts, model, mini_data, tmp_path, capsys):
    tagger, vocabulary, ontology, sounds = parts
    options = ["--model", model, "--format", "json", "--hierarchy=max", "--ontology", mini_data / "ontology.json"]

    def rows(*more):
        assert status_of(*sounds, *options, *more) == 0
        return rows_by_file(capsys.readouterr().out)

    plain = [tagger.tag_file(sound, top_k=39) for sound in sounds]
    scores = np.array([[{one.mid: one.score for one in tags}[mid] for mid in vocabulary.mids] for tags in plain])
    expected = raised(scores, vocabulary, ontology)
    answers = rows("--top-k", 39)
    found = [[{row["mid"]: row["score"] for row in answers[sound]}[mid] for mid in vocabulary.mids] for sound in sounds]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # between what a parent scores and what its child does
    clip, c = np.unravel_index(np.argmax(expected - scores), scores.shape)
    threshold = (expected[clip, c] + scores[clip, c]) / 2
    assert vocabulary.mids[c] in {row["mid"] for row in rows("--top-k", 39, "--threshold", threshold)[sounds[clip]]}
    assert vocabulary.mids[c] not in {one.mid for one in plain[clip] if one.score >= threshold}

    timeline = tagger.tag_timeline(sounds[0])
    timeline = timeline._replace(scores=raised(timeline.scores, vocabulary, ontology))
    found = [(row["mid"], row["start"], row["score"]) for row in rows("--timeline", "--top-k", 39)[sounds[0]]]
    assert len(found) == timeline.scores.size
    steps = {round(max(0.0, time - timeline.step / 2), 3): step for step, time in enumerate(timeline.times.tolist())}
    for mid, start, score in found:
        assert score == pytest.approx(timeline.scores[steps[start], vocabulary.index(mid)], abs=1e-6)
    threshold = float(np.median(timeline.scores.max(0)))
    heard = {row["label"] for row in rows("--events", "--threshold", threshold)[sounds[0]]}
    assert heard == {event.label for event in events(timeline, threshold)}


def test_psla_tag_finds_the_ontology_in_the_taggers_folder(parts, model, mini_data, tmp_path, capsys):
    sound = parts[3][0]
    folder = shutil.copytree(model, tmp_path / "tagger")
    arguments = (sound, "--model", folder, "--hierarchy=max")
    assert status_of(*arguments) == 2
    said = capsys.readouterr().err
    assert f"there is no {folder / 'ontology.json'}; give --ontology FILE, or put ontology.json into" in said
    assert "https://github.com/audioset/ontology" in said
    shutil.copy(mini_data / "ontology.json", folder)
    printed = []
    for options in ((), ("--ontology", mini_data / "ontology.json")):
        assert status_of(*arguments, *options) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert status_of(sound, "--model", folder) == 0
    assert capsys.readouterr().out != printed[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hierarchy=mean"], "invalid choice: 'mean'"),
        (["--ontology", "x.json"], "give --hierarchy=max with it"),
        (["--hierarchy=max", "--ontology", "x.json"], "there is no x.json"),
        (["--hierarchy=max", "--ontology", "{broken}"], "{broken}: not a JSON file"),
        (["--hierarchy=max", "--ontology", "{other}"], "{other}: by the ontology no parent follows from any of the 39 classes"),
    ],
)
def test_a_wrong_hierarchy_is_refused(parts, model, tmp_path, capsys, options, message):
    files = {"broken": tmp_path / "broken.json", "other": tmp_path / "other.json"}
    files["broken"].write_text("[{")
    files["other"].write_text(json.dumps(ONTOLOGY))
    assert status_of(parts[3][0], "--model", model, *(option.format(**files) for option in options)) == 2
    printed = capsys.readouterr()
    assert message.format(**files) in printed.err
    assert printed.out == ""
