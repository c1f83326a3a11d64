"""The command line of a recipe: what reaches the YAML file, and what a mistake says."""

import inspect
import logging
import multiprocessing
import re
import sys

import numpy as np
import pytest
import ruamel.yaml
import soundfile
import torch
from speechbrain.utils.run_opts import RunOptions

from psla_sb.errors import InputError
from psla_sb.experiment import aggregate, brain, evaluation, train
from psla_sb.experiment.hparams import REQUIRED_KEYS, CommandLine, load_hparams
from psla_sb.experiment.train import main
from runs import REPOSITORY, TINY, TRAIN, command, run

MINI = TRAIN.parent / "hparams" / "mini.yaml"
RECIPES = sorted((REPOSITORY / "recipes").glob("*/hparams/*.yaml"))


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A run in this process sends SpeechBrain's log to a stream that is gone after the test."""
    handlers, level, hook = logging.root.handlers[:], logging.root.level, sys.excepthook
    yield
    logging.root.handlers[:], sys.excepthook = handlers, hook
    logging.root.setLevel(level)


def overrides(*arguments):
    return CommandLine.from_command_line_args(["a.yaml", *arguments])[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("null", None), ("True", True), ("false", False), ("3", 3), ("-1", -1), ("1e-3", 1e-3), ("5.0e-7", 5e-7), ("", None)],
        *[("[1, 2]", [1, 2]), ("[a.csv, b.csv]", ["a.csv", "b.csv"]), ("{last: 0.4}", {"last": 0.4}), ('"2024"', "2024")],
        *[(text, text) for text in ("/d/a=b", "/d/a: b", "/d/a #1", "#1", "a: b: c", "x:", "a = b", "[1, 2", "{x", "'q", "@x")],
        *[(text, text) for text in ("2024-01-31", "~/x", "*x", "- a", "%x", "|", "é ü", "a  b", "-x", "1:30", "no")],
    ],
)
def test_values(text, value):
    for arguments in ([f"--key={text}"], ["--key", text])[: 1 if not text or text.startswith("-x") else 2]:
        parsed = overrides(*arguments)["key"]
        assert parsed == value
        assert type(parsed) is type(value) or isinstance(parsed, type(value))


@pytest.mark.parametrize("folder", ["/d/a=b", "/d/a: b", "/d/a #1", "é {x}", "2024-01-31", "'q"])
def test_folder_reaches_the_file_as_it_is(folder):
    hparams = load_hparams(MINI, overrides(f"--data_folder={folder}"))
    assert hparams["data_folder"] == folder
    assert hparams["class_list"] == f"{folder}/class_labels_indices.csv"


def test_references_and_lists_reach_the_file():
    hparams = load_hparams(MINI, overrides("--n_mels=!ref <n_train>", "--n_train=80", "--published={last: 0.5}", "--seconds=null"))
    assert (hparams["n_mels"], hparams["published"], hparams["seconds"]) == (80, {"last": 0.5}, None)
    assert hparams["compute_features"](torch.zeros(1, 16000)).shape[-1] == 80


def test_run_options():
    _, options, values = CommandLine.from_command_line_args(
        ["a.yaml", "--device=cpu", "--optimizer_step_limit=7", "--debug", "--lr", "1"]
    )
    assert (options.device, options.optimizer_step_limit, options.debug, values) == ("cpu", 7, True, {"lr": 1})
    assert {"device", "optimizer_step_limit", "debug"} <= options.overridden_args


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_every_key_can_be_overridden(path):
    """argparse would take a key that begins an option's name for that option: `--optimizer` for `--optimizer_step_limit`."""
    keys = ruamel.yaml.YAML().load(path.read_text(encoding="utf-8"))
    assert set(keys) & set(RunOptions().keys()) <= {"max_grad_norm", "ckpt_interval_minutes"}
    assert set(keys) >= set(aggregate.REQUIRED_KEYS if path.stem == "aggregate" else REQUIRED_KEYS)
    for option in ("max_grad_norm", "ckpt_interval_minutes"):
        keys.pop(option, None)
    assert overrides(*(f"--{key}=1" for key in keys)) == dict.fromkeys(keys, 1)


def test_all_keys_that_are_used_are_looked_for_first():
    source = "".join(map(inspect.getsource, (train, brain, evaluation)))
    optional = {"pretrained_tagger", "teacher_scores", "track"}
    assert set(re.findall(r'hparams(?:\["|\.(?!get\b))(\w+)', source)) - optional <= set(REQUIRED_KEYS)
    assert set(re.findall(r'hparams\["(\w+)', inspect.getsource(aggregate))) == set(aggregate.REQUIRED_KEYS)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_missing_key_is_named(key, tmp_path):
    text = re.sub(rf"^{key}:.*\n(?:[ ].*\n)*", "", MINI.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yaml has no key {key};"):
        load_hparams(tmp_path / "mine.yaml", {})


def error_of(capsys, *arguments):
    """What a recipe prints on a mistake."""
    with pytest.raises(SystemExit) as caught:
        main(str(TRAIN), [str(argument) for argument in arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.index("error: ") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr=1"], "mini.yaml has no key 'lrr'. Did you mean 'lr'?"),
        (["--batchsize", "3"], "Did you mean 'batch_size'?"),
        (["--zzzzz=1"], "has no key 'zzzzz'.\n"),
        (["--data=/d"], "has no key 'data'."),
        (["--opt=x"], "has no key 'opt'."),
        (["--dev=cpu"], "has no key 'dev'. Did you mean 'device'?"),
        (["--test_onl=1"], "Did you mean 'test_only'?"),
        (["--epochs=3"], "Did you mean 'number_of_epochs'?"),
        (["--data_folder"], "'--data_folder' has no value"),
        (["--data_folder", "--seed=1"], "'--data_folder' has no value"),
        (["/data"], "'/data': an override of a YAML key is written --KEY=VALUE"),
        (["--variant=b9"], "variant must be one of b0"),
        (["--n_heads=abc"], "AttentionPooling"),
        (["--class_list=!ref <nope>/x"], '"nope" is not valid'),
        (["--n_frames=!foo 3"], "'!foo'"),
        (["--optimizer=!name:torch.optim.Adamm"], "torch.optim.Adamm"),
        (["--output_folder=2024"], "the key 'output_folder' must be a path, not 2024"),
        (["--train_annotation=null"], "the key 'train_annotation' must be a path, not None"),
        (["--device=qpu"], "--device=qpu cannot be used"),
        (["--device=cuda:99"], "--device=cuda:99 cannot be used"),
    ],
)
def test_mistake_is_named(arguments, message, capsys, tmp_path, monkeypatch):
    # where there are no results of another run
    monkeypatch.chdir(tmp_path)
    printed = error_of(capsys, "hparams/mini.yaml", *arguments)
    assert printed.startswith("error: ")
    assert message in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file, neither here nor in"),
        (b"", "has no keys"),
        (b"- a\n", "has no keys"),
        (b"just text", "has no keys"),
        (b"a: [", "not a YAML file"),
        (b"a: 1\na: 2\n", "not a YAML file"),
        (b"\xff\xfe\x00\x01", "not a YAML file"),
        (b"\x00\x01", "not a YAML file"),
        (b"a: 1", "has no key data_folder"),
    ],
)
def test_no_recipe(content, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    printed = error_of(capsys, path)
    assert printed.startswith(f"error: {path}")
    assert message in printed


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(str(TRAIN), ["--help"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("--KEY=VALUE overrides any key", "param_file", "--device", "--precision", "--test_only"):
        assert text in printed


def test_no_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        main(str(TRAIN), [])
    assert caught.value.code == 2
    assert "param_file" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path):
    """Own data: twelve stereo clips at 44.1 kHz, annotations with paths relative to this folder, classes under own names."""
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    rows = []
    for i in range(12):
        soundfile.write(tmp_path / "clips" / f"{i}.wav", rng.uniform(-0.5, 0.5, (22050, 2)), 44100)
        rows.append(f"{i:03d},{{data_root}}/clips/{i}.wav,0.5,{('dog', 'cat;bird', 'bird')[i % 3]}\n")
    (tmp_path / "train.csv").write_text("".join(["ID,wav,duration,labels\n", *rows[:8]]))
    (tmp_path / "valid.csv").write_text("".join(["ID,wav,labels\n", *(row.replace(",0.5", "") for row in rows[8:])]))
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n0,dog,Dog\n1,cat,Cat\n2,bird,Bird\n")
    return tmp_path


def own_settings(folder, root, **changes):
    settings = {"train_annotation": f"{folder}/train.csv", "valid_annotation": f"{folder}/valid.csv", "n_classes": 3}
    settings |= {"class_list": f"{folder}/classes.csv", "data_folder": root, "output_folder": f"{folder}/out"}
    settings = {**TINY, **settings, "skip_prep": True, "number_of_epochs": 1, **changes}
    return [f"--{key}={value}" for key, value in settings.items()]


def test_own_data(own):
    run([*command(TRAIN, "hparams/mini.yaml")[:3], *own_settings(".", ".")], cwd=own, fresh=True)
    scores = np.load(own / "out" / "predictions" / "valid_epoch_01.npy")
    assert scores.shape == (4, 3)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("broken", [2, 10])
def test_broken_sound_file_ends_the_run(broken, num_workers, own, capsys):
    path = own / "clips" / f"{broken}.wav"
    path.write_text("no sound")
    printed = error_of(capsys, "hparams/mini.yaml", *own_settings(own, own, num_workers=num_workers))
    assert printed.startswith(f"error: {path}: cannot be decoded as sound")
    # Python would wait for ever for those that are left
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("file", "text", "changes", "message"),
    [
        (None, None, {"n_classes": 4}, "classes.csv has 3 classes, but n_classes is 4: pass --n_classes=3"),
        ("classes.csv", "index,mid,display_name\n0,dog,Dog\n2,bird,Bird\n3,cat,Cat\n", {}, "classes.csv, row 3"),
        ("classes.csv", "", {}, "classes.csv"),
        (
            "train.csv",
            "ID,wav,duration,labels\na,a.wav,1,fish\n",
            {},
            "train.csv, clip 'a': the label 'fish' is not in the class list",
        ),
        ("valid.csv", "ID,wav,duration,labels\n", {}, "valid.csv: no clips in it"),
        (None, None, {"train_annotation": "/none.csv"}, "/none.csv: no such annotation file"),
        (None, None, {"class_list": "/none.csv"}, "/none.csv"),
    ],
)
def test_own_data_that_does_not_fit(file, text, changes, message, own, capsys):
    if file is not None:
        (own / file).write_text(text)
    printed = error_of(capsys, "hparams/mini.yaml", *own_settings(own, own, **changes))
    assert printed.startswith("error: ")
    assert message in printed


def test_test_only_without_a_trained_epoch(own, capsys):
    printed = error_of(capsys, "hparams/mini.yaml", "--test_only", *own_settings(own, own))
    assert printed.startswith(f"error: {own}/out: no trained epoch to evaluate here; train first")
