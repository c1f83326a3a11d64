"""What scripts that start many trainings share: their options, what they note of each run, and what they print meanwhile."""

import hashlib
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from speechbrain.utils.run_opts import RunOptions
from tqdm import tqdm

from psla_sb import add_version
from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import HPARAMS
from psla_sb.errors import InputError
from psla_sb.experiment import launch
from psla_sb.experiment.differences import read_evaluation
from psla_sb.experiment.hparams import REQUIRED_KEYS, check_keys
from psla_sb.experiment.jobs import Job, Listener, last_line
from psla_sb.experiment.pace import duration_text

# Keys that change no result.
NEUTRAL_KEYS = ("num_workers",)


def script_parser(recipe: str, description: str, epilog: str, seeds: Sequence[int], what: str, folder: str) -> ArgumentParser:
    """Makes the parser of a recipe's script, whose other options are those of `train.py`; in `epilog`, {recipe} is its path.

    `seeds` are the default ones, `what` says what there is of each, and `folder` where the runs of all YAML files go.
    """
    parser = ArgumentParser(
        Path(recipe).name,
        description=description,
        epilog=epilog.format(recipe=recipe),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version(parser)
    parser.add_argument("hparams", metavar="YAML", help="the recipe, such as hparams/mini.yaml")
    default = ",".join(map(str, seeds))
    parser.add_argument("--seeds", type=seed_list, default=seeds, metavar="N,N,...", help=f"{what} (default: {default})")
    where = f"(default: {folder}/<name of the YAML file>)"
    parser.add_argument("--output_folder", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--dry_run", action="store_true", help="list the commands, and run none")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--devices", type=names_list, metavar="DEVICE,...", help="one run at a time on each, such as cuda:0,cuda:1"
    )
    several.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs at a time, which share out the CPU's cores")
    return parser


def slots_of(options: Namespace) -> list[list[str]]:
    """The further arguments of a command, for each run at a time."""
    return [[f"--device={device}"] for device in options.devices or ()] or [[]] * options.jobs


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


def check(options: Namespace, file: Path, run_opts: RunOptions, overrides: Mapping[str, Any], each: str) -> None:
    """Refuses what every run, or the script, would stumble over; `each` is what is run with every seed."""
    check_keys(file, read_yaml(file), {key: value for key, value in overrides.items() if key != "trust"}, REQUIRED_KEYS)
    if "seed" in overrides:
        raise InputError(f"--seed: pass --seeds=1,2,3, which every {each} is run with")
    if options.jobs < 1:
        raise InputError(f"--jobs must be 1 or more, not {options.jobs}")
    if options.devices and "device" in run_opts.overridden_args:
        raise InputError("pass either --device, of all runs, or --devices, one run at a time on each")
    for device in options.devices or ():
        kind, _, index = device.partition(":")
        # counted without a context on any of them, which would take memory from the runs
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise InputError(f"--devices: there is no {device} here, but {torch.cuda.device_count()} CUDA devices")


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


def that_matter(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that change results."""
    return {key: value for key, value in overrides.items() if key not in NEUTRAL_KEYS}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as JSON gives them back, those of single runs and of the command line alike."""
    return {key: json.loads(json.dumps(value, default=str)) for key, value in values.items()}


def check_record(job: Job) -> bool:
    """Whether a run has been begun; an `InputError` if it was with other settings."""
    remedy = "Choose another --output_folder, or delete that folder"
    if not job.record_file.is_file():
        if (job.folder / HPARAMS).exists():
            raise InputError(f"{job.folder}: holds a run, but none of an {job.of}. {remedy}")
        return False
    try:
        recorded = json.loads(job.record_file.read_text(encoding="utf-8"))
        before, now = recorded["overrides"], job.record["overrides"]
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key, ...) != now.get(key, ...))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{job.record_file}: not a record of an {job.of} ({error}). {remedy}") from None
    if keys:
        said = ", ".join(f"{key} was {before[key]}" if key in before else f"{key} was not overridden" for key in keys)
        raise InputError(f"{job.folder}: was run with other overrides ({said}). {remedy}")
    if recorded.get("hparams") != job.record["hparams"]:
        raise InputError(f"{job.folder}: was run with another version of the YAML file. {remedy}")
    return True


def is_done(job: Job) -> bool:
    """Whether a run is done, with the same settings; an `InputError` if it was begun with others."""
    return check_record(job) and read_evaluation(job.folder) is not None


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
        self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: started, prints to {job.log}")

    def ended(self, job: Job, status: int | None, seconds: float) -> None:
        self.seconds.append(seconds)
        self.bar.update()
        left = self.n_jobs - len(self.seconds)
        eta = f"; {left} to go, about {duration_text(sum(self.seconds) / len(self.seconds) * left / self.n_slots)}" if left else ""
        evaluation = read_evaluation(job.folder) if status == 0 else None
        if evaluation is not None:
            self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: done in {duration_text(seconds)}{eta}")
            return
        why = "another process is at work in its folder" if status is None else f"exit status {status}: {last_line(job)}"
        word = "interrupted" if status == launch.EXIT_INTERRUPTED else "failed"
        self.say(f"[{len(self.seconds)}/{self.n_jobs}] {job.title}: {word}, {why}{eta}")
        self.failed.append(f"{job.folder}: {why}")

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()

    def exit_if_failed(self) -> None:
        """Ends the script with status 1 if some runs failed, and says which."""
        if self.failed:
            print("\n".join(["", "These runs failed; the same command tries them again:", *self.failed]), file=sys.stderr)
            sys.exit(1)
