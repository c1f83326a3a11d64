"""What a preparation must not do without a word: another file, another column, a file overwritten, sounds that vanish."""

import os
import unicodedata
from pathlib import Path

import pytest
from own_sounds import sets_of, write_folders, write_sound
from test_prepare_tables import labels_of, table

from psla_sb.errors import InputError
from psla_sb.prepare.own_clips import clean_label
from psla_sb.prepare.own_folders import clips_of
from psla_sb.prepare.own_sounds import Settings, prepare


def test_a_missing_file_is_not_another_one_of_its_name(tmp_path):
    text = "file,label\ndog/001.wav,dog\ncat/001.wav,cat\ncat/002.wav,cat\n"
    found = clips_of(table(tmp_path, text, files=["dog/001.wav", "cat/002.wav"]), {})
    assert [(clip.path.rpartition("/")[0].rpartition("/")[2], clip.labels) for clip in found.clips] == [
        ("dog", ("dog",)),
        ("cat", ("cat",)),
    ]
    assert found.left_out == [("cat/001.wav", "no such file")]


def test_paths_of_another_machine_are_found_by_name(tmp_path):
    text = "file,label\n/home/me/dog/001.wav,dog\n/home/me/cat/002.wav,cat\n"
    found = clips_of(table(tmp_path, text, files=["x/001.wav", "x/002.wav"]), {})
    assert labels_of(found) == {"001.wav": ("dog",), "002.wav": ("cat",)}
    # unless two of them would be one file
    text = "file,label\n/home/me/dog/001.wav,dog\n/home/me/cat/001.wav,cat\n"
    with pytest.raises(InputError, match="none of the files in column 'file' is in"):
        clips_of(table(tmp_path / "b", text, files=["x/001.wav"]), {})


def test_a_name_without_ending_of_two_files_finds_none(tmp_path):
    found = clips_of(table(tmp_path, "file,label\na,dog\nb,cat\n", files=["a.mp3", "a.wav", "b.wav"]), {})
    assert labels_of(found) == {"b.wav": ("cat",)}
    assert found.left_out == [("a", "several files have this name; give their paths in the table")]


@pytest.mark.parametrize("start", ["start", "Start Time (s)", "onset_s", "start_time_seconds", "begin_sec"])
def test_segments_stay_segments(tmp_path, start):
    text = f"file,{start},end,label\na.wav,0,1,dog\na.wav,1,2,cat\nb.wav,NA,NA,dog\nc.wav,,1.5,cat\n"
    text = text.replace("onset_s", "onset_seconds")
    found = clips_of(table(tmp_path, text), {})
    assert [(clip.start, clip.end) for clip in found.clips] == [(0, 1), (1, 2), (None, None), (0, 1.5)]


def test_an_offset_with_a_duration_is_a_start(tmp_path):
    found = clips_of(table(tmp_path, "file,offset,duration,label\na.wav,0.5,1,dog\nb.wav,2,1,cat\nc.wav,3,2,cat\n"), {})
    assert [(clip.start, clip.end) for clip in found.clips] == [(0.5, 1.5), (2, 3), (3, 5)]


@pytest.mark.parametrize("cell", ["-0.02", "soon"])
def test_a_cell_that_is_no_time_is_named(tmp_path, cell):
    path = table(tmp_path, f"file,start,end,label\na.wav,0,1,dog\na.wav,{cell},2,cat\n")
    with pytest.raises(
        InputError, match=f"row 3, column 'start': '{cell}' is no time in seconds; mend it, or add --start-column none"
    ):
        clips_of(path, {})
    assert len(clips_of(path, {"start": "none"}).clips) == 2


def test_columns_that_look_like_more_than_they_are_are_said(tmp_path):
    text = "file,label,split,speaker\na.wav,dog,train,x\nb.wav,cat,unlabeled,y\nc.wav,cat,test,x\n"
    said = " ".join(clips_of(table(tmp_path, text), {}).said)
    assert "not used, by what is in them: 'split', 'speaker'; name such a column" in said


def test_columns_of_classes_come_before_a_guess_by_words(tmp_path):
    text = "file,dog,cat,bird,site\na.wav,1,0,1,north\nb.wav,0,1,0,south\nc.wav,1,1,NA,north\nd.wav,0,0,0,south\n"
    text += "".join(f"{i}.wav,1,0,0,north\n" for i in range(8))
    found = clips_of(table(tmp_path, text, files=["a.wav", "b.wav", "c.wav", "d.wav", *(f"{i}.wav" for i in range(8))]), {})
    assert labels_of(found)["c.wav"] == ("dog", "cat")
    said = " ".join(found.said)
    assert "classes: 2 columns of 0 and 1, 'dog', 'cat'" in said
    assert "not a class: `bird`, for row 4 has 'NA', neither 0 nor 1" in said


def test_rows_of_one_clip_are_united_and_counted(tmp_path):
    for i in range(12):
        write_sound(tmp_path / f"{i}.wav")
    rows = [f"{i}.wav,{'dog' if i % 2 else 'cat'},train" for i in range(12)]
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(["file,label,split", *rows, "0.wav,dog,train"]) + "\n")
    report = prepare(path, tmp_path / "out")
    assert "rows of a clip that another row has already, whose labels are united: 1" in report["said"]
    path.write_text("\n".join(["file,label,split", *rows, "0.wav,cat,test"]) + "\n")
    with pytest.raises(InputError, match=r"0\.wav: it is there twice, in train and test; mend the table"):
        prepare(path, tmp_path / "other")


def test_letters_with_accents_are_one_letter(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Vögel") for form in ("NFC", "NFD"))
    assert composed != apart
    assert clean_label(apart) == clean_label(composed) == composed
    found = clips_of(table(tmp_path, f"file,label\n{composed}.wav,a\nb.wav,b\n", files=[f"{apart}.wav", "b.wav"]), {})
    assert len(found.clips) == 2


def test_sounds_do_not_vanish(tmp_path):
    root = write_folders(tmp_path / "in", ["a", "b"])
    os.symlink(tmp_path / "nowhere.wav", root / "a" / "fetched later.wav")
    said = " ".join(clips_of(root, {}).said)
    assert f"links to files that are not there: 1, the first is {Path('a') / 'fetched later.wav'}" in said


def test_a_folder_that_cannot_be_looked_into_is_said(tmp_path, monkeypatch):
    root = write_folders(tmp_path / "in", ["a", "b"])
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(InputError, match=r"in/b: cannot be looked into \(Permission denied\)"):
        clips_of(root, {})


def test_files_of_others_and_the_source_stay(tmp_path):
    for i in range(12):
        write_sound(tmp_path / "in" / f"{i}.wav")
    text = "file,label\n" + "".join(f"{i}.wav,{'ab'[i % 2]}\n" for i in range(12))
    for name in ("test.csv", "train.csv"):
        (tmp_path / "in" / name).write_text(text)
        for force in (False, True):
            with pytest.raises(InputError, match=f"{name}: would be overwritten; choose another folder for --out"):
                prepare(tmp_path / "in" / name, tmp_path / "in", Settings({}, force=force))
        assert (tmp_path / "in" / name).read_text() == text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "valid.csv").write_text("mine")
    with pytest.raises(InputError, match=r"has a valid\.csv of another origin"):
        prepare(tmp_path / "in" / "test.csv", tmp_path / "out")
    assert (tmp_path / "out" / "valid.csv").read_text() == "mine"
    prepare(tmp_path / "in" / "test.csv", tmp_path / "out", Settings({}, force=True))
    assert set(sets_of(tmp_path / "out")) == {"train", "valid", "test"}


def esc(root):
    rows = [f"{i % 5 + 1}-{i}-A-0.wav,{i % 5 + 1},{i % 2},{'dog' if i % 2 else 'cat'},{bool(i % 3)},{i},A" for i in range(20)]
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category,esc10,src_file,take", *rows]) + "\n")
    for row in rows:
        write_sound(root / "audio" / row.partition(",")[0])
    return root


def test_a_known_layout_takes_what_is_said_of_columns_and_nothing_else(tmp_path):
    root = esc(tmp_path / "ESC-50")
    found = clips_of(root, {"label": "target", "group": "none"})
    assert {label for clip in found.clips for label in clip.labels} == {"0", "1"}
    assert {clip.group for clip in found.clips} == {""}
    for given in ({"audio": root}, {"nested": "all"}, {"separator": ";"}):
        with pytest.raises(InputError, match="is ESC-50; --audio, --label-separator and --nested are not for it"):
            clips_of(root, {}, **given)
    write_sound(tmp_path / "mine" / "x.wav")
    with pytest.raises(InputError, match=r"has ESC-50 in ESC-50, and other sounds.* name one"):
        clips_of(tmp_path, {})
