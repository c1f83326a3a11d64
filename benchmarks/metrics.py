"""Times average precision and ROC area of all classes against a loop over scikit-learn, on data like AudioSet's.

python benchmarks/metrics.py --clips 20000 --classes 527
"""

import argparse
import time
import warnings

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from psla_sb import metrics


def audioset_like(n_clips, n_classes, labels_per_clip, rng):
    """(scores float32, targets float32), both [clips, classes]: frequent and rare classes, positives that score higher."""
    prior = 1 / np.arange(1, n_classes + 1) ** 0.7
    prior *= labels_per_clip / prior.sum()
    targets = (rng.random((n_clips, n_classes)) < prior).astype(np.float32)
    logits = rng.standard_normal((n_clips, n_classes), dtype=np.float32) + 2 * targets - 3
    return 1 / (1 + np.exp(-logits)), targets


def sklearn_loop(scores, targets):
    """(AP, AUC), each [classes]."""
    classes = range(scores.shape[1])
    ap = [average_precision_score(targets[:, c], scores[:, c]) for c in classes]
    return np.array(ap), np.array([roc_auc_score(targets[:, c], scores[:, c]) for c in classes])


def psla_sb_separately(scores, targets):
    """(AP, AUC), each [classes], from one public function each."""
    return metrics.average_precision(scores, targets), metrics.roc_auc(scores, targets)


def best_time(function, n_times, *arguments):
    """(seconds of the fastest call, its result)."""
    seconds = []
    for _ in range(n_times):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--labels-per-clip", type=float, default=2.5)
    parser.add_argument("--repeats", type=int, default=3, help="of our own functions; the fastest counts")
    args = parser.parse_args()

    scores, targets = audioset_like(args.clips, args.classes, args.labels_per_clip, np.random.default_rng(0))
    print(f"{args.clips} clips x {args.classes} classes, {targets.sum() / args.clips:.2f} labels a clip, float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without a positive clip
        reference, (ap, auc) = best_time(sklearn_loop, 1, scores, targets)
    print(f"scikit-learn, average_precision_score + roc_auc_score per class: {reference:7.3f} s")
    seconds, (our_ap, our_auc) = best_time(psla_sb_separately, args.repeats, scores, targets)
    print(f"psla_sb, average_precision + roc_auc:                           {seconds:7.3f} s, {reference / seconds:.1f} x")
    seconds, _ = best_time(metrics.summarize, args.repeats, scores, targets)
    print(f"psla_sb, summarize (mAP, mAUC, d', loss):                       {seconds:7.3f} s, {reference / seconds:.1f} x")
    difference = max(np.nanmax(np.abs(our_ap - ap)), np.nanmax(np.abs(our_auc - auc)))
    print(f"largest difference of a class: {difference:.1e}")


if __name__ == "__main__":
    main()
