"""The recipe's out_of_fold.py, on tones: no clip is scored by a tagger that has heard it, and the scores teach."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment import out_of_fold as module
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.enhancement import enhance_annotation
from psla_sb.labels.teacher_scores import check_teacher, open_scores
from psla_sb.labels.vocabulary import Vocabulary
from runs import REPOSITORY, TRAIN, command, run

SCRIPT = TRAIN.with_name("out_of_fold.py")
RATE, TONES = 16000, {"hum": 150, "whistle": 2500, "beep": 900}
SMALL = {
    **{"device": "cpu", "pretrained": "null", "embedding_model": "{width: 0.2, depth: 0.2}", "num_workers": 0, "n_frames": 30},
    **{
        "n_mels": 32,
        "freq_mask": 0,
        "time_mask": 0,
        "mixup_rate": 0,
        "batch_size": 4,
        "draws_per_epoch": 80,
        "number_of_epochs": 6,
        "n_classes": 3,
        "lr": 0.003,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """42 training clips of three tones, of which three at a time are a group, and 12 to validate on."""
    folder, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(1)
    for name, n_clips in (("train", 42), ("valid", 12)):
        rows = []
        for i in range(n_clips):
            tone, clip = list(TONES)[i % 3], f"{'abcdefghijklmn'[i // 3]}_{name}{i}"
            times = np.arange(int(0.6 * RATE)) / RATE
            wave = 0.2 * np.sin(2 * np.pi * TONES[tone] * rng.uniform(0.8, 1.25) * times) + 0.02 * rng.standard_normal(len(times))
            soundfile.write(folder / f"{clip}.wav", wave, RATE)
            rows.append([clip, f"{{data_root}}/{clip}.wav", 0.6, tone, f"session {i // 3}"])
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["ID", "wav", "duration", "labels", "group"], *rows])
    Vocabulary(list(TONES), list(TONES)).to_csv(folder / "classes.csv")
    return folder


def arguments(data, output, *options, **overrides):
    files = {"class_list": "classes.csv", "train_annotation": "train.csv", "valid_annotation": "valid.csv"}
    settings = {**SMALL, "data_folder": data, **{key: data / file for key, file in files.items()}, **overrides}
    given = [f"--{key}={value}" for key, value in settings.items()]
    return ["hparams/own.yaml", f"--output_folder={output}", "--folds=2", *options, *given]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """The folder that the script has written, once stopped and gone on with; and what it has printed then."""
    folder = tmp_path_factory.mktemp("teacher")
    argv, out = [sys.executable, str(SCRIPT), *arguments(data, folder / "out")], folder / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(argv, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    first = out / "fold_1" / "seed_1" / "out-of-fold_teacher.log"
    wait_for(lambda: process.poll() is not None or (first.exists() and "Going into epoch 1" in first.read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (folder / "log").read_text()
    assert not (out / "scores.npy").exists()
    assert not (out / "fold_2" / "seed_1").exists()
    return out, run(argv, cwd=folder)


def status_of(data, output, *options, **overrides):
    """The exit status of the script, in this process."""
    try:
        module.main(str(SCRIPT), [str(part) for part in arguments(data, output, *options, **overrides)])
    except SystemExit as end:
        return end.code
    return 0


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_no_tagger_has_heard_what_it_scores(made, data):
    out, _ = made
    manifest, vocabulary = Manifest.from_csv(data / "train.csv", data), Vocabulary.from_csv(data / "classes.csv")
    scores = np.load(out / "scores.npy")
    assert scores.dtype == np.float32
    assert [row["ID"] for row in rows_of(out / "ids.csv")] == manifest.table["ID"].to_pylist()
    assert Vocabulary.from_csv(out / "class_labels_indices.csv") == vocabulary
    fold_of = {row["ID"]: int(row["fold"]) for row in rows_of(out / "folds.csv")}
    labels = {row["ID"]: row["labels"] for row in rows_of(data / "train.csv")}
    groups = {row["ID"]: row["group"] for row in rows_of(data / "train.csv")}
    assert len({(groups[clip], fold) for clip, fold in fold_of.items()}) == 14
    for fold in (1, 2):
        trained_on = {row["ID"] for row in rows_of(out / f"fold_{fold}" / "train.csv")}
        scored = {clip for clip, number in fold_of.items() if number == fold}
        assert trained_on == set(fold_of) - scored
        assert {labels[clip] for clip in scored} == set(TONES)
        known = json.loads((out / f"fold_{fold}" / "seed_1" / "identity.json").read_text())["contents"]
        assert (known["train"]["clips"], known["valid"]["clips"], known["teacher_scores"]) == (len(trained_on), 12, None)
        tagger = AudioTagger.from_experiment(out / f"fold_{fold}" / "seed_1")
        for row in [row for row, clip in enumerate(fold_of) if clip in scored][:3]:
            found = {tag.mid: tag.score for tag in tagger.tag_file(manifest[row]["wav"], top_k=3)}
            np.testing.assert_allclose(scores[row], [found[mid] for mid in vocabulary.mids], atol=1e-5)


def test_it_says_what_it_found_and_what_to_do_next(made, data):
    out, done = made
    manifest, vocabulary = Manifest.from_csv(data / "train.csv", data), Vocabulary.from_csv(data / "classes.csv")
    score, chance = check_teacher(open_scores(out, manifest, vocabulary), manifest.label_sets(vocabulary), out)
    assert f"42 clips, each scored by a tagger that was not trained on it: mAP {score:.4f} (by chance {chance:.4f})." in done.stdout
    assert f"--teacher_scores={out}" in done.stdout
    assert f"--label_enhancement='{json.dumps({'scores': str(out)})}'" in done.stdout
    ontology = [{"id": mid, "name": mid, "child_ids": ["beep"] if mid == "hum" else []} for mid in TONES]
    (data / "ontology.json").write_text(json.dumps(ontology))
    labels = manifest.label_sets(vocabulary)
    assert len(enhance_annotation(manifest, labels, vocabulary, out, data / "ontology.json")) == 42


def test_what_it_says_to_do_next_trains(made, data, tmp_path):
    """With labels that the scores enhance, too, where the recipe's file has such a block; where it has none, the error says so."""
    _, done = made
    (data / "ontology.json").write_text(json.dumps([{"id": m, "name": m, "child_ids": ["beep"] * (m == "hum")} for m in TONES]))
    said = shlex.split(done.stdout.splitlines()[-1])
    taught, enhanced = (word.rstrip(",") for word in said if word.startswith("--"))
    file = REPOSITORY / "recipes" / "AudioSet" / "hparams" / "own.yaml"
    block = "label_enhancement: !name:psla_sb.labels.enhancement.enhance_annotation\n    scores: x\n"
    block += "    ontology: !ref <data_folder>/ontology.json\n"
    lines = file.read_text().splitlines(keepends=True)
    with_block = tmp_path / "enhanced.yaml"
    with_block.write_text("".join(block if line.startswith("label_enhancement:") else line for line in lines))
    base = [argument for argument in arguments(data, "")[1:] if not argument.startswith(("--folds", "--output_folder"))]

    def train(recipe, option, check=True):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return run([sys.executable, TRAIN, recipe, *base, f"--output_folder={folder}", "--number_of_epochs=1", option], check)

    assert "scores of 42 of 42 training clips" in train(file, taught).stdout
    assert "Label enhancement (threshold mean" in train(with_block, enhanced).stdout
    failed = train(file, enhanced, check=False)
    assert failed.returncode == 2
    assert "--label_enhancement: an override {...} changes parts of a block, and" in failed.stderr


def test_the_scores_teach_and_are_known_again(made, data, tmp_path):
    out, _ = made
    table = Manifest.from_csv(data / "train.csv", data).table
    # other clips in another order: matched by ID
    Manifest(table.take(list(range(41, 1, -1)))).to_csv(tmp_path / "train.csv")
    files = {"class_list": data / "classes.csv", "valid_annotation": data / "valid.csv", "train_annotation": tmp_path / "train.csv"}
    settings = {**SMALL, **files, "data_folder": data, "output_folder": tmp_path / "student", "teacher_scores": out}
    settings |= dict.fromkeys(("n_train", "n_eval", "seconds", "average_start")) | {"number_of_epochs": 1}
    done = run(command(TRAIN, "hparams/own.yaml", **settings))
    assert "scores of 40 of 40 training clips (100.0 %)" in done.stdout + done.stderr
    assert "The teacher's mAP on the training labels is" in done.stdout + done.stderr
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in ("ids.csv", "class_labels_indices.csv"):
        (wrong / file).write_bytes((out / file).read_bytes())
    np.save(wrong / "scores.npy", np.roll(np.load(out / "scores.npy"), 1, axis=0))
    refused = run(command(TRAIN, "hparams/own.yaml", **{**settings, "teacher_scores": wrong}), check=False)
    assert refused.returncode == 2
    assert "these scores do not know the clips' labels: their mAP on 40 clips" in refused.stderr


def test_what_is_done_is_not_done_again_and_nothing_else_is_mixed_in(made, data, tmp_path, capsys):
    out, _ = made
    before = {
        path: path.read_bytes() for path in [*out.glob("fold_*/*.npy"), *out.glob("*.npy"), *out.glob("fold_*/*/results.json")]
    }
    assert status_of(data, out) == 0
    assert "0 runs to do, 2 done already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    other = tmp_path / "other.csv"
    other.write_text((data / "train.csv").read_text())
    for options, overrides, message in [
        (["--folds=3"], {}, "was begun with other settings: it has 2 folds."),
        (["--group=^(.)"], {}, "was begun with other settings: its groups are of --group=None."),
        ([], {"train_annotation": other}, "fold_1/seed_1: was run with other overrides (train_annotation was"),
        ([], {"lr": 0.001}, "fold_1/seed_1: was run with other overrides (lr was 0.003)."),
    ]:
        assert status_of(data, out, *options, **overrides) == 2
        assert message in capsys.readouterr().err
    # the annotation itself is another
    text = (data / "train.csv").read_text()
    try:
        (data / "train.csv").write_text(text.replace("d_train10,", "d_other10,"))
        assert status_of(data, out) == 2
        assert "was begun with other settings: the training annotation had other clips or labels." in capsys.readouterr().err
        (data / "train.csv").write_text(text.replace("session 3", "session 4"))
        assert status_of(data, out) == 2
        assert "was begun with other settings: its clips are in other folds." in capsys.readouterr().err
    finally:
        (data / "train.csv").write_text(text)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds=1"], "--folds must be 2 or more, not 1"),
        (["--folds=15"], "14 groups of clips cannot be shared out to 15 folds"),
        (["--seed=3"], "--seed: pass --seeds=1,2,3, which every fold is run with"),
        (["--jobs=0"], "--jobs must be 1 or more"),
        (["--group=session"], "'session' is no regular expression with a group in parentheses, nor a column of"),
        (["--group=("], "'(' is not a regular expression that can be used here"),
        (["--group=(?=a)(.)"], "is not a regular expression that can be used here"),
        (["--group=^([a-k])_"], "'^([a-k])_' finds no group in the ID 'l_train33'"),
        (["--lrr=3"], "has no key 'lrr'. Did you mean 'lr'?"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(data, tmp_path, capsys, options, message):
    assert status_of(data, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/fold_*/seed_*"))


def test_a_dry_run_lists_the_commands(data, tmp_path, capsys):
    assert status_of(data, tmp_path / "out", "--dry_run", "--seeds=1,2", "--group=^(.)") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert not (tmp_path / "out").exists()
    assert len(lines) == 4
    assert lines[2][:3] == [sys.executable, str(TRAIN), str(TRAIN.parent / "hparams" / "own.yaml")]
    assert lines[2][-3:] == [
        "--seed=2",
        f"--train_annotation={tmp_path}/out/fold_1/train.csv",
        f"--output_folder={tmp_path}/out/fold_1/seed_2",
    ]
    assert "--skip_prep=True" in lines[2]
    assert not any("--teacher_scores" in part for part in lines[2])


@pytest.mark.parametrize(("given", "expected"), [([], ["--teacher_scores=null"]), (["--teacher_scores=b"], ["--teacher_scores=b"])])
def test_a_students_recipe_teaches_its_teachers_only_if_told(data, tmp_path, capsys, given, expected):
    text = (TRAIN.parent / "hparams" / "own.yaml").read_text()
    (tmp_path / "student.yaml").write_text(text.replace("teacher_scores: null", "teacher_scores: a"))
    module.main(str(SCRIPT), [str(tmp_path / "student.yaml"), *arguments(data, tmp_path / "out", "--dry_run", *given)[1:]])
    for line in capsys.readouterr().out.splitlines():
        assert [part for part in shlex.split(line) if part.startswith("--teacher_scores")] == expected


def test_groups_of_columns_ids_and_files(data, tmp_path):
    manifest = Manifest.from_csv(data / "train.csv", data)
    by_column = np.repeat(np.arange(14), 3)
    np.testing.assert_array_equal(module.groups_of(manifest, None), by_column)
    np.testing.assert_array_equal(module.groups_of(manifest, "group"), by_column)
    np.testing.assert_array_equal(module.groups_of(manifest, "^([a-z])"), by_column)
    np.testing.assert_array_equal(module.groups_of(manifest, "train(.)"), [int(str(i)[0]) for i in range(42)])
    assert len(set(module.groups_of(manifest, "labels"))) == 3
    (tmp_path / "train.csv").write_text(
        "ID,wav,duration,labels,start,session\na,1.wav,1,hum,0,\nb,1.wav,1,hum,1,\nc,2.wav,1,hum,0,x\nd,3.wav,1,hum,0,x\n"
    )
    segments = Manifest.from_csv(tmp_path / "train.csv")
    assert module.groups_of(segments, None).tolist() == [0, 0, 1, 2]
    assert module.groups_of(segments, "session").tolist() == [0, 1, 2, 2]
