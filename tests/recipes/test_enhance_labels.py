"""The recipe's enhance_labels.py, with a tiny teacher; and training with what it writes."""

import csv
import json
import re
import sys

import numpy as np
import pytest

from enhance_labels import read_labels
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import class_balanced_weights
from psla_sb.experiment.enhance_labels import main
from psla_sb.experiment.hparams import load_hparams
from psla_sb.experiment.train import tagging_dataset, train_batches
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.enhancement import enhance
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.report import audit, mended
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.mini_audioset import write_mini_audioset
from runs import REPOSITORY, TINY, TRAIN, run

SCRIPT = REPOSITORY / "recipes" / "AudioSet" / "enhance_labels.py"
ENHANCED = REPOSITORY / "recipes" / "AudioSet" / "hparams" / "psla_balanced_enhanced.yaml"
RATES = {"type1_rate": 0.4, "type2_rate": 0.4}


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory):
    """The tiny data set, whose clips the teacher knows, with errors in the training labels."""
    sizes = {key: TINY[key] for key in ("n_train", "n_eval", "seconds")}
    return write_mini_audioset(tmp_path_factory.mktemp("noisy"), **sizes, **RATES)


def enhance_labels(data, output, *options):
    """The script in this process, with the mini recipe."""
    settings = {**TINY, **RATES, "data_folder": data, "output_folder": output}
    main(str(SCRIPT), ["hparams/mini.yaml", *(f"--{key}={value}" for key, value in settings.items()), *options], read_labels)


@pytest.fixture(scope="module")
def teacher(lively_runs):
    """A run's folder."""
    return lively_runs / "a"


@pytest.fixture(scope="module")
def enhanced(noisy_data, teacher, tmp_path_factory):
    """The folder that the script wrote."""
    output = tmp_path_factory.mktemp("enhanced")
    clean = f"--clean={noisy_data / 'balanced_train_segments_clean.csv'}"
    enhance_labels(noisy_data, output, f"--teacher={teacher}", clean, "--threshold", "mean", "25")
    return output / "enhanced_labels"


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parts(data, folder):
    """Manifest, labels, vocabulary and ontology of the training set."""
    vocabulary = Vocabulary.from_csv(data / "class_labels_indices.csv")
    manifest = Manifest.from_csv(folder.parent / "train.csv", data_root=data)
    return manifest, manifest.label_sets(vocabulary), vocabulary, Ontology.from_json(data / "ontology.json")


def test_scores_are_the_teachers_of_these_clips(enhanced, noisy_data, teacher):
    manifest, _, _, _ = parts(noisy_data, enhanced)
    scores = np.load(enhanced / "scores.npy")
    assert scores.dtype == np.float32
    assert scores.shape == (TINY["n_train"], 39)
    assert [row["ID"] for row in read(enhanced / "ids.csv")] == manifest.table["ID"].to_pylist()
    tagger = AudioTagger.from_experiment(teacher)
    for clip in (0, 17):
        found = {tag.mid: tag.score for tag in tagger.tag_file(manifest[clip]["wav"], top_k=39)}
        np.testing.assert_allclose(scores[clip], [found[mid] for mid in tagger.hparams.mids], atol=1e-5)


@pytest.mark.parametrize(("name", "threshold"), [("mean", "mean"), ("25", 25)])
def test_annotations_and_report_are_those_of_the_scores(enhanced, noisy_data, name, threshold):
    manifest, labels, vocabulary, ontology = parts(noisy_data, enhanced)
    expected = enhance(labels, np.load(enhanced / "scores.npy"), vocabulary, ontology, threshold)
    rows = read(enhanced / f"train_enhanced_{name}.csv")
    assert [row["labels"].split(";") for row in rows] == [[vocabulary.mids[c] for c in clip] for clip in expected]
    for column in ("ID", "wav"):
        assert [row[column] for row in rows] == manifest.table[column].to_pylist()
    added = expected.indices.size - labels.indices.size
    assert added > 0
    assert sum(int(row["added"]) for row in read(enhanced / f"classes_{name}.csv")) == added
    assert sum(int(row["clips"]) for row in read(enhanced / f"pairs_{name}.csv")) >= added
    assert sum(int(row["n_added"]) for row in read(enhanced / f"clips_{name}.csv")) == added
    assert (enhanced / f"labels_{name}.png").stat().st_size > 10_000
    clean = read_labels(noisy_data / "balanced_train_segments_clean.csv")
    clean = clean.label_sets(vocabulary).take(manifest.rows_in(clean.table["ID"], "clean"))
    (summary,) = [row for row in read(enhanced / "summary.csv") if row["threshold"] == name]
    assert int(summary["labels_added"]) == added
    assert (float(summary["precision"]), float(summary["recall"])) == mended(labels, expected, clean)
    assert 0 < float(summary["chance_precision"]) < 1


def test_scores_that_are_there_are_used_and_those_of_others_are_not(enhanced, noisy_data, teacher, tmp_path, monkeypatch):
    (tmp_path / "enhanced_labels").mkdir()
    for file in ("scores.npy", "scores.json"):
        (tmp_path / "enhanced_labels" / file).write_bytes((enhanced / file).read_bytes())
    one, first = np.load(enhanced / "scores.npy"), teacher / "snapshots" / "epoch_01.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(AudioTagger, "tag_features", None)
        enhance_labels(noisy_data, tmp_path, f"--teacher={teacher}")
    assert len(read(tmp_path / "enhanced_labels" / "summary.csv")) == 1
    enhance_labels(noisy_data, tmp_path, f"--teacher={teacher}", f"--teacher={first}", "--threshold", "5")
    both = [np.load(tmp_path / "enhanced_labels" / f"teacher_{i}.npy") for i in (1, 2)]
    np.testing.assert_array_equal(both[0], one)
    assert not np.allclose(both[0], both[1])
    np.testing.assert_allclose(np.load(tmp_path / "enhanced_labels" / "scores.npy"), np.mean(both, axis=0), rtol=1e-6)
    enhance_labels(noisy_data, tmp_path, f"--teacher={teacher}")
    np.testing.assert_array_equal(np.load(tmp_path / "enhanced_labels" / "scores.npy"), one)


def test_audit_needs_no_teacher(noisy_data, tmp_path, capsys):
    enhance_labels(noisy_data, tmp_path, "--audit", f"--out={tmp_path / 'audit'}")
    _, labels, vocabulary, ontology = parts(noisy_data, tmp_path / "audit")
    found = audit(labels, vocabulary, ontology)
    rows = {row["mid"]: row for row in read(tmp_path / "audit" / "audit.csv")}
    assert [int(rows[mid]["without_parent"]) for mid in vocabulary.mids] == found.without_parent.tolist()
    assert [int(rows[mid]["without_child"]) for mid in vocabulary.mids] == found.without_child.tolist()
    assert found.without_parent.any()
    assert found.without_child.any()
    assert "without any child  class" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "audit").iterdir()] == ["audit.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --teacher, or --audit"),
        (["--teacher=nowhere"], "nowhere: no such file"),
        (["--teacher=nowhere", "--threshold", "mean", "101"], "'101' is not mean, median or a percentile"),
        (["--teacher=nowhere", "--types", "III"], "invalid choice: 'III'"),
        (["--teacher=nowhere", "--ontology=none.json"], "none.json: cannot read this ontology"),
        (["--teacher=nowhere", "--clean=none.csv"], "none.csv: cannot be read"),
        (["--teacher=nowhere", "--clean={data}/eval_segments.csv"], "eval_segments.csv: lacks 40 of the 40 clips"),
        (["--teacher=nowhere", "--n_classes=40"], "has 39 classes, but n_classes is 40"),
        (["--teacher=nowhere", "--tresholds=5"], "has no key 'tresholds'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_scored(noisy_data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        enhance_labels(noisy_data, tmp_path, *(option.format(data=noisy_data) for option in options))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def balanced(data, output, **overrides):
    settings = {"pretrained": None, "variant": "b0", "n_classes": 39, "batch_size": 20, "n_mels": 32, "n_frames": 48}
    return {
        **settings,
        "number_of_epochs": 1,
        "num_workers": 0,
        "data_folder": str(data),
        "output_folder": str(output),
        **overrides,
    }


def test_the_recipe_enhances_training_labels_and_their_weights_and_no_others(enhanced, noisy_data):
    overrides = balanced(noisy_data, enhanced.parent, balanced_sampling=True)
    hparams = load_hparams(ENHANCED, overrides)
    _, labels, vocabulary, ontology = parts(noisy_data, enhanced)
    expected = enhance(labels, np.load(enhanced / "scores.npy"), vocabulary, ontology)
    dataset, found = tagging_dataset("train", hparams, vocabulary)
    assert [clip.tolist() for clip in found] == [clip.tolist() for clip in expected]
    assert expected.indices.size > labels.indices.size
    assert dataset[3]["target"].nonzero().flatten().tolist() == sorted(expected[3].tolist())
    weights = np.asarray(train_batches(hparams, found).sampler.weights)
    np.testing.assert_allclose(weights, class_balanced_weights(expected, 39))
    assert not np.allclose(weights, class_balanced_weights(labels, 39))
    evaluation = Manifest.from_csv(hparams["valid_annotation"]).label_sets(vocabulary)
    assert [clip.tolist() for clip in tagging_dataset("valid", hparams, vocabulary)[1]] == [clip.tolist() for clip in evaluation]

    other = load_hparams(ENHANCED, overrides | {"label_enhancement": {"threshold": 25, "types": ["I"]}})
    expected = enhance(labels, np.load(enhanced / "scores.npy"), vocabulary, ontology, 25, "I")
    assert [c.tolist() for c in tagging_dataset("train", other, vocabulary)[1]] == [clip.tolist() for clip in expected]
    off = load_hparams(ENHANCED, overrides | {"label_enhancement": None})
    assert [c.tolist() for c in tagging_dataset("train", off, vocabulary)[1]] == [clip.tolist() for clip in labels]


def test_the_recipe_trains(enhanced, noisy_data, tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "enhanced_labels").symlink_to(enhanced)
    settings = balanced(noisy_data, run_folder, pretrained="null")
    done = run([sys.executable, str(TRAIN), str(ENHANCED), *(f"--{key}={value}" for key, value in settings.items())])
    assert "Label enhancement (threshold mean, types I+II)" in done.stdout
    # once, and not all of them
    n_empty = int((parts(noisy_data, enhanced)[1].counts(39) == 0).sum())
    ((count, names),) = re.findall(r"(\d+) classes are on no clip, .*?: (.*)", done.stdout + done.stderr)
    assert int(count) == n_empty > 5
    assert names.count("; ") == 4
    assert names.endswith(f" and {n_empty - 5} others")
    assert len(json.loads((run_folder / "results.json").read_text())["epochs"]) == 1
