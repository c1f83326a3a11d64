"""`main`: the one body behind every recipe's `enhance_labels.py`: a teacher's scores -> enhanced annotations and what came of it.

What it writes is in `--help`; the rules are in `psla_sb.labels.enhancement`, the tables in `psla_sb.labels.report`.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.run_opts import RunOptions

from psla_sb import add_version
from psla_sb.aggregation.scoring import score
from psla_sb.dataio.bad_clips import audio_check
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment import launch
from psla_sb.experiment.hparams import crop_of, load_hparams, prepare
from psla_sb.files import atomic_write
from psla_sb.labels.enhancement import candidate_matrix, class_thresholds, enhance, warn_of_classes_without_clips
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.report import audit, audit_table, class_table, clip_table, mended, mended_by_chance, pair_table
from psla_sb.labels.teacher_scores import SCORES, new_array, write_clips
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import MeanScores
from psla_sb.prepare.official_files import fetch_metadata

DESCRIPTION = """\
Scores the training clips of a recipe with a trained tagger, and adds the parents and children that annotators left out and that
the tagger hears. Interrupted, the same command goes on.

Into --out it writes scores.npy (float32, [clips, classes]), ids.csv and class_labels_indices.csv, which the recipe's
`label_enhancement` reads, and for each threshold, such as mean:
  train_enhanced_mean.csv  the training annotation with the enhanced labels
  classes_mean.csv         clips of each class before and after, and its threshold
  pairs_mean.csv           how often which carried label brought which other one
  clips_mean.csv           the 100 clips with most additions
  labels_mean.png          a picture of the classes with most additions
and summary.csv. With --audit it writes audit.csv only, and needs no teacher."""
# Rows that are averaged at a time: some 20 MB for each teacher, with AudioSet's classes.
ROWS_AT_ONCE = 10_000
AUDIT_ROWS = 20


def main(recipe: str, arguments: list[str] | None = None, read_labels: Callable[[str], Manifest] = Manifest.from_file) -> None:
    """Runs a recipe's `enhance_labels.py`; `read_labels` reads what `--clean` names. See `psla_sb.experiment.launch.main`.

    Example
    -------
    >>> main("recipes/AudioSet/enhance_labels.py", ["hparams/nothing.yaml", "--audit"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        usage="%(prog)s hparams/RECIPE.yaml --teacher SOURCE [options] [SpeechBrain's run options] [--KEY=VALUE overrides]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version(parser)
    add = parser.add_argument
    add("--teacher", metavar="SOURCE", action="append", help="what --model of psla-tag takes; several: their mean")
    add("--threshold", nargs="+", type=threshold_kind, default=["mean"], help="mean, median, percentiles (default: mean)")
    add("--types", nargs="+", choices=["I", "II"], default=["I", "II"], help="I: children, II: ancestors (default: both)")
    add("--out", metavar="FOLDER", help="default: enhanced_labels in output_folder")
    add("--ontology", metavar="FILE", help="default: ontology.json in data_folder")
    add("--labels", metavar="FILE", help="class list of a .pth teacher (default: the recipe's)")
    add("--clean", metavar="FILE", help="true labels of the training clips, if known: says how many errors were mended")
    trust = "a module whose classes the teacher may be made of; repeatable"
    add("--trust", metavar="MODULE", action="append", default=[], help=trust)
    add("--audit", action="store_true", help="only count which labels lack parents or children")
    options, rest = parser.parse_known_args(arguments)
    if not options.teacher and not options.audit:
        parser.error("needs --teacher, or --audit")
    rest += [f"--trust={module}" for module in options.trust]
    launch.main(recipe, functools.partial(run, options, read_labels), rest)


def threshold_kind(text: str) -> str | float:
    """Reads a threshold as the command line gives it.

    Example
    -------
    >>> threshold_kind("mean"), threshold_kind("25")
    ('mean', 25.0)
    """
    if text in ("mean", "median"):
        return text
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= 100:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not mean, median or a percentile from 0 to 100")


def run(
    options: argparse.Namespace,
    read_labels: Callable[[str], Manifest],
    hparams_file: str | Path,
    run_opts: RunOptions,
    overrides: dict[str, Any],
) -> None:
    """Does what the command line, of which `options` are our own part, asks for."""
    run_opts = launch.start_processes(run_opts)
    # the recipe's own encoder is not used: nothing is downloaded for it
    hparams = load_hparams(hparams_file, overrides, if_there={"pretrained": None})
    vocabulary = prepare(hparams)
    manifest = Manifest.from_file(hparams["train_annotation"], hparams["data_folder"])
    labels = manifest.label_sets(vocabulary)
    file = options.ontology or Path(hparams["data_folder"]) / "ontology.json"
    if options.ontology is None:
        run_on_main(fetch_metadata, [[file]])
    ontology = Ontology.from_json(file)
    folder = Path(options.out or Path(hparams["output_folder"]) / "enhanced_labels")
    if options.audit:
        if if_main_process():
            write_audit(audit_table(audit(labels, vocabulary, ontology), vocabulary), folder)
        return
    clean = None
    if options.clean is not None:
        truth = read_labels(options.clean)
        clean = truth.label_sets(vocabulary).take(manifest.rows_in(truth.table["ID"], options.clean))
    # before hours of scoring
    if not candidate_matrix(vocabulary, ontology, options.types).any():
        raise InputError(f"the ontology relates none of the {len(vocabulary)} classes to another; is it that of this data set?")
    scores = teacher_scores(options.teacher, manifest, vocabulary, folder, hparams, run_opts, options.labels)
    if scores is None:
        return
    warn_of_classes_without_clips(labels, vocabulary)
    summary = [
        report(manifest, labels, scores, vocabulary, ontology, kind, options.types, folder, clean) for kind in options.threshold
    ]
    write_table(pa.Table.from_pylist(summary), folder / "summary.csv")
    print("\n".join(_lines(summary)) + f"\nWritten into {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def teacher_scores(
    teachers: Sequence[str],
    manifest: Manifest,
    vocabulary: Vocabulary,
    folder: Path,
    hparams: Mapping[str, Any],
    run_opts: Mapping[str, Any],
    labels: str | None = None,
) -> np.ndarray | None:
    """Scores clips, and writes `scores.npy` and what these are of; returns the scores, float32 `[clips, classes]`, memory-mapped.

    Of several teachers the mean of the scores is taken. `labels` is the class list of teachers that are checkpoints of the
    published code, by default the recipe's.
    """
    one = len(teachers) == 1
    members = {Path(SCORES).stem: teachers[0]} if one else {f"teacher_{i}": source for i, source in enumerate(teachers, 1)}
    loader = {"batch_size": hparams["valid_batch_size"], "num_workers": hparams["num_workers"]}
    each = score(
        members,
        manifest,
        vocabulary,
        folder,
        **loader,
        run_opts=run_opts,
        labels=labels or hparams["class_list"],
        trust=hparams.get("trust", ()),
        crop=crop_of("eval_crop", hparams),
        check=audio_check(hparams.get("on_bad_audio", "error"), folder, "train", len(manifest)),
    )
    if if_main_process():
        if not one:
            # what a single teacher left there is no longer what the scores are made from
            (folder / SCORES).with_suffix(".json").unlink(missing_ok=True)
            _write_mean(list(each.values()), folder / SCORES)
        write_clips(folder, manifest.table["ID"], vocabulary)
        return np.load(folder / SCORES, mmap_mode="r")
    return None


def _write_mean(arrays: Sequence[np.ndarray], path: Path) -> None:
    with atomic_write(path) as temporary:
        mean = new_array(temporary, arrays[0].shape)
        for start in range(0, len(mean), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scores = MeanScores()
            for array in arrays:
                mean[rows] = scores.add(array[rows])
        mean.flush()


def report(
    manifest: Manifest,
    labels: LabelSets,
    scores: np.ndarray,
    vocabulary: Vocabulary,
    ontology: Ontology,
    kind: str | float,
    types: Sequence[str],
    folder: Path,
    clean: LabelSets | None = None,
) -> dict[str, Any]:
    """Enhances the labels with one threshold, writes the annotation, the tables and the picture; returns a row of the summary."""
    name = kind if isinstance(kind, str) else f"{kind:g}"
    thresholds = class_thresholds(scores, labels, kind)
    enhanced = enhance(labels, scores, vocabulary, ontology, thresholds, types)
    manifest.with_labels(enhanced, vocabulary).to_csv(folder / f"train_enhanced_{name}.csv")
    classes = class_table(labels, enhanced, thresholds, vocabulary)
    write_table(classes, folder / f"classes_{name}.csv")
    write_table(pair_table(labels, enhanced, vocabulary, ontology, types), folder / f"pairs_{name}.csv")
    write_table(clip_table(manifest, labels, enhanced, vocabulary), folder / f"clips_{name}.csv")
    # matplotlib is slow to import
    from psla_sb.plots.enhancement import label_changes

    before, after = classes["before"].to_numpy(), classes["after"].to_numpy()
    title = f"Label enhancement of {Path(manifest.source).name} (threshold: {name}, types: {' and '.join(types)})"
    label_changes(vocabulary.names, before, after, folder / f"labels_{name}.png", title)
    row = {"threshold": name, "labels_before": int(before.sum()), "labels_added": int((after - before).sum())}
    row["clips_changed"] = int((np.diff(enhanced.offsets) > np.diff(labels.offsets)).sum())
    if clean is not None:
        found = mended(labels, enhanced, clean), mended_by_chance(labels, enhanced, clean, vocabulary, ontology, types)
        for what, (precision, recall) in zip(("", "chance_"), found, strict=True):
            row |= {f"{what}precision": float(precision), f"{what}recall": float(recall)}
    return row


def write_audit(table: pa.Table, folder: Path) -> None:
    """Writes `audit.csv`, and prints the classes with most gaps."""
    write_table(table, Path(folder) / "audit.csv")
    print(f"{'clips':>10}{'without a parent':>18}{'without any child':>19}  class")
    for row in table.slice(0, AUDIT_ROWS).to_pylist():
        print(f"{row['clips']:10}{row['without_parent']:18}{row['without_child']:19}  {row['name']}")
    print(f"Every class is in {Path(folder) / 'audit.csv'}")


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table as CSV, whole or not at all."""
    with atomic_write(path) as temporary:
        pyarrow.csv.write_csv(table, temporary)


def _lines(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The summary as text; what is known only with true labels is in the last columns."""
    names = list(summary[0])
    yield "  ".join(f"{name:>16}" for name in names)
    for row in summary:
        yield "  ".join(f"{value:16.3f}" if isinstance(value, float) else f"{value:>16}" for value in row.values())
