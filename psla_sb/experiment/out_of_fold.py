"""`main`: the body of every recipe's `out_of_fold.py`: scores of the training clips by taggers that have not been trained on them.

A teacher that was trained on the clips it scores gives back their labels. Here the clips are shared out to k folds:

    fold_1 | fold_2 | fold_3        a tagger is trained on 2 and 3 and scores 1; one on 1 and 3 scores 2; one on 1 and 2 scores 3

Every training is a process of the `train.py` beside the script; what is done is not done again.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import definitions_text, read_definitions, read_yaml, tags_of
from psla_sb.checkpoints.trust import as_names, check_trusted
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError, Interrupted
from psla_sb.experiment import launch
from psla_sb.experiment.enhance_labels import ROWS_AT_ONCE, teacher_scores, write_table
from psla_sb.experiment.hparams import load_hparams, prepare, resolve
from psla_sb.experiment.jobs import Job, cores_of_each, run_jobs
from psla_sb.experiment.runs import Progress, check, check_scores, digest_of, is_done, plain, script_parser, slots_of, that_matter
from psla_sb.files import atomic_write, put_back_on_error, read_json, write_json
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_scores import SCORES, check_teacher, new_array, write_clips
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.splits import share_out

DESCRIPTION = """Makes a teacher's scores of the training clips, each by taggers that were not trained on it. Shares the clips out
to folds, each with its part of every class; trains the recipe without each fold, and scores that fold with the weight average.
Validation is what it is in the recipe: no fold chooses an epoch."""
EPILOG = """Clips of a group are in one fold. Groups are what the column `group` of the training annotation says, if there is one;
or another column, or a part of the ID, see --group; otherwise clips of one sound file are a group: each of AudioSet's is alone.

Every other --KEY=VALUE goes to all runs, as at train.py: keys of the YAML file, and run options such as --precision=bf16. The
recipe's own teacher_scores are not used, unless they are given here.

examples:
  python {recipe} hparams/mini.yaml
  python {recipe} hparams/psla.yaml --data_folder=/data --folds 3 --seeds=1,2 --devices cuda:0,cuda:1
  python {recipe} hparams/psla.yaml --data_folder=/data --group '^(.{{11}})'

It can be stopped at any time (Ctrl-C, SIGTERM): the runs save their state, and the same command goes on. In the output folder:
scores.npy (float32, [clips, classes]: the mean over the seeds), ids.csv and class_labels_indices.csv, which --teacher_scores=FOLDER
of train.py reads, and, of a YAML file with a block label_enhancement (psla_balanced_enhanced.yaml), --label_enhancement='{{scores:
FOLDER}}'; folds.csv; and the runs, fold_K/seed_S.

exit status: 0 if the scores are there, 1 if some runs failed (their last lines are shown), 2 if the input is wrong, or the scores
are not far better than chance, 75 if stopped"""
NAME = "out-of-fold_teacher"
# What all runs share, wherever each writes.
SHARED = ("class_list", "valid_annotation", "test_annotation")


def main(recipe: str, arguments: list[str] | None = None) -> None:
    """Runs a recipe's `out_of_fold.py`; see `psla_sb.experiment.launch.main`, and `--help`.

    Raises
    ------
    SystemExit
        With status 1, if some runs failed; 2, if the input is wrong; 75, if SIGTERM or Ctrl-C stopped it.

    Example
    -------
    >>> main("recipes/AudioSet/out_of_fold.py", ["hparams/nothing.yaml", "--folds=5"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    options, rest = command_line(recipe).parse_known_args(arguments)
    launch.main(recipe, functools.partial(out_of_fold, Path(recipe).resolve(), options, rest), [options.hparams, *rest])


def command_line(recipe: str) -> ArgumentParser:
    """The options of the script; all others are those of `train.py`."""
    parser = script_parser(recipe, DESCRIPTION, EPILOG, [1], "a run each, whose mean is taken", "results/out_of_fold")
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="(default: %(default)s)")
    group = "a column of the training annotation; or a regular expression, whose first group in an ID is what its clips share"
    parser.add_argument("--group", metavar="COLUMN|REGEX", help=group)
    return parser


def out_of_fold(
    recipe: Path, options: Namespace, rest: Sequence[str], file: Path, run_opts: RunOptions, overrides: dict[str, Any]
) -> None:
    """Runs what is not done yet, and puts the scores together; `rest` are the arguments of all runs."""
    check(options, file, run_opts, overrides, "fold")
    if options.folds < 2:
        raise InputError(f"--folds must be 2 or more, not {options.folds}")
    # before hours of training: the runs are loaded to score clips
    trust = as_names(overrides.get("trust", read_yaml(file).get("trust")))
    check_trusted(tags_of(definitions_text(read_definitions(file))), file, trust)
    folder = options.output_folder or Path("results") / "out_of_fold" / file.stem
    settings = resolve(file, {**{key: value for key, value in overrides.items() if key != "trust"}, "output_folder": str(folder)})
    check_scores(settings)
    jobs = jobs_of(folder, options, [sys.executable, str(recipe.with_name("train.py")), str(file), *rest], settings, overrides)
    done = [job for job in jobs if is_done(job)]
    to_do = [job for job in jobs if job not in done]
    if options.dry_run:
        print("".join(f"{shlex.join(job.command)}\n" for job in to_do), end="")
        return
    for signum in launch.STOP_SIGNALS:
        signal.signal(signum, launch.stop)
    hparams = load_hparams(file, {**overrides, "output_folder": str(folder)}, if_there={"pretrained": None})
    manifest, labels, vocabulary, folds = share_clips_out(folder, options, hparams)
    slots = slots_of(options)
    progress = Progress(len(to_do), len(done), len(slots))
    environment = cores_of_each(len(slots) if options.devices is None else 1)
    stopped = run_jobs(to_do, slots, progress, environment=environment)
    progress.close()
    if stopped:
        raise Interrupted
    progress.exit_if_failed()
    for signum in launch.STOP_SIGNALS:
        signal.signal(signum, launch.stop)
    if options.devices:
        run_opts = dataclasses.replace(run_opts, device=options.devices[0], overridden_args=run_opts.overridden_args)
    run_opts = launch.start_processes(run_opts)
    scores = []
    for k in range(options.folds):
        of_fold = Manifest(manifest.table.filter(pa.array(folds == k)), manifest.data_root, manifest.source)
        runs = [str(job.folder) for job in jobs if job.folder.parent == fold_folder(folder, k)]
        scores.append(teacher_scores(runs, of_fold, vocabulary, fold_folder(folder, k), hparams, run_opts))
    put_together(folder, scores, folds, manifest, vocabulary)
    remedy = "Train for longer (number_of_epochs), or on more clips: nothing can be learnt from such teachers"
    score, chance = check_teacher(np.load(folder / SCORES, mmap_mode="r"), labels, folder / SCORES, remedy)
    print(
        f"\n{len(manifest)} clips, each scored by a tagger that was not trained on it: mAP {score:.4f} (by chance {chance:.4f}).\n"
        f"Train with them: --teacher_scores={shlex.quote(str(folder))}, or, where the YAML file has a block label_enhancement, "
        f"with labels that they enhance: --label_enhancement={shlex.quote(json.dumps({'scores': str(folder)}))}"
    )


def fold_folder(folder: Path, k: int) -> Path:
    """Where fold `k`, from 0 on, has its runs and scores."""
    return folder / f"fold_{k + 1}"


def jobs_of(
    folder: Path, options: Namespace, command: Sequence[str], settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[Job]:
    """The trainings, one without each fold for each seed."""
    shared = {key: str(settings[key]) for key in SHARED if settings.get(key)} | {"skip_prep": "True"}
    # what is to be taught by these scores is another recipe's business
    shared |= {"teacher_scores": "null"} if settings.get("teacher_scores") and "teacher_scores" not in overrides else {}
    jobs, digest = [], digest_of(Path(command[2]))
    for seed in options.seeds:
        for k in range(options.folds):
            run = fold_folder(folder, k) / f"seed_{seed}"
            own = {"seed": str(seed), "train_annotation": str(run.parent / "train.csv"), "output_folder": str(run)}
            arguments = [f"--{key}={value}" for key, value in {**shared, **own}.items()]
            record = {"hparams": digest, "overrides": plain({**that_matter(overrides), "seed": seed})}
            jobs.append(Job(f"without fold {k + 1}, seed {seed}", [*command, *arguments], run, record, NAME))
    return jobs


def share_clips_out(
    folder: Path, options: Namespace, hparams: Mapping[str, Any]
) -> tuple[Manifest, LabelSets, Vocabulary, np.ndarray]:
    """Prepares the data, and writes what each run trains on; returns the training clips, and the fold of each, from 0 on.

    In a folder that has been used the folds must be what they were.
    """
    note = folder / f"{NAME}.json"
    before = read_json(note)
    with put_back_on_error(sorted(folder.glob("*.csv")) if before else []):
        vocabulary = prepare(hparams)
        manifest = Manifest.from_file(hparams["train_annotation"], hparams["data_folder"])
        labels = manifest.label_sets(vocabulary)
        said = {"folds": options.folds, "group": options.group, "clips": manifest.digest(("ID", "labels"))}
        groups = groups_of(manifest, options.group)
        if groups.max() + 1 < options.folds:
            raise InputError(f"{manifest.source}: {groups.max() + 1} groups of clips cannot be shared out to {options.folds} folds")
        parts = [1 / options.folds] * options.folds
        folds = share_out(labels.to_sparse(len(vocabulary)), groups, parts, train=None)
        said["split"] = hashlib.sha256(folds.astype(np.int64).tobytes()).hexdigest()
        if before is not None and (keys := [key for key, value in said.items() if before.get(key) != value]):
            what = {
                "folds": f"it has {before.get('folds')} folds",
                "group": f"its groups are of --group={before.get('group')}",
                "clips": "the training annotation had other clips or labels",
                "split": "its clips are in other folds",
            }
            raise InputError(
                f"{folder}: was begun with other settings: {what[keys[0]]}. Choose another --output_folder, or delete that folder"
            )
    # first: what is written after it is of this split
    write_json(note, said)
    for k in range(options.folds):
        clips = Manifest(manifest.table.filter(pa.array(folds != k)), manifest.data_root, manifest.source)
        if before is None or not (fold_folder(folder, k) / "train.csv").exists():
            clips.to_csv(fold_folder(folder, k) / "train.csv")
    write_table(pa.table({"ID": manifest.table["ID"], "fold": folds + 1}), folder / "folds.csv")
    sizes = ", ".join(map(str, np.bincount(folds, minlength=options.folds)))
    print(f"{len(manifest)} training clips in {options.folds} folds: {sizes}", file=sys.stderr)
    return manifest, labels, vocabulary, folds


def groups_of(manifest: Manifest, group: str | None) -> np.ndarray:
    """Numbers the clips' groups from 0 on, `[clips]`; `group` is a column, or a regular expression, see `--help`.

    Example
    -------
    >>> clips = Manifest.from_columns(["a_1", "b_1", "a_2"], ["1.wav", "2.wav", "3.wav"], [1.0] * 3, [""] * 3)
    >>> groups_of(clips, "^(.)_").tolist(), groups_of(clips, None).tolist()
    ([0, 1, 0], [0, 1, 2])
    """
    columns = _columns(manifest.source)
    if group in columns or (group is None and "group" in columns):
        names = _column(manifest, group or "group")
        # a clip of which nothing is said is alone
        names = pc.if_else(pc.equal(names, ""), pc.binary_join_element_wise("", manifest.table["ID"].combine_chunks(), "\0"), names)
    elif group is None:
        names = manifest.paths()
    else:
        names = _in_ids(manifest, group, columns)
    return names.dictionary_encode().indices.to_numpy().astype(np.int64)


def _columns(source: str) -> list[str]:
    if Path(source).suffix != ".csv" or not Path(source).is_file():
        return []
    with pyarrow.csv.open_csv(source) as reader:
        return reader.schema.names


def _column(manifest: Manifest, name: str) -> pa.Array:
    options = pyarrow.csv.ConvertOptions(column_types={name: pa.string()}, include_columns=[name], strings_can_be_null=False)
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    values = pyarrow.csv.read_csv(manifest.source, parse_options=parse, convert_options=options)[name].combine_chunks()
    if len(values) != len(manifest):
        raise InputError(f"{manifest.source}: its column '{name}' has {len(values)} values for {len(manifest)} clips")
    return values


def _in_ids(manifest: Manifest, pattern: str, columns: Sequence[str]) -> pa.Array:
    """What a pattern's first group is in each ID."""
    ids, remedy = manifest.table["ID"].combine_chunks(), "such as '^(.{11})', the first 11 characters of an ID"
    try:
        if re.compile(pattern).groups < 1:
            named = f", nor a column of {manifest.source} ({', '.join(columns)})" if columns else ""
            raise InputError(f"--group: '{pattern}' is no regular expression with a group in parentheses{named}; {remedy}")
        # Arrow's own expressions, which have no lookarounds: nothing of so many IDs becomes a Python object
        found = pc.match_substring_regex(ids, pattern)
        names = pc.replace_substring_regex(ids, f"(?s)^.*?(?:{pattern}).*$", r"\1")
    except (re.error, pa.ArrowInvalid) as error:
        raise InputError(f"--group: '{pattern}' is not a regular expression that can be used here ({error}); {remedy}") from None
    row = pc.index(pc.and_(found, pc.not_equal(names, "")), False).as_py()
    if row >= 0:
        raise InputError(f"--group: '{pattern}' finds no group in the ID '{ids[row]}'; {remedy}")
    return names


def put_together(
    folder: Path, scores: Sequence[np.ndarray | None], folds: np.ndarray, manifest: Manifest, vocabulary: Vocabulary
) -> None:
    """Writes the scores of all clips, in the annotation's order, from those of each fold's."""
    with atomic_write(folder / SCORES) as temporary:
        together = new_array(temporary, (len(manifest), len(vocabulary)))
        for k, of_fold in enumerate(scores):
            assert of_fold is not None
            rows = np.flatnonzero(folds == k)
            for start in range(0, len(rows), ROWS_AT_ONCE):
                together[rows[start : start + ROWS_AT_ONCE]] = of_fold[start : start + ROWS_AT_ONCE]
        together.flush()
        # which would say that they are one tagger's
        (folder / SCORES).with_suffix(".json").unlink(missing_ok=True)
        (folder / SCORES).unlink(missing_ok=True)
        write_clips(folder, manifest.table["ID"], vocabulary)
