"""Counts how often intervals as of `psla-compare` cover what they should, and plain percentiles beside them.

From random halves of the clips: the value on all clips; of two generated systems, which share most of their errors, or of two that
`psla-compare` could compare. With --new, from new generated clips every time: the mean value of many such sets.

    python benchmarks/compare_coverage.py --clips 4000 --classes 50
    python benchmarks/compare_coverage.py results/psla/1 results/psla/2
    python benchmarks/compare_coverage.py --new --clips 1000 --classes 150
"""

import argparse
import math

import numpy as np
from metrics import audioset_like
from tqdm import trange

from psla_sb.aggregation.bootstrap import ClassFigures, bootstrap, interval, means
from psla_sb.aggregation.predictions import match, open_all
from psla_sb.metrics import average_precision, roc_auc

# A half drawn without replacement is nearer to its whole than n/2 independent clips are to where clips come from: the variance of
# its value around the whole's is theirs times 1 - n_drawn / n_whole = 1/2, the finite-population correction. The bootstrap knows
# nothing of a whole, so its interval is right for independent clips, and for a half is made narrower by the root of 1/2.
HALF = math.sqrt(0.5)
TRUTH_SETS = 600


def two_systems(n_clips, n_classes, rng):
    """(scores of two systems, targets), [clips, classes] each: one hears as the other does, with more noise of its own."""
    scores, targets = audioset_like(n_clips, n_classes, 2.5, rng)
    logits = np.log(scores / (1 - scores))
    return [logits + noise * rng.standard_normal(logits.shape, dtype=np.float32) for noise in (0.5, 0.6)], targets


def with_difference(values):
    """{(figure, of what): the first system's, or the second's less the first's} of {figure: [systems, ...]}."""
    first = {(name, "first"): value[0] for name, value in values.items()}
    return first | {(name, "difference"): value[1] - value[0] for name, value in values.items()}


def figures(systems, targets):
    """What is to be covered, a number each."""
    values = [np.stack([figure(one, targets) for one in systems])[:, None] for figure in (average_precision, roc_auc)]
    return {key: value[0] for key, value in with_difference(means(ClassFigures(*values))).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("systems", nargs="*", metavar="[NAME=]PATH", help="two systems (default: generated ones)")
    parser.add_argument("--class_list", help="the class list of systems that have none beside them")
    parser.add_argument("--new", action="store_true", help="draw new clips in place of halves")
    parser.add_argument("--clips", type=int, default=4000, help="of generated systems (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=50, help="of generated systems (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=200, help="of halves, or of new clips (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--level", type=float, default=0.95)
    options = parser.parse_args()
    if len(options.systems) not in (0, 2) or (options.systems and options.new):
        parser.error("give two systems, or none; with --new none")

    rng = np.random.default_rng(0)
    if options.systems:
        matched = match(open_all(options.systems), options.class_list)
        systems, targets = matched.scores, matched.targets
    else:
        systems, targets = two_systems(options.clips, options.classes, rng)
    n_clips, n_classes = targets.shape
    whole = figures(systems, targets)
    if options.new:
        sets = [figures(*two_systems(n_clips, n_classes, rng)) for _ in range(TRUTH_SETS)]
        whole = {key: np.mean([one[key] for one in sets]) for key in whole}
    covered = {key: [] for key in whole}
    tails = [(1 - options.level) / 2, (1 + options.level) / 2]
    for number in trange(options.draws, disable=None):
        if options.new:
            drawn, truth = two_systems(n_clips, n_classes, rng)
        else:
            rows = rng.permutation(n_clips)[: n_clips // 2]
            drawn, truth = [one[rows] for one in systems], targets[rows]
        resampled = with_difference(means(bootstrap(drawn, truth, options.resamples, seed=number)))
        for key, value in figures(drawn, truth).items():
            both = np.array([interval(value, resampled[key], options.level), np.quantile(resampled[key], tails)])
            low, high = (value + (both - value) * (1 if options.new else HALF)).T
            covered[key].append((low <= whole[key]) & (whole[key] <= high))

    error = math.sqrt(options.level * (1 - options.level) / options.draws)
    what = f"sets of {n_clips} new clips" if options.new else f"random halves of {n_clips} clips"
    print(f"{options.draws} {what} x {n_classes} classes, {options.resamples} resamples of each")
    print(f"intervals should cover in {options.level:.1%} +- {error:.1%}")
    print(f"{'':22}{'value':>9}{'covered':>10}{'by plain percentiles':>22}")
    for (name, which), value in whole.items():
        own, plain = np.mean(covered[name, which], axis=0)
        print(f"{name:10}{which:12}{value:+9.4f}{own:10.1%}{plain:22.1%}")


if __name__ == "__main__":
    main()
