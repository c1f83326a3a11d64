"""Tables as people have them: every delimiter, encoding and name of columns, and what is wrong with some."""

import pytest
from own_sounds import all_of, sets_of, write_sound

from psla_sb.errors import InputError
from psla_sb.prepare.own_clips import Clip, identifiers, splits_of
from psla_sb.prepare.own_folders import clips_of
from psla_sb.prepare.own_sounds import Settings, prepare
from psla_sb.prepare.own_tables import label_separator, read_table, seconds_of


def table(folder, text, encoding="utf-8", name="clips.csv", files=("a.wav", "b.wav", "c.wav")):
    """Writes a table, and sounds (empty ones, which nobody decodes here) beside it."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def labels_of(found):
    return {clip.path.rpartition("/")[2]: clip.labels for clip in found.clips}


PLAIN = {"a.wav": ("Vögel",), "b.wav": ("Hund",), "c.wav": ("Vögel",)}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_encodings(delimiter, encoding, end, tmp_path):
    rows = [("Datei", "Klasse"), ("a.wav", "Vögel"), ("b.wav", "Hund"), ("c.wav", "Vögel")]
    path = table(tmp_path, end.join(map(delimiter.join, rows)) + end, encoding)
    assert labels_of(clips_of(path, {"label": "Klasse"})) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        'sep=;\r\nfile;label\r\n"a.wav";"Vögel"\r\nb.wav;Hund\r\nc.wav;Vögel\r\n',
        "file,label,,\na.wav,Vögel,,\nb.wav,Hund,,\nc.wav,Vögel,,\n,,,\n",
        'file,label\n"a.wav","Vögel"\n"b.wav"," Hund "\n\nc.wav,"Vö\ngel"\n'.replace("Vö\ngel", "Vögel"),
        "notes\tFILE NAME\tClass\nx\ta\tVögel\ny\tb\tHund\n\tc\tVögel\n",
        "label,path\nVögel,C:\\data\\a.wav\nHund,C:\\data\\b.wav\nVögel,C:\\data\\c.wav\n",
        "id,species\na,Vögel\nb,Hund\nc,Vögel\n",
    ],
)
def test_tables_of_spreadsheets(text, tmp_path):
    assert labels_of(clips_of(table(tmp_path, text), {})) == PLAIN


def test_columns_are_guessed_by_what_is_in_them(tmp_path):
    text = "nr,what,which,note\n1,dog,x/a.wav,p\n2,cat,x/b.wav,q\n3,dog,x/c.wav,r\n4,cat,x/d.wav,s\n"
    path = table(tmp_path, text, files=[f"deep/x/{name}.wav" for name in "abcd"])
    found = clips_of(path, {})
    assert labels_of(found)["d.wav"] == ("cat",)
    assert "file: `which`, labels: `what` (one each), no split and no fold and no group" in found.said[0]
    # columns of these names that are something else
    text = "file,label,subset,fold,start,source\n" + "".join(f"x/{c}.wav,{c},esc10,first,?,web\n" for c in "abcd")
    assert "no split and no fold and no group;" in clips_of(table(tmp_path, text, files=[]), {}).said[0]


def test_the_guess_is_said_and_can_be_changed(tmp_path):
    rows = "".join(
        f"{c}.wav,{i % 2},{'ab'[i % 2]};c,{['train', 'val', 'Test'][i % 3]},s{i // 2}\n" for i, c in enumerate("uvwxyzmnop")
    )
    path = table(tmp_path, "file,label,labels,Split,speaker\n" + rows, files=[f"{c}.wav" for c in "uvwxyzmnop"])
    found = clips_of(path, {})
    assert found.said[0].startswith("file: `file`, labels: `labels` (separated by ;), split: `Split`, group: `speaker`, no fold;")
    assert found.clips[1] == Clip(str(tmp_path / "v.wav"), ("b", "c"), None, None, "valid", "s0", "")
    found = clips_of(path, {"label": "LABEL", "split": "none", "group": "none"}, "")
    assert found.clips[1][1:] == (("1",), None, None, "", "", "")
    found = clips_of(path, {"label": "labels"}, "")
    assert found.clips[1].labels == ("b;c",)


def test_times(tmp_path):
    rows = [
        "filename onset offset event_label",
        "a.wav 0,5 1,25 dog",
        "a.wav 1:02 1:03.5 cat",
        "a.wav 0.5 1.25 bark",
        "b.wav   cat",
    ]
    text = "\n".join(rows).replace(" ", "\t")
    found = clips_of(table(tmp_path, text), {})
    assert [clip[1:4] for clip in found.clips][1] == (("cat",), 62.0, 63.5)
    assert found.clips[0][2:4] == (0.5, 1.25)
    assert found.clips[3][2:4] == (None, None)
    text = "file,start,duration,label\na.wav,1.5,2,dog\nb.wav,3,1,cat\nc.wav,3,0,cat\n"
    found = clips_of(table(tmp_path, text), {})
    assert [clip[2:4] for clip in found.clips] == [(1.5, 3.5), (3.0, 4.0)]
    assert found.left_out == [(str(tmp_path / "c.wav"), "row 4 ends before it starts")]
    assert [clip[2:4] for clip in clips_of(table(tmp_path, text), {"start": "none"}).clips] == [(None, None)] * 3


def test_a_class_a_column(tmp_path):
    text = "file,dog,cat,quality\na.wav,1,0,0.5\nb.wav,1,1,0.7\nc.wav,0,0,0.1\n"
    found = clips_of(table(tmp_path, text), {})
    assert labels_of(found) == {"a.wav": ("dog",), "b.wav": ("dog", "cat"), "c.wav": ()}
    text = "file,dog,cat,category\na.wav,1,0,pets\nb.wav,1,1,pets\nc.wav,0,0,x\n"
    assert labels_of(clips_of(table(tmp_path, text), {}))["b.wav"] == ("pets",)
    assert labels_of(clips_of(table(tmp_path, text), {"label": "none"}))["b.wav"] == ("dog", "cat")


def test_files_are_found_by_path_or_by_name(tmp_path):
    text = "file,label\nx/a.wav,p\ny/a,q\nb,p\na.wav,r\ngone.wav,q\n,q\n"
    (tmp_path / "t").mkdir()
    path = table(tmp_path / "t", text, files=[])
    audio = tmp_path / "sounds"
    for name in ("x/a.wav", "y/a.wav", "z/b.flac", ".hidden/gone.wav", "__MACOSX/gone.wav", "z/._gone.wav", "z/notes.txt"):
        (audio / name).parent.mkdir(parents=True, exist_ok=True)
        (audio / name).touch()
    found = clips_of(path, {}, audio=audio)
    assert [clip.path for clip in found.clips] == [str(audio / name) for name in ("x/a.wav", "y/a.wav", "z/b.flac")]
    assert found.left_out == [
        ("a.wav", "several files have this name; give their paths in the table"),
        ("gone.wav", "no such file"),
        ("", "row 7 names no file"),
    ]
    assert found.said[-1] == "files that are no sounds, and are not used: 1 (.txt 1)"


def test_rows_of_one_clip_are_united(tmp_path):
    for name in "abcdefgh":
        write_sound(tmp_path / f"{name}.wav")
    rows = "".join(f"{name}.wav,{label}\n" for name in "abcdefgh" for label in ("x", "yz"["aceg".find(name) >= 0]))
    (tmp_path / "clips.csv").write_text(f"file,label\n{rows}")
    report = prepare(tmp_path / "clips.csv", tmp_path / "out")
    assert all_of(tmp_path / "out")["a.wav"] == {"x", "z"}
    assert report["single_label"] is False
    assert sum(report["clips"].values()) == 8


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (["a;b", "c"], ";"),
        (["a|b", "c"], "|"),
        (["a|b;c"], ";"),
        (["a,b", "b", "a"], ","),
        (["dog,cat", "cat,bird", "bird,dog"], ","),
        (["Chirp, tweet", "Dog", "Chirp, tweet"], ""),
        (["Baby cry, infant cry", "Crying, sobbing", "Dog"], ""),
        (["a", "b"], ""),
    ],
)
def test_label_separators(cells, separator):
    assert label_separator(cells) == separator


def test_times_as_text():
    texts = ["0", ".5", "1e-3", "01:30", "1:00:00", "-1", "nan", "inf", "1:2:3:4", "a"]
    assert [seconds_of(text) for text in texts] == [0.0, 0.5, 0.001, 90.0, 3600.0, None, None, None, None, None]


@pytest.mark.parametrize(
    ("names", "meanings"),
    [
        (["train", "valid", "test"], ["train", "valid", "test"]),
        (["Training", "VAL", "testing "], ["train", "valid", "test"]),
        (["dev", "eval"], ["train", "test"]),
        (["train", "dev", "test"], ["train", "valid", "test"]),
        (["train", "dev", "eval"], ["train", "valid", "test"]),
        (["train", "eval", "test"], ["train", "valid", "test"]),
        (["test", "valid"], None),
        (["train", "dog"], None),
        ([], None),
    ],
)
def test_names_of_splits(names, meanings):
    assert splits_of(names) == (meanings and dict(zip(names, meanings, strict=True)))


def test_identifiers_are_what_annotations_can_list():
    assert identifiers(["a,b", "a;b", 'a"b', "a_b", "ok"]) == ["a_b", "a_b_2", "a_b_3", "a_b_4", "ok"]


def test_names_with_signs(tmp_path):
    names = ["Chirp, tweet", 'The "big" one', "a => b", "Ünï", "50% = half", "$x {data_root}"]
    for i in range(6 * len(names)):
        write_sound(tmp_path / f"{i}.wav")
    rows = "".join(f'{i}.wav,"{names[i // 6].replace(chr(34), 2 * chr(34))}"\n' for i in range(6 * len(names)))
    (tmp_path / "clips.csv").write_text(f"file,label\n{rows}", encoding="utf-8")
    report = prepare(tmp_path / "clips.csv", tmp_path / "out")
    from psla_sb.dataio.manifest import Manifest
    from psla_sb.labels.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_csv(tmp_path / "out" / "class_labels_indices.csv")
    assert set(vocabulary.names) == {name.replace(" => ", " -> ") for name in names} == set(report["positives"])
    targets = Manifest.from_csv(tmp_path / "out" / "train.csv").targets(vocabulary)
    assert targets.sum(axis=0).tolist() == list(report["positives"].values())
    assert (targets.sum(axis=1) == 1).all()


WRONG = {
    "file,label\n": r"clips\.csv: only a header in it",
    "": r"clips\.csv: nothing in it",
    "a.wav,dog\nb.wav,cat\n": "row 1: has 'a.wav' and not names of columns; put a row such as file,label above it",
    "just some text\nof some lines\n": r"row 1: only one column",
    "file,label\na.wav,x,y\nb.wav,z,\n": r"row 2: 3 cells, but the header has 2; put quotes around cells that contain ','",
    "file,file\na.wav,x\n": "two columns are called 'file'",
    'file,label\na.wav,"x\nb.wav,y\n': r"row 3: cannot be read .*; is a quote missing there\?",
    "file,label\nq.wav,x\nr.wav,y\n": r"none of the files in column 'file' is in .* the first is 'q\.wav'; say .* with --audio",
    "nr,what\n1,x\n2,y\n": "no column names sound files .*--file-column",
    "file,note\na.wav,x\nb.wav,y\nc.wav,z\n": "which column has the classes\\? Name it with --label-column; there are 'file'",
    "file,start,label\na.wav,1,x\nb.wav,2,y\n": "has starts, but no column has ends; name it with --end-column",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_tables_get_one_line(text, tmp_path):
    path = table(tmp_path, text)
    with pytest.raises(InputError, match=WRONG[text]) as caught:
        clips_of(path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "what"), [(b"PK\x03\x04abc", "is a workbook"), (b"\x00\x01\x02" * 9, "is not text")])
def test_files_that_are_no_tables(content, what, tmp_path):
    (tmp_path / "clips.csv").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_table(tmp_path / "clips.csv")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"label": "clas"}, r"no column 'clas' \(--label-column\); there are 'file', 'class', 'on', 'end', 'part'"),
        (
            {"start": "class", "end": "end", "label": "part"},
            "row 2, column 'class': 'x' is no time in seconds; mend it, or add --start",
        ),
        ({"split": "part"}, "column 'part': its values must be train, valid and test, not '7', '8'"),
    ],
)
def test_wrong_columns(chosen, said, tmp_path):
    path = table(tmp_path, "file,class,on,end,part\na.wav,x,1,2,7\nb.wav,y,1,2,8\n")
    with pytest.raises(InputError, match=said):
        clips_of(path, chosen)


def test_splits_and_folds_of_a_table(tmp_path):
    for i in range(40):
        write_sound(tmp_path / "audio" / f"{i}.wav")
    rows = [(f"{i}.wav", "ab"[i % 2], i // 2 % 5 + 1) for i in range(40)]
    (tmp_path / "clips.csv").write_text("file,label,fold\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    report = prepare(tmp_path / "clips.csv", tmp_path / "out", Settings(folds=5))
    assert report["clips"] == {"train": 24, "valid": 8, "test": 8}
    assert report["n_folds"] == 5
    fold_of = {file: fold for file, _, fold in rows}
    assert {fold_of[file] for file in sets_of(tmp_path / "out")["test"]} == {5}
    assert {fold_of[file] for file in sets_of(tmp_path / "out")["valid"]} == {4}
    for k in range(1, 6):
        sets = sets_of(tmp_path / "out" / f"fold_{k}")
        assert {fold_of[file] for file in sets["test"]} == {k}
        assert {fold_of[file] for file in sets["valid"]} == {k % 5 + 1}
        assert sum(map(len, sets.values())) == 40
    with pytest.raises(InputError, match="has 5 folds of its own; ask for --folds 5, or add --fold-column none"):
        prepare(tmp_path / "clips.csv", tmp_path / "out", Settings(folds=4))
