"""The commands of "From zero to .47" in the AudioSet README, on a generated AudioSet of the real layout, with a teacher's file."""

import json
import pickle
import sys

import numpy as np
import pytest

from psla_sb.cli.teacher import teacher
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment.hparams import load_hparams
from psla_sb.labels.vocabulary import Vocabulary
from runs import REPOSITORY, TRAIN, command, run

AGGREGATE = REPOSITORY / "recipes" / "AudioSet" / "aggregate.py"
# psla_plus.yaml as it is, but for a network and clips that take seconds
SMALL = {"pretrained": "null", "variant": "b0", "n_classes": 39, "n_mels": 32, "n_frames": 50, "batch_size": 10, "num_workers": 0}
SMALL |= {"draws_per_epoch": 20, "number_of_epochs": 2, "average_start": 1, "average_every": 1, "warmup_epochs": 1}


@pytest.fixture(scope="module")
def data(mini_data, tmp_path_factory):
    """The embedded set under the real set's names; class lists are as long as they are there."""
    folder = tmp_path_factory.mktemp("audioset")
    (folder / "audio").symlink_to(mini_data / "audio")
    for file in ("class_labels_indices.csv", "eval_segments.csv", "ontology.json"):
        (folder / file).write_bytes((mini_data / file).read_bytes())
    lines = (mini_data / "balanced_train_segments.csv").read_text().splitlines(keepends=True)
    (folder / "balanced_train_segments.csv").write_text("".join(lines[:13]))
    (folder / "unbalanced_train_segments.csv").write_text("".join(lines[:3] + lines[13:]))
    return folder


def write_teacher(folder, annotation, vocabulary):
    """What EfficientAT publishes: float16 logits, and a pickle of {YouTube's ID: row}, in another order and with other clips."""
    manifest = Manifest.from_csv(annotation)
    targets = manifest.targets(vocabulary)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(manifest) + 7)
    logits = np.full((len(rows), len(vocabulary)), -9.0, np.float16)
    logits[rows[: len(manifest)]] = 6 * targets - 4 + rng.normal(size=targets.shape)
    ids = [manifest[i]["id"].removeprefix("Y")[:11] for i in range(len(manifest))]
    # five clips have no scores
    index = {name: int(row) for name, row in zip(ids[5:], rows[5 : len(manifest)], strict=True)}
    index |= {f"otherclip{i:02d}": int(row) for i, row in enumerate(rows[len(manifest) :])}
    np.save(folder / "logits.npy", logits)
    (folder / "index.pkl").write_bytes(pickle.dumps(index))


def test_from_zero(data, tmp_path, capsys):
    settings = {**SMALL, "data_folder": data, "device": "cpu"}
    first = command(TRAIN, "hparams/psla_plus.yaml")[:3]

    def train(seed, *options, **more):
        given = {**settings, "seed": seed, "output_folder": tmp_path / str(seed), **more}
        return run([*first, *options, *(f"--{key}={value}" for key, value in given.items())])

    said = train(1, "--dry_run").stdout
    assert "ema_decay: 0.9999" in said
    annotation, classes = tmp_path / "1" / "train.csv", data / "class_labels_indices.csv"
    write_teacher(tmp_path, annotation, Vocabulary.from_csv(classes))
    files = [str(tmp_path / "logits.npy"), "--index", str(tmp_path / "index.pkl"), "--annotation", str(annotation)]
    teacher([*files, "--labels", str(classes), "--out", str(tmp_path / "teacher")])
    assert "Scores of 35 of 40 clips (87.5%)" in capsys.readouterr().out
    for seed in (1, 2):
        done = train(seed, teacher_scores=tmp_path / "teacher")
        assert "35 of 40 training clips" in done.stdout + done.stderr
        results = json.loads((tmp_path / str(seed) / "results.json").read_text())
        assert set(results["evaluation"]) >= {"weight_average", "swa", "ema"}
        assert results["tagger"] in ("swa", "ema")
    runs = f"--runs=[{tmp_path / '1'}, {tmp_path / '2'}]"
    run([sys.executable, AGGREGATE, "hparams/aggregate.yaml", "--members=average", runs, f"--output_folder={tmp_path / 'both'}"])
    ensemble = json.loads((tmp_path / "both" / "ensemble.json").read_text())
    assert len(ensemble["members"]) == 2
    # the taught run is another one than one without a teacher
    alone = train(1, output_folder=tmp_path / "alone")
    assert alone.returncode == 0
    losses = [json.loads((tmp_path / name / "results.json").read_text())["epochs"][0]["train_loss"] for name in ("1", "alone")]
    assert losses[0] != losses[1]


def test_both_label_sets_of_a_run(data, tmp_path):
    settings = {**SMALL, "number_of_epochs": 1, "data_folder": data, "output_folder": tmp_path / "run", "device": "cpu"}
    settings |= {"propagated_labels": data / "ontology.json"}
    argv = command(TRAIN, "hparams/psla_plus.yaml")[:3]
    done = run([*argv, *(f"--{key}={value}" for key, value in settings.items())])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["evaluation_propagated"]) == set(results["evaluation"])
    assert "On labels propagated to parents" in done.stdout + done.stderr


@pytest.mark.parametrize("recipe", ["AudioSet", "FSD50K"])
def test_psla_plus_has_the_published_settings(recipe, tmp_path):
    overrides = {"data_folder": str(tmp_path), "output_folder": str(tmp_path / "run"), "pretrained": None}
    built = load_hparams(REPOSITORY / "recipes" / recipe / "hparams" / "psla_plus.yaml", overrides)
    assert (built["class_weight_offset"], built["replacement"]) == (100, False)
    assert (built["mixup_rate"], built["mixup"].alpha, built["mixup"].at_least_half) == (0.5, 2.0, True)
    assert [part.amount if hasattr(part, "amount") else part.shift for part in built["waveform_augment"][:2]] == [7, 2000]
    # off, since it cost accuracy where it was tried
    assert (built["feature_augment"][0].p, built["feature_augment"][0].alpha) == (0, 0.4)
    assert built["distillation_weight"] == 9
    optimizer = built["optimizer"].keywords
    assert "weight_decay" not in optimizer
    schedule, epochs = built["schedule"], built["epoch_counter"].limit
    # in proportion on FSD50K
    expected = (200, 8, 80, 95, 50) if recipe == "AudioSet" else (40, 2, 16, 19, 10)
    found = (epochs, schedule.warmup_epochs, schedule.decay_start, schedule.decay_epochs, built["average_start"])
    assert (found, schedule.end) == (expected, 0.01)
    if recipe == "AudioSet":
        assert (built["draws_per_epoch"], built["average_every"], built["ema_decay"]) == (100_000, 5, 0.9999)
