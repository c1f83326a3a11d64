"""How long label enhancement takes on a data set of AudioSet's size, and how much memory.

Writes made-up teacher scores (float16, memory-mapped, 2.1 GB at the default size) to a temporary folder, makes up an ontology and
an annotation, whose clips are in another order than the scores, and enhances it as a recipe does. The peak memory is that of the
whole process; libraries, annotation and labels are in the figure before.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.lib.format import open_memmap

from psla_sb.dataio.manifest import Manifest
from psla_sb.labels.enhancement import enhance_annotation
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.report import added_labels
from psla_sb.labels.teacher_scores import IDS, SCORES
from psla_sb.labels.vocabulary import Vocabulary

ROWS = 20_000


def make_classes(rng, n_classes):
    """A vocabulary, and entries of an ontology in which every class but the first has one parent, and one in ten has two."""
    mids = [f"/m/{i}" for i in range(n_classes)]
    children = [[] for _ in mids]
    for i in range(1, n_classes):
        for parent in rng.integers(0, i, size=1 + (rng.random() < 0.1)):
            children[parent].append(mids[i])
    entries = [{"id": mid, "name": mid, "child_ids": below} for mid, below in zip(mids, children, strict=True)]
    return Vocabulary(mids, mids), entries


def make_labels(rng, n_clips, n_classes):
    """One to four classes a clip, some far more frequent than others."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, size=n_clips))])
    prior = rng.permutation(1 / np.arange(1, n_classes + 1) ** 0.7)
    return LabelSets(offsets, rng.choice(n_classes, size=offsets[-1], p=prior / prior.sum()).astype(np.int32))


def write_scores(rng, path, label_sets, n_classes):
    """Low scores, higher ones where a clip carries the class."""
    n_clips = len(label_sets)
    open_memmap(path, mode="w+", dtype=np.float16, shape=(n_clips, n_classes)).flush()
    with open(path, "r+b") as file:
        file.seek(-2 * n_clips * n_classes, 2)
        for start in range(0, n_clips, ROWS):
            rows = np.arange(start, min(start + ROWS, n_clips))
            scores = 0.5 * rng.random((len(rows), n_classes), dtype=np.float32) ** 2
            scores += 0.2 * label_sets.to_multi_hot(rows, n_classes)
            file.write(scores.astype(np.float16).data)


def peak_memory():
    """The most memory this process has had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--threshold", default="mean", help="mean, median or a percentile")
    parser.add_argument("--folder", help="where the scores are written for the time of the run (default: the system's)")
    args = parser.parse_args()
    threshold = args.threshold if args.threshold.isalpha() else float(args.threshold)

    rng = np.random.default_rng(0)
    vocabulary, entries = make_classes(rng, args.classes)
    label_sets = make_labels(rng, args.clips, args.classes)
    ids = pa.array(np.arange(args.clips)).cast(pa.string())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scores, file = Path(folder) / SCORES, Path(folder) / "ontology.json"
        write_scores(rng, scores, label_sets, args.classes)
        pyarrow.csv.write_csv(pa.table({"ID": ids}), scores.with_name(IDS))
        file.write_text(json.dumps(entries))
        order = rng.permutation(args.clips)
        ids, label_sets = ids.take(pa.array(order)), label_sets.take(order)
        manifest = Manifest(pa.table({"ID": ids, "wav": ids, "labels": ids}))
        before, start = peak_memory(), time.perf_counter()
        enhanced = enhance_annotation(manifest, label_sets, vocabulary, folder, file, threshold)
        seconds, peak = time.perf_counter() - start, peak_memory()
    added = added_labels(label_sets, enhanced)[0].size
    print(f"{args.clips} clips x {args.classes} classes, {label_sets.indices.size} labels, {added} added")
    print(f"{seconds:.1f} s; peak memory of the process {peak:.0f} MB, {before:.0f} MB before")


if __name__ == "__main__":
    main()
