"""Scores that are what they say: of the sounds as they are now, whole, and the same however they were shared out."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from psla_sb import files
from psla_sb.aggregation import scoring
from psla_sb.aggregation.report import greedy_selection
from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.weights import load_weights, write_tensors
from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.bad_clips import BadClips, audio_check, state_of_sounds
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import summarize
from runs import TRAIN, command, finish


@pytest.fixture
def clips(lively_runs, mini_data):
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    return Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data), vocabulary


def test_members_of_other_lengths_have_their_own_centre(lively_runs, clips, tmp_path):
    """The centre of the longest member's crop is not always the clip's."""
    members = {"long": snapshot_path(lively_runs / "a", 1)}
    for n_frames in (25, 30):
        folder = members[f"short{n_frames}"] = tmp_path / f"short{n_frames}"
        open_source(members["long"]).export(folder)
        text = (folder / "hyperparams.yaml").read_text()
        assert text.count("n_frames: 48") == 2
        (folder / "hyperparams.yaml").write_text(text.replace("n_frames: 48", f"n_frames: {n_frames}"))
    together = score(members, *clips, tmp_path / "together", crop="centre")
    for name, member in members.items():
        alone = score({name: member}, *clips, tmp_path / "alone", crop="centre")[name]
        assert np.array_equal(together[name], alone), name
    assert np.abs(together["short25"] - score(members, *clips, tmp_path / "first")["short25"]).max() > 1e-3


def test_a_score_that_is_no_number_is_never_published(lively_runs, clips, tmp_path):
    broken = tmp_path / "run" / "snapshots" / "epoch_01.safetensors"
    state = load_weights(snapshot_path(lively_runs / "a", 1))
    name = "classifier.att.0.weight" if "classifier.att.0.weight" in state else next(iter(state))
    for file in ("hyperparams.yaml", "class_labels_indices.csv"):
        (tmp_path / "run" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / file).write_bytes((lively_runs / "a" / file).read_bytes())
    state[name].fill_(float("nan"))
    write_tensors(state, broken)
    with pytest.raises(InputError, match=rf"epoch_01\.safetensors: .* of '{name}' are NaN"):
        score({"good": snapshot_path(lively_runs / "a", 1), "bad": broken}, *clips, tmp_path / "scores")
    # infinite weights are not refused by themselves
    state[name].fill_(float("inf"))
    write_tensors(state, broken)
    with pytest.raises(InputError, match=r"bad: what it scores clip '.*' \(.*\) is not a number"):
        score({"good": snapshot_path(lively_runs / "a", 1), "bad": broken}, *clips, tmp_path / "scores")
    assert not [path for path in (tmp_path / "scores").iterdir() if not path.name.startswith("tmp+")]
    # mended, all are scored
    write_tensors(load_weights(snapshot_path(lively_runs / "a", 1)), broken)
    scores = score({"good": snapshot_path(lively_runs / "a", 1), "bad": broken}, *clips, tmp_path / "scores")
    assert np.array_equal(scores["good"], scores["bad"])


def test_rows_that_were_lost_are_no_zeros(lively_runs, clips, tmp_path, monkeypatch):
    flush = scoring._flush

    def lose_a_row(arrays, paths):
        for array in arrays.values():
            array[7] = np.nan if not np.isnan(array[7]).all() else array[7]
        flush(arrays, paths)

    monkeypatch.setattr(scoring, "_flush", lose_a_row)
    with pytest.raises(InputError, match="is not a number"):
        score({"a": snapshot_path(lively_runs / "a", 1)}, *clips, tmp_path)
    assert not (tmp_path / "a.npy").exists()


RANK = """
import sys
import torch
from psla_sb.aggregation import scoring
from psla_sb.dataio.manifest import Manifest
from psla_sb.labels.vocabulary import Vocabulary
folder, rank, annotation, data, classes, *members = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
# the first process has room for one model at a time, the other for all
scoring._has_room = lambda taggers: len(taggers) < (1 if rank == "0" else 9)
clips = Manifest.from_csv(annotation, data), Vocabulary.from_csv(classes)
scoring.score({f"m{i}": member for i, member in enumerate(members)}, *clips, f"{folder}/scores", batch_size=3)
torch.distributed.destroy_process_group()
"""


def test_one_process_decides_what_fits(lively_runs, clips, mini_data, tmp_path):
    members = [snapshot_path(lively_runs / name, epoch) for name in "ab" for epoch in (1, 2)]
    files_ = [lively_runs / "a" / "eval.csv", mini_data, mini_data / "class_labels_indices.csv", *members]
    ranks = []
    for rank in "01":
        argv, env = [sys.executable, "-c", RANK, tmp_path, rank, *files_], {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen([*map(str, argv)], stderr=subprocess.PIPE, text=True, env=env))
    for process in ranks:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    alone = score({f"m{i}": member for i, member in enumerate(members)}, *clips, tmp_path / "alone", batch_size=3)
    for name, scores in alone.items():
        assert np.array_equal(np.load(tmp_path / "scores" / f"{name}.npy"), scores), name


def a_set_with_a_bad_clip(lively_runs, mini_data, folder):
    """400 clips, one of which cannot be read, and what mends it."""
    clips = Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data)
    sound, bad = folder / "good.flac", folder / "bad.flac"
    sound.write_bytes(Path(clips[0]["wav"]).read_bytes())
    bad.write_bytes(b"fLaC, but no sound")
    labels = clips.table["labels"].to_pylist() * 20
    wavs = [str(bad), *[str(sound)] * 399]
    return Manifest.from_columns([f"c{i}" for i in range(400)], wavs, [1.0] * 400, labels), lambda: bad.write_bytes(
        sound.read_bytes()
    )


def test_a_mended_file_is_scored_again(lively_runs, mini_data, tmp_path):
    clips, mend = a_set_with_a_bad_clip(lively_runs, mini_data, tmp_path)
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    member = {"a": snapshot_path(lively_runs / "a", 1)}

    def scored(policy="skip"):
        check = audio_check(policy, tmp_path, "valid", len(clips))
        return np.array(score(member, clips, vocabulary, tmp_path / "scores", check=check)["a"])

    with pytest.raises(AudioError):
        scored("error")
    silent = scored()
    assert not np.array_equal(silent[0], silent[1])
    stamp = (tmp_path / "scores" / "a.json").stat().st_mtime_ns
    assert np.array_equal(scored(), silent)
    assert (tmp_path / "scores" / "a.json").stat().st_mtime_ns == stamp
    # scores with silence in them are not those of a run that stops at bad clips
    with pytest.raises(AudioError):
        scored("error")
    mend()
    mended = scored()
    np.testing.assert_allclose(mended[0], mended[1], atol=1e-6)
    assert np.array_equal(mended[1:], silent[1:])
    # a list that was deleted, as its message says one may
    (tmp_path / "bad_clips.csv").unlink()
    scored()
    assert json.loads((tmp_path / "scores" / "a.json").read_text())["bad_clips"]
    assert np.array_equal(scored("error"), mended)


def test_a_pass_that_finds_bad_clips_goes_on_where_it_was(lively_runs, mini_data, tmp_path, monkeypatch):
    clips, _ = a_set_with_a_bad_clip(lively_runs, mini_data, tmp_path)
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    member = {"a": snapshot_path(lively_runs / "a", 1)}
    monkeypatch.setattr(scoring, "BATCHES_AT_ONCE", 1)
    seen = []

    class Stops(BadClips):
        def __init__(self, most):
            super().__init__(tmp_path, "valid", len(clips))
            self.most = most

        def __call__(self, batch):
            super().__call__(batch)
            seen.append(len(batch.id))
            if len(seen) == self.most:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(member, clips, vocabulary, tmp_path / "scores", check=Stops(5))
    seen.clear()
    score(member, clips, vocabulary, tmp_path / "scores", check=Stops(None))
    # of 13 batches four were done
    assert len(seen) == 13 - 4


def test_a_runs_table_is_of_the_sounds_as_they_are(tiny_run, mini_data, tmp_path):
    """A validation clip that was silence in the first epochs and was mended since."""
    bad = tmp_path / "bad.flac"
    clips = Manifest.from_csv(tiny_run[0] / "eval.csv", mini_data)
    content = Path(clips[0]["wav"]).read_bytes()
    bad.write_bytes(b"no sound")
    labels = clips.table["labels"].to_pylist()
    wavs = [str(bad), *[clips[i % 20]["wav"] for i in range(1, 120)]]
    manifest = Manifest.from_columns([f"c{i}" for i in range(120)], wavs, [1.0] * 120, [labels[i % 20] for i in range(120)])
    manifest.to_csv(tmp_path / "eval.csv")
    files_ = {"train_annotation": tiny_run[0] / "train.csv", "valid_annotation": tmp_path / "eval.csv", "skip_prep": True}
    settings = {**files_, "data_folder": mini_data, "on_bad_audio": "skip", "output_folder": tmp_path / "run"}
    argv, log = command(TRAIN, "hparams/mini.yaml", **settings), tmp_path / "log"
    assert finish(argv, log) == 0, log.read_text()
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    bad.write_bytes(content)
    assert finish(argv, log) == 0, log.read_text()
    after = json.loads((tmp_path / "run" / "results.json").read_text())
    predictions = tmp_path / "run" / "predictions"
    targets = manifest.targets(Vocabulary.from_csv(tmp_path / "run" / "class_labels_indices.csv"))
    for i, epoch in enumerate(after["epochs"], 1):
        scores = np.load(predictions / f"valid_epoch_{i:02d}.npy")
        assert epoch["mAP"] == summarize(scores, targets)["mAP"]
    assert after["evaluation"]["last"]["mAP"] == after["epochs"][-1]["mAP"]
    # so small a model gives everything the same scores: what was scored again is told by the stamps
    now = state_of_sounds(manifest, audio_check("skip", tmp_path / "run", "valid", 120))
    for name in ("valid_epoch_01", "valid_epoch_02", "valid_weight_average"):
        stamp = json.loads((predictions / f"{name}.json").read_text())
        assert {key: stamp[key] for key in now} == now
        assert "weights" in stamp
    assert [epoch["train_loss"] for epoch in before["epochs"]] == [epoch["train_loss"] for epoch in after["epochs"]]


def test_a_kill_after_scoring_anew_leaves_no_old_figures(tiny_run, mini_data, tmp_path):
    """Figures are those of the scores that are there, whoever wrote them."""
    folder, log = shutil.copytree(tiny_run[0], tmp_path / "run"), tmp_path / "log"
    rng = np.random.default_rng(0)
    targets = Manifest.from_csv(folder / "eval.csv", mini_data).targets(Vocabulary.from_csv(folder / "class_labels_indices.csv"))
    changed = rng.random(targets.shape).astype(np.float32)
    np.save(folder / "predictions" / "valid_epoch_01.npy", changed)
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder)
    assert finish(argv, log) == 0, log.read_text()
    first, last = json.loads((folder / "results.json").read_text())["epochs"]
    assert first["mAP"] == summarize(changed, targets)["mAP"]
    second = np.load(folder / "predictions" / "valid_epoch_02.npy")
    assert last["ensemble_mAP"] == pytest.approx(summarize((changed + second.astype(float)) / 2, targets)["mAP"])


def test_scores_are_stamped_with_the_sounds_of_before_the_pass(lively_runs, clips, tmp_path):
    manifest, vocabulary = clips
    sound = tmp_path / "a.flac"
    sound.write_bytes(Path(manifest[0]["wav"]).read_bytes())
    wavs = [str(sound), *(manifest[i]["wav"] for i in range(1, 20))]
    moved = Manifest.from_columns(manifest.table["ID"], wavs, [1.0] * 20, manifest.table["labels"])
    member = {"a": snapshot_path(lively_runs / "a", 1)}

    def replaced_meanwhile(batch):
        if batch.index[0] == 0:
            soundfile.write(sound, np.zeros(8000), 16000)

    first = np.array(score(member, moved, vocabulary, tmp_path / "scores", check=replaced_meanwhile, batch_size=4)["a"])
    again = score(member, moved, vocabulary, tmp_path / "scores", batch_size=4)["a"]
    assert not np.array_equal(first[0], again[0])


def test_greedy_selection_stops_when_nothing_gains(monkeypatch):
    rng = np.random.default_rng(0)
    targets = (rng.random((50, 3)) < 0.4).astype(int)
    tried = []
    monkeypatch.setattr("psla_sb.aggregation.report.average_precision", lambda s, t: (tried.append(1), _ap(s, t))[1])
    order, found = greedy_selection([targets.astype(np.float32), *(rng.random((50, 3)) for _ in range(9))], targets)
    assert (order, found) == ([0], [1.0])
    # two rounds, not ten
    assert len(tried) == 20


def _ap(scores, targets):
    from psla_sb.metrics import average_precision

    return average_precision(scores, targets)


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", fsync)
    files.flush(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.flush(tmp_path / "a")


def test_a_file_of_another_machine_is_waited_for(tmp_path):
    path = tmp_path / "a"
    threading.Timer(0.5, path.touch).start()
    begun = time.monotonic()
    files.wait_for(path)
    assert time.monotonic() - begun > 0.3
    with pytest.raises(InputError, match="not seen here 0 s after"):
        files.wait_for(tmp_path / "b", seconds=0.1)


def test_lines_of_many_writers(tmp_path):
    path = tmp_path / "list.csv"
    script = (
        f"from psla_sb.files import append\nfor i in range(200): append({str(path)!r}, f'{{i}}' * 50 + chr(10), 'head' + chr(10))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    head, *lines = path.read_text().splitlines()
    assert head == "head"
    assert sorted(lines) == sorted([f"{i}" * 50 for i in range(200)] * 3)
