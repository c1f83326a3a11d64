"""Folders of sounds: by class, with splits, with Audacity's label tracks, ESC-50 and UrbanSound8K; and what is left out of them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from own_sounds import RATE, all_of, sets_of, write_folders, write_sound
from sounds import encoded

from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.own_folders import clips_of, group_by_pattern, read_label_track
from psla_sb.prepare.own_sounds import Settings, prepare
from psla_sb.prepare.packing import pack


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found_in(root, **kwargs):
    found = clips_of(root, {}, **kwargs)
    return {str(Path(clip.path).relative_to(root)): (clip.labels, clip.split) for clip in found.clips}, found


def test_a_folder_a_class(tmp_path):
    root = touch(
        tmp_path, "dog/a.wav", "dog/b.WAV", "cat/c.Mp3", "cat/deep/d.ogg", ".git/x/e.wav", "__MACOSX/dog/a.wav", "cat/._c.mp3"
    )
    touch(root, "dog/readme.txt", "dog/cover.jpg", "dog/Thumbs.db", "lost.wav")
    clips, found = found_in(root)
    assert clips == {
        "dog/a.wav": (("dog",), ""),
        "dog/b.WAV": (("dog",), ""),
        "cat/c.Mp3": (("cat",), ""),
        "cat/deep/d.ogg": (("deep",), ""),
    }
    assert found.left_out == [(str(root / "lost.wav"), "in no folder of a class")]
    assert found.said == [
        "a folder for each of 3 classes; the last one is the class (or --nested all)",
        "files that are no sounds, and are not used: 3 (.db 1, .jpg 1, .txt 1)",
    ]


def test_nested_folders(tmp_path):
    root = touch(tmp_path, "animals/dog/a.wav", "animals/cat/b.wav", "rain/c.wav")
    assert {name: labels for name, (labels, _) in found_in(root)[0].items()} == {
        "animals/dog/a.wav": ("dog",),
        "animals/cat/b.wav": ("cat",),
        "rain/c.wav": ("rain",),
    }
    clips, _ = found_in(root, nested="all")
    assert clips["animals/dog/a.wav"][0] == ("animals", "dog")


@pytest.mark.parametrize("pattern", ["{split}/{c}/{i}.wav", "{c}/{split}/{i}.wav", "{split}/x/{c}/{i}.wav"])
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "Validation", "TESTING"), ("train", "dev", "eval")])
def test_folders_of_splits(pattern, names, tmp_path):
    for split in names:
        touch(tmp_path, *(pattern.format(split=split, c=c, i=i) for c in ("dog", "cat") for i in range(2)))
    clips, _ = found_in(tmp_path)
    for name, meaning in zip(names, ("train", "valid", "test"), strict=True):
        of_split = {labels for path, (labels, split) in clips.items() if name in path.split("/") and split == meaning}
        assert of_split == {("dog",), ("cat",)}
    assert len(clips) == 12


def test_a_class_called_test_is_none_of_splits(tmp_path):
    clips, _ = found_in(touch(tmp_path, "train/a.wav", "test/b.wav", "dog/c.wav"))
    assert clips["train/a.wav"] == (("train",), "")


def test_folders_of_splits_with_others_beside_them(tmp_path):
    _, found = found_in(touch(tmp_path, "train/dog/a.wav", "test/cat/b.wav", "extra/dog/c.wav"))
    assert {clip.split for clip in found.clips} == {""}
    assert "folders test, train are not taken for splits, as there are others beside them: extra" in found.said


def test_a_sound_beside_folders_of_splits(tmp_path):
    clips, found = found_in(touch(tmp_path, "train/dog/a.wav", "train/cat/b.wav", "test/cat/b.wav", "stray.wav"))
    assert {split for _, split in clips.values()} == {"train", "test"}
    assert found.left_out == [(str(tmp_path / "stray.wav"), "in no folder of a class")]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "elsewhere", "cat/b.wav")
    root = touch(tmp_path / "root", "dog/a.wav")
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (root / "dog" / "above").symlink_to(root)
    assert set(found_in(root)[0]) == {"dog/a.wav", "cat/b.wav"}


TRACKS = [
    ("0.5\t1.25\tdog\n2\t3\tcat\n", "utf-8", [(0.5, 1.25, "dog"), (2.0, 3.0, "cat")], 0),
    ("0,500000\t1,250000\tHündin\r\n", "latin-1", [(0.5, 1.25, "Hündin")], 0),
    ("0.5\t1.25\tdog\n\\\t120.0\t8000.0\n", "utf-8-sig", [(0.5, 1.25, "dog")], 0),
    ("1\t1\tclick\n1\t2\t\n1\t2\tdog\n", "utf-16", [(1.0, 2.0, "dog")], 1),
    ("1\t1\tclick\n", "utf-8", [], 1),
]


@pytest.mark.parametrize(("text", "encoding", "segments", "n_points"), TRACKS)
def test_label_tracks(text, encoding, segments, n_points, tmp_path):
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert read_label_track(tmp_path / "x.txt") == (segments, n_points)


@pytest.mark.parametrize("text", ["", "Recorded in May\n", "1\tdog\n", "\\\t1\t2\n"])
def test_texts_that_are_no_label_tracks(text, tmp_path):
    (tmp_path / "x.txt").write_text(text)
    assert read_label_track(tmp_path / "x.txt") is None


@pytest.fixture
def recordings(tmp_path):
    """Eight recordings of four seconds with label tracks: three segments each, and some that cannot be used."""
    root = tmp_path / "field"
    for i in range(8):
        write_sound(root / f"rec{i}.wav", seconds=4.0)
        last = f"3.0 {4.5 if i == 0 else 3.75} {'dog' if i % 2 else 'cat'}"
        track = f"0.5 1,25 dog\n1.5 2.0 cat\n1.5 2.0 noisy\n{last}\n2 2 click\n".replace(" ", "\t")
        (root / f"rec{i}.txt").write_text(track + ("9\t10\tdog\n" if i == 1 else ""))
    write_sound(root / "unlabelled.wav")
    return root


def test_segments_become_clips(recordings, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in recordings.iterdir()}
    out = tmp_path / "out"
    report = prepare(recordings, out)
    assert {path: path.stat().st_mtime_ns for path in recordings.iterdir()} == before
    assert sum(report["clips"].values()) == 24 == report["segments"]
    assert report["said"][1] == "labels of a point in time, which are left out as they have no length: 8"
    assert "segments that end after their recordings do, and are cut there: 1" in report["said"]
    left_out = dict(list(csv.reader((out / "left_out.csv").open()))[1:])
    assert left_out[str(recordings / "unlabelled.wav")] == "no label track beside it"
    assert left_out[f"{recordings / 'rec1.wav'} from 9 s on"] == "begins after the end of its recording"
    clips = [clip for name in sets_of(out) for clip in Manifest.from_csv(out / f"{name}.csv")]
    of_first = sorted((c["start"], round(c["duration"], 6), tuple(c["labels"])) for c in clips if c["wav"].endswith("rec0.wav"))
    assert of_first == [(0.5, 0.75, ("dog",)), (1.5, 0.5, ("cat", "noisy")), (3.0, 1.0, ("cat",))]
    assert {clip["id"] for clip in clips} >= {"rec0_0.500-1.250", "rec0_1.500-2.000"}
    # a recording is in one set
    assert sum(len({Path(clip["wav"]) for clip in Manifest.from_csv(out / f"{name}.csv")}) for name in sets_of(out)) == 8
    assert report["durations"]["max"] == 1.0
    assert report["hours"] == pytest.approx(sum(clip["duration"] for clip in clips) / 3600)


def test_several_labels_of_a_segment(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "a.txt").write_text("0\t1\tdog; cat\n1\t2\tdog\n")
    (tmp_path / "b.txt").write_text("0\t1\tChirp, tweet\n")
    labels = [clip.labels for clip in clips_of(tmp_path, {}).clips]
    assert labels == [("dog", "cat"), ("dog",), ("Chirp, tweet",)]
    assert clips_of(tmp_path, {}, "").clips[0].labels == ("dog; cat",)


def test_segments_of_long_recordings_that_cannot_be_sought_in(tmp_path):
    for name in ("a", "b", "c", "d"):
        noise = 0.1 * np.random.default_rng(ord(name)).standard_normal(70 * RATE)
        soundfile.write(tmp_path / f"{name}.{'wav' if name == 'a' else 'ogg'}", noise, RATE)
        (tmp_path / f"{name}.txt").write_text("1\t2\tdog\n61\t62\tcat\n")
    (remark,) = [remark for remark in prepare(tmp_path, tmp_path / "out")["remarks"] if "psla-pack" in remark]
    assert remark.startswith("segments far into files of a format that must be decoded from its beginning: 3, the first in b.ogg;")


def test_prepared_segments_are_read_and_packed(recordings, tmp_path):
    prepare(recordings, tmp_path / "out")
    manifest = Manifest.from_csv(tmp_path / "out" / "train.csv")
    vocabulary = Vocabulary.from_csv(tmp_path / "out" / "class_labels_indices.csv")
    packed = Manifest.from_csv(pack(tmp_path / "out" / "train.csv", tmp_path / "packs"), tmp_path / "packs")
    datasets = [TaggingDataset(m, m.label_sets(vocabulary), len(vocabulary), RATE) for m in (manifest, packed)]
    for clip, ours, theirs in zip(manifest, *datasets, strict=True):
        assert ours["error"] is None
        segment = read_audio(clip["wav"], RATE)[round(clip["start"] * RATE) :][: round(clip["duration"] * RATE)]
        torch.testing.assert_close(ours["sig"], segment - segment.mean(), rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs["sig"], ours["sig"], rtol=0, atol=1e-6)


def test_esc_50(tmp_path):
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(50):
        fold, category = i % 5 + 1, ("dog", "rain")[i // 5 % 2]
        rows.append(f"{fold}-{i}-A-0.wav,{fold},0,{category},True,{i // 10 * 5 + i % 5},A")
        write_sound(tmp_path / "ESC-50-master" / "audio" / f"{fold}-{i}-A-0.wav")
    (tmp_path / "ESC-50-master" / "meta").mkdir()
    (tmp_path / "ESC-50-master" / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    for source, out in ((tmp_path / "ESC-50-master", tmp_path / "a"), (tmp_path, tmp_path / "b")):
        report = prepare(source, out, Settings(folds=5))
        assert report["clips"] == {"train": 30, "valid": 10, "test": 10}
        assert {file[0] for file in sets_of(out)["test"]} == {"5"}
        assert {file[0] for file in sets_of(out)["valid"]} == {"4"}
        assert {file[0] for file in sets_of(out / "fold_2")["test"]} == {"2"}
        assert report["said"][0] == "ESC-50, as it is published: its folds are used"
        assert report["groups"] == 25


def test_urbansound8k(tmp_path):
    rows = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for i in range(60):
        fold = i % 10 + 1
        rows.append(f"{i}-0-0-{fold}.wav,{i},{100 + i}.5,{104 + i}.5,1,{fold},{i // 10 % 2},{('siren', 'drilling')[i // 10 % 2]}")
        write_sound(tmp_path / "audio" / f"fold{fold}" / f"{i}-0-0-{fold}.wav")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text("\n".join(rows) + "\n")
    report = prepare(tmp_path, tmp_path / "out")
    # its times are those in recordings that it does not have
    assert report["segments"] == 0
    assert report["clips"] == {"train": 48, "valid": 6, "test": 6}
    assert {file.rpartition("-")[2] for file in sets_of(tmp_path / "out")["test"]} == {"10.wav"}


def test_what_cannot_be_used_is_left_out(tmp_path):
    root = write_folders(tmp_path / "in", ["dog", "cat"])
    soundfile.write(root / "dog" / "zero.wav", np.zeros(4000), RATE)
    soundfile.write(root / "dog" / "dc.wav", np.full(4000, 0.3), RATE)
    write_sound(root / "cat" / "blip.wav", seconds=0.03)
    (root / "cat" / "broken.wav").write_bytes(b"RIFF no sound at all")
    (root / "cat" / "empty.flac").write_bytes(b"")
    loud = np.sign(np.random.default_rng(0).standard_normal(4000))
    soundfile.write(root / "dog" / "loud.wav", loud, RATE)
    report = prepare(root, tmp_path / "out")
    left_out = {Path(file).name: reason for file, reason in list(csv.reader((tmp_path / "out" / "left_out.csv").open()))[1:]}
    assert set(left_out) == {"zero.wav", "dc.wav", "blip.wav", "broken.wav", "empty.flac"}
    assert [left_out[name] for name in ("zero.wav", "dc.wav", "blip.wav")] == ["silent", "silent", "shorter than 50 ms"]
    assert report["left_out_reasons"] == {"cannot be decoded, or its row is wrong": 2, "silent": 2, "shorter than 50 ms": 1}
    assert report["clipped"] == 1
    assert report["clipped_files"] == [str(root / "dog" / "loud.wav")]
    assert len(all_of(tmp_path / "out")) == 17


def test_duplicates_are_kept_together_and_named(tmp_path):
    root = write_folders(tmp_path / "in", ["dog", "cat"], n_clips=12, seconds=2.0, rate=16000)
    for i in range(6):
        samples, _ = soundfile.read(root / "dog" / f"dog{i}.wav", dtype="float32")
        soundfile.write(root / "dog" / f"copy{i}.flac", samples, 16000)
        (root / "dog" / f"mp3_{i}.mp3").write_bytes(encoded("mp3", samples, rate=16000))
    samples, _ = soundfile.read(root / "cat" / "cat0.wav")
    soundfile.write(root / "dog" / "no_dog.wav", 0.3 * samples, 16000)
    report = prepare(root, tmp_path / "out")
    sets = sets_of(tmp_path / "out")
    where = {file: name for name, clips in sets.items() for file in clips}
    for i in range(6):
        assert where[f"dog{i}.wav"] == where[f"copy{i}.flac"] == where[f"mp3_{i}.mp3"]
    assert where["no_dog.wav"] == where["cat0.wav"]
    assert report["duplicates"] == {"same": 6, "alike": 7, "label_conflicts": 1, "in_two_sets": 0}
    with (tmp_path / "out" / "duplicates.csv").open() as file:
        (conflict,) = [row for row in csv.DictReader(file) if row["other_labels"] == "yes"]
    assert {Path(conflict["first"]).name, Path(conflict["second"]).name} == {"cat0.wav", "no_dog.wav"}
    assert any("pairs of clips that are the same but have different labels: 1." in remark for remark in report["remarks"])


def test_duplicates_across_the_splits_of_the_source(tmp_path):
    root = tmp_path / "in"
    for split in ("train", "valid", "test"):
        write_folders(root / split, ["dog", "cat"], n_clips=4, seconds=1.0)
    (root / "test" / "dog" / "again.wav").write_bytes((root / "train" / "dog" / "dog1.wav").read_bytes())
    report = prepare(root, tmp_path / "out")
    assert report["clips"] == {"train": 8, "valid": 8, "test": 9}
    assert report["duplicates"]["in_two_sets"] == 1
    assert "figures will be too good. The first: again.wav (dog) and dog1.wav (dog)" in report["remarks"][0]


def test_a_set_that_is_missing_is_cut_from_training(tmp_path):
    root = tmp_path / "in"
    write_folders(root / "train", ["dog", "cat"], n_clips=20)
    write_folders(root / "test", ["dog", "cat"], n_clips=4)
    report = prepare(root, tmp_path / "out")
    assert report["clips"] == {"train": 34, "valid": 6, "test": 8}
    assert "no valid set is there; it is cut from the training clips" in report["said"]


def test_groups_by_pattern(tmp_path):
    root = tmp_path / "in"
    for name in ("dog", "cat"):
        for i in range(24):
            write_sound(root / name / f"{name}_rec{i // 3}_{i}.wav")
    prepare(root, tmp_path / "out", Settings(group_pattern=r"rec\d+"))
    where = {}
    for name, clips in sets_of(tmp_path / "out").items():
        for file in clips:
            where.setdefault(file.split("_")[1], set()).add(name)
    # recordings of both classes are one group
    assert all(len(sets) == 1 for sets in where.values())
    assert {frozenset(sets) for sets in where.values()} == {frozenset({name}) for name in ("train", "valid", "test")}
    # and are written, for out-of-fold teachers, which share training clips out again
    from psla_sb.experiment.out_of_fold import groups_of

    manifest = Manifest.from_csv(tmp_path / "out" / "train.csv")
    recordings = [clip["id"].split("_")[1] for clip in map(manifest.__getitem__, range(len(manifest)))]
    pairs = set(zip(groups_of(manifest, None).tolist(), recordings, strict=True))
    assert len(pairs) == len(set(recordings)) == len({group for group, _ in pairs})
    clips = clips_of(root, {}).clips
    with pytest.raises(InputError, match=r"'rec\(': is no regular expression"):
        group_by_pattern(clips, "rec(")
    with pytest.raises(InputError, match="'xyz': is in no file's name, such as "):
        group_by_pattern(clips, "xyz")


def test_formats_rates_and_lengths(tmp_path):
    root = write_folders(tmp_path / "in", ["dog", "cat"], n_clips=6)
    write_sound(root / "dog" / "other.wav", seconds=2.0, rate=44100)
    for codec, ending in (("mp3", "mp3"), ("m4a", "m4a"), ("vorbis", "ogg")):
        noise = (0.1 * np.random.default_rng(len(ending) + ord(ending[0])).standard_normal(16000)).astype(np.float32)
        (root / "cat" / f"x_{codec}.{ending}").write_bytes(encoded(codec, noise, rate=16000))
    report = prepare(root, tmp_path / "out")
    assert report["sample_rates"] == {"8000": 12, "16000": 3, "44100": 1}
    assert report["formats"] == {"wav": 13, "mp3": 1, "m4a": 1, "ogg": 1}
    assert report["durations"]["median"] == pytest.approx(0.3)
    assert report["durations"]["max"] == pytest.approx(2.0)
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == report
    assert io.StringIO((tmp_path / "out" / "train.csv").read_text()).readline() == '"ID","wav","duration","labels"\n'
