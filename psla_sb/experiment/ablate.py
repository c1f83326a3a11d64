"""`main`: the body of every recipe's `ablate.py`: what each technique of a recipe gives, over paired seeds.

Every run is a process of the `train.py` beside the script, in a folder of its own; what is done is not done again.
"""

import functools
import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import CLASSES
from psla_sb.errors import InputError, Interrupted
from psla_sb.experiment import launch
from psla_sb.experiment.differences import data_set_of, read_evaluation, write_report
from psla_sb.experiment.evaluation import ROWS
from psla_sb.experiment.hparams import REQUIRED_KEYS, CommandLine, check_keys, resolve
from psla_sb.experiment.jobs import Job, cores_of_each, run_jobs
from psla_sb.experiment.runs import (
    Progress,
    check,
    check_scores,
    digest_of,
    is_done,
    names_list,
    plain,
    script_parser,
    slots_of,
    that_matter,
)
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
    parser = script_parser(recipe, DESCRIPTION, EPILOG, [1, 2, 3], "of each variant", "results/ablation")
    rows = [row for row in ROWS if row != "chance"]
    parser.add_argument("--vary", action="append", default=[], metavar='"KEY=A,B"', help="other values of a key; repeatable")
    parser.add_argument(
        "--only", type=names_list, metavar="NAME,...", help="run only these variants (see --dry_run for their names)"
    )
    row = "whose mAP is compared (default: %(default)s)"
    parser.add_argument("--row", choices=rows, default="weight_average", help=row)
    return parser


def ablate(
    recipe: Path, options: Namespace, rest: Sequence[str], file: Path, run_opts: RunOptions, overrides: dict[str, Any]
) -> None:
    """Runs what is not done yet, and writes what all of it says; `rest` are the arguments of all runs."""
    check(options, file, run_opts, overrides, "variant")
    settings = resolve(file, overrides)
    varied = values_to_vary(options.vary, file, overrides)
    variants = variants_of(settings, varied)
    wanted = chosen(variants, options.only)
    slots = slots_of(options)
    check_preparation(file, varied, len(slots))
    folder = options.output_folder or Path("results") / "ablation" / file.stem
    in_use = techniques_in_use(settings)
    off = [name for name, keys in TECHNIQUES.items() if name not in in_use and any(key in settings for key in keys)]
    if off:
        print(f"Already off in {file.name}, and so left out: {', '.join(off)}.", file=sys.stderr)

    command = [sys.executable, str(recipe.with_name("train.py")), str(file), *rest]
    digest, fixed, runs = digest_of(file), that_matter(overrides), dict[Path, Job]()
    for variant in variants:
        for job in jobs_of(variant, options.seeds, command, folder, digest, fixed):
            # variants that are the same have the same runs
            runs.setdefault(job.folder, job)
    done = {run for run, job in runs.items() if is_done(job)}
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
    progress.exit_if_failed()


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


def is_prepared(job: Job) -> bool:
    """Whether a run has ended its preparation: it then writes the classes."""
    return (job.folder / CLASSES).exists()


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
