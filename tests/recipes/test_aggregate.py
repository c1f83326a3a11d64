"""The recipe's aggregate.py on runs whose models tell clips apart: its figures, its taggers, two ranks, and mistakes."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from speechbrain.inference.classifiers import EncoderClassifier

from psla_sb.aggregation.report import greedy_selection
from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.weights import load_weights
from psla_sb.dataio import dataset
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment import aggregate as aggregate_module
from psla_sb.experiment import evaluation, train
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import FIGURES, average_precision, roc_auc, summarize
from runs import REPOSITORY, TRAIN, command, torchrun

AGGREGATE = REPOSITORY / "recipes" / "AudioSet" / "aggregate.py"


def aggregate(runs, output_folder, *arguments, **settings):
    """What aggregate.py reports; run in this process, which has everything imported."""
    settings = {"output_folder": output_folder, "batch_size": 6, "num_workers": 0, **settings}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    listed = "[" + ",".join(f'"{one}"' for one in runs) + "]"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        aggregate_module.main(
            str(AGGREGATE), ["hparams/aggregate.yaml", "--device=cpu", f"--runs={listed}", *overrides, *arguments]
        )
    finally:
        torch.set_num_threads(before)
    return json.loads((output_folder / "ensemble.json").read_text())


@pytest.fixture(scope="module")
def targets(lively_runs, mini_data):
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    labels = Manifest.from_csv(lively_runs / "a" / "eval.csv").label_sets(vocabulary)
    return labels.to_multi_hot(np.arange(len(labels)), len(vocabulary))


@pytest.fixture(scope="module")
def two_runs(lively_runs, tmp_path_factory):
    """The output folder and the report of the ensemble of all checkpoints of two runs, exported."""
    folder = tmp_path_factory.mktemp("aggregate")
    return folder, aggregate([lively_runs / "a", lively_runs / "b"], folder, export=True)


def saved(folder, report):
    return [np.load(folder / "scores" / f"{name}.npy") for name in report["chosen"]]


def test_report_is_that_of_the_saved_predictions(two_runs, lively_runs, targets):
    folder, report = two_runs
    expected = [f"{lively_runs.name}-{name}-epoch_0{epoch}" for name in "ab" for epoch in (1, 2)]
    assert report["chosen"] == list(report["members"]) == expected
    each = saved(folder, report)
    assert len({scores.tobytes() for scores in each}) == 4
    assert [report["members"][name] for name in report["chosen"]] == [summarize(scores, targets) for scores in each]
    for n_members, figures in enumerate(report["so_far"], 1):
        slow = summarize(np.mean(each[:n_members], axis=0, dtype=np.float64), targets)
        for name in ("mAP", "mAUC", "d_prime"):
            assert figures[name] == pytest.approx(slow[name], abs=1e-12)
    assert report["ensemble"] == report["so_far"][-1]
    assert len({figures["mAP"] for figures in report["so_far"]}) == 4
    np.testing.assert_array_equal(np.load(folder / "ensemble.npy"), np.mean(each, axis=0, dtype=np.float64).astype(np.float32))
    best = max(report["members"], key=lambda name: report["members"][name]["mAP"])
    assert report["best_single"] == best
    assert (folder / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    log = (folder / "log.txt").read_text()
    assert "ensemble of 4" in log
    assert "best single, picked on this set" in log
    assert not list((folder / "scores").glob("tmp+*"))


def test_classes_are_in_a_csv_file(two_runs, targets):
    folder, report = two_runs
    with open(folder / "classes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    whole = np.mean(saved(folder, report), axis=0, dtype=np.float64)
    single = np.load(folder / "scores" / f"{report['best_single']}.npy")
    for column, values in {
        "positive_clips": targets.sum(axis=0),
        "ensemble_AP": average_precision(whole, targets),
        "ensemble_AUC": roc_auc(whole, targets),
        "best_single_AP": average_precision(single, targets),
        "best_single_AUC": roc_auc(single, targets),
    }.items():
        read = np.array([float(row[column] or "nan") for row in rows])
        np.testing.assert_allclose(read, values, atol=1e-12)


def test_weight_average_is_the_mean_of_all_members(two_runs, lively_runs):
    folder, report = two_runs
    files = [load_weights(snapshot_path(lively_runs / name, epoch)) for name in "ab" for epoch in (1, 2)]
    averaged = load_weights(folder / "weight_average" / "classifier.ckpt")
    for key, value in averaged.items():
        mean = sum(state[f"classifier.{key}"].double() for state in files) / 4
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-8)
    assert report["weight_average"]["mAP"] > 0


def test_ensemble_and_average_tag_as_any_tagger_does(two_runs, lively_runs, mini_data, tmp_path):
    folder, _ = two_runs
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    clip = Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data)[3]["wav"]
    for tagger, file in (("tagger", "ensemble.npy"), ("weight_average", "scores/weight_average.npy")):
        expected = np.load(folder / file)[3]
        for load in (AudioTagger.from_folder, AudioTagger.from_hparams):
            tags = load(str(folder / tagger)).tag_file(clip, top_k=39)
            np.testing.assert_allclose(
                [tag.score for tag in tags], [expected[vocabulary.index(tag.mid)] for tag in tags], atol=1e-5
            )
        theirs = EncoderClassifier.from_hparams(source=str(folder / tagger), savedir=str(tmp_path / tagger))
        probabilities, _, index, label = theirs.classify_file(clip)
        np.testing.assert_allclose(probabilities[0], expected, atol=1e-5)
        assert label == [vocabulary.names[int(index)]]


def test_any_mix_of_models(lively_runs, two_runs, tmp_path, capsys):
    """A tagger's folder, a snapshot and a run with another front end: an ensemble, but neither an average nor one tagger."""
    mixed = [lively_runs / "a", two_runs[0] / "tagger", lively_runs / "c" / "snapshots" / "epoch_01.safetensors"]
    with pytest.raises(SystemExit):
        aggregate(mixed, tmp_path / "out", members="best", export=True)
    assert "different front ends, so their ensemble cannot be one tagger: pass --export=False" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    report = aggregate(mixed, tmp_path / "out", members="best")
    assert len(report["chosen"]) == 3
    assert report["weight_average"] == {"none": "members have different front ends"}
    np.testing.assert_allclose(
        np.load(tmp_path / "out" / "scores" / f"{report['chosen'][1]}.npy"), np.load(two_runs[0] / "ensemble.npy"), atol=1e-6
    )
    report = aggregate(mixed[:2], tmp_path / "out", members="last")
    assert report["weight_average"] == {"none": "members are of different architectures"}


def test_greedy_selection_picks_on_other_clips_than_it_reports(lively_runs, mini_data, targets, tmp_path):
    settings = {"select": "greedy", "selection_annotation": lively_runs / "a" / "train.csv"}
    report = aggregate([lively_runs / "a", lively_runs / "b"], tmp_path, **settings)
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    labels = Manifest.from_csv(lively_runs / "a" / "train.csv").label_sets(vocabulary)
    names = list(report["members"])
    scores = [np.load(tmp_path / "selection_scores" / f"{name}.npy") for name in names]
    order, precisions = greedy_selection(scores, labels.to_multi_hot(np.arange(len(labels)), len(vocabulary)))
    assert report["chosen"] == [names[i] for i in order]
    assert report["selection"]["mAP"] == precisions
    whole = summarize(np.mean(saved(tmp_path, report), axis=0, dtype=np.float64), targets)
    assert report["ensemble"]["mAP"] == pytest.approx(whole["mAP"], abs=1e-12)
    assert set(report["members"]) == set(names)
    assert "picked on the selection set" in (tmp_path / "log.txt").read_text()


def test_members_of_other_lengths_hear_their_own_centre(lively_runs, tmp_path):
    """A member that hears less is scored as it is alone."""
    snapshot, short = lively_runs / "a" / "snapshots" / "epoch_01.safetensors", tmp_path / "short"
    open_source(snapshot).export(short)
    settings = (short / "hyperparams.yaml").read_text()
    (short / "hyperparams.yaml").write_text(settings.replace("n_frames: 48", "n_frames: 25"))
    both = aggregate([lively_runs / "a", short], tmp_path / "both", eval_crop="centre", export=False)
    (name,) = (name for name in both["members"] if name.endswith("short"))
    files = {
        key: lively_runs / "a" / file for key, file in (("annotation", "eval.csv"), ("class_list", "class_labels_indices.csv"))
    }
    data_folder = read_yaml(lively_runs / "a" / "hyperparams.yaml")["data_folder"]
    alone = aggregate([short], tmp_path / "alone", eval_crop="centre", export=False, data_folder=data_folder, **files)
    (only,) = alone["members"]
    together = np.load(tmp_path / "both" / "scores" / f"{name}.npy")
    assert np.array_equal(together, np.load(tmp_path / "alone" / "scores" / f"{only}.npy"))
    first = aggregate([short], tmp_path / "first", eval_crop="first", export=False, data_folder=data_folder, **files)
    assert not np.allclose(together, np.load(tmp_path / "first" / "scores" / f"{next(iter(first['members']))}.npy"))


def test_greedy_selection_is_the_best_step_by_step():
    rng = np.random.default_rng(0)
    targets = (rng.uniform(size=(60, 4)) < 0.3).astype(int)
    scores = [rng.uniform(size=(60, 4)) + weight * targets for weight in (0.1, 0.3, 0.25, 0.2, 0.0)]
    order, precisions = greedy_selection(scores, targets)
    picked = []
    for choice, precision in zip(order, precisions, strict=True):
        tried = [summarize(np.mean([*picked, one], axis=0), targets)["mAP"] for one in scores]
        assert choice == int(np.argmax(tried))
        assert precision == pytest.approx(max(tried))
        picked.append(scores[choice])
    assert precisions[-1] == max(precisions) > precisions[0] == max(summarize(one, targets)["mAP"] for one in scores)
    # a member that is better than all others together is picked again and again, and once is enough
    assert greedy_selection([targets.astype(float), *(1.0 - targets for _ in range(3))], targets) == ([0], [1.0])
    # repetition: a good member counts twice beside a worse one that still helps
    order, _ = greedy_selection([np.array([[0.6], [0.5], [0.0]]), np.array([[0.0], [0.15], [0.2]])], np.array([[1], [1], [0]]))
    assert order[0] == 0


def test_two_gloo_ranks_write_what_one_process_writes(two_runs, lively_runs, tmp_path):
    folder, report = two_runs
    runs = f'--runs=["{lively_runs / "a"}","{lively_runs / "b"}"]'
    options = ["--device=cpu", runs, f"--output_folder={tmp_path}", "--batch_size=6", "--num_workers=0", "--export=True"]
    torchrun([sys.executable, str(AGGREGATE), "hparams/aggregate.yaml", *options])
    assert json.loads((tmp_path / "ensemble.json").read_text()) == report
    files = [path.relative_to(folder) for pattern in ("scores/*", "*.npy", "tagger/*.ckpt") for path in folder.glob(pattern)]
    assert len(files) == 10 + 1 + 3
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_batch_norm_statistics_can_be_estimated_anew(lively_runs, tmp_path):
    runs = [lively_runs / "a"]
    plain = aggregate(runs, tmp_path / "plain")
    anew = aggregate(runs, tmp_path / "anew", batch_norm_annotation=lively_runs / "a" / "train.csv")
    before, after = (load_weights(tmp_path / name / "weight_average" / "embedding_model.ckpt") for name in ("plain", "anew"))
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert plain["weight_average"] != anew["weight_average"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": []}, "no runs to aggregate: pass --runs=[FOLDER,...]"),
        ({"runs": ["nowhere"]}, "nowhere: no such run"),
        ({"runs": ["{tmp}"]}, "{tmp}: not the output folder of a run that has trained an epoch"),
        ({"runs": ["{a}", "{a}"]}, "epoch_01.safetensors is a member twice"),
        ({"members": "all"}, "members must be one of checkpoints, last, average, best, not 'all'"),
        ({"first_epoch": "3"}, "no run has an epoch 3"),
        ({"select": "best"}, "select must be null or greedy, not 'best'"),
        ({"select": "greedy"}, "20 of its clips are also in"),
        ({"select": "greedy", "selection_annotation": "{a}/eval.csv"}, "20 of its clips are also in"),
        ({"annotation": "{tmp}/none.csv"}, "{tmp}/none.csv: no such annotation file"),
        ({"output_folder": "{a}"}, "{a}: the output folder of a training run; choose another --output_folder"),
        ({"output_folder": "3"}, "the key 'output_folder' must be a path"),
        ({"member": "last"}, "has no key 'member'. Did you mean 'members'?"),
        ({"runs": ["{a}/snapshots/epoch_01.safetensors", "{tmp}/classes"]}, "other classes than the class list"),
        ({"runs": ["{tmp}/damaged"]}, "{tmp}/damaged/hyperparams.yaml: not a YAML file"),
    ],
)
def test_mistakes_are_named_and_overwrite_nothing(settings, message, lively_runs, tmp_path, capsys):
    other = tmp_path / "classes"
    (other / "snapshots").mkdir(parents=True)
    for file in ("hyperparams.yaml", "results.json", "snapshots/epoch_01.safetensors", "snapshots/epoch_02.safetensors"):
        (other / file).write_bytes((lively_runs / "a" / file).read_bytes())
    lines = (lively_runs / "a" / "class_labels_indices.csv").read_text().splitlines()
    lines[1:3] = lines[2].replace("1,", "0,", 1), lines[1].replace("0,", "1,", 1)
    (other / "class_labels_indices.csv").write_text("\n".join(lines))
    (shutil.copytree(other, tmp_path / "damaged") / "hyperparams.yaml").write_text("sample_rate: [")
    places = {"{tmp}": str(tmp_path), "{a}": str(lively_runs / "a")}

    def filled(value):
        for name, place in places.items():
            value = value.replace(name, place)
        return value

    before = {path: path.read_bytes() for path in (lively_runs / "a").rglob("*") if path.is_file()}
    settings = {
        key: [filled(one) for one in value] if isinstance(value, list) else filled(value) for key, value in settings.items()
    }
    runs = settings.pop("runs", [str(lively_runs / "a")])
    output_folder = settings.pop("output_folder", tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        aggregate(runs, output_folder, **settings)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert f"error: {filled(message)}" in printed or filled(message) in printed[printed.index("error: ") :]
    assert not (tmp_path / "out" / "ensemble.json").exists()
    assert {path: path.read_bytes() for path in (lively_runs / "a").rglob("*") if path.is_file()} == before


def test_the_ensembles_scores_teach_a_student(lively_runs, mini_data, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    aggregate([lively_runs / "a"], teacher, annotation=lively_runs / "a" / "train.csv")
    # its models have learnt next to nothing, and such teachers are refused
    clips = Manifest.from_csv(lively_runs / "a" / "train.csv")
    scores = np.load(teacher / "ensemble.npy") + clips.targets(Vocabulary.from_csv(mini_data / "class_labels_indices.csv"))
    np.save(teacher / "ensemble.npy", scores / 2)
    settings = {"data_folder": mini_data, "number_of_epochs": 1, "average_start": 1, "mixup_rate": 0, "draws_per_epoch": 16}
    losses = {}
    for scores in ("null", teacher / "ensemble.npy"):
        folder = tmp_path / f"student {len(losses)}"
        overrides = {**settings, "output_folder": folder, "teacher_scores": scores, "distillation_weight": 0.5}
        train.main(str(TRAIN), [str(part) for part in command(TRAIN, "hparams/mini.yaml", "--device=cpu", **overrides)[2:]])
        losses[str(scores)] = json.loads((folder / "results.json").read_text())["epochs"][0]["train_loss"]
    alone, taught = losses.values()
    # scores of an untrained teacher are further from 0 and 1 than labels are
    assert alone != taught
    assert 0.5 * alone < taught < 2 * alone
    missing = {**settings, "output_folder": tmp_path / "wrong", "teacher_scores": teacher / "scores" / "none.npy"}
    argv = [str(part) for part in command(TRAIN, "hparams/mini.yaml", **missing)[2:]]
    with pytest.raises(SystemExit):
        train.main(str(TRAIN), argv)
    assert "none.npy: no such file" in capsys.readouterr().err


def test_a_separate_test_set_is_scored_in_one_pass(mini_data, tiny_run, tmp_path, monkeypatch):
    """With the validation clips as the test set every figure is known from the validation, which goes another way."""
    calls, decoded, score, read_samples = [], [], evaluation.score, dataset.read_samples

    def counting(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "read_samples", lambda *clip: decoded.append(clip) or read_samples(*clip))
            return calls.append(list(args[0])) or score(*args, **kwargs)

    monkeypatch.setattr(evaluation, "score", counting)
    (tmp_path / "test.csv").write_bytes((tiny_run[0] / "eval.csv").read_bytes())
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "test_annotation": tmp_path / "test.csv"}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(str(TRAIN), [str(part) for part in command(TRAIN, "hparams/mini.yaml", "--device=cpu", **settings)[2:]])
    torch.set_num_threads(before)
    # and the validation clips once more, with the average, on which thresholds are fitted
    assert calls == [["test_weight_average", "test_epoch_01", "test_epoch_02"], ["valid_weight_average"]]
    assert len(decoded) == 40
    predictions = tmp_path / "run" / "predictions"
    targets = Manifest.from_csv(tmp_path / "test.csv").label_sets(Vocabulary.from_csv(mini_data / "class_labels_indices.csv"))
    targets = targets.to_multi_hot(np.arange(20), 39)
    scores = {name: np.load(predictions / f"test_{name}.npy") for name in ("epoch_01", "epoch_02", "weight_average", "ensemble")}
    for epoch in (1, 2):
        np.testing.assert_allclose(scores[f"epoch_0{epoch}"], np.load(predictions / f"valid_epoch_0{epoch}.npy"), atol=1e-5)
    mean = (scores["epoch_01"].astype(np.float64) + scores["epoch_02"]) / 2
    np.testing.assert_array_equal(scores["ensemble"], mean.astype(np.float32))
    reported = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert reported.keys() == tiny_run[1]["evaluation"].keys()
    assert reported["last"] == {**{name: summarize(scores["epoch_02"], targets)[name] for name in FIGURES}, "epochs": [2]}
    assert reported["weight_average"] == {**summarize(scores["weight_average"], targets), "epochs": [1, 2]}
    assert reported["ensemble"] == {**summarize(mean, targets), "epochs": [1, 2]}
