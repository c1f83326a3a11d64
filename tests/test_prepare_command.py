"""psla-prepare as a user calls it: what it prints, writes and refuses, and the words that it uses."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from own_sounds import RATE, all_of, sets_of, write_folders, write_sound

from psla_sb.cli.prepare import prepare
from psla_sb.dataio.manifest import Manifest
from runs import REPOSITORY

JARGON = re.compile(r"\bmids?\b|ontolog|manifest|multi-?hot|vocabular|embedding|stratif", re.IGNORECASE)


def call(*arguments):
    """What the command prints, its errors, and its exit status."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            prepare([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return out.getvalue(), err.getvalue(), status


def refused(*arguments):
    """The one line that says what is wrong; it is not of usage."""
    out, err, status = call(*arguments)
    assert (out, status) == ("", 2), out + err
    line = err.splitlines()[-1]
    assert line.startswith("psla-prepare: error: ")
    assert all(other.startswith(("usage: ", " ")) for other in err.splitlines()[:-1])
    assert not JARGON.search(line)
    return line.removeprefix("psla-prepare: error: ")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of three classes, one of few clips, some sounds that cannot be used, and a name that HTML must not read."""
    root = write_folders(tmp_path_factory.mktemp("sounds") / "in", ["dog", "<i>cat & co"], n_clips=14, seconds=0.5)
    write_folders(root, ["rare<u>"], n_clips=2, seconds=0.5)
    samples, _ = soundfile.read(root / "dog" / "dog0.wav")
    soundfile.write(root / "rare<u>" / "dog_again.wav", samples / 2, RATE)
    soundfile.write(root / "dog" / "silent.wav", np.zeros(RATE), RATE)
    (root / "dog" / "broken.mp3").write_bytes(b"nothing")
    (root / "dog" / "notes.doc").write_bytes(b"nothing")
    return root


@pytest.fixture(scope="module")
def prepared(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    return out, *call(sounds, "--out", out)


def test_what_is_printed(prepared, sounds):
    out, said, errors, status = prepared
    assert status == 0, errors
    lines = said.splitlines()
    assert lines[0] == "a folder for each of 3 classes"
    assert lines[1] == "files that are no sounds, and are not used: 1 (.doc 1)"
    assert lines[2] == "split anew; groups of clips that stay together: 30"
    assert re.fullmatch(r"\d+ train, \d+ valid, \d+ test clips, 3 classes, 0\.00 hours", lines[4])
    assert "look: pairs of clips that are the same but have different labels: 1. The first: " in said
    assert "look: classes with fewer than 10 clips to train on: " in said
    assert f"left out: 1 cannot be decoded, or its row is wrong, 1 silent; {out}/left_out.csv lists them" in said
    assert lines[-1] == f"{out}/prepared.html says more. Train on it:  psla-fit {out}"
    assert not JARGON.search(said)


def test_what_is_written(prepared):
    out = prepared[0]
    assert {path.name for path in out.iterdir()} == {
        *(".lock", "train.csv", "valid.csv", "test.csv", "class_labels_indices.csv", "prepared.json", "prepared.html"),
        *("left_out.csv", "duplicates.csv"),
    }
    report = json.loads((out / "prepared.json").read_text())
    sets = sets_of(out)
    assert report["clips"] == {name: len(clips) for name, clips in sets.items()}
    assert report["single_label"] is True
    assert report["n_classes"] == 3
    assert report["positives"] == {
        name: sum(labels == {name} for labels in sets["train"].values()) for name in ("<i>cat & co", "dog", "rare<u>")
    }
    for clip in Manifest.from_csv(out / "train.csv"):
        assert Path(clip["wav"]).is_absolute()
        assert clip["duration"] == 0.5
    assert not Manifest.from_csv(out / "train.csv").has_segments


class Reader(HTMLParser):
    """Sees that elements are closed, and collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page(prepared, sounds):
    html = (prepared[0] / "prepared.html").read_text()
    page = Reader()
    page.feed(html)
    text = " ".join(page.text)
    assert page.open == []
    assert page.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        *("h1", "h2", "p", "ul", "li", "table", "tr", "th", "td", "span", "br"),
    }
    assert "<i>cat & co" in text
    assert "<i>" not in html
    assert "<u>" not in html
    assert "rare<u>" in text
    for expected in (str(sounds / "dog" / "silent.wav"), "dog_again.wav", "8,000 Hz", "wav", "500 ms to 1 s", "What to look at"):
        assert expected in text
    assert not JARGON.search(re.sub("<style>.*?</style>", "", html, flags=re.DOTALL))
    assert "http" not in html


def test_the_help_is_for_everybody():
    out, _, status = call("--help")
    assert status == 0
    assert not JARGON.search(out)
    for word in ("Audacity", "ESC-50", "--label-column", "--group-pattern", "--folds", "prepared.html"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 140


def test_the_same_again_and_another_source(prepared, sounds, tmp_path):
    out, *_ = prepared
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert call(sounds, "--out", out)[2] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other = write_folders(tmp_path / "other", ["a", "b"])
    line = refused(other, "--out", out)
    assert line == f"{out}: was prepared from {sounds}; choose another folder for --out, or replace what is there with --force"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "train.csv").write_text("mine")
    assert "has a train.csv of another origin; choose another folder" in refused(other, "--out", strange)
    assert call(other, "--out", strange, "--force")[2] == 0
    assert len(all_of(strange)) == 16


def test_into_the_folder_of_the_sounds(tmp_path):
    root = write_folders(tmp_path / "in", ["a", "b"])
    for out in (root, root / "prepared"):
        for _ in range(2):
            assert call(root, "--out", out)[2] == 0
            assert len(all_of(out)) == 16


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    from psla_sb.prepare import own_sounds

    root = write_folders(tmp_path / "in", ["a", "b"])
    (tmp_path / "file").touch()
    monkeypatch.setattr(own_sounds, "measure", lambda *args: pytest.fail("it listens before"))
    assert "cannot be written to (" in refused(root, "--out", tmp_path / "file" / "out")


def test_other_settings_replace_what_was_there(tmp_path):
    root, out = write_folders(tmp_path / "in", ["a", "b"], n_clips=12), tmp_path / "out"
    assert call(root, "--out", out, "--folds", 4)[2] == 0
    folds = [sets_of(out / f"fold_{k}") for k in (1, 2, 3, 4)]
    assert sorted(file for fold in folds for file in fold["test"]) == sorted(all_of(out))
    for k, fold in enumerate(folds):
        assert fold["valid"] == folds[(k + 1) % 4]["test"]
        assert sum(map(len, fold.values())) == 24
    (out / "fold_4" / "mine.txt").touch()
    assert call(root, "--out", out, "--folds", 3, "--test", 0)[2] == 0
    assert not (out / "test.csv").exists()
    assert json.loads((out / "prepared.json").read_text())["clips"]["test"] == 0
    assert [path.name for path in (out / "fold_4").iterdir()] == ["mine.txt"]
    assert call(root, "--out", out)[2] == 0
    assert not (out / "fold_1").exists()
    assert (out / "test.csv").exists()


def test_an_interruption_leaves_nothing_that_looks_ready(tmp_path, monkeypatch):
    from psla_sb.prepare import own_output

    root, out = write_folders(tmp_path / "in", ["a", "b"]), tmp_path / "out"
    assert call(root, "--out", out)[2] == 0

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own_output, "page", interrupt)
        assert call(root, "--out", out)[2] not in (0, 2)
    assert not (out / "train.csv").exists()
    assert call(root, "--out", out)[2] == 0
    assert (out / "train.csv").exists()


def test_rare_classes_can_be_left_out(sounds, tmp_path):
    said, *_ = call(sounds, "--out", tmp_path, "--min-clips", 5)
    assert "classes with fewer than 5 clips, which are left out: 1" in said
    assert set().union(*all_of(tmp_path).values()) == {"dog", "<i>cat & co"}


def silence(root):
    for name in ("a", "b"):
        for i in range(4):
            path = root / name / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.zeros(RATE), RATE)
    return root


def broken(root):
    write_folders(root, ["a", "b"])
    for path in root.rglob("*.wav"):
        path.write_bytes(b"RIFF")
    return root


def many_classes(root):
    write_sound(root / "a.wav", seconds=150.0)
    rows = "".join(f"a.wav,{0.06 * i:.3f},{0.06 * (i + 1):.3f},text {i % 1200}\n" for i in range(2400))
    (root / "clips.csv").write_text(f"file,start,end,label\n{rows}")
    return root / "clips.csv"


def one_group(root):
    rows = "".join(f"{write_sound(root / f'{i}.wav').name},{'ab'[i % 2]},x\n" for i in range(20))
    (root / "clips.csv").write_text(f"file,label,recorder\n{rows}")
    return root / "clips.csv"


def with_table(root):
    write_folders(root, ["audio"])
    (root / "clips.csv").write_text("file,label\n")
    return root


BAD = {
    "one class": (lambda root: write_folders(root, ["dog"]), [], "all sounds are of one class, 'dog'; put the clips of each class"),
    "a table beside": (with_table, [], r"; or name the table that says the classes, such as .*/in/clips\.csv"),
    "one clip a class": (
        lambda root: write_folders(root, "abcdef", n_clips=1),
        [],
        r"each of the 6 classes has a single clip.* \(--label-column\)\? If they are, add clips",
    ),
    "no validation": (lambda root: write_folders(root, ["a", "b"], n_clips=1), [], "each of the 2 classes has a single clip"),
    "two clips": (
        lambda root: write_folders(root / "x", ["a"], n_clips=2).parent,
        ["--nested", "all"],
        "two classes are needed|too few",
    ),
    "silent": (silence, [], "all 8 clips are silent; were the right files, or the right channels, exported"),
    "broken": (broken, [], "none of the 16 clips can be used; the first, .*"),
    "10,000 classes": (many_classes, [], r"1200 classes for 2400 clips; are these the classes .*--min-clips 10"),
    "one group": (
        one_group,
        ["--group-column", "recorder"],
        "20 clips in 1 groups are too few to keep some for validation and test",
    ),
    "nothing": (lambda root: root, [], "no such folder or file"),
    "no sounds": (lambda root: (root.mkdir(), (root / "a.txt").touch(), root)[-1], [], "no sound files in it or below"),
    "options of tables": (lambda root: write_folders(root, ["a", "b"]), ["--label-column", "x"], "is a folder; columns"),
    "options of folders": (lambda root: with_table(root) / "clips.csv", ["--nested", "all"], "--nested is for folders"),
    "many folds": (
        lambda root: write_folders(root, ["a", "b"], n_clips=3),
        ["--folds", 9],
        "6 groups, too few for 9 folds; ask for",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line(what, tmp_path):
    make, options, said = BAD[what]
    line = refused(make(tmp_path / "in"), "--out", tmp_path / "out", *options)
    assert re.search(said, line), line
    assert str(tmp_path / "in") in line
    assert not (tmp_path / "out" / "train.csv").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--valid", "0"], "--valid must be above 0"),
        (["--valid", ".6", "--test", ".4"], "both together below 1"),
        (["--folds", "2"], "--folds must be 3 or more"),
        (["--min-clips", "0"], "--min-clips must be 1 or more"),
    ],
)
def test_wrong_options(options, said, tmp_path):
    assert said in refused(tmp_path, "--out", tmp_path / "out", *options)


def test_names_that_are_no_text(tmp_path):
    root = write_folders(tmp_path / "in", ["a", "b"])
    bad = bytes(root / "a") + b"/\xff.wav"
    Path(root / "a" / "a0.wav").rename(root / "a" / "line\nbreak.wav")
    with open(bad, "wb") as file:
        file.write((root / "b" / "b0.wav").read_bytes())
    assert call(root, "--out", tmp_path / "out")[2] == 0
    assert len(all_of(tmp_path / "out")) == 15
    assert (tmp_path / "out" / "left_out.csv").read_text().count("the file's name has a line break, or is no UTF-8; rename it") == 2


def test_messages_in_the_sources_have_no_jargon():
    """Of what a person may read: the texts of errors and lines in the modules of the command."""
    for path in (REPOSITORY / "psla_sb" / "prepare").glob("own_*.py"):
        for line in path.read_text().splitlines():
            if "InputError(" in line or "said" in line:
                assert not JARGON.search(line), f"{path.name}: {line}"
