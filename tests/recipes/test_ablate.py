"""The recipe's ablate.py: which runs it starts, how it is stopped and goes on, and what it says of them.

Most tests have a `train.py` of a few lines in the place of the recipe's.
"""

import csv
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from psla_sb.experiment import ablate as ablate_module
from psla_sb.experiment.hparams import resolve
from psla_sb.experiment.variants import variants_of
from psla_sb.metrics import FIGURES
from runs import REPOSITORY, TINY, TRAIN, differences

ABLATE = TRAIN.with_name("ablate.py")
# It "trains" for `lr` seconds, fails with `n_heads` 13, and saves when it is stopped; figures depend on seed and overrides.
FAKE = """
import hashlib, json, signal, sys, time
from pathlib import Path

arguments = "\\n".join(sys.argv[2:]).replace("_batches\\n", "_batches=").split("\\n")
options = dict(argument[2:].split("=", 1) for argument in arguments)
folder = Path(options.pop("output_folder"))
started = time.time()

def stop(signum, frame):
    print("Interrupted, and saved.")
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("at work", flush=True)
time.sleep(float(options.get("warmup", 0)))
(folder / "class_labels_indices.csv").touch()
if options.get("n_heads") == "13":
    print("some warning")
    sys.exit("error: 13 heads are too many\\n")
time.sleep(float(options.get("lr", 0)) if not (folder / "saved").exists() else 0)

def figures(row):
    number = int(hashlib.sha256(json.dumps([row, sorted(options.items())]).encode()).hexdigest()[:8], 16) / 2**32
    return {"mAP": 0.3 + number / 10, "mAUC": 0.9 + number / 100, "d_prime": None}

evaluation = {row: figures(row) for row in ("weight_average", "last", "best", "last_epochs_mean", "ensemble")}
(folder / "results.json").write_text(json.dumps({"epochs": [], "evaluation": {**evaluation, "chance": {"mAP": 0.1}}}))
with open(folder / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({"options": options, "from": started, "to": time.time()}) + "\\n")
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose training takes no time: the path of its ablate.py, beside which are `train.py` and `mini.yaml`."""
    (tmp_path / "AudioSet").mkdir()
    (tmp_path / "AudioSet" / "train.py").write_text(FAKE)
    text = (TRAIN.parent / "hparams" / "mini.yaml").read_text()
    (tmp_path / "AudioSet" / "mini.yaml").write_text(text.replace("drop_connect: 0\n", "drop_connect: 0\nwarmup: 0\n"))
    return tmp_path / "AudioSet" / "ablate.py"


@pytest.fixture
def ablate(recipe, tmp_path, capsys):
    """Runs the ablation into `tmp_path / "out"`; returns its exit status and what it has printed on stdout and stderr."""

    def run(*arguments, seeds="1,2"):
        status = 0
        try:
            ablate_module.main(
                str(recipe), ["mini.yaml", f"--seeds={seeds}", f"--output_folder={tmp_path / 'out'}", *map(str, arguments)]
            )
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def calls(folder):
    """{(variant, seed): what each of its runs was called with}"""
    return {
        (path.parents[1].name, int(path.parent.name)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/*/calls.jsonl"))
    }


def figure(folder, variant, row="weight_average"):
    """[mAP of each seed]"""
    files = sorted((folder / variant).glob("*/results.json"))
    return np.array([json.loads(file.read_text())["evaluation"][row]["mAP"] for file in files])


OFF = {"balanced_sampling": "False", "mixup_rate": "0", "freq_mask": "0", "time_mask": "0"}
MASKS = {"freq_mask", "time_mask"}


def test_every_variant_is_run_with_every_seed(ablate, tmp_path):
    status, printed, said = ablate("--jobs=6", "--vary", "n_heads=1,4", "--vary=lr=1e-3", "--batch_size=4", "--debug_batches", "3")
    assert status == 0
    assert said.count("pretraining, label enhancement") == 1
    expected = {
        "full": {},
        "no_balanced_sampling": {"balanced_sampling": "False"},
        "no_mixup": {"mixup_rate": "0"},
        "no_masks": {key: OFF[key] for key in MASKS},
        "baseline": OFF,
        "only_balanced_sampling": {key: OFF[key] for key in OFF if key != "balanced_sampling"},
        "only_mixup": {key: OFF[key] for key in OFF if key != "mixup_rate"},
        "only_masks": {key: OFF[key] for key in OFF if key not in MASKS},
        "n_heads=1": {"n_heads": "1"},
        "lr=1e-3": {"lr": "1e-3"},
    }
    done = calls(tmp_path / "out")
    assert done.keys() == {(name, seed) for name in expected for seed in (1, 2)}
    for (name, seed), (call,) in done.items():
        assert call["options"] == {"batch_size": "4", "debug_batches": "3", "seed": str(seed), **expected[name]}
    # the recipe's own value is the full recipe, and is not run twice
    assert "| n_heads=4 " in printed


def test_label_enhancement_needs_its_scores_in_one_place(ablate, recipe, tmp_path):
    """The recipe looks for them in the folder of the run, of which an ablation has many."""
    file = recipe.with_name("mini.yaml")
    block = "label_enhancement: !name:psla_sb.labels.enhancement.enhance_annotation\n    scores: !ref <output_folder>/scores\n"
    file.write_text(file.read_text().replace("label_enhancement: null", block + "    threshold: 25\n#"))
    status, _, said = ablate()
    assert status == 2
    assert f"there are no scores in {tmp_path}/out/full/scores; all runs need them in one place" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "scores").mkdir()
    chosen = f"--label_enhancement={{scores: {tmp_path / 'scores'}}}"
    assert ablate(chosen, "--only=full,no_label_enhancement,only_label_enhancement")[0] == 0
    lines = json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]
    assert [line["published_difference"] for line in lines if line["name"] == "no label enhancement"] == [0.010]


def test_the_numbers_are_those_of_the_results(ablate, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = ablate("--jobs=6", "--vary", "n_heads=1,4", seeds="3,1,2")
    assert status == 0
    table = (out / "ablation.md").read_text()
    assert printed.startswith(table)
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    lines = {entry["name"]: entry for entry in summary["variants"]}
    assert len(lines) == 8 + 2 + 2
    for name, line in lines.items():
        folder, row = name.replace(" ", "_"), "weight_average"
        if name == "n_heads=4":
            folder = "full"
        if name.startswith("full, "):
            folder, row = "full", {"full, last epoch": "last", "full, ensemble": "ensemble"}[name]
        values = figure(out, folder, row)
        assert line["mean"] == pytest.approx(values.mean(), abs=1e-12)
        assert line["standard_deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        cells = next(row for row in table.splitlines() if row.startswith(f"| {name} ")).split("|")
        assert (float(cells[4]), float(cells[5])) == (round(values.mean(), 3), round(np.std(values, ddof=1), 3))
        if name in ("full", "n_heads=4"):
            assert line["difference"] is None
            continue
        against = "baseline" if name.startswith("only") else "full"
        pairs = values - figure(out, against)
        found = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
        assert line["against"] == cells[7].strip() == against
        assert line["difference"]["mean"] == pytest.approx(pairs.mean(), abs=1e-12)
        assert line["difference"]["interval"] == pytest.approx([found.low, found.high], abs=1e-12)
        assert cells[6].strip() == f"{pairs.mean():+.3f}"
        assert cells[8].strip() == f"[{found.low:+.3f}, {found.high:+.3f}]"
    published = {name: line["published_difference"] for name, line in lines.items() if line["published_difference"] is not None}
    assert published == {"full, last epoch": -0.004, "full, ensemble": 0.009}
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_all_figures_of_all_runs_are_in_a_csv_file(ablate, tmp_path):
    assert ablate("--only=full,no mixup", "--vary", "n_heads=1")[0] == 0
    with open(tmp_path / "out" / "ablation.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        results = json.loads((tmp_path / "out" / row["variant"].replace(" ", "_") / row["seed"] / "results.json").read_text())
        for name in FIGURES:
            assert (float(row[name]) if row[name] else None) == results["evaluation"][row["row"]][name]
    assert {row["changes"] for row in rows} == {"nothing", "mixup_rate=0"}


def test_one_seed_has_no_interval_and_the_row_can_be_chosen(ablate, tmp_path):
    status, printed, _ = ablate("--only=full,no_mixup", "--row=ensemble", seeds="7")
    assert status == 0
    assert "One seed has no standard deviation and no interval" in printed
    assert "Not done: no balanced sampling (seed 7); no masks (seed 7)" in printed
    lines = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]}
    assert lines.keys() == {"full", "no mixup", "full, last epoch", "full, weight average"}
    assert lines["full"]["mean"] == figure(tmp_path / "out", "full", "ensemble")[0]
    assert lines["no mixup"]["difference"]["interval"] is None
    assert lines["full, weight average"]["published_difference"] == -0.009


def test_what_is_done_is_not_done_again(ablate, recipe, tmp_path):
    arguments = ("--only=full,no_mixup", "--batch_size=4")
    assert ablate(*arguments)[0] == 0
    first = calls(tmp_path / "out")
    # neither a comment nor the number of workers changes a result
    file = recipe.with_name("mini.yaml")
    file.write_text("# a comment\n" + file.read_text())
    status, printed, said = ablate("--only=full,no_mixup,no_masks", "--batch_size=4", "--num_workers=1", seeds="1,2,3")
    assert status == 0
    assert "5 runs to do, 4 done already" in said
    again = calls(tmp_path / "out")
    assert {run: again[run] for run in first} == first
    assert again.keys() - first.keys() == {("full", 3), ("no_mixup", 3), *(("no_masks", seed) for seed in (1, 2, 3))}
    assert "Not done: no balanced sampling" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch_size=2"], "full/1: was run with other overrides (batch_size was 4)."),
        (["--batch_size=4", "--n_mels=32"], "full/1: was run with other overrides (n_mels was not overridden)."),
        (["--batch_size=4", "yaml"], "full/1: was run with another version of the YAML file."),
        (["--batch_size=4", "foreign"], "no_masks/2: holds a run, but none of an ablation."),
        (["--batch_size=4", "damaged"], "full/1/ablation.json: not a record of an ablation"),
    ],
)
def test_runs_with_other_settings_are_refused(change, message, ablate, recipe, tmp_path):
    assert ablate("--only=full,no_mixup", "--batch_size=4")[0] == 0
    first = calls(tmp_path / "out")
    file, foreign = recipe.with_name("mini.yaml"), tmp_path / "out" / "no_masks" / "2"
    if "yaml" in change:
        file.write_text(file.read_text().replace("n_heads: 4", "n_heads: 2"))
    if "foreign" in change:
        foreign.mkdir(parents=True)
        (foreign / "hyperparams.yaml").touch()
    if "damaged" in change:
        (tmp_path / "out" / "full" / "1" / "ablation.json").write_text("{}")
    status, _, said = ablate(*(one for one in change if one.startswith("--")))
    assert status == 2
    assert f"error: {tmp_path / 'out'}/{message}" in said
    assert "Choose another --output_folder, or delete that folder" in said
    assert calls(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize=4"], "mini.yaml has no key 'batchsize'. Did you mean 'batch_size'?"),
        (["--vary=lrr=1,2"], "mini.yaml has no key 'lrr'. Did you mean 'lr'?"),
        (["--vary=lr"], "--vary 'lr': is written KEY=VALUE,VALUE,..."),
        (["--vary=lr=1,,2"], "--vary 'lr=1,,2': is written KEY=VALUE,VALUE,..."),
        (["--vary=seed=1,2"], "--vary: seed is this command's own business"),
        (["--vary=n_train=100", "--jobs=2"], "--vary: the preparation depends on n_train"),
        (["--vary=lr=a/b,a b"], "two of the variants cannot have the same folder"),
        (["--only=full,no_pretraining"], "--only: there is no variant 'no_pretraining' here, but full, no balanced sampling"),
        (["--seed=3"], "--seed: pass --seeds=1,2,3"),
        (["--seeds=1,1"], "numbers of 0 or more, each once"),
        (["--seeds=x"], "whole numbers, such as 1,2,3"),
        (["--jobs=0"], "--jobs must be 1 or more, not 0"),
        (["--jobs=2", "--devices=cuda:0"], "not allowed with argument"),
        (["--devices=cuda:99"], "--devices: there is no cuda:99 here"),
        (["--devices=xpu:0", "--device=cpu"], "pass either --device"),
        (["--precision=half"], "invalid choice: 'half'"),
        (["--row=first"], "invalid choice: 'first'"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(arguments, message, ablate, tmp_path):
    status, _, said = ablate(*arguments)
    assert status == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_commands(ablate, recipe, tmp_path):
    status, printed, _ = ablate("--only=no_mixup", "--dry_run", "--published={last: 0.5}", seeds="5")
    (line,) = printed.splitlines()
    assert (status, (tmp_path / "out").exists()) == (0, False)
    expected = [sys.executable, recipe.with_name("train.py"), recipe.with_name("mini.yaml"), "--published={last: 0.5}"]
    expected += ["--mixup_rate=0", "--seed=5", f"--output_folder={tmp_path / 'out' / 'no_mixup' / '5'}"]
    assert shlex.split(line) == list(map(str, expected))


def test_a_run_that_fails_does_not_stop_the_others(ablate, tmp_path):
    arguments = ("--only=full,no_mixup,n_heads=13", "--vary=n_heads=13")
    for _ in range(2):
        status, printed, said = ablate(*arguments)
        assert status == 1
        assert f"{tmp_path}/out/n_heads=13/2: exit status 1: error: 13 heads are too many" in said
        assert "n_heads=13 (seed 1, 2)" in printed
        assert "| no mixup " in printed
        assert "| n_heads=13 " not in printed
    assert all(len(each) == 1 for each in calls(tmp_path / "out").values())
    assert "2 runs to do, 4 done already" in said


def test_the_first_run_is_alone_until_it_has_prepared(ablate, tmp_path):
    assert ablate("--jobs=4", "--only=full,no_mixup", "--warmup=0.7")[0] == 0
    began = {run: each[0]["from"] for run, each in calls(tmp_path / "out").items()}
    first = began.pop(("full", 1))
    assert min(began.values()) - first > 0.6
    assert max(began.values()) - min(began.values()) < 0.6


def test_each_device_has_one_run_at_a_time(ablate, tmp_path):
    assert ablate("--devices=xpu:0,xpu:1", "--lr=0.3", seeds="1")[0] == 0
    by_device = {}
    for (call,) in calls(tmp_path / "out").values():
        by_device.setdefault(call["options"]["device"], []).append((call["from"], call["to"]))
    assert sorted(by_device) == ["xpu:0", "xpu:1"]
    assert min(map(len, by_device.values())) >= 3
    for spans in by_device.values():
        assert all(end <= begin for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:], strict=False))
    # the device is no setting: the same runs, elsewhere
    assert "0 runs to do, 8 done already" in ablate("--lr=0.3", seeds="1")[2]


def test_a_folder_in_use_is_left_alone(ablate, tmp_path):
    folder = tmp_path / "out" / "no_mixup" / "1"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, said = ablate("--only=full,no_mixup")
    assert status == 1
    assert f"{folder}: another process is at work in its folder" in said
    assert ("no_mixup", 1) not in calls(tmp_path / "out")
    assert ablate("--only=full,no_mixup")[0] == 0


def begin(script, arguments, folder, log):
    """Starts ablate.py as a user would, whose output goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, str(script), *arguments]
    with open(log, "ab") as stream:
        return subprocess.Popen(argv, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def wait_for(condition, seconds=120):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_runs_which_save(signum, ablate, recipe, tmp_path):
    recipe.write_text(ABLATE.read_text())
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["mini.yaml", "--seeds=1,2", "--only=full,no_mixup", "--jobs=2", "--lr=60", f"--output_folder={out}"]
    process = begin(recipe, arguments, tmp_path, log)
    begun = [out / "full" / "1" / "ablation.log", out / "no_mixup" / "1" / "ablation.log"]
    wait_for(lambda: all(file.exists() and "at work" in file.read_text() for file in begun))
    process.send_signal(signum)
    assert process.wait(60) == 75, log.read_text()
    assert log.read_text().endswith("Interrupted, and saved. The same command goes on from here.\n")
    assert all(file.with_name("saved").exists() for file in begun)
    assert not (out / "full" / "2").exists()
    assert not list(out.glob("*/*/calls.jsonl"))
    for folder in ("full", "no_mixup"):
        (out / folder / "2").mkdir()
        (out / folder / "2" / "saved").touch()
    assert ablate(*arguments[2:-1])[0] == 0
    assert len(calls(out)) == 4


@pytest.mark.slow
def test_real_runs_are_stopped_and_go_on(tiny_run, mini_data, tmp_path):
    """Two variants, two seeds, two at a time, stopped once: the same figures as of a training that was started by hand."""
    out, log = tmp_path / "out", tmp_path / "log"
    settings = {**TINY, "data_folder": mini_data, "output_folder": out}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    arguments = ["hparams/mini.yaml", "--seeds=1,2", "--only=full,no_mixup", "--jobs=2", *arguments]
    process = begin(ABLATE, arguments, tmp_path, log)
    first = out / "full" / "1" / "ablation.log"
    wait_for(lambda: first.exists() and "Going into epoch 1" in first.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()
    assert first.read_text().endswith("Interrupted, and saved. The same command goes on from here.\n")
    assert begin(ABLATE, arguments, tmp_path, log).wait(300) == 0, log.read_text()
    assert "| no mixup " in log.read_text()
    assert differences(out / "full" / "1", tiny_run[0]) == []
    assert len({file.read_bytes() for file in out.glob("*/*/results.json")}) == 4
    assert (out / "ablation.png").exists()


def test_the_parts_of_later_systems_are_techniques_too():
    """Of psla_plus.yaml each can be left out, and tried alone; psla.yaml, which lacks their keys, says nothing of them."""
    hparams = TRAIN.parent / "hparams"
    plus = resolve(hparams / "psla_plus.yaml", {"data_folder": "x", "output_folder": "y", "freq_mixstyle": 0.4})
    by_name = {variant.name: variant for variant in variants_of(plus)}
    parts = ("gain", "roll", "larger half", "Freq-MixStyle", "mel edges", "moving average", "estimated statistics")
    assert {f"{which} {part}" for which in ("no", "only") for part in parts} <= set(by_name)
    assert by_name["no mel edges"].overrides == {"edge_ranges": "[0, 0]"}
    assert "no teacher" not in by_name
    taught = {variant.name for variant in variants_of({**plus, "teacher_scores": "teacher"})}
    assert "no teacher" in taught
    psla = resolve(hparams / "psla.yaml", {"data_folder": "x", "output_folder": "y"})
    assert not {f"no {part}" for part in parts} & {variant.name for variant in variants_of(psla)}
