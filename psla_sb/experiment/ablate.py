"""`main`: the body of every recipe's `ablate.py`: what each technique of a recipe gives, over paired seeds.

Every run is a process of the `train.py` beside the script, in a folder of its own; what is done is not done again.
"""

import functools
import hashlib
import json
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from speechbrain.utils.run_opts import RunOptions
from tqdm import tqdm

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import CLASSES, HPARAMS
from psla_sb.errors import InputError, Interrupted
from psla_sb.experiment import launch
from psla_sb.experiment.differences import data_set_of, read_evaluation, write_report
from psla_sb.experiment.evaluation import ROWS
from psla_sb.experiment.hparams import REQUIRED_KEYS, CommandLine, check_keys, resolve
from psla_sb.experiment.jobs import LOG, RECORD, Job, Listener, cores_of_each, last_line, run_jobs
from psla_sb.experiment.pace import duration_text
from psla_sb.experiment.variants import TECHNIQUES, Variant, chosen, key_and_values, techniques_in_use, variants_of

DESCRIPTION = """Says what each technique of a recipe gives. Trains the recipe as it is (full), without each of its techniques (no
mixup, ...), without any (baseline), with each alone on the baseline (only mixup, ...), and, with --vary, with other values
of any key; each with several seeds. Compares them seed by seed, with 95 % intervals."""
EPILOG = """Every other --KEY=VALUE goes to all runs, as at train.py: keys of the YAML file, and run options such as
--precision=bf16.

examples:
  python {recipe} hparams/mini.yaml --seeds=1,2,3
  python {recipe} hparams/psla.yaml --data_folder=/data --vary "mixup_rate=0.25,1" --vary "n_heads=1" --devices cuda:0,cuda:1
  python {recipe} hparams/mini.yaml --seeds=1 --only full,no_mixup --number_of_epochs=10 --jobs 2

It can be stopped at any time (Ctrl-C, SIGTERM): the runs save their state, and the same command goes on. In the output folder:
ablation.md (the table), ablation.csv (all figures of all runs), summary.json, ablation.png, and the runs, VARIANT/SEED.

exit status: 0 if all runs are done, 1 if some failed (their last lines are shown), 2 if the command line is wrong, 75 if stopped"""
# Keys that change no result.
NEUTRAL_KEYS = ("num_workers",)


def main(recipe: str, arguments: list[str] | None = None) -> None:
    """Runs a recipe's `ablate.py`; see `psla_sb.experiment.launch.main`, and `--help`.

    Raises
    ------
    SystemExit
        With status 1, if some runs failed; 2, if the command line is wrong; 75, if SIGTERM or Ctrl-C stopped it.

    Example
    -------
    >>> main("recipes/AudioSet/ablate.py", ["hparams/nothing.yaml", "--seeds=1,2"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    options, rest = command_line(recipe).parse_known_args(arguments)
    launch.main(recipe, functools.partial(ablate, Path(recipe).resolve(), options, rest), [options.hparams, *rest])


def command_line(recipe: str) -> ArgumentParser:
    """The options of the script; all others are those of `train.py`."""
    parser = ArgumentParser(
        Path(recipe).name,
        description=DESCRIPTION,
        epilog=EPILOG.format(recipe=recipe),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rows = [row for row in ROWS if row != "chance"]
    parser.add_argument("hparams", metavar="YAML", help="the full recipe, such as hparams/mini.yaml")
    parser.add_argument("--seeds", type=seed_list, default=[1, 2, 3], metavar="N,N,...", help="(default: 1,2,3)")
    parser.add_argument("--vary", action="append", default=[], metavar='"KEY=A,B"', help="other values of a key; repeatable")
    parser.add_argument(
        "--only", type=names_list, metavar="NAME,...", help="run only these variants (see --dry_run for their names)"
    )
    row = "whose mAP is compared (default: %(default)s)"
    parser.add_argument("--row", choices=rows, default="weight_average", help=row)
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--devices", type=names_list, metavar="DEVICE,...", help="one run at a time on each, such as cuda:0,cuda:1"
    )
    several.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs at a time, which share out the CPU's cores")
    parser.add_argument("--output_folder", type=Path, metavar="FOLDER", help="(default: results/ablation/<name of the YAML file>)")
    parser.add_argument("--dry_run", action="store_true", help="list the commands, and run none")
    return parser


def seed_list(text: str) -> list[int]:
    """The value of `--seeds`.

    Example
    -------
    >>> seed_list("1,2,10")
    [1, 2, 10]
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}': whole numbers, such as 1,2,3") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ArgumentTypeError(f"'{text}': numbers of 0 or more, each once")
    return seeds


def names_list(text: str) -> list[str]:
    """The value of `--only` and of `--devices`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def ablate(
    recipe: Path, options: Namespace, rest: Sequence[str], file: Path, run_opts: RunOptions, overrides: dict[str, Any]
) -> None:
    """Runs what is not done yet, and writes what all of it says; `rest` are the arguments of all runs."""
    check(options, file, run_opts, overrides)
    settings = resolve(file, overrides)
    varied = values_to_vary(options.vary, file, overrides)
    variants = variants_of(settings, varied)
    wanted = chosen(variants, options.only)
    slots = [[f"--device={device}"] for device in options.devices or ()] or [[]] * options.jobs
    check_preparation(file, varied, len(slots))
    folder = options.output_folder or Path("results") / "ablation" / file.stem
    off = [name for name in TECHNIQUES if name not in techniques_in_use(settings)]
    if off:
        print(f"Already off in {file.name}, and so left out: {', '.join(off)}.", file=sys.stderr)

    command = [sys.executable, str(recipe.with_name("train.py")), str(file), *rest]
    fixed = {key: value for key, value in overrides.items() if key not in NEUTRAL_KEYS}
    digest, runs = digest_of(file), dict[Path, Job]()
    for variant in variants:
        for job in jobs_of(variant, options.seeds, command, folder, digest, fixed):
            # variants that are the same have the same runs
            runs.setdefault(job.folder, job)
    done = {run for run, job in runs.items() if check_record(run, job.record) and read_evaluation(run) is not None}
    open_runs = [folder / variant.folder / str(seed) for seed in options.seeds for variant in wanted]
    jobs = [runs[run] for run in dict.fromkeys(open_runs) if run not in done]
    check_scores(resolve(file, {**overrides, "output_folder": str(folder / "full")}))
    if options.dry_run:
        print("".join(f"{shlex.join(job.command)}\n" for job in jobs), end="")
        return
    progress = Progress(len(jobs), len(done), len(slots))
    environment = cores_of_each(len(slots) if options.devices is None else 1)
    stopped = run_jobs(jobs, slots, progress, is_prepared, environment)
    progress.close()
    if stopped:
        raise Interrupted
    report(folder, variants, options, settings, data_set_of(recipe.parent.name, file.stem))
    if progress.failed:
        print("\n".join(["", "These runs failed; the same command tries them again:", *progress.failed]), file=sys.stderr)
        sys.exit(1)


def jobs_of(
    variant: Variant, seeds: Sequence[int], command: Sequence[str], folder: Path, digest: str, fixed: Mapping[str, Any]
) -> list[Job]:
    """The runs of a variant, one for each seed; `fixed` are the overrides of all runs that change results."""
    jobs = []
    for seed in seeds:
        run = folder / variant.folder / str(seed)
        record = {"hparams": digest, "overrides": plain({**fixed, **variant.overrides, "seed": seed})}
        own = variant.overrides | {"seed": str(seed), "output_folder": str(run)}
        arguments = [f"--{key}={value}" for key, value in own.items()]
        jobs.append(Job(f"{variant.name}, seed {seed}", [*command, *arguments], run, record))
    return jobs


def check(options: Namespace, file: Path, run_opts: RunOptions, overrides: Mapping[str, Any]) -> None:
    """Refuses what every run, or this command, would stumble over."""
    check_keys(file, read_yaml(file), {key: value for key, value in overrides.items() if key != "trust"}, REQUIRED_KEYS)
    if "seed" in overrides:
        raise InputError("--seed: pass --seeds=1,2,3, which every variant is run with")
    if options.jobs < 1:
        raise InputError(f"--jobs must be 1 or more, not {options.jobs}")
    if options.devices and "device" in run_opts.overridden_args:
        raise InputError("pass either --device, of all runs, or --devices, one run at a time on each")
    for device in options.devices or ():
        kind, _, index = device.partition(":")
        # counted without a context on any of them, which would take memory from the runs
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise InputError(f"--devices: there is no {device} here, but {torch.cuda.device_count()} CUDA devices")


def values_to_vary(vary: Sequence[str], file: Path, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By key: the values of `--vary` as texts, and what these mean."""
    varied: dict[str, dict[str, Any]] = {}
    for key, texts in map(key_and_values, vary):
        if key in ("seed", "output_folder"):
            raise InputError(f"--vary: {key} is this command's own business")
        check_keys(file, read_yaml(file), {**overrides, key: None}, REQUIRED_KEYS)
        for text in texts:
            # a run option of the same name (max_grad_norm) is none of the overrides
            parsed = CommandLine.from_command_line_args([str(file), f"--{key}={text}"])[2].get(key, text)
            varied.setdefault(key, {})[text] = parsed
    return varied


def check_preparation(file: Path, varied: Mapping[str, Any], n_slots: int) -> None:
    """Refuses to vary, in several runs at a time, what the preparation makes the data with: all runs share the data."""
    text = json.dumps(read_yaml(file).get("prepare"), default=lambda scalar: str(getattr(scalar, "value", scalar)))
    for key in varied:
        if n_slots > 1 and f"<{key}>" in text and key != "data_folder":
            raise InputError(
                f"--vary: the preparation depends on {key}, and all runs share its data; run one at a time, without --jobs"
            )


def check_scores(settings: Mapping[str, Any]) -> None:
    """Refuses label enhancement whose scores are looked for in a run's own folder, where nothing has written them."""
    enhancement = settings.get("label_enhancement")
    scores = enhancement.get("scores") if isinstance(enhancement, Mapping) else None
    if isinstance(scores, str) and not Path(scores).exists():
        remedy = "all runs need them in one place: run enhance_labels.py, and pass --label_enhancement='{scores: FOLDER}'"
        raise InputError(f"label_enhancement: there are no scores in {scores}; {remedy}")


def digest_of(file: Path) -> str:
    """The SHA-256 of what a YAML file says, whatever its comments say."""
    events = ruamel.yaml.YAML().parse(file.read_text(encoding="utf-8"))
    said = [[type(event).__name__, *(str(getattr(event, name, "")) for name in ("anchor", "tag", "value"))] for event in events]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as JSON gives them back, the ones of variants and of the command line alike."""
    return {key: json.loads(json.dumps(value, default=str)) for key, value in values.items()}


def check_record(run: Path, record: Mapping[str, Any]) -> bool:
    """Whether a run has been begun; an `InputError` if it was with other settings."""
    remedy = "Choose another --output_folder, or delete that folder"
    if not (run / RECORD).is_file():
        if (run / HPARAMS).exists():
            raise InputError(f"{run}: holds a run, but none of an ablation. {remedy}")
        return False
    try:
        recorded = json.loads((run / RECORD).read_text(encoding="utf-8"))
        before, now = recorded["overrides"], record["overrides"]
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key, ...) != now.get(key, ...))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run / RECORD}: not a record of an ablation ({error}). {remedy}") from None
    if keys:
        said = ", ".join(f"{key} was {before[key]}" if key in before else f"{key} was not overridden" for key in keys)
        raise InputError(f"{run}: was run with other overrides ({said}). {remedy}")
    if recorded.get("hparams") != record["hparams"]:
        raise InputError(f"{run}: was run with another version of the YAML file. {remedy}")
    return True


def is_prepared(job: Job) -> bool:
    """Whether a run has ended its preparation: it then writes the classes."""
    return (job.folder / CLASSES).exists()


class Progress(Listener):
    """Prints a line for each start and each end of a run, below a bar if this is a terminal."""

    def __init__(self, n_jobs: int, n_done: int, n_slots: int) -> None:
        self.n_jobs, self.n_slots = n_jobs, n_slots
        self.seconds: list[float] = []
        self.failed: list[str] = []
        self.bar = tqdm(total=n_jobs, unit="run", disable=None)
        self.say(f"{n_jobs} runs to do, {n_done} done already")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def started(self, job: Job) -> None:
        self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: started, prints to {job.folder / LOG}")

    def ended(self, job: Job, status: int | None, seconds: float) -> None:
        self.seconds.append(seconds)
        self.bar.update()
        left = self.n_jobs - len(self.seconds)
        eta = f"; {left} to go, about {duration_text(sum(self.seconds) / len(self.seconds) * left / self.n_slots)}" if left else ""
        evaluation = read_evaluation(job.folder) if status == 0 else None
        if evaluation is not None:
            self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: done in {duration_text(seconds)}{eta}")
            return
        why = "another process is at work in its folder" if status is None else f"exit status {status}: {last_line(job.folder)}"
        word = "interrupted" if status == launch.EXIT_INTERRUPTED else "failed"
        self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: {word}, {why}{eta}")
        self.failed.append(f"{job.folder}: {why}")

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()


def report(folder: Path, variants: Sequence[Variant], options: Namespace, settings: Mapping[str, Any], data_set: str) -> None:
    """Writes and prints what the runs that are done say, and names those that are not."""
    evaluations: dict[str, dict[int, dict[str, Any]]] = {}
    missing = []
    for variant in variants:
        found = {seed: read_evaluation(folder / variant.folder / str(seed)) for seed in options.seeds}
        evaluations[variant.name] = {seed: evaluation for seed, evaluation in found.items() if evaluation is not None}
        lacks = [str(seed) for seed, evaluation in found.items() if evaluation is None]
        missing += [f"{variant.name} (seed {', '.join(lacks)})"] if lacks else []
    if any(evaluations.values()):
        print(write_report(folder, variants, evaluations, options.row, settings, data_set))
        print(f"\nAll figures: {folder / 'ablation.csv'}")
    if missing:
        print(f"Not done: {'; '.join(missing)}")
