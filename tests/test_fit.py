"""What `psla-fit` chooses by the clips of a folder, what it says of folders that cannot be trained on, and what it trains."""

import csv
import json
import re
import signal
import sys

import numpy as np
import pytest
import soundfile

from psla_sb.errors import InputError
from psla_sb.experiment import fit
from runs import REPOSITORY, differences, finish, run, two_ranks

TONES = {"low": 200, "middle": 900, "high": 3000}
SMALL = {
    **{"device": "cpu", "pretrained": "null", "embedding_model": "{width: 0.2, depth: 0.2}", "num_workers": 0},
    **{"n_mels": 32, "freq_mask": 4, "time_mask": 8, "batch_size": 4, "draws_per_epoch": 24},
}


def write_clips(folder, n=24, rate=16000, seconds=0.4, several=False, duration=True, level=0.3, classes=tuple(TONES)):
    """Tones with a little noise as train, valid and test, half of them train; of several labels if asked for."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        labels = [classes[i % len(classes)]] + ([classes[(i + 1) % len(classes)]] if several and i % 2 else [])
        times = np.arange(int(rate * seconds)) / rate
        wave = sum(np.sin(2 * np.pi * TONES.get(label, 500) * rng.uniform(0.9, 1.1) * times) for label in labels)
        path = folder / f"{i}.wav"
        soundfile.write(path, level * wave + level * 0.1 * rng.standard_normal(len(times)), rate)
        rows.append([f"clip{i}", path, seconds if duration else "nan", ";".join(labels)])
    parts = {"train": rows[: n // 2], "valid": rows[n // 2 : 3 * n // 4], "test": rows[3 * n // 4 :]}
    for name, part in parts.items():
        write_rows(folder / f"{name}.csv", [["ID", "wav", "duration", "labels"], *part])
    write_rows(folder / "class_labels_indices.csv", [["index", "mid", "display_name"], *([i, c, c] for i, c in enumerate(classes))])
    return folder


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def choices(folder, **given):
    return {choice.key: choice.value for choice in fit.choose(folder, given=given)}


def test_chooses_by_what_is_there(tmp_path):
    found = choices(write_clips(tmp_path / "a"))
    assert found["activation"] == "softmax"
    assert (found["sample_rate"], found["n_classes"]) == (16000, 3)
    # not less than a second, of 50 frames
    assert found["n_frames"] == 50
    assert found["test_annotation"] == str(tmp_path / "a" / "test.csv")
    assert found["output_folder"] == str(tmp_path / "a" / "run")
    # few clips are drawn several times an epoch
    assert found["draws_per_epoch"] * found["number_of_epochs"] == fit.DRAWS
    assert "train_crop" not in found
    # four clips of each class
    assert found["class_weight_offset"] == fit.FEW_CLIPS
    assert "class_weight_offset" not in choices(write_clips(tmp_path / "b", n=48))


def test_chooses_for_several_labels_high_rates_and_long_clips(tmp_path):
    found = choices(write_clips(tmp_path, rate=44100, seconds=11.0, several=True, n=8, duration=False))
    assert found["activation"] == "sigmoid"
    assert found["sample_rate"] == 32000
    assert found["n_frames"] == 500
    assert (found["train_crop"], found["eval_crop"]) == ("random", "centre")


def test_what_is_given_is_not_chosen(tmp_path):
    found = choices(write_clips(tmp_path), sample_rate=8000, number_of_epochs=3)
    assert not {"sample_rate", "number_of_epochs"} & set(found)
    assert found["n_frames"] == 50


def test_files_may_be_elsewhere(tmp_path):
    folder = write_clips(tmp_path / "a")
    (folder / "class_labels_indices.csv").rename(folder / "classes.csv")
    (folder / "valid.csv").rename(tmp_path / "other.csv")
    with pytest.raises(InputError, match=r"has no valid\.csv and no class_labels_indices\.csv"):
        choices(folder)
    given = {"class_list": str(folder / "classes.csv"), "valid_annotation": str(tmp_path / "other.csv")}
    found = choices(folder, **given)
    assert found["n_classes"] == 3
    assert found["test_annotation"] == str(folder / "test.csv")
    assert not set(given) & set(found)
    # no test set is wanted
    assert "test_annotation" not in choices(folder, **given, test_annotation=None)


def test_without_the_weights_it_learns_from_nothing(tmp_path, monkeypatch):
    write_clips(tmp_path)
    assert choices(tmp_path)["pretrained"] == "imagenet"
    monkeypatch.setattr(fit, "lite_package", lambda variant: "no_such_package")
    found = choices(tmp_path)
    assert (found["pretrained"], found["head_epochs"], found["layer_decay"]) == (None, 0, 1.0)
    (said,) = [choice.why for choice in fit.choose(tmp_path) if choice.key == "pretrained"]
    assert "`pip install no-such-package`" in said
    # of other networks it knows nothing
    assert "pretrained" not in choices(tmp_path, variant="b0")


def test_other_recipes_have_other_keys(tmp_path):
    write_clips(tmp_path)
    mini = REPOSITORY / "recipes" / "AudioSet" / "hparams" / "mini.yaml"
    found = {choice.key: choice.value for choice in fit.choose(tmp_path, mini)}
    assert "activation" not in found
    # a frame every 10 ms
    assert found["n_frames"] == 100


def one_class(folder):
    write_clips(folder, classes=("low",))


def one_clip_a_class(folder):
    write_clips(folder)
    rows = (folder / "train.csv").read_text().splitlines()[:4]
    (folder / "train.csv").write_text("\n".join(rows) + "\n")


def many_classes(folder):
    write_clips(folder)
    write_rows(
        folder / "class_labels_indices.csv", [["index", "mid", "display_name"], *([i, f"c{i}", f"c{i}"] for i in range(10_000))]
    )
    for name in ("train", "valid", "test"):
        text = (folder / f"{name}.csv").read_text()
        for i, tone in enumerate(TONES):
            text = text.replace(f",{tone}", f",c{i}")
        (folder / f"{name}.csv").write_text(text)


def no_validation(folder):
    write_clips(folder)
    (folder / "valid.csv").unlink()


def unreadable(folder):
    write_clips(folder)
    for path in folder.glob("*.wav"):
        path.write_bytes(b"nothing")


def silent(folder):
    write_clips(folder, level=0.0)


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (one_class, "only one class, 'low'; add clips of something else"),
        (one_clip_a_class, "no class has more than one clip to learn from; add clips"),
        (many_classes, "10000 classes, but only 12 clips to learn them from; join classes, or add clips"),
        (no_validation, "has no valid.csv; `psla-prepare SOUNDS --out"),
        (unreadable, "none of the clips of"),
        (silent, "the clips are silent, all that were listened to"),
        (nothing, "no such folder; `psla-prepare SOUNDS --out"),
    ],
)
def test_what_cannot_be_trained_on_is_said_in_a_line(tmp_path, spoil, says):
    spoil(tmp_path / "data")
    with pytest.raises(InputError) as refused:
        fit.choose(tmp_path / "data")
    said = str(refused.value)
    assert says in said
    assert "\n" not in said
    assert str(tmp_path / "data") in said
    assert not any(word in said for word in ("mid", "ontology", "manifest"))


def psla_fit(tmp_path, *arguments, check=True, **overrides):
    """The command as a user runs it, with a network that takes seconds."""
    script = tmp_path / "fit.py"
    script.write_text("from psla_sb.cli.fit import fit\nfit()\n")
    settings = {**SMALL, **overrides}
    return run([sys.executable, script, *arguments, *(f"--{key}={value}" for key, value in settings.items())], check=check)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder of clips with several labels, and what the command said of it."""
    folder = tmp_path_factory.mktemp("several") / "data"
    write_clips(folder, several=True)
    done = psla_fit(folder.parent, folder, number_of_epochs=2)
    return folder, done.stdout + done.stderr


def test_trains_reports_and_tags(fitted):
    folder, said = fitted
    found = results(folder / "run")
    assert len(found["epochs"]) == 2
    # two fifths of two epochs are none, and 0 is from the first one on
    assert found["evaluation"]["weight_average"]["epochs"] == [1, 2]
    assert found["clips"]["set"] == "test"
    # tones are told apart by what each mel band has
    assert found["baseline"]["mAP"] > 0.8
    assert "logistic regression" in found["baseline"]["what"]
    settings = [line.split("  ")[0] for line in said.splitlines()]
    assert {"activation", "n_frames", "sample_rate"} <= set(settings)
    assert "2 epochs of 6 steps: about" not in said, "six steps are too few to say how long it takes"
    assert "logistic regression on mel bands" in said


def test_same_command_goes_on_and_other_settings_are_refused(fitted):
    folder, _ = fitted
    before = {path: path.stat().st_mtime_ns for path in (folder / "run" / "snapshots").iterdir()}
    psla_fit(folder.parent, folder, number_of_epochs=2)
    unchanged = [path for path, time in before.items() if "average" not in path.name and path.stat().st_mtime_ns == time]
    assert len(unchanged) == 2
    refused = psla_fit(folder.parent, folder, number_of_epochs=2, layer_decay=0.1, check=False)
    assert refused.returncode == 2
    assert "layer_decay was 0.8, is 0.1" in refused.stderr


def test_killed_and_started_again_it_ends_as_one_that_was_not(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text("from psla_sb.cli.fit import fit\nfit()\n")
    folder = write_clips(tmp_path / "data", several=True)
    settings = {**SMALL, "number_of_epochs": 3, "ckpt_interval_steps": 2, "report": False, "baseline": False}
    options = [f"--{key}={value}" for key, value in settings.items()]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    argv = [sys.executable, str(script), str(folder), *options]
    assert finish([*argv, f"--output_folder={whole}"], log) == 0, log.read_text()
    for target, count in (("TaggingBrain.fit_batch", 4), ("TaggingBrain.evaluate_batch", 1), ("TaggingBrain.fit_batch", 9)):
        at = (signal.SIGKILL, f"psla_sb.experiment.brain:{target}", count)
        assert finish([*argv, f"--output_folder={killed}"], log, at=at) == -signal.SIGKILL, log.read_text()
    assert finish([*argv, f"--output_folder={killed}"], log) == 0, log.read_text()
    assert differences(whole, killed) == []


def test_two_processes_train_one_tagger(fitted, tmp_path):
    script = tmp_path / "fit.py"
    script.write_text("from psla_sb.cli.fit import fit\nfit()\n")
    folder = write_clips(tmp_path / "data", several=True)
    others = {key: value for key, value in SMALL.items() if key not in ("embedding_model", "pretrained", "n_mels")}
    settings = {**others, "number_of_epochs": 1, "pretrained_tagger": fitted[0] / "run" / "tagger"}
    argv = [sys.executable, str(script), str(folder), *(f"--{key}={value}" for key, value in settings.items())]
    log = tmp_path / "log"
    assert two_ranks(argv, log) == [0, 0], log.with_suffix(".0").read_text() + log.with_suffix(".1").read_text()
    assert (folder / "run" / "report.html").is_file()
    # what was chosen is said once
    assert [log.with_suffix(f".{rank}").read_text().count("n_classes           3") for rank in (0, 1)] == [1, 0]


def test_ends_early_when_nothing_gets_better(tmp_path):
    folder = write_clips(tmp_path / "data")
    for _ in range(2):
        done = psla_fit(tmp_path, folder, number_of_epochs=9, patience=2, lr=1e-12)
        found = results(folder / "run")
        # without a rate nothing changes but statistics, so the first epochs are the best
        assert 3 <= len(found["epochs"]) < 9
        assert found["evaluation"]["weight_average"]["epochs"] == [epoch["epoch"] for epoch in found["epochs"]][-3:]
    assert "Going into epoch" not in done.stdout + done.stderr
    n_epochs = len(found["epochs"])
    psla_fit(tmp_path, folder, number_of_epochs=9, patience=9, lr=1e-12)
    # with more patience it goes on
    assert len(results(folder / "run")["epochs"]) > n_epochs


def test_single_label_scores_are_a_distribution(tmp_path):
    from psla_sb.inference import AudioTagger

    folder = write_clips(tmp_path / "data")
    psla_fit(tmp_path, folder, number_of_epochs=1)
    tags = AudioTagger.from_folder(folder / "run" / "tagger").tag_file(folder / "0.wav")
    assert sum(tag.score for tag in tags) == pytest.approx(1, abs=1e-5)


def test_starts_from_a_trained_tagger_whatever_its_encoder_is(fitted, tmp_path):
    tagger = fitted[0] / "run" / "tagger"
    folder = write_clips(tmp_path / "data", seconds=1.2)
    # without the small encoder of the other tests
    others = {key: value for key, value in SMALL.items() if key not in ("embedding_model", "pretrained", "n_mels")}
    script = tmp_path / "fit.py"
    script.write_text("from psla_sb.cli.fit import fit\nfit()\n")
    settings = {**others, "pretrained_tagger": tagger, "number_of_epochs": 1}
    done = run([sys.executable, script, folder, *(f"--{key}={value}" for key, value in settings.items())])
    said = done.stdout + done.stderr
    # all of them, of the encoder and of the head: the classes are the same
    assert re.search(r"\d\d+ tensors taken; 0 not taken", said)
    refused = run([*done.args, "--sample_rate=32000"], check=False)
    assert refused.returncode == 2
    assert f"{tagger} hears sounds at 16000 Hz, not at 32000" in refused.stderr
    recipe = (folder / "run" / "own.yaml").read_text()
    assert "width: 0.2" in recipe
    assert "n_mels: 32" in recipe
    # what it hears of a clip is chosen anew
    assert (folder / "run" / "tagger" / "hyperparams.yaml").read_text().count("n_frames: 60") == 2


def test_folds_give_figures_of_all_clips(tmp_path):
    folder = write_clips(tmp_path / "data", n=24, several=True)
    refused = psla_fit(tmp_path, folder, "--folds", check=False)
    assert refused.returncode == 2
    assert f"{folder} has no folds: `psla-prepare SOUNDS --out {folder} --folds 5` makes them" in refused.stderr
    rows = [line for name in ("train", "valid", "test") for line in (folder / f"{name}.csv").read_text().splitlines()[1:]]
    for k in range(3):
        (folder / f"fold_{k + 1}").mkdir()
        parts = [rows[(k + 2) % 3 :: 3], rows[(k + 1) % 3 :: 3], rows[k::3]]
        for name, part in zip(("train", "valid", "test"), parts, strict=True):
            (folder / f"fold_{k + 1}" / f"{name}.csv").write_text("\n".join(["ID,wav,duration,labels", *part]) + "\n")
    # what is called nearly so is none
    for name in ("fold_1 (copy)", "fold_01", "fold_7"):
        (folder / name).mkdir()
        (folder / name / "train.csv").write_text((folder / "fold_1" / "train.csv").read_text())
    done = psla_fit(tmp_path, folder, "--folds", number_of_epochs=1)
    block = results(folder / "run")["folds"]
    each = [results(folder / "run" / f"fold_{k}")["evaluation"]["weight_average"]["mAP"] for k in (1, 2, 3)]
    assert block["mAP"]["each"] == each
    assert block["mAP"]["mean"] == pytest.approx(np.mean(each))
    scores = np.concatenate([np.load(folder / "run" / f"fold_{k}" / "predictions" / "test_weight_average.npy") for k in (1, 2, 3)])
    assert len(scores) == 24
    assert block["n_folds"] == 3
    assert "3 folds, each scored by a tagger that has not heard it: mAP" in done.stdout
    page = (folder / "run" / "report.html").read_text()
    assert "Trained 3 times, each time without another part of the clips" in page
    # what the main training says stays
    assert "baseline" in results(folder / "run")
