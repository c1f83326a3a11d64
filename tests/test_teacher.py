"""Teachers from elsewhere: scores matched by clip ID, the check against the labels, psla-teacher."""

import json
import os
import pickle
import pickletools
import re

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.cli.teacher import teacher
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.identity import contents_of
from psla_sb.labels.enhancement import enhance_annotation
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_import import match, read_index
from psla_sb.labels.teacher_scores import MatchedScores, check_teacher, open_scores, write_clips
from psla_sb.labels.vocabulary import Vocabulary

N_CLASSES = 5
VOCABULARY = Vocabulary([f"/m/{c}" for c in range(N_CLASSES)], [f"class {c}" for c in range(N_CLASSES)])
# no class is where it was
OTHER_ORDER = Vocabulary(VOCABULARY.mids[1:] + VOCABULARY.mids[:1], VOCABULARY.names[1:] + VOCABULARY.names[:1])


def clips_of(ids, seed=0):
    """An annotation of clips with one or two labels each."""
    rng = np.random.default_rng(seed)
    labels = [";".join(rng.choice(VOCABULARY.mids, rng.integers(1, 3), replace=False)) for _ in ids]
    return Manifest.from_columns(ids, [f"{clip}.wav" for clip in ids], [1.0] * len(ids), labels)


def youtube_ids(n):
    """As YouTube's, some of which begin with `Y` or `-`."""
    return [f"{'Y-_a'[i % 4]}{i:010d}" for i in range(n)]


def probabilities_of(manifest, dtype=np.float32):
    """What a good teacher says."""
    noise = np.random.default_rng(1).random((len(manifest), N_CLASSES))
    return (0.15 + 0.6 * manifest.targets(VOCABULARY) + 0.2 * noise).astype(dtype)


def logits_of(manifest, dtype=np.float32):
    scores = probabilities_of(manifest, np.float64)
    return np.log(scores / (1 - scores)).astype(dtype)


def folder_of(folder, ids, scores, vocabulary=VOCABULARY):
    folder.mkdir(exist_ok=True)
    np.save(folder / "scores.npy", scores)
    write_clips(folder, pa.array(ids), vocabulary)
    return folder


# scores that are matched by ID


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=3), unique=True, max_size=12),
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=3), unique=True, max_size=12),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_each_clip_has_its_row_or_none(tmp_path_factory, clips, ids, dtype):
    folder = tmp_path_factory.mktemp("teacher")
    rows = {clip: np.random.default_rng(row).random(N_CLASSES).astype(dtype) for row, clip in enumerate(ids)}
    folder_of(folder, ids, np.array(list(rows.values()), dtype).reshape(-1, N_CLASSES))
    if not clips:
        return
    manifest = clips_of(clips)
    if not set(clips) & set(ids):
        with pytest.raises(InputError, match=r"none of the \d+ clips|not a whole"):
            open_scores(folder, manifest, VOCABULARY)
        return
    scores = open_scores(folder, manifest, VOCABULARY)
    assert scores.shape == (len(clips), N_CLASSES)
    dataset = TaggingDataset(manifest, manifest.label_sets(VOCABULARY), N_CLASSES, teacher=pickle.loads(pickle.dumps(scores)))
    for row, clip in enumerate(clips):
        found = dataset[row]["teacher"].numpy()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rows.get(clip, np.full(N_CLASSES, np.nan)).astype(np.float32))


def test_scores_stay_on_the_disk(tmp_path, caplog):
    manifest = clips_of([str(i) for i in range(3000)])
    ids = [str(i) for i in reversed(range(100, 4000))]
    scores = open_scores(folder_of(tmp_path / "t", ids, np.zeros((3900, N_CLASSES), np.float64)), manifest, VOCABULARY)
    assert "scores of 2900 of 3000 training clips (96.7 %); the others learn from their labels alone" in caplog.text
    assert isinstance(scores, MatchedScores)
    assert isinstance(scores.scores, np.memmap)
    # a row's number for each clip, and none of the scores
    assert len(pickle.dumps(scores)) < 8 * 3000 + 1000


def test_a_row_that_is_no_number_in_part_is_an_error_of_its_clip(tmp_path):
    table = clips_of(["a", "b", "c"]).table
    manifest = Manifest(table.set_column(1, "wav", pa.array([f"{tmp_path}/{clip}.wav" for clip in "abc"])))
    scores = np.full((3, N_CLASSES), 0.5, np.float32)
    scores[1, 2] = np.nan
    dataset = TaggingDataset(
        manifest,
        manifest.label_sets(VOCABULARY),
        N_CLASSES,
        teacher=open_scores(folder_of(tmp_path, ["c", "b", "a"], scores), manifest, VOCABULARY),
    )
    soundfile.write(tmp_path / "b.wav", np.zeros(100), 16000)
    assert dataset[1]["error"] == "clip 'b': the teacher's scores are not all finite numbers"
    # of a file that is not there, that is said
    assert dataset[0]["error"] == f"{tmp_path}/a.wav: no such file"


def test_a_run_knows_the_matching(tmp_path):
    manifest = clips_of([str(i) for i in range(4000)])
    scores = np.full((4001, N_CLASSES), 0.5, np.float32)
    digests = set()
    for ids in (list(range(4001)), [1, 0, *range(2, 4001)], [*range(3999), 4000, 3999]):
        teacher_scores = open_scores(folder_of(tmp_path / "t", [str(i) for i in ids], scores), manifest, VOCABULARY)
        digests.add(contents_of(VOCABULARY, {}, teacher_scores, None)["teacher_scores"])
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: write_clips(folder, pa.array(["a", "b"]), OTHER_ORDER), "its classes are in another order; psla-teacher"),
        (
            lambda folder: write_clips(folder, pa.array(["a", "b"]), Vocabulary(list("vwxyz"), list("VWXYZ"))),
            "its classes are others than those of the class list",
        ),
        (lambda folder: np.save(folder / "scores.npy", np.zeros((2, 4), np.float32)), "scores of 4 classes, not of the 5"),
        (lambda folder: np.save(folder / "scores.npy", np.zeros((2, 5), int)), "int64 numbers; scores are float16"),
        (lambda folder: (folder / "ids.csv").write_text("ID\na\na\n"), "some IDs are there more than once"),
        (lambda folder: (folder / "ids.csv").write_text("ID\nx\ny\n"), "none of the 2 clips .* first ID is 'x'.* annotation 'a'"),
        (lambda folder: (folder / "ids.csv").unlink(), r"ids\.csv: no such file"),
        (lambda folder: (folder / "scores.npy").unlink(), r"scores\.npy: no such file .*psla-teacher. .* ensemble\.npy"),
    ],
)
def test_folders_of_something_else_are_refused(spoil, message, tmp_path):
    manifest = clips_of(["a", "b"])
    folder_of(tmp_path, ["a", "b"], np.zeros((2, N_CLASSES), np.float32))
    assert open_scores(tmp_path, manifest, VOCABULARY).shape == (2, N_CLASSES)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        open_scores(tmp_path, manifest, VOCABULARY)


def test_scores_of_a_part_of_the_clips_cannot_enhance(tmp_path):
    manifest = clips_of(["a", "b"])
    folder_of(tmp_path, ["b"], np.zeros((1, N_CLASSES), np.float32))
    with pytest.raises(InputError, match=r"lacks 1 of the 2 clips .* can teach \(teacher_scores\), but cannot enhance"):
        enhance_annotation(manifest, manifest.label_sets(VOCABULARY), VOCABULARY, tmp_path, tmp_path / "ontology.json")


# the check against the labels


def test_a_teacher_is_checked_on_clips_that_have_scores(tmp_path):
    manifest = clips_of([str(i) for i in range(300)])
    labels, scores = manifest.label_sets(VOCABULARY), probabilities_of(manifest)
    ids = [str(i) for i in range(299, -1, -3)]
    matched = open_scores(folder_of(tmp_path, ids, scores[299::-3]), manifest, VOCABULARY)
    assert check_teacher(matched, labels, tmp_path) == pytest.approx((1.0, 0.3), abs=0.1)
    wrong = open_scores(folder_of(tmp_path, ids, np.roll(scores[299::-3], 1, axis=0)), manifest, VOCABULARY)
    with pytest.raises(
        InputError, match=r"do not know the clips' labels: their mAP on 100 clips is 0\.\d+, and given to other clips 0"
    ):
        check_teacher(wrong, labels, tmp_path)
    with pytest.raises(InputError, match="do not know the clips' labels"):
        check_teacher(np.roll(scores, 1, axis=1), labels, tmp_path)
    with pytest.raises(InputError, match=r"from -.* Are they logits\? psla-teacher imports"):
        check_teacher(logits_of(manifest), labels, tmp_path)
    with pytest.raises(InputError, match="of clip 7 are not all finite"):
        check_teacher(np.where(np.arange(300)[:, None] == 7, np.nan, scores), labels, tmp_path)


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 100))
def test_a_teacher_that_is_refused_is_no_better_than_a_tenth_of_the_way(n_clips, share, seed):
    manifest = clips_of([str(i) for i in range(n_clips)], seed)
    noise = np.random.default_rng(seed).random((n_clips, N_CLASSES))
    try:
        score, chance = check_teacher(
            share * manifest.targets(VOCABULARY) + (1 - share) * noise, manifest.label_sets(VOCABULARY), "teacher"
        )
    except InputError:
        assert share < 0.5 or n_clips == 1
    else:
        assert score - chance >= 0.1 * (1 - chance)


def test_clips_without_labels_say_nothing_of_a_teacher():
    assert np.isnan(check_teacher(np.full((3, N_CLASSES), 0.5), LabelSets.from_lists([[], [], []]), "teacher")).all()


# psla-teacher


@pytest.fixture
def files(tmp_path):
    """What the command is given: 200 clips, a file of logits with 40 others, in another order, and its index."""
    ids = youtube_ids(240)
    manifest, everything = clips_of(ids[:200]), clips_of(ids)
    manifest.to_csv(tmp_path / "train.csv")
    VOCABULARY.to_csv(tmp_path / "classes.csv")
    rows = np.random.default_rng(2).permutation(240)
    logits = np.empty((240, N_CLASSES), np.float16)
    logits[rows] = logits_of(everything, np.float16)
    np.save(tmp_path / "logits.npy", logits)
    (tmp_path / "index.pkl").write_bytes(pickle.dumps(dict(zip(ids, rows.tolist(), strict=True))))
    return tmp_path


def call(files, *options, index="index.pkl", scores="logits.npy", status=0):
    arguments = [files / scores, "--index", files / index, "--annotation", files / "train.csv", "--labels", files / "classes.csv"]
    arguments += ["--out", files / "out", *options]
    if status == 0:
        teacher([str(part) for part in arguments])
    else:
        with pytest.raises(SystemExit) as end:
            teacher([str(part) for part in arguments])
        assert end.value.code == status
        assert not list((files / "out").glob("*"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_published_file_is_imported(files, capsys, protocol):
    index = pickle.loads((files / "index.pkl").read_bytes())
    (files / "index.pkl").write_bytes(pickle.dumps(index, protocol=protocol))
    call(files)
    said = capsys.readouterr().out
    assert said.startswith("Scores of 200 of 200 clips (100.0%).\nThe teacher's mAP on their labels is 1.0000, and by chance 0.")
    manifest = Manifest.from_csv(files / "train.csv")
    scores = open_scores(files / "out", manifest, VOCABULARY)
    assert (type(scores), scores.dtype) == (np.memmap, np.float16)
    np.testing.assert_allclose(scores, probabilities_of(clips_of(youtube_ids(240)))[:200], atol=2e-3)
    assert Vocabulary.from_csv(files / "out" / "class_labels_indices.csv") == VOCABULARY
    logits = np.load(files / "logits.npy")[[index[clip] for clip in manifest.table["ID"].to_pylist()]]
    np.testing.assert_array_equal(scores, (1 / (1 + np.exp(-logits.astype(np.float32)))).astype(np.float16))


def test_names_of_clips_may_differ(files, capsys):
    """Of segment lists, files and published lists; two clips of one recording are not told apart by its ID alone."""
    manifest, ids = Manifest.from_csv(files / "train.csv"), youtube_ids(240)
    names = [*(f"Y{clip}" for clip in ids[:50]), *(f"{clip}_30.000_40.000" for clip in ids[50:100]), *ids[100:198]]
    names += [f"{ids[198]}_0_10", f"{ids[198]}_10_20"]
    columns = manifest.table.select(["wav", "duration", "labels"]).to_pydict()
    Manifest.from_columns(names, columns["wav"], columns["duration"], columns["labels"]).to_csv(files / "train.csv")
    index = pickle.loads((files / "index.pkl").read_bytes())
    (files / "index.json").write_text(
        json.dumps({f"{clip}.mp3" if i % 2 else clip: row for i, (clip, row) in enumerate(index.items())})
    )
    call(files, index="index.json")
    assert "Scores of 198 of 200 clips (99.0%): 49 by their ID, 149 by YouTube's ID in it." in capsys.readouterr().out
    scores = open_scores(files / "out", Manifest.from_csv(files / "train.csv"), VOCABULARY)
    np.testing.assert_allclose(scores[:198], probabilities_of(clips_of(ids))[:198], atol=2e-3)
    assert np.isnan(scores[198:]).all()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "Y", "_0_10", ".wav"]), max_size=8), st.lists(st.integers(0, 5), max_size=8), st.randoms())
def test_matching_is_that_of_a_dictionary(forms, numbers, random):
    def named(number, form):
        clip = f"clip-{number:06d}"
        return f"Y{clip}" if form == "Y" else clip + form

    clips = list(dict.fromkeys(named(random.randrange(6), form) for form in forms))
    ids = list(dict.fromkeys(named(number, random.choice(["", "Y", ".flac"])) for number in numbers))

    def core(name):
        return name[1:12] if name.startswith("Y") else name[:11]

    cores = [core(name) for name in ids]
    exact = {name: row for row, name in enumerate(ids)}
    near = {name: row for row, name in enumerate(cores) if cores.count(name) == 1}
    alone = [core(name) for name in clips]
    expected = [exact.get(name, near.get(core(name), -1) if alone.count(core(name)) == 1 else -1) for name in clips]
    found, n_exact = match(pa.array(clips, pa.string()), pa.array(ids, pa.string()), "index")
    assert found.tolist() == expected
    assert n_exact == len(set(clips) & set(ids))


def test_probabilities_and_other_classes(files, capsys):
    manifest = clips_of(youtube_ids(200))
    scores = probabilities_of(manifest, np.float64)
    more = Vocabulary([*OTHER_ORDER.mids, "/m/more"], [*OTHER_ORDER.names, "more"])
    more.to_csv(files / "theirs.csv")
    np.save(files / "scores.npy", np.hstack([np.roll(scores, -1, axis=1), np.full((200, 1), 0.5)]))
    (files / "ids.csv").write_text("ID\n" + "\n".join(youtube_ids(200)))
    options = ("--probabilities", "--teacher-labels", files / "theirs.csv")
    call(files, *options, scores="scores.npy", index="ids.csv")
    written = np.load(files / "out" / "scores.npy")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, scores.astype(np.float32))
    # what is written can be imported again
    first = (files / "out" / "scores.npy").read_bytes()
    call(files, "--probabilities", scores="out/scores.npy", index="out/ids.csv")
    assert (files / "out" / "scores.npy").read_bytes() == first


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_of_an_index_is_run(files, capsys):
    for content in ({"a": Runs(f"touch {files}/ran")}, Runs(f"touch {files}/ran"), {Runs(f"touch {files}/ran"): 1}):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            try:
                (files / "index.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
            except TypeError:
                continue
            call(files, status=2)
            assert "UnpicklingError: it names posix.system" in capsys.readouterr().err
    assert not (files / "ran").exists()


@settings(deadline=None)
@given(st.data())
def test_no_bytes_break_the_reading_of_an_index(tmp_path_factory, data):
    whole = pickle.dumps({"a": 1, "b": 2, "c": 300})
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.arg is None]
    spoilt = data.draw(
        st.one_of(
            st.binary(max_size=40),
            st.builds(lambda at: whole[:at], st.integers(0, len(whole) - 1)),
            st.builds(lambda at, code: whole[:at] + code + whole[at:], st.integers(0, len(whole)), st.sampled_from(opcodes)),
        )
    )
    path = tmp_path_factory.mktemp("index") / "index.pkl"
    path.write_bytes(spoilt)
    try:
        ids, rows = read_index(path, 400)
    except InputError:
        return
    assert len(ids) == len(rows)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": np.int64(1)}, r"cannot be read as an index .*numpy.*write it as JSON"),
        ({"a": 240}, "'a' has the row 240; rows are whole numbers from 0 to 239"),
        ({"a": -1}, "'a' has the row -1"),
        ({"a": True}, "'a' has the row True"),
        ({"a": 1.0}, "'a' has the row 1.0"),
        ({"a": 10**30}, "'a' has the row 1000"),
        ({1: 1}, "'1' has the row 1; .* IDs are texts"),
        ({"a": {"b": 1}}, "'a' has the row"),
        ({"\ud800": 1}, "an ID is no text"),
        (["a", "b"], "holds a list; an index is"),
        ({}, "has none of the 200 clips .* it is empty"),
        ({"a": 1}, "has none of the 200 clips .*: its first ID is 'a', the annotation's 'Y0000000000'"),
    ],
)
def test_an_index_of_something_else_is_refused(files, capsys, index, message):
    (files / "index.pkl").write_bytes(pickle.dumps(index))
    call(files, status=2)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_scores_of_something_else_are_refused(files, capsys):
    logits = np.load(files / "logits.npy")
    swapped = pickle.loads((files / "index.pkl").read_bytes())
    (files / "wrong.pkl").write_bytes(pickle.dumps(dict(zip(swapped, np.roll(list(swapped.values()), 1).tolist(), strict=True))))
    holed = logits.copy()
    holed[swapped["Y0000000000"], 3] = np.nan
    OTHER_ORDER.to_csv(files / "other.csv")
    Vocabulary(list("vwxyz"), list("VWXYZ")).to_csv(files / "foreign.csv")
    np.savez(files / "archive.npz", logits)
    objects = np.empty((240, N_CLASSES), object)
    np.save(files / "objects.npy", objects, allow_pickle=True)
    (files / "cut.npy").write_bytes((files / "logits.npy").read_bytes()[:1000])
    (files / "empty.npy").write_bytes(b"")
    for name, array in {"cube": logits[None], "whole": logits.astype(int), "holed": holed, "narrow": logits[:, :4]}.items():
        np.save(files / f"{name}.npy", array)
    np.save(files / "probabilities.npy", 1 / (1 + np.exp(-logits)))
    for options, message in {
        ("none.npy",): "none.npy: no such file",
        ("archive.npz",): "an archive of several arrays",
        ("objects.npy",): "not a whole .npy file",
        ("cut.npy",): "not a whole .npy file",
        ("empty.npy",): "not a whole .npy file",
        ("index.pkl",): "not a whole .npy file",
        ("cube.npy",): "has the shape [1, 240, 5] of float16",
        ("whole.npy",): "of int64; scores are [rows, classes]",
        ("holed.npy",): "the scores of clip 'Y0000000000' are not all finite numbers",
        ("narrow.npy",): "has scores of 4 classes, and the class list has 5; give the teacher's own class list",
        ("probabilities.npy",): "if they are probabilities, pass --probabilities",
        ("logits.npy", "--probabilities"): "of logits leave --probabilities out",
        ("logits.npy", "--teacher-labels", files / "other.csv"): "do not know the clips' labels",
        ("logits.npy", "--teacher-labels", files / "foreign.csv"): "lacks 5 of the 5 classes, the first is '/m/0'",
        ("logits.npy", "--index", files / "wrong.pkl"): "do not know the clips' labels",
    }.items():
        call(files, *options[1:], scores=options[0], status=2)
        assert message in capsys.readouterr().err
