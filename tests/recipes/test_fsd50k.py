"""Runs of the FSD50K recipe, as a user starts them, on a generated FSD50K of the true layout."""

import csv
import json
import runpy
import sys

import numpy as np
import pytest

from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment import aggregate, enhance_labels, train
from psla_sb.experiment import hparams as hparams_module
from psla_sb.experiment.hparams import load_hparams
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.calibration import Calibration, expected_calibration_error, fit_calibration
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import f1_of, summarize
from runs import REPOSITORY, TINY, command, run

RECIPE = REPOSITORY / "recipes" / "FSD50K"
SIZE = {"n_valid": 10, "seconds": 0.6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a tiny run, and its output."""
    folder = tmp_path_factory.mktemp("fsd50k")
    settings = {**SIZE, "data_folder": folder / "data", "output_folder": folder / "run"}
    done = run(command(RECIPE / "train.py", "hparams/mini.yaml", **settings), cwd=folder)
    return folder / "run", done.stdout + done.stderr


def test_epochs_are_of_the_validation_set_and_the_evaluation_of_the_eval_set(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    targets, sizes = {}, {}
    for name in ("train", "valid", "eval"):
        labels = Manifest.from_csv(folder / f"{name}.csv").label_sets(vocabulary)
        sizes[name] = len(labels)
        targets[name] = labels.to_multi_hot(np.arange(len(labels)), len(vocabulary))
    assert sizes == {"train": TINY["n_train"], "valid": SIZE["n_valid"], "eval": TINY["n_eval"]}

    def scores(name):
        return np.load(folder / "predictions" / f"{name}.npy")

    valid = [summarize(scores(f"valid_epoch_0{epoch}"), targets["valid"])["mAP"] for epoch in (1, 2)]
    assert [epoch["mAP"] for epoch in results["epochs"]] == valid
    evaluation = results["evaluation"]
    best = 1 + int(np.argmax(valid))
    assert evaluation["best"]["epochs"] == [best]
    assert evaluation["best"]["mAP"] == summarize(scores(f"test_epoch_0{best}"), targets["eval"])["mAP"]
    assert evaluation["weight_average"]["mAP"] == summarize(scores("test_weight_average"), targets["eval"])["mAP"]
    mean = (scores("test_epoch_01").astype(float) + scores("test_epoch_02")) / 2
    assert evaluation["ensemble"]["mAP"] == pytest.approx(summarize(mean, targets["eval"])["mAP"], abs=1e-12)


def test_thresholds_are_fitted_on_the_validation_set_and_reported_on_the_eval_set(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    valid, test = (Manifest.from_csv(folder / f"{name}.csv").targets(vocabulary) for name in ("valid", "eval"))
    scores = {name: np.load(folder / "predictions" / f"{name}_weight_average.npy") for name in ("valid", "test")}
    expected, found = fit_calibration(scores["valid"], valid), Calibration.read(folder / "calibration.json", vocabulary)
    np.testing.assert_array_equal(found.threshold, expected.threshold)
    np.testing.assert_array_equal(found.slope, expected.slope)
    said = results["calibration"]
    assert not said["same_clips"]
    assert said["fitted_on"] == {"set": "valid", "clips": SIZE["n_valid"]}
    assert said["macro_F1"] == pytest.approx(np.nanmean(f1_of(found.decisions(scores["test"]), test)))
    assert said["ECE_before"] == expected_calibration_error(scores["test"], test)
    assert AudioTagger.from_folder(folder / "tagger").calibration.n_clips == SIZE["n_valid"]


def test_names_of_classes_are_for_people(finished):
    folder, output = finished
    names = Vocabulary.from_csv(folder / "class_labels_indices.csv").names
    assert "Chirp, tweet" in names
    assert not any("_" in name for name in names)
    assert "Chirp, tweet" in (folder / "tagger" / "label_encoder.ckpt").read_text()
    assert "best epoch on the validation set" in output


def test_aggregation_reports_on_the_eval_set(finished, tmp_path):
    arguments = [
        "hparams/aggregate.yaml",
        "--device=cpu",
        f"--runs={finished[0]}",
        f"--output_folder={tmp_path}",
        "--num_workers=0",
    ]
    aggregate.main(str(RECIPE / "aggregate.py"), arguments)
    scores = np.load(finished[0] / "predictions" / "test_ensemble.npy")
    np.testing.assert_allclose(np.load(tmp_path / "ensemble.npy"), scores, atol=1e-5)
    assert json.loads((tmp_path / "ensemble.json").read_text())["annotation_file"] == str(finished[0] / "eval.csv")


def enhance(options, data, output):
    settings = {**TINY, **SIZE, "data_folder": data, "output_folder": output}
    arguments = [*options, *(f"--{key}={value}" for key, value in settings.items())]
    enhance_labels.main(str(RECIPE / "enhance_labels.py"), ["hparams/mini.yaml", *arguments])


def test_labels_are_enhanced_with_audiosets_ontology(finished, tmp_path):
    data = finished[0].parent / "data"
    enhance([f"--teacher={finished[0]}", "--threshold", "mean", "--device=cpu"], data, tmp_path)
    assert np.load(tmp_path / "enhanced_labels" / "scores.npy").shape == (TINY["n_train"], 39)
    with open(tmp_path / "enhanced_labels" / "ids.csv", newline="", encoding="utf-8") as file:
        assert [row["ID"] for row in csv.DictReader(file)] == Manifest.from_csv(tmp_path / "train.csv").table["ID"].to_pylist()
    # what the enhanced recipe then trains on
    settings = {"pretrained": None, "variant": "b0", "n_classes": 39, "expected_clips": None, "data_folder": str(data)}
    hparams = load_hparams(RECIPE / "hparams" / "psla_enhanced.yaml", {**settings, "output_folder": str(tmp_path)})
    vocabulary = hparams_module.prepare(hparams)
    before = Manifest.from_csv(hparams["train_annotation"]).label_sets(vocabulary)
    after = train.tagging_dataset("train", hparams, vocabulary)[1]
    assert len(after.indices) >= len(before.indices)
    for name in ("valid", "test"):
        labels = Manifest.from_csv(hparams[f"{name}_annotation"]).label_sets(vocabulary)
        np.testing.assert_array_equal(train.tagging_dataset(name, hparams, vocabulary)[1].indices, labels.indices)


@pytest.mark.parametrize("script", ["train", "aggregate", "enhance_labels"])
def test_scripts_have_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPE / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_full_recipe_names_what_is_missing(tmp_path, capsys):
    arguments = ["hparams/psla.yaml", "--pretrained=null", "--variant=b0", f"--output_folder={tmp_path / 'run'}"]
    for options, message in [([], "--data_folder=..."), ([f"--data_folder={tmp_path}"], "zenodo.org/records/4060432")]:
        with pytest.raises(SystemExit) as stop:
            train.main(str(RECIPE / "train.py"), [*arguments, *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_psla_plus_chooses_its_tagger_on_the_validation_set(finished, tmp_path):
    folder, _ = finished
    data = folder.parent / "data"
    settings = {"pretrained": "null", "variant": "b0", "n_mels": 32, "n_frames": 60, "batch_size": 8, "draws_per_epoch": 16}
    n_classes = len(Vocabulary.from_csv(folder / "class_labels_indices.csv"))
    settings |= {"n_classes": n_classes, "number_of_epochs": 2, "average_start": 1, "num_workers": 0, "expected_clips": "null"}
    settings |= {"data_folder": data, "output_folder": tmp_path / "run", "device": "cpu", "warmup_epochs": 1}
    argv = command(RECIPE / "train.py", "hparams/psla_plus.yaml")[:3]
    run([*argv, *(f"--{key}={value}" for key, value in settings.items())])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    predictions, vocabulary = tmp_path / "run" / "predictions", Vocabulary.from_csv(folder / "class_labels_indices.csv")
    targets = Manifest.from_csv(folder / "valid.csv").targets(vocabulary)
    held_out = {name: summarize(np.load(predictions / f"valid_{name}.npy"), targets)["mAP"] for name in ("swa", "ema")}
    assert results["tagger"] == max(held_out, key=held_out.get)
    assert results["evaluation"]["weight_average"] == results["evaluation"][results["tagger"]]
    assert np.array_equal(np.load(predictions / "test_weight_average.npy"), np.load(predictions / f"test_{results['tagger']}.npy"))
    assert results["calibration"]["fitted_on"] == {"set": "valid", "clips": SIZE["n_valid"]}
