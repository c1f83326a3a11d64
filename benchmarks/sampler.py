"""Times class weights and an epoch's draws at the size of AudioSet, and at ten times that.

python benchmarks/sampler.py
"""

import argparse
import time
from collections import deque

import numpy as np

from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.labels.label_sets import LabelSets


def audioset_like(n_clips, n_classes, rng):
    """`LabelSets` with 1 to 4 labels a clip (2.5 on average), frequent and rare classes."""
    offsets = np.zeros(n_clips + 1, np.int64)
    np.cumsum(rng.integers(1, 5, n_clips), out=offsets[1:])
    prior = np.cumsum(1 / np.arange(1, n_classes + 1) ** 0.7)
    return LabelSets(offsets, prior.searchsorted(rng.random(offsets[-1]) * prior[-1]).astype(np.int32))


def report(what, function):
    """Print the seconds that a call takes; return what it returns."""
    start = time.perf_counter()
    result = function()
    print(f"{what:<75} {time.perf_counter() - start:7.3f} s", flush=True)
    return result


def consume(iterable):
    deque(iterable, maxlen=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--many", type=int, default=20_000_000, help="rows of the large case")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = audioset_like(args.clips, args.classes, rng)
    print(f"{args.clips} clips, {len(labels.indices)} labels, {args.classes} classes")
    weights = report("class_balanced_weights", lambda: class_balanced_weights(labels, args.classes))
    sampler = BalancedSampler(weights)
    report("an epoch of draws, with replacement, iterated", lambda: consume(sampler))
    report("the same, without replacement", lambda: consume(BalancedSampler(weights, replacement=False)))
    batches = MixupBatchSampler(sampler, args.clips, args.batch_size)
    report(f"the same with replacement, in {len(batches)} batches with mixup partners", lambda: consume(batches))

    many = np.resize(weights, args.many)
    print(f"{args.many} rows")
    sampler = report("BalancedSampler", lambda: BalancedSampler(many))
    report("an epoch of draws, with replacement, iterated", lambda: consume(sampler))
    without = BalancedSampler(many, num_samples=200_000, replacement=False)
    report("200000 draws without replacement", lambda: consume(without))


if __name__ == "__main__":
    main()
