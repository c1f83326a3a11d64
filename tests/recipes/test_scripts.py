"""What train.py and aggregate.py do when a person starts them: refusals, remarks, and what they fetch, say and save."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import read_results, snapshot_path
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.weights import load_weights, write_tensors
from psla_sb.dataio.manifest import Manifest
from runs import REPOSITORY, TINY, TRAIN, at_start, command, differences, finish, run, serve, torchrun

AGGREGATE = TRAIN.with_name("aggregate.py")


def ended(log, argv, **kwargs):
    """The exit status of a script, and the lines that it has printed."""
    before = len(log.read_text()) if log.exists() else 0
    status = finish([str(part) for part in argv], log, **kwargs)
    return status, log.read_text()[before:].splitlines()


def aggregation(runs, folder, *arguments, **settings):
    listed = ",".join(f'"{one}"' for one in runs)
    settings = {"batch_size": 6, "num_workers": 0, "output_folder": folder, **settings}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, AGGREGATE, "hparams/aggregate.yaml", "--device=cpu", f"--runs=[{listed}]", *overrides, *arguments]


def test_the_readmes_ablation_in_the_default_folder(tiny_run, mini_data, tmp_path):
    """The folder is the same for all settings, so the second run would be taken for the first."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (off,) = re.findall(r"^ +(--pretrained=null --balanced_sampling=False .*)$", text, re.MULTILINE)
    folder = shutil.copytree(tiny_run[0], tmp_path / "results" / "mini" / "1")
    shutil.copytree(mini_data, tmp_path / "results" / "mini" / "data")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run([*command(TRAIN, "hparams/mini.yaml"), *off.split()], cwd=tmp_path, check=False)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    for said in (
        "balanced_sampling was True, is False",
        "mixup_rate was 0.5, is 0",
        "freq_mask was 16, is 0",
        "time_mask was 40, is 0",
        f"--output_folder={folder}-",
    ):
        assert said in line
    # what was off already
    assert "pretrained" not in line
    assert "label_enhancement" not in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nan", r"error: \S*broken/snapshots/epoch_02\.safetensors: \d+ of the \d+ numbers of '.*' are NaN .*"),
        # which weights may be
        ("inf", r"error: \S*broken-epoch_02: what it scores clip '.*' \(.*\) is not a number; .*"),
    ],
)
def test_a_member_whose_weights_are_no_numbers(lively_runs, tmp_path, value, said):
    member, log = shutil.copytree(lively_runs / "b", tmp_path / "broken"), tmp_path / "log"
    state = load_weights(snapshot_path(member, 2))
    for weights in state.values():
        if weights.is_floating_point():
            weights.fill_(float(value))
    write_tensors(state, snapshot_path(member, 2))
    argv, folder = aggregation([lively_runs / "a", member], tmp_path / "ensemble"), tmp_path / "ensemble"
    status, lines = ended(log, argv)
    assert status == 2
    assert re.fullmatch(said, lines[-1])
    assert [path.name for path in (folder / "scores").glob("*") if not path.name.startswith("tmp+")] == []
    assert not (folder / "ensemble.json").exists()
    snapshot_path(member, 2).write_bytes(snapshot_path(lively_runs / "b", 2).read_bytes())
    assert ended(log, argv)[0] == 0
    assert all(np.isfinite(np.load(file)).all() for file in (folder / "scores").glob("*.npy"))


def test_scores_of_sounds_that_were_mended_or_changed(lively_runs, mini_data, tmp_path):
    clips = Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data)
    sounds = [tmp_path / f"{name}.flac" for name in ("bad", "good", "other")]
    bad, good, other = sounds
    bad.write_bytes(b"fLaC, but no sound")
    good.write_bytes(Path(clips[0]["wav"]).read_bytes())
    other.write_bytes(Path(clips[1]["wav"]).read_bytes())
    labels = [";".join(clips[i % 20]["labels"]) for i in range(100)]
    wavs = [str(bad), str(other), *[str(good)] * 98]
    Manifest.from_columns([f"c{i}" for i in range(100)], wavs, [0.5] * 100, labels).to_csv(tmp_path / "clips.csv")
    folder, log = tmp_path / "ensemble", tmp_path / "log"

    def scored(policy):
        argv = aggregation([lively_runs / "a"], folder, annotation=tmp_path / "clips.csv", on_bad_audio=policy, batch_size=50)
        status, lines = ended(log, argv)
        return status, lines[-1], np.load(folder / "ensemble.npy") if status == 0 else None

    status, _, silent = scored("skip")
    assert status == 0
    assert not np.allclose(silent[0], silent[2])
    # what was scored as silence is nothing for who stops at bad clips
    status, line, _ = scored("error")
    assert (status, f"error: {bad}: cannot be decoded" in line) == (2, True)
    bad.write_bytes(good.read_bytes())
    _, _, mended = scored("skip")
    np.testing.assert_allclose(mended[0], mended[2], atol=1e-6)
    np.testing.assert_array_equal(mended[1:], silent[1:])
    other.write_bytes(good.read_bytes())
    _, _, changed = scored("skip")
    np.testing.assert_allclose(changed[1], changed[2], atol=1e-6)
    assert not np.allclose(mended[1], mended[2])


def test_members_of_other_lengths_have_their_own_centre(lively_runs, mini_data, tmp_path):
    snapshot, short, log = snapshot_path(lively_runs / "a", 1), tmp_path / "short", tmp_path / "log"
    open_source(snapshot).export(short)
    text = (short / "hyperparams.yaml").read_text()
    (short / "hyperparams.yaml").write_text(text.replace("n_frames: 48", "n_frames: 25"))
    run_folder = lively_runs / "a"
    files = {"annotation": run_folder / "eval.csv", "class_list": run_folder / "class_labels_indices.csv", "data_folder": mini_data}

    def scores(runs, folder, crop):
        assert ended(log, aggregation(runs, folder, eval_crop=crop, **files))[0] == 0, log.read_text()
        (file,) = (folder / "scores").glob("*short.npy")
        return np.load(file)

    together = scores([snapshot, short], tmp_path / "both", "centre")
    assert np.array_equal(together, scores([short], tmp_path / "alone", "centre"))
    # and what is there already is not taken for another crop's
    first = scores([snapshot, short], tmp_path / "both", "first")
    assert np.abs(first - together).max() > 1e-3
    np.testing.assert_allclose(first, scores([short], tmp_path / "first", "first"), atol=1e-5)


def test_greedy_selection_shows_how_far_it_is(lively_runs, tmp_path):
    argv = aggregation(
        [lively_runs / "a"], tmp_path / "ensemble", "--select=greedy", f"--selection_annotation={lively_runs / 'a' / 'train.csv'}"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    process = subprocess.Popen([*map(str, argv)], stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    # the end of a terminal is an error
    with contextlib.suppress(OSError):
        while some := os.read(ours, 4096):
            said += some
    os.close(ours)
    assert process.wait(60) == 0, said
    bars = re.findall(r"selecting: (\d+) models [^\r]*mAP=0\.\d{4}, members=(\d)", said.decode())
    assert bars, said[said.index(b"selecting") :]
    assert len(json.loads((tmp_path / "ensemble" / "ensemble.json").read_text())["chosen"]) == int(bars[-1][1])


def test_two_processes_fetch_weights_once_and_a_run_that_goes_on_never(mini_data, tmp_path):
    from efficientnet_pytorch import EfficientNet

    (tmp_path / "www").mkdir()
    torch.save(EfficientNet.from_name("efficientnet-b0").state_dict(), tmp_path / "www" / "b0.pth")
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "pretrained": "imagenet", "n_train": 40}
    settings |= {"width": "null", "depth": "null", "n_frames": 32, "draws_per_epoch": 16, "number_of_epochs": 1}
    argv = command(TRAIN, "hparams/mini.yaml", **settings)
    with serve(tmp_path / "www") as (address, asked):
        code = 'from efficientnet_pytorch import utils\nutils.url_map["efficientnet-b0"] = os.environ["ADDRESS"] + "/b0.pth"'
        env = at_start(tmp_path, code, ADDRESS=address, TORCH_HOME=tmp_path / "home")
        torchrun(argv, env=env)
        assert asked == ["/b0.pth"]
        shutil.rmtree(tmp_path / "home")
        # the test of a finished run, as its training would go on, begins from the checkpoint
        run([*argv, "--test_only"], env=env)
        assert asked == ["/b0.pth"]
    assert not (tmp_path / "home").exists()


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def test_what_is_no_number_is_null_in_the_results(tiny_run, mini_data, tmp_path):
    """Of one clip no class has both positive and negative ones."""
    head, first, *_ = (tiny_run[0] / "eval.csv").read_text().splitlines(keepends=True)
    (tmp_path / "eval.csv").write_text(head + first)
    files = {"train_annotation": tiny_run[0] / "train.csv", "valid_annotation": tmp_path / "eval.csv", "skip_prep": True}
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "number_of_epochs": 1, **files}
    status, lines = ended(tmp_path / "log", command(TRAIN, "hparams/mini.yaml", **settings))
    assert status == 0, lines
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=no_constant)
    assert results["epochs"][0]["mAUC"] is results["evaluation"]["weight_average"]["d_prime"] is None
    assert np.isnan(read_results(tmp_path / "run")["epochs"][0]["mAUC"])


def test_what_a_short_run_does_not_reach_is_said_once_each(mini_data, tmp_path):
    schedule = "{warmup_steps: 1000, warmup_interval: 50}"
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "average_start": 16, "schedule": schedule}
    status, lines = ended(tmp_path / "log", command(TRAIN, "hparams/mini.yaml", **settings))
    assert status == 0, lines
    for said in (
        "average_start is 16, but the last epoch is 2: the weight average is that epoch alone.",
        "The learning rate is still rising when the run ends: it has 10 steps, warmup_steps is 1000.",
        "The learning rate is 0 in the first 50 of 10 steps (warmup_interval).",
        "The weight average is of epoch 2 alone: average_start is 16.",
    ):
        assert sum(said in line for line in lines) == 1, said


def test_published_figures_are_beside_the_published_setting_alone(mini_data, tmp_path):
    text = (TRAIN.parent / "hparams" / "mini.yaml").read_text()
    for key, value in TINY.items():
        text, n = re.subn(rf"^{key}: [^#\n]*", f"{key}: {value} ", text, flags=re.MULTILINE)
        assert n == 1
    file = tmp_path / "mini.yaml"
    file.write_text(text.replace("published: {}", "published: {last: 0.123}"))

    def table(name, *arguments):
        argv = [sys.executable, TRAIN, file, f"--data_folder={mini_data}", f"--output_folder={tmp_path / name}", *arguments]
        status, lines = ended(tmp_path / "log", argv)
        assert status == 0, lines
        return "\n".join(lines)

    said = table("published")
    assert re.search(r"mAP +mAUC +d-prime +published", said)
    assert re.search(r"last epoch .* 0\.123$", said, re.MULTILINE)
    said = table("other", "--mixup_rate=0", "--number_of_epochs=1")
    assert "0.123" not in said
    assert "Published figures are not beside these: mixup_rate, number_of_epochs differ from the published setting." in said


QUARTER_OF_AN_HOUR = """
import time
from pathlib import Path
from psla_sb.experiment.brain import TaggingBrain
now, fit_batch, steps, save = time.time, TaggingBrain.fit_batch, [], Path(os.environ["SAVE"])
def counted(brain, batch):
    steps.append(len(steps))
    if len(steps) == 2:
        time.time = lambda: now() + 14 * 60
    if len(steps) == 3:
        assert not list(save.glob("CKPT+*"))
        time.time = lambda: now() + 15 * 60
    if len(steps) == 5:
        os.kill(os.getpid(), 9)
    return fit_batch(brain, batch)
TaggingBrain.fit_batch = counted
"""


def test_a_hard_kill_loses_a_quarter_of_an_hour(tiny_run, mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run")
    save = tmp_path / "run" / "save"
    done = run(argv, env=at_start(tmp_path, QUARTER_OF_AN_HOUR, SAVE=save), check=False)
    assert done.returncode == -9, done.stderr
    (checkpoint,) = save.glob("CKPT+*")
    assert read_yaml(checkpoint / "CKPT.yaml")["end-of-epoch"] is False
    assert ended(tmp_path / "log", argv)[0] == 0
    assert differences(tiny_run[0], tmp_path / "run") == []


ELSEWHERE = """
from speechbrain.utils import distributed
from psla_sb.experiment import pace
distributed.infer_device = lambda: "cuda:99"
pace.HEARTBEAT = -1.0
"""


def test_the_runs_device_is_that_of_the_example_too_and_the_log_shows_life(mini_data, tmp_path):
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "number_of_epochs": 1}
    argv = command(TRAIN, "hparams/mini.yaml", "--device=cpu", **settings)
    done = run(argv, env=at_start(tmp_path, ELSEWHERE))
    said = done.stdout + done.stderr
    assert "An example, " in said
    assert "No GPU can be used" not in said
    assert re.search(r"Epoch 1: step \d of 5, [\d.]+ clips/s, loss [\d.]+, \d+ s to the end of the epoch's training", said)


def test_mistakes_and_help_of_each_script(tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    status, lines = ended(log, [sys.executable, TRAIN, "hparams/psla.yaml", "--data_folder=/nope", f"--output_folder={out}"])
    assert (status, lines[-1]) == (2, "error: /nope: no such folder, which --data_folder names")
    status, lines = ended(log, [sys.executable, TRAIN, "hparams/mini.yaml", "--epochs=3", f"--output_folder={out}"])
    assert (status, lines[-1].endswith("has no key 'epochs'. Did you mean 'number_of_epochs'?")) == (2, True)
    assert not out.exists()
    for script in (TRAIN, AGGREGATE):
        status, lines = ended(log, [sys.executable, script, "--help"])
        assert status == 0
        assert "Trains" not in "\n".join(lines)
        assert "--KEY=VALUE overrides any key" in " ".join(" ".join(lines).split())


def test_a_validation_clip_that_is_gone(tiny_run, mini_data, tmp_path):
    """As the preparation finds it, at the start and not after an epoch; the run's annotations stay."""
    folder, data = shutil.copytree(tiny_run[0], tmp_path / "run"), shutil.copytree(mini_data, tmp_path / "data")
    next((data / "audio" / "eval").glob("*.flac")).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=data, output_folder=folder, number_of_epochs=3)
    status, lines = ended(tmp_path / "log", argv)
    assert status == 2
    assert "valid_annotation had 20 clips, and has 19" in lines[-1]
    assert "Going into epoch" not in "\n".join(lines)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # what each start says of itself
    assert {path.name for path in after if after[path] != before.get(path)} <= {"env.log", "log.txt"}
    assert after.keys() == before.keys()
