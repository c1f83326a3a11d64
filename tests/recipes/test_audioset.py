"""Runs of the AudioSet recipe, as a user starts them."""

import csv
import json

import numpy as np
import pytest

from psla_sb.aggregation.averaging import average_weights
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_weights
from psla_sb.dataio.manifest import Manifest
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import summarize
from runs import REPOSITORY, TRAIN, command, run


def targets_of(folder, data):
    vocabulary = Vocabulary.from_csv(data / "class_labels_indices.csv")
    labels = Manifest.from_csv(folder / "eval.csv").label_sets(vocabulary)
    return labels.to_multi_hot(np.arange(len(labels)), len(vocabulary))


def test_results_are_those_of_the_predictions(tiny_run, mini_data):
    folder, results, _ = tiny_run
    targets = targets_of(folder, mini_data)
    epochs = [np.load(folder / "predictions" / f"valid_epoch_{epoch:02d}.npy") for epoch in (1, 2)]
    for record, scores in zip(results["epochs"], epochs, strict=True):
        assert record["mAP"] == summarize(scores, targets)["mAP"]
        assert record["valid_loss"] == summarize(scores, targets)["loss"]
    ensemble = summarize(np.mean(epochs, axis=0, dtype=np.float64), targets)
    assert results["evaluation"]["ensemble"]["mAP"] == pytest.approx(ensemble["mAP"], abs=1e-12)
    assert results["epochs"][1]["ensemble_mAP"] == pytest.approx(ensemble["mAP"], abs=1e-12)
    assert results["evaluation"]["last"]["mAP"] == results["epochs"][1]["mAP"]
    mean = (results["epochs"][0]["mAP"] + results["epochs"][1]["mAP"]) / 2
    assert results["evaluation"]["last_epochs_mean"]["mAP"] == pytest.approx(mean)
    assert results["evaluation"]["chance"]["mAP"] == pytest.approx(targets.mean(axis=0)[targets.any(axis=0)].mean())
    averaged = np.load(folder / "predictions" / "valid_weight_average.npy")
    assert results["evaluation"]["weight_average"]["mAP"] == summarize(averaged, targets)["mAP"]


def test_every_figure_in_the_results_has_a_meaning(tiny_run):
    results = tiny_run[1]
    for entry in (*results["epochs"], *results["evaluation"].values(), results["evaluation"]):
        assert set(entry) - {"epoch"} <= set(results["meaning"])


def test_weight_average_is_the_true_mean_of_the_snapshots(tiny_run):
    folder, _, _ = tiny_run
    paths = [snapshot_path(folder, epoch) for epoch in (1, 2)]
    average, files = average_weights(paths), [load_weights(path) for path in paths]
    key = "embedding_model._conv_stem.weight"
    assert not np.array_equal(files[0][key], files[1][key])
    np.testing.assert_allclose(average[key], (files[0][key] + files[1][key]) / 2, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(load_weights(folder / "snapshots" / "average.safetensors")[key], average[key])


def test_exported_tagger_scores_as_the_run_did(tiny_run, mini_data):
    folder, _, _ = tiny_run
    predictions = np.load(folder / "predictions" / "valid_weight_average.npy")
    tagger = AudioTagger.from_hparams(source=str(folder / "tagger"), savedir=None)
    manifest = Manifest.from_csv(folder / "eval.csv", data_root=mini_data)
    tags = tagger.tag_file(manifest[0]["wav"], top_k=39)
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    np.testing.assert_allclose([t.score for t in tags], sorted(predictions[0], reverse=True), atol=1e-5)
    assert [t.score for t in tags] == pytest.approx([predictions[0][vocabulary.index(t.mid)] for t in tags], abs=1e-5)
    assert all(t.label == vocabulary.names[vocabulary.index(t.mid)] for t in tags)


def test_output_folder_has_the_usual_files_and_the_log_a_table(tiny_run):
    folder, _, done = tiny_run
    for name in ("hyperparams.yaml", "log.txt", "env.log", "train_log.txt", "save", "tagger/hyperparams.yaml"):
        assert (folder / name).exists(), name
    assert len((folder / "train_log.txt").read_text().splitlines()) == 2
    assert "ensemble of all epochs' predictions" in done.stdout
    assert "ensemble of all epochs' predictions" in (folder / "log.txt").read_text()


def test_a_finished_run_is_only_evaluated_again(tiny_run, mini_data):
    folder, results, _ = tiny_run
    run(command(TRAIN, "hparams/mini.yaml", "--test_only", data_folder=mini_data, output_folder=folder))
    assert json.loads((folder / "results.json").read_text()) == results


def test_every_technique_can_be_switched_off(mini_data, tmp_path):
    off = {"pretrained": "null", "balanced_sampling": False, "mixup_rate": 0, "freq_mask": 0, "time_mask": 0}
    off |= {"label_enhancement": "null", "number_of_epochs": 1, "seed": 2}
    run(command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "off", **off))
    assert np.isfinite(json.loads((tmp_path / "off" / "results.json").read_text())["epochs"][0]["train_loss"])


def test_run_options_of_speechbrain(mini_data, tmp_path):
    options = ("--debug", "--precision=bf16", "--grad_accumulation_factor=2", "--device", "cpu")
    run(command(TRAIN, "hparams/mini.yaml", *options, data_folder=mini_data, output_folder=tmp_path / "debug"))
    assert len(json.loads((tmp_path / "debug" / "results.json").read_text())["epochs"]) == 2


@pytest.mark.parametrize("folder", [REPOSITORY, REPOSITORY / "recipes" / "AudioSet"])
def test_without_a_data_folder_the_error_says_what_to_pass(folder):
    script = TRAIN.relative_to(REPOSITORY) if folder == REPOSITORY else "train.py"
    done = run(command(script, "hparams/psla.yaml")[:3], check=False, cwd=folder)
    assert done.returncode == 2
    assert "--data_folder" in done.stderr
    assert "hparams/mini.yaml" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["psla", "psla_balanced", "baseline"])
def test_full_recipes_train_on_data_of_the_real_layout(name, mini_data, tmp_path):
    """The full recipes, with the smallest encoder and no download, on the embedded set under the real sets' names."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "audio").symlink_to(mini_data / "audio")
    for file in ("class_labels_indices.csv", "eval_segments.csv", "balanced_train_segments.csv"):
        (data / file).write_bytes((mini_data / file).read_bytes())
    lines = (mini_data / "balanced_train_segments.csv").read_text().splitlines(keepends=True)
    if name != "psla_balanced":
        (data / "balanced_train_segments.csv").write_text("".join(lines[:13]))
        (data / "unbalanced_train_segments.csv").write_text("".join(lines[:3] + lines[13:]))
    settings = {"pretrained": "null", "variant": "b0", "n_classes": 39, "batch_size": 10, "n_mels": 32}
    settings = {**settings, "n_frames": 48, "number_of_epochs": 1, "num_workers": 2}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    argv = command(TRAIN, f"hparams/{name}.yaml")[:3]
    run([*argv, *overrides, f"--data_folder={data}", f"--output_folder={tmp_path / 'run'}"])
    with open(tmp_path / "run" / "train.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 40
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]) == 1
