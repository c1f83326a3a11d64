"""Training on labels that are propagated to parents, and figures on those beside the official ones."""

import csv
import json
import shutil

import numpy as np
import pytest

from psla_sb.checkpoints.run_folder import IDENTITY
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment.ablate import check_scores
from psla_sb.experiment.differences import published_labels
from psla_sb.experiment.hparams import resolve
from psla_sb.experiment.variants import techniques_in_use
from psla_sb.labels.enhancement import propagate_to_parents
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import FIGURES, summarize
from runs import TRAIN, command, run

BLOCK = """label_enhancement: !name:psla_sb.labels.enhancement.propagate_annotation
    ontology: !ref <data_folder>/ontology.json
    parents: ontology
propagated_labels: !ref <data_folder>/ontology.json
"""
SAID = "Labels propagated to parents (counted in the ontology)"


@pytest.fixture(scope="module")
def world(mini_data):
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    return vocabulary, Ontology.from_json(mini_data / "ontology.json")


@pytest.fixture(scope="module")
def recipe(tiny_run, mini_data, world, tmp_path_factory):
    """A recipe that propagates, and how to run it on annotations without the labels that propagation brings back."""
    folder, (vocabulary, ontology) = tmp_path_factory.mktemp("recipe"), world
    lines = (TRAIN.parent / "hparams" / "mini.yaml").read_text().splitlines(keepends=True)
    text = "".join(BLOCK if line.startswith("label_enhancement:") else line for line in lines)
    (folder / "mini.yaml").write_text(text)
    for name in ("train", "eval"):
        with open(tiny_run[0] / f"{name}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            indices = [vocabulary.index(mid) for mid in row["labels"].split(";")]
            alone = propagate_to_parents([[i] for i in indices], vocabulary, ontology)
            brought = {i for above in alone for i in above[1:]}
            row["labels"] = ";".join(vocabulary.mids[i] for i in indices if i not in brought)
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    annotations = {"train_annotation": folder / "train.csv", "valid_annotation": folder / "eval.csv"}
    settings = {"data_folder": mini_data, "class_list": mini_data / "class_labels_indices.csv", "skip_prep": True, **annotations}

    def train(output, *arguments, **overrides):
        return run(command(TRAIN, folder / "mini.yaml", *arguments, output_folder=output, **settings, **overrides), check=False)

    return train, folder


def labels_of(folder, name, vocabulary):
    return Manifest.from_csv(folder / f"{name}.csv").label_sets(vocabulary)


def test_a_recipe_trains_on_propagated_labels_and_reports_both(recipe, world, tmp_path):
    (train, folder), (vocabulary, ontology) = recipe, world
    done = train(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    given = labels_of(folder, "train", vocabulary)
    propagated = propagate_to_parents(given, vocabulary, ontology)
    assert f"{SAID}: {propagated.indices.size - given.indices.size} labels added to {given.indices.size}, on " in done.stdout
    assert propagated.indices.size > given.indices.size
    contents = json.loads((tmp_path / "run" / IDENTITY).read_text())["contents"]
    assert contents["train"]["labels"] == propagated.digest()
    official = labels_of(folder, "eval", vocabulary)
    assert contents["valid"]["labels"] == official.digest()

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    second = results["evaluation_propagated"]
    assert list(second) == list(results["evaluation"])
    labels = propagate_to_parents(official, vocabulary, ontology)
    targets = labels.to_multi_hot(np.arange(len(labels)), len(vocabulary))
    assert results["clips"]["labels_propagated"] == targets.sum() > results["clips"]["labels_found"]

    def scores(name):
        return np.load(tmp_path / "run" / "predictions" / f"valid_{name}.npy")

    epochs = [summarize(scores(f"epoch_{epoch:02d}"), targets) for epoch in (1, 2)]
    for row in ("weight_average", "ensemble"):
        expected = summarize(scores(row), targets)
        assert {key: second[row][key] for key in expected} == pytest.approx(expected)
    for figure in FIGURES:
        assert second["last"][figure] == pytest.approx(epochs[1][figure])
        assert second["best"][figure] == pytest.approx(epochs[second["best"]["epochs"][0] - 1][figure])
        assert second["last_epochs_mean"][figure] == pytest.approx(np.mean([epoch[figure] for epoch in epochs]))
    assert second["chance"]["mAP"] == pytest.approx(targets.mean(axis=0)[targets.any(axis=0)].mean())
    for row, figures in results["evaluation"].items():
        assert second[row].keys() == figures.keys()
        assert second[row].get("epochs") == figures.get("epochs")
        assert second[row]["mAP"] != figures["mAP"]
    assert {"evaluation_propagated", *second} <= set(results["meaning"])
    _, _, table = done.stdout.partition("On labels propagated to parents, ")
    assert table.startswith(f"{targets.sum() / 20:.2f} a clip in place of {official.indices.size / 20:.2f}:")
    for title, row in (("chance (mean class prior)", "chance"), ("ensemble of all epochs' predictions", "ensemble")):
        (line,) = (line for line in table.splitlines() if line.startswith(title))
        assert f"{second[row]['mAP']:.4f}" in line


def test_null_switches_it_off(recipe, world, tmp_path):
    (train, folder), (vocabulary, _) = recipe, world
    off = {"label_enhancement": "null", "propagated_labels": "null"}
    done = train(tmp_path / "run", number_of_epochs=1, **off)
    assert done.returncode == 0, done.stderr
    assert "propagated" not in (done.stdout + done.stderr).replace("propagated_labels", "")
    contents = json.loads((tmp_path / "run" / IDENTITY).read_text())["contents"]
    assert contents["train"]["labels"] == labels_of(folder, "train", vocabulary).digest()
    assert "evaluation_propagated" not in json.loads((tmp_path / "run" / "results.json").read_text())
    # other labels are another run
    refused = train(tmp_path / "run", number_of_epochs=1, propagated_labels="null")
    assert refused.returncode == 2
    assert "label_enhancement was null, is !name:psla_sb.labels.enhancement.propagate_annotation" in refused.stderr


def test_a_finished_run_is_evaluated_on_both_by_an_override(tiny_run, mini_data, tmp_path):
    folder = shutil.copytree(tiny_run[0], tmp_path / "run")
    argv = command(TRAIN, "hparams/mini.yaml", "--test_only", data_folder=mini_data, output_folder=folder)
    run([*argv, f"--propagated_labels={mini_data / 'ontology.json'}"])
    both = json.loads((folder / "results.json").read_text())
    assert both["evaluation"] == tiny_run[1]["evaluation"]
    assert both["evaluation_propagated"].keys() == both["evaluation"].keys()
    run(argv)
    after = json.loads((folder / "results.json").read_text())
    assert {**after, "clips": None} == {**tiny_run[1], "clips": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "propagated_labels: {file}: cannot read this ontology"),
        ("[{", "propagated_labels: {file}: not a JSON file"),
        ('[{"id": "a", "name": "A", "child_ids": []}]', "propagated_labels: {file}: by the ontology no parent follows from any of"),
        (3, "propagated_labels must be null or the path of an ontology.json, not 3"),
    ],
)
def test_what_is_no_ontology_is_refused_before_the_training(recipe, tmp_path, content, message):
    file = tmp_path / "other.json"
    if isinstance(content, str):
        file.write_text(content)
    done = recipe[0](tmp_path / "run", propagated_labels=3 if content == 3 else file)
    assert done.returncode == 2
    assert message.format(file=file) in done.stderr
    assert not (tmp_path / "run" / "snapshots").exists()


def test_an_ablation_needs_no_scores_for_it(recipe):
    values = resolve(recipe[1] / "mini.yaml", {"data_folder": "/data"})
    check_scores(values)
    assert "label enhancement" in techniques_in_use(values)
    # the published difference is that of enhancement by a teacher
    assert published_labels("full AudioSet", values) is None
