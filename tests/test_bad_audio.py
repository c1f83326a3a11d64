"""Sound files that cannot be read in a run, the ones that look odd and can, and what is kept of long clips."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.bad_clips import BadClips, audio_check
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, Draw, MixupBatchSampler
from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets
from runs import TRAIN, command, differences, finish

RATE, N_SAMPLES = 16000, 8000


def noise(n, channels=1, level=0.3):
    return np.random.default_rng(n).uniform(-level, level, (n, channels)).squeeze()


def cut(path):
    soundfile.write(path, noise(RATE), RATE)
    path.write_bytes(path.read_bytes()[:5000])


def wrong_extension(path):
    soundfile.write(path.with_suffix(".ogg"), noise(RATE), RATE)
    path.with_suffix(".ogg").rename(path)


GOOD = {
    "silent.wav": lambda path: soundfile.write(path, np.zeros(RATE), RATE),
    "10_ms.wav": lambda path: soundfile.write(path, noise(160), RATE),
    "1_sample.wav": lambda path: soundfile.write(path, noise(2)[:1], RATE),
    "10_minutes.flac": lambda path: soundfile.write(path, noise(600 * 8000), 8000),
    "8_kHz.wav": lambda path: soundfile.write(path, noise(8000), 8000),
    "44_kHz.wav": lambda path: soundfile.write(path, noise(44100), 44100),
    "48_kHz.wav": lambda path: soundfile.write(path, noise(48000), 48000),
    "24_bit.wav": lambda path: soundfile.write(path, noise(RATE), RATE, subtype="PCM_24"),
    "float.wav": lambda path: soundfile.write(path, noise(RATE), RATE, subtype="FLOAT"),
    "stereo.wav": lambda path: soundfile.write(path, noise(RATE, 2), RATE),
    "surround.wav": lambda path: soundfile.write(path, noise(RATE, 6), RATE),
    "a.mp3": lambda path: soundfile.write(path, noise(RATE), RATE),
    "a.ogg": lambda path: soundfile.write(path, noise(RATE), RATE),
    "a.flac": lambda path: soundfile.write(path, noise(RATE), RATE),
    "truncated.wav": cut,  # what is there of it can be read
    "ogg_inside.wav": wrong_extension,
}
BAD = {
    "missing.wav": lambda path: None,
    "folder.wav": lambda path: path.mkdir(),
    "zero_bytes.wav": lambda path: path.touch(),
    "text.flac": lambda path: path.write_text("<html>This video is no longer available</html>" * 50),
    "truncated.flac": cut,
    "nan.wav": lambda path: soundfile.write(path, np.array([0.1, np.nan, 0.2]), RATE, subtype="FLOAT"),
    "no_samples.wav": lambda path: soundfile.write(path, np.zeros(0), RATE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, make in {**GOOD, **BAD}.items():
        make(folder / name)
    return folder


def dataset(folder, names, **kwargs):
    manifest = Manifest.from_columns(names, [str(folder / name) for name in names], [1.0] * len(names), [""] * len(names))
    labels = LabelSets.from_lists([[row % 3] for row in range(len(names))])
    return TaggingDataset(manifest, labels, n_classes=3, n_samples=N_SAMPLES, **kwargs)


@pytest.mark.parametrize("name", GOOD)
def test_odd_clips_are_read(name, folder):
    item = dataset(folder, [name])[0]
    assert item["error"] is None
    assert torch.equal(item["sig"], read_clip(folder / name, n_samples=N_SAMPLES))
    assert torch.isfinite(item["sig"]).all()
    expected = {"10_ms.wav": 160, "1_sample.wav": 1, "truncated.wav": (5000 - 44) // 2}.get(name, N_SAMPLES)
    assert item["sig"].shape == (expected,)
    assert item["sig"].any() == (name not in ("silent.wav", "1_sample.wav"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_clip_is_replaced_by_the_next_readable_draw(name, folder):
    """By one of the same purpose, whose index and labels come with it."""
    names = [name, "a.flac", "gone.wav", "stereo.wav"]
    sampler = MixupBatchSampler(BalancedSampler([1.0, 4.0, 1.0, 0.0], seed=3), len(names), 2, seed=3)
    items = dataset(folder, names, redraw=sampler.redraw)
    sources = set()
    for position in range(30):
        item = items[Draw(index=0, epoch=2, position=position, partner=False)]
        assert item["error"] is None
        assert item["id"] == "a.flac" == names[item["index"]], "the sampler never draws a clip of weight 0"
        assert item["target"].tolist() == [0.0, 1.0, 0.0]
        assert item["skipped"][0][0] == name
        assert str(folder / name) in item["skipped"][0][1]
        assert {clip for clip, _ in item["skipped"]} <= {name, "gone.wav"}
        partner = items[Draw(index=0, epoch=2, position=position, partner=True)]
        sources.add(partner["id"])
        assert partner["partner"]
    assert sources == {"a.flac", "stereo.wav"}, "partners come from the whole set"


def test_replacements_depend_on_seed_epoch_and_position_alone():
    clips = 1000

    def drawn(seed, epoch, position, attempt, partner):
        sampler = MixupBatchSampler(BalancedSampler(np.ones(clips), seed=seed), clips, 4, seed=seed)
        return sampler.redraw(Draw(0, epoch, position, partner), attempt).index

    for partner in (False, True):
        keys = [(s, e, p, a) for s in (1, 2) for e in (1, 2) for p in range(10) for a in (1, 2)]
        rows = [drawn(*key, partner) for key in keys]
        assert rows == [drawn(*key, partner) for key in keys]
        assert len(set(rows)) > 70, "of 80 draws from 1000"


def test_readable_clips_are_as_they_are_without_skip(folder):
    names = list(GOOD)[:5]
    plain, skipping = dataset(folder, names), dataset(folder, names, redraw=lambda draw, attempt: 1 / 0)
    for row in range(len(names)):
        assert torch.equal(plain[row]["sig"], skipping[row]["sig"])
        assert skipping[row]["skipped"] == []


def test_a_set_without_readable_clips_ends(folder):
    sampler = MixupBatchSampler(BalancedSampler(np.ones(2)), 2, 2)
    item = dataset(folder, ["missing.wav", "nan.wav"], redraw=sampler.redraw)[0]
    assert item["error"] is not None
    with pytest.raises(InputError, match=r"(missing|nan)\.wav"):
        BadClips(folder, "train", 1000)(SimpleNamespace(error=[item["error"]], skipped=[item["skipped"]]))


def skipped(*clips):
    return SimpleNamespace(error=[None, None], skipped=[[], [(clip, f"{clip}.wav: is\nbroken, badly") for clip in clips]])


def listed(folder):
    with open(folder / "bad_clips.csv", newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_the_list_has_each_clip_once_over_processes_and_restarts(tmp_path):
    one, other = (BadClips(tmp_path, "train", 400) for _ in range(2))
    one(skipped("a", "b"))
    other(skipped("b", "c, d"))
    one(skipped("c, d", "a"))
    BadClips(tmp_path, "train", 400)(skipped("a"))
    BadClips(tmp_path, "valid", 400)(SimpleNamespace(id=["x", "a"], error=[None, "a.wav: is broken"]))
    assert listed(tmp_path) == [
        ["set", "ID", "error"],
        ["train", "a", "a.wav: is broken, badly"],
        ["train", "b", "b.wav: is broken, badly"],
        ["train", "c, d", "c, d.wav: is broken, badly"],
        ["valid", "a", "a.wav: is broken"],
    ]


def test_a_list_that_was_edited_or_cut(tmp_path):
    (tmp_path / "bad_clips.csv").write_text("set,ID,error\ntrain,a,is broken\n\nvalid,x,is broken\ntrain")
    check = BadClips(tmp_path, "train", 400)
    for _ in range(2):
        check(skipped("a", "b", "with\u2028separator"))
    assert check.known == {"a", "b", "with\u2028separator"}
    assert [row[1] for row in listed(tmp_path) if len(row) > 2] == ["ID", "a", "x", "b", "with\u2028separator"]


def test_more_than_one_percent_stop_the_run(tmp_path):
    check = BadClips(tmp_path, "train", 300)
    check(skipped("a", "b", "c"))
    with pytest.raises(InputError, match=r"4 of the 300 clips of the train set.*more than 1%.*bad_clips\.csv"):
        check(skipped("d"))
    with pytest.raises(InputError, match="4 of the 300"):
        BadClips(tmp_path, "train", 300)(skipped("a"))
    BadClips(tmp_path, "valid", 300)(SimpleNamespace(id=["a"], error=[None]))


def test_policies():
    with pytest.raises(InputError, match="on_bad_audio must be one of error, skip, not 'ignore'"):
        audio_check("ignore", "results", "train", 5)


def test_crops(tmp_path):
    wave = noise(3 * N_SAMPLES + 1)
    soundfile.write(tmp_path / "long.wav", wave, RATE, subtype="DOUBLE")
    wave = (wave - wave.mean()).astype(np.float32)

    def crop(name, epoch=1, position=0, seed=7, n=N_SAMPLES):
        items = dataset(tmp_path, ["long.wav"], crop=name, seed=seed)
        sig = items[Draw(0, epoch, position, False)]["sig"].numpy()
        starts = [start for start in range(len(wave) - n + 1) if abs(wave[start] - sig[0]) < 1e-6]
        start = next(start for start in starts if np.allclose(wave[start : start + n], sig, atol=1e-6))
        assert sig.shape == (n,)
        return start

    assert crop("first") == crop("first", 5, 9) == 0
    assert crop("centre") == crop("centre", 5, 9) == N_SAMPLES + 1
    keys = [(e, p, s) for e in (1, 2) for p in (0, 1, 2, 3, 4) for s in (1, 2)]
    starts = [crop("random", *key) for key in keys]
    assert starts == [crop("random", *key) for key in keys]
    assert len(set(starts)) == len(starts)
    assert max(starts) - min(starts) > N_SAMPLES
    with pytest.raises(ValueError, match="crop must be one of first, centre, random, not 'middle'"):
        crop("middle")


@pytest.mark.parametrize("place", [0.0, 0.5, np.nextafter(1.0, 0)])
@pytest.mark.parametrize("length", [N_SAMPLES - 1, N_SAMPLES, N_SAMPLES + 1])
def test_a_crop_is_inside_of_its_clip(place, length, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(length), RATE)
    assert len(read_clip(tmp_path / "a.wav", n_samples=N_SAMPLES, place=place)) == min(length, N_SAMPLES)


def annotations(tiny_run, mini_data, folder):
    """The tiny run's annotations five times over, each with one clip that cannot be read."""
    for name in ("train", "eval"):
        with open(tiny_run[0] / f"{name}.csv", newline="", encoding="utf-8") as stream:
            header, *clips = csv.reader(stream)
        clips = [[f"{i}_{clip[0]}", *clip[1:]] for i in range(5) for clip in clips]
        # the first one is also what a run shows as an example
        clips[0][0], clips[0][1] = f"bad_{name}", str(folder / "bad.flac")
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *clips])
    (folder / "bad.flac").write_bytes(b"fLaC, but no sound")
    return {
        "data_folder": mini_data,
        "skip_prep": True,
        "train_annotation": folder / "train.csv",
        "valid_annotation": folder / "eval.csv",
        "class_list": mini_data / "class_labels_indices.csv",
        "balanced_sampling": False,
        "train_crop": "random",
        "n_frames": 32,
    }


def test_a_run_with_bad_clips(tiny_run, mini_data, tmp_path):
    """It stops, or goes on and says what it left out; the same with workers, and again after a kill."""
    settings = annotations(tiny_run, mini_data, tmp_path)
    log = tmp_path / "log.txt"

    def train(name, **overrides):
        argv = command(TRAIN, "hparams/mini.yaml", **settings, output_folder=tmp_path / name, **overrides)
        return finish(argv, log), log.read_text()

    status, said = train("error")
    assert status == 2
    assert f"error: {tmp_path / 'bad.flac'}: cannot be decoded" in said
    status, said = train("skip", on_bad_audio="skip", eval_crop="centre")
    assert status == 0, said
    rows = listed(tmp_path / "skip")
    assert [row[:2] for row in rows] == [["set", "ID"], ["train", "bad_train"], ["valid", "bad_eval"]]
    assert json.loads((tmp_path / "skip" / "results.json").read_text())["evaluation"]["ensemble"]["mAP"] > 0
    assert train("workers", on_bad_audio="skip", eval_crop="centre", num_workers=2)[0] == 0
    assert differences(tmp_path / "skip", tmp_path / "workers") == []
