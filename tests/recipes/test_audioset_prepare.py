"""AudioSet's files, as they lie on people's disks, made into annotations."""

import csv
import logging
import os

import numpy as np
import pytest
import soundfile
import torch
from sounds import encoded, tones

from audioset_prepare import find_clips, prepare_audioset, read_segments
from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError

HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
LABELS = ["/m/09x0r,/t/dd00088", "/m/012xff", "/m/03fwl,/m/04rlf,/m/09x0r"]


@pytest.fixture
def prepare(tmp_path):
    """Prepares a folder with the clips of given names; returns the training annotation."""

    def prepare_clips(train_ids, files, eval_ids=("evaluation1",), top="audio", **segments):
        make_sound(tmp_path / top / "evaluation1.wav")
        for file in files:
            make_sound(tmp_path / top / file)
        for name, ids in (("train", train_ids), ("eval", eval_ids)):
            rows = [f'{clip_id}, {10 * i}.000, {10 * i + 10}.000, "{LABELS[i % 3]}"\n' for i, clip_id in enumerate(ids)]
            (tmp_path / f"{name}.csv").write_text(segments.get(name, HEADER + "".join(rows)))
        return again()

    def again():
        out = tmp_path / "out"
        prepare_audioset(tmp_path, out / "train.csv", ["train.csv"], out / "eval.csv", ["eval.csv"])
        return Manifest.from_csv(out / "train.csv", data_root=tmp_path)

    prepare_clips.again = again
    return prepare_clips


def make_sound(path, seconds=0.25):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(8000 * seconds)), 8000, format=path.suffix[1:].upper())


@pytest.mark.parametrize("clip_id", ["--PJHxphWEs", "_abcdefghi_", "Yabcdefghij", "YYabcdefgh_", "a-b_c-d_e-f", "01234567890"])
@pytest.mark.parametrize(
    "name",
    [
        *("{}.wav", "Y{}.wav", "{}_30.000_40.000.flac", "{}_30_40.flac", "Y{}_30_40.wav", "{}_30000.ogg"),
        *("{}.WAV", "Y{}.Flac", "a/b/c/{}.mp3", "b a/Y{}.ogg"),
    ],
)
def test_names_of_files(name, clip_id, tmp_path):
    path = tmp_path / name.format(clip_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    ids, paths = find_clips(tmp_path)
    assert ids.to_pylist() == [clip_id]
    assert paths.to_pylist() == [name.format(clip_id)]


@pytest.mark.parametrize(
    "name",
    [
        *("{}_30.0-40.0.ogg", "{}_30_40.wav", "{}_30000_40000.m4a", "Y{}.opus", "Y{}_30.000_40.000.webm", "{}-30-40.mp4"),
        *("{}_30.flac", "{}_30_40", "{}", "{}.f140.m4a"),
    ],
)
@pytest.mark.parametrize("clip_id", ["--PJHxphWEs", "0_1_2_3_4_5", "Yabc-1_2-34"])
def test_names_of_common_downloaders(name, clip_id, tmp_path):
    (tmp_path / name.format(clip_id)).touch()
    (tmp_path / f"{clip_id}.info.json").touch()
    (tmp_path / f"{clip_id}.jpg").touch()
    assert find_clips(tmp_path)[0].to_pylist() == [clip_id]


def test_of_several_files_the_good_one_is_taken(prepare, tmp_path):
    ids = ["abcdefghijk", "lmnopqrstuv", "broken_____"]
    (tmp_path / "audio").mkdir()
    for name in ("abcdefghijk.mp3", "abcdefghijk.wav", "broken_____.wav", "broken_____.flac"):
        (tmp_path / "audio" / name).write_text("no sound")
    soundfile.write(tmp_path / "audio" / "abcdefghijk.flac", np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    whole = (tmp_path / "audio" / "abcdefghijk.flac").read_bytes()
    (tmp_path / "audio" / "abcdefghijk.flac").write_bytes(whole[: len(whole) // 2])
    manifest = prepare(ids, ["later/Yabcdefghijk.flac", "lmnopqrstuv_30_40.flac", "z/lmnopqrstuv.flac"])
    assert [row["wav"].rpartition("audio/")[2] for row in manifest] == ["later/Yabcdefghijk.flac", "lmnopqrstuv_30_40.flac"]
    left_out = list(csv.DictReader((tmp_path / "out" / "train_left_out.csv").open(encoding="utf-8")))
    assert [row["ID"] for row in left_out] == ["broken_____"]


def test_every_format_and_its_true_length(prepare, tmp_path):
    ids = ["mp3_no_xing", "m4a_faststa", "flac_unknow"]
    (tmp_path / "audio").mkdir()
    flac = bytearray(encoded("flac", tones(44100, 6.0)))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (tmp_path / "audio" / "mp3_no_xing.mp3").write_bytes(encoded("mp3", tones(44100, 6.0), container_options={"write_xing": "0"}))
    (tmp_path / "audio" / "m4a_faststa.mp4").write_bytes(encoded("m4a", tones(44100, 6.0)))
    (tmp_path / "audio" / "flac_unknow.flac").write_bytes(flac)
    assert [row["duration"] for row in prepare(ids, [])] == pytest.approx([6.0] * 3, abs=0.1)


def test_other_files_are_no_clips(tmp_path):
    for name in ("abcdefghij.wav", "abcdefghijklm.wav", "abcdefghijk.txt", "abcdefghijk (1).wav", "abcdefghijk.wav.part", "wav"):
        (tmp_path / name).touch()
    (tmp_path / "folder_name.wav").mkdir()
    with open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "w"):
        pass
    assert find_clips(tmp_path)[0].to_pylist() == []


def test_clips_in_linked_folders_are_found(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "abcdefghijk.wav").touch()
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "linked").symlink_to(tmp_path / "disk")
    # links that lead round and round are not
    (tmp_path / "audio" / "self").symlink_to(tmp_path / "audio")
    (tmp_path / "disk" / "above").symlink_to(tmp_path)
    assert find_clips(tmp_path / "audio")[1].to_pylist() == ["linked/abcdefghijk.wav"]


@pytest.mark.parametrize("top", ["audio", "wavs"])
def test_annotation(top, prepare, tmp_path, caplog):
    ids = ["--PJHxphWEs", "_missing__1", "Yabcdefghij", "broken_____", "empty______"]
    (tmp_path / top).mkdir()
    (tmp_path / top / "broken_____.wav").write_text("no sound")
    soundfile.write(tmp_path / top / "empty______.wav", [], 8000)
    with caplog.at_level(logging.INFO):
        manifest = prepare(ids, ["deep/Y--PJHxphWEs.flac", "Yabcdefghij_20_30.wav"], top=top)
    root = str(tmp_path)
    assert list(manifest) == [
        {"id": ids[0], "wav": f"{root}/{top}/deep/Y{ids[0]}.flac", "duration": 0.25, "labels": LABELS[0].split(",")},
        {"id": ids[2], "wav": f"{root}/{top}/Yabcdefghij_20_30.wav", "duration": 0.25, "labels": LABELS[2].split(",")},
    ]
    with open(tmp_path / "out" / "train_left_out.csv", encoding="utf-8") as file:
        left_out = [(row["ID"], row["reason"], row["file"]) for row in csv.DictReader(file)]
    assert left_out == [
        ("_missing__1", "no file", ""),
        ("broken_____", "cannot be read as sound, or is empty", f"{root}/{top}/broken_____.wav"),
        ("empty______", "cannot be read as sound, or is empty", f"{root}/{top}/empty______.wav"),
    ]
    assert "train.csv: 5 clips, 2 usable, 1 without a file, 2 that cannot be read" in caplog.text
    assert "train_left_out.csv" in caplog.text


def test_several_lists_make_one_set(tmp_path):
    ids = [f"clip_num_{i}x" for i in range(3)]
    for i, name in enumerate(("unbalanced", "balanced", "eval")):
        (tmp_path / f"{name}.csv").write_text(HEADER + f'{ids[i]}, 0.000, 10.000, "{LABELS[i]}"\n')
        make_sound(tmp_path / "audio" / f"{ids[i]}.wav")
    prepare_audioset(tmp_path, tmp_path / "t.csv", ["unbalanced.csv", "balanced.csv"], tmp_path / "e.csv", ["eval.csv"])
    assert [row["id"] for row in Manifest.from_csv(tmp_path / "t.csv")] == ids[:2]
    assert [row["id"] for row in Manifest.from_csv(tmp_path / "e.csv")] == ids[2:]


def test_none_found(prepare, tmp_path):
    with pytest.raises(InputError) as caught:
        prepare(["abcdefghijk"], ["other_clip_.wav"])
    for text in (
        "train.csv: 1 clips, 0 usable",
        f"{tmp_path}/audio",
        "<id>, Y<id>",
        ".flac",
        "abcdefghijk.wav",
        "there are 2 files",
    ):
        assert text in str(caught.value)


def test_none_readable(prepare, tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "abcdefghijk.wav").write_text("no sound")
    with pytest.raises(InputError, match="no readable one of a clip in the list"):
        prepare(["abcdefghijk"], [])


@pytest.mark.parametrize(
    "changed",
    [
        '--PJHxphWEs,30,40,"""/m/09x0r","/t/dd00088"""',
        '--PJHxphWEs, 30.000, 40.000," ""/m/09x0r"," /t/dd00088"""',
        "--PJHxphWEs,30,40,/m/09x0r,/t/dd00088",
        '--PJHxphWEs\t30.000\t40.000\t"/m/09x0r,/t/dd00088"',
        '=NAME?, 30.000, 40.000, "/m/09x0r"',
        '--PJHxphWEs, 30.000, 40.000, "Speech"',
        '--PJHxphWEs, 30.000, 40.000, ""',
        '--PJHxphWEs, 30.000, "/m/09x0r"',
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_mangled_list_is_refused_with_the_line(changed, newline, tmp_path):
    path = tmp_path / "balanced_train_segments.csv"
    line = '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"'
    rows = [
        *HEADER.splitlines(),
        '--ZhevVpy1s, 50.000, 60.000, "/m/012xff"',
        line,
        "",
        '--aE2O5G5WE, 0.000, 10.000, "/m/03fwl"',
        "",
    ]
    path.write_bytes(newline.join(rows).encode())
    assert [segment["id"].as_py() for segment in read_segments(path)] == ["--ZhevVpy1s", "--PJHxphWEs", "--aE2O5G5WE"]
    path.write_bytes(newline.join(rows).replace(line, changed).encode())
    with pytest.raises(InputError, match=r"balanced_train_segments\.csv: not AudioSet's .*line 5 is .*research\.google\.com"):
        read_segments(path)


@pytest.mark.parametrize("content", [b"", HEADER.encode(), b"\x00\xff\xfe binary", b"<!DOCTYPE html>\n<html>Not found</html>\n"])
def test_no_list(content, tmp_path):
    path = tmp_path / "eval_segments.csv"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"eval_segments\.csv: not AudioSet's segment list as published: (it has no segments|line 1)"
    ):
        read_segments(path)


def test_missing_folder_and_list(tmp_path):
    arguments = (tmp_path / "t.csv", ["train.csv"], tmp_path / "e.csv", ["eval.csv"])
    with pytest.raises(InputError, match="nowhere: no such folder; data_folder is"):
        prepare_audioset(tmp_path / "nowhere", *arguments)
    with pytest.raises(InputError, match=r"train\.csv: no such file, and it is none of AudioSet.s official ones"):
        prepare_audioset(tmp_path, *arguments)


def test_second_time_nothing_is_done_and_the_message_says_how_to_do_it_again(prepare, tmp_path, caplog):
    ids = ["abcdefghijk", "later______"]
    assert len(prepare(ids, ["abcdefghijk.wav"])) == 1
    annotations = [tmp_path / "out" / name for name in ("train.csv", "eval.csv")]
    before = [path.stat().st_mtime_ns for path in annotations]
    make_sound(tmp_path / "audio" / "later______.wav")
    with caplog.at_level(logging.INFO):
        assert len(prepare.again()) == 1
    assert [path.stat().st_mtime_ns for path in annotations] == before
    assert "if clips were added or removed since, delete them" in caplog.text
    for path in annotations:
        path.unlink()
    assert len(prepare.again()) == 2


def test_changed_list_is_prepared_again(prepare, tmp_path):
    assert len(prepare(["abcdefghijk"], ["abcdefghijk.wav", "later______.wav"])) == 1
    with open(tmp_path / "train.csv", "a") as file:
        file.write('later______, 0.000, 10.000, "/m/09x0r"\n')
    assert len(prepare.again()) == 2


def test_interrupted_preparation_is_done_again(prepare, tmp_path):
    with pytest.raises(InputError, match=r"eval\.csv"):
        prepare(["abcdefghijk"], ["abcdefghijk.wav"], eval_ids=["missing____"])
    assert not (tmp_path / "out" / "eval.csv").exists()
    os.rename(tmp_path / "audio" / "evaluation1.wav", tmp_path / "audio" / "missing____.wav")
    prepare.again()
    assert len(Manifest.from_csv(tmp_path / "out" / "eval.csv")) == 1


def test_copies_at_the_sample_rate_of_the_model(prepare, tmp_path):
    prepare(["abcdefghijk", "broken_____", "missing____"], ["sub/Yabcdefghijk_0.000_10.000.wav"])
    (tmp_path / "audio" / "broken_____.mp3").write_text("no sound")
    tone = 0.5 * np.sin(np.arange(4000) / 9)
    soundfile.write(tmp_path / "audio" / "sub" / "Yabcdefghijk_0.000_10.000.wav", tone, 8000)
    arguments = (tmp_path, tmp_path / "out" / "train.csv", ["train.csv"], tmp_path / "out" / "eval.csv", ["eval.csv"])
    prepare_audioset(*arguments, resampled_folder=tmp_path / "16k", sample_rate=16000)
    clips = Manifest.from_csv(tmp_path / "out" / "train.csv", data_root=tmp_path)
    assert [clip["id"] for clip in map(clips.__getitem__, range(len(clips)))] == ["abcdefghijk"]
    assert clips[0]["duration"] == 0.5
    assert os.path.samefile(clips[0]["wav"], tmp_path / "16k" / "sub" / "Yabcdefghijk_0.000_10.000.flac")
    copy, rate = soundfile.read(clips[0]["wav"], dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(copy, read_audio(tmp_path / "audio" / "sub" / "Yabcdefghijk_0.000_10.000.wav"), atol=2**-15)
    _, broken, missing = (tmp_path / "out" / "train_left_out.csv").read_text().splitlines()
    assert broken.startswith("broken_____,cannot be decoded as sound (")
    assert broken.endswith(f",{tmp_path / 'audio' / 'broken_____.mp3'}")
    assert missing == "missing____,no file,"


def test_copies_in_another_format(prepare, tmp_path):
    prepare(["abcdefghijk"], ["abcdefghijk.mp3"])
    arguments = (tmp_path, tmp_path / "out" / "train.csv", ["train.csv"], tmp_path / "out" / "eval.csv", ["eval.csv"])
    waves = []
    for name in ("flac", "wav"):
        prepare_audioset(*arguments, resampled_folder=tmp_path / "16k", resampled_format=name)
        clip = Manifest.from_csv(tmp_path / "out" / "train.csv", data_root=tmp_path)[0]
        assert os.path.samefile(clip["wav"], tmp_path / "16k" / f"abcdefghijk.{name}")
        waves.append(read_audio(clip["wav"]))
    assert torch.equal(*waves)
    with pytest.raises(InputError, match="resampled_format: must be flac or wav, not mp3"):
        prepare_audioset(*arguments, resampled_folder=tmp_path / "16k", resampled_format="mp3")


def test_copies_are_not_taken_for_clips_nor_put_in_their_place(prepare, tmp_path):
    prepare(["abcdefghijk"], ["abcdefghijk.flac"], top="")
    first, second = (
        (tmp_path / f"out{i}" / "train.csv", ["train.csv"], tmp_path / f"out{i}" / "eval.csv", ["eval.csv"]) for i in (1, 2)
    )
    # before the clips in the order of paths
    prepare_audioset(tmp_path, *first, resampled_folder=tmp_path / "16k")
    prepare_audioset(tmp_path, *second, resampled_folder=tmp_path / "16k")
    assert second[0].read_bytes() == first[0].read_bytes()
    assert sorted(path.name for path in (tmp_path / "16k").iterdir()) == [".lock", "abcdefghijk.flac", "evaluation1.flac"]
    with pytest.raises(InputError, match="has the clips themselves"):
        prepare_audioset(tmp_path, *second, resampled_folder=tmp_path)
    assert soundfile.info(tmp_path / "abcdefghijk.flac").samplerate == 8000


def test_copies_elsewhere_are_found_from_a_linked_data_folder(prepare, tmp_path):
    prepare(["abcdefghijk"], ["abcdefghijk.wav"])
    (tmp_path / "a" / "b").mkdir(parents=True)
    linked, out = tmp_path / "a" / "b" / "data", tmp_path / "out"
    linked.symlink_to(tmp_path)
    arguments = (out / "train.csv", ["train.csv"], out / "eval.csv", ["eval.csv"])
    prepare_audioset(linked, *arguments, resampled_folder=tmp_path / "a" / "16k")
    clip = Manifest.from_csv(out / "train.csv", data_root=linked)[0]
    assert clip["wav"] == str(tmp_path / "a" / "16k" / "abcdefghijk.flac")
    assert os.path.isfile(clip["wav"])
