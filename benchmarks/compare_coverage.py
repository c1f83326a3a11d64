"""Counts how often the interval of a difference, from a random half of the clips, covers the difference on all clips.

Two generated systems, which share most of their errors; or two that `psla-compare` could compare:

    python benchmarks/compare_coverage.py --clips 4000 --classes 50
    python benchmarks/compare_coverage.py results/psla/1 results/psla/2
"""

import argparse
import math

import numpy as np
from metrics import audioset_like
from tqdm import trange

from psla_sb.aggregation.bootstrap import ClassFigures, bootstrap, interval, means
from psla_sb.aggregation.predictions import match, open_all
from psla_sb.metrics import average_precision, roc_auc


def two_systems(n_clips, n_classes, rng):
    """(scores of two systems, targets), [clips, classes] each: one hears as the other does, with more noise of its own."""
    scores, targets = audioset_like(n_clips, n_classes, 2.5, rng)
    logits = np.log(scores / (1 - scores))
    return [logits + noise * rng.standard_normal(logits.shape, dtype=np.float32) for noise in (0.5, 0.6)], targets


def figures(systems, targets):
    """{figure: [systems]}"""
    values = [np.stack([figure(one, targets) for one in systems])[:, None] for figure in (average_precision, roc_auc)]
    return {name: value[:, 0] for name, value in means(ClassFigures(*values)).items()}


def covers(value, resampled, whole, level):
    """Whether the interval of a half's value covers the value of the whole."""
    # A half drawn without replacement is nearer to its whole than n/2 independent clips are to where clips come from: its value's
    # variance around the whole's is theirs times 1 - n_drawn / n_whole = 1/2, the finite-population correction. The bootstrap knows
    # nothing of a whole, so its interval is right for the independent clips, and is made narrower by the root of 1/2 here.
    low, high = value + (np.array(interval(value, resampled, level)) - value) * math.sqrt(0.5)
    return low <= whole <= high


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("systems", nargs="*", metavar="[NAME=]PATH", help="two systems (default: generated ones)")
    parser.add_argument("--class_list", help="the class list of systems that have none beside them")
    parser.add_argument("--clips", type=int, default=4000, help="of generated systems (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=50, help="of generated systems (default: %(default)s)")
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--level", type=float, default=0.95)
    options = parser.parse_args()
    if len(options.systems) not in (0, 2):
        parser.error("give two systems, or none")

    rng = np.random.default_rng(0)
    if options.systems:
        matched = match(open_all(options.systems), options.class_list)
        systems, targets = matched.scores, matched.targets
    else:
        systems, targets = two_systems(options.clips, options.classes, rng)
    n_clips, n_classes = targets.shape
    whole = figures(systems, targets)
    covered = {(name, what): [] for name in whole for what in ("difference", "first")}
    for number in trange(options.halves, unit=" halves", disable=None):
        rows = rng.permutation(n_clips)[: n_clips // 2]
        half = [one[rows] for one in systems]
        values, resampled = figures(half, targets[rows]), means(bootstrap(half, targets[rows], options.resamples, seed=number))
        for name, value in values.items():
            apart, resampled_apart = value[1] - value[0], resampled[name][1] - resampled[name][0]
            covered[name, "difference"].append(covers(apart, resampled_apart, whole[name][1] - whole[name][0], options.level))
            covered[name, "first"].append(covers(value[0], resampled[name][0], whole[name][0], options.level))

    error = math.sqrt(options.level * (1 - options.level) / options.halves)
    print(f"{options.halves} halves of {n_clips} clips x {n_classes} classes, {options.resamples} resamples of each")
    print(f"intervals of {options.level:.0%} should cover in {options.level:.1%} +- {error:.1%} of the halves")
    for name, value in whole.items():
        apart, alone = (np.mean(covered[name, what]) for what in ("difference", "first"))
        print(f"{name:8} difference {value[1] - value[0]:+.4f}: covered in {apart:.1%}")
        print(f"{'':8} the first's own {value[0]:.4f}: covered in {alone:.1%}")


if __name__ == "__main__":
    main()
