"""What label enhancement is worth where the truth is known: trainings on noisy, enhanced and clean labels of the embedded data set.

    python benchmarks/label_enhancement_training.py --folder=results/label_enhancement

Training labels are taken away at random (two kinds of error, see `psla_sb.dataio.mini`). For each seed a tagger is trained on
what is left; it is the teacher that enhances these labels; others are trained on the enhanced and on the true labels. All are
scored on the true labels of the evaluation clips. Prints which part of the added labels is right and which part of the missing
ones is back, next to the same for as many candidates drawn at random, and the mAP of each training.

Nine runs of hparams/mini.yaml: an hour or two on two cores. Interrupted, the same command goes on. Options that `--help` does not
list are passed on to the recipe, such as --number_of_epochs=10.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np

from psla_sb.checkpoints.run_folder import read_results
from psla_sb.prepare.mini_audioset import write_mini_audioset

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "AudioSet"
sys.path.insert(0, str(RECIPE))
from audioset_prepare import prepare_audioset  # noqa: E402 - lies beside the recipe's scripts

FIGURES = ("weight_average", "ensemble")


def run(script, log, *arguments, **overrides):
    """Run a script of the recipe; its output goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(RECIPE / script), "hparams/mini.yaml", *arguments]
    with open(log, "a") as file:
        subprocess.run([*command, *(f"--{key}={value}" for key, value in overrides.items())], check=True, stdout=file, stderr=file)


def main():
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="where data and runs are written, and looked for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--clips", type=int, default=500, help="for training (default: %(default)s)")
    parser.add_argument("--type1-rate", type=float, default=0.3, help="of leaf classes left out (default: %(default)s)")
    parser.add_argument("--type2-rate", type=float, default=0.3, help="of ancestors left out (default: %(default)s)")
    parser.add_argument("--threshold", nargs="+", default=["mean", "median", "25", "10", "5"], help="the student takes the first")
    args, passed_on = parser.parse_known_args()
    folder = args.folder.resolve()
    data = write_mini_audioset(folder / "data", args.clips, type1_rate=args.type1_rate, type2_rate=args.type2_rate)
    for name, segments in (("noisy", "balanced_train_segments.csv"), ("clean", "balanced_train_segments_clean.csv")):
        prepare_audioset(data, folder / f"{name}.csv", [segments], folder / f"{name}_eval.csv", ["eval_segments.csv"])
    common = {"data_folder": data, "skip_prep": True, "valid_annotation": folder / "clean_eval.csv"}
    precision, mended = {}, {}
    for seed in args.seeds:
        noisy, labels = folder / f"noisy_{seed}", folder / f"labels_{seed}"
        annotations = {
            "noisy": folder / "noisy.csv",
            "enhanced": labels / f"train_enhanced_{args.threshold[0]}.csv",
            "clean": folder / "clean.csv",
        }
        for name, annotation in annotations.items():
            if name == "enhanced" and not (labels / "summary.csv").exists():
                settings = {**common, "train_annotation": annotations["noisy"], "teacher": noisy, "out": labels}
                options = [*passed_on, "--threshold", *args.threshold]
                run("enhance_labels.py", folder / "log.txt", *options, clean=folder / "clean.csv", **settings)
            output = folder / f"{name}_{seed}"
            if "evaluation" not in read_results(output):
                settings = {**common, "train_annotation": annotation, "output_folder": output, "seed": seed}
                run("train.py", folder / "log.txt", *passed_on, **settings)
            for figure in FIGURES:
                precision.setdefault((name, figure), []).append(read_results(output)["evaluation"][figure]["mAP"])
        with open(labels / "summary.csv", newline="") as file:
            for row in csv.DictReader(file):
                mended.setdefault(row.pop("threshold"), []).append({key: float(value) for key, value in row.items()})

    print(f"{args.clips} clips, error rates {args.type1_rate} and {args.type2_rate}, {len(args.seeds)} seeds: {args.seeds}\n")
    print(f"{'threshold':12}{'added':>8}{'precision':>11}{'by chance':>11}{'recall':>8}{'by chance':>11}   (means over the seeds)")
    for threshold, rows in mended.items():
        mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
        print(f"{threshold:12}{mean['labels_added']:8.0f}{mean['precision']:11.3f}{mean['chance_precision']:11.3f}", end="")
        print(f"{mean['recall']:8.3f}{mean['chance_recall']:11.3f}")
    print(f"\n{'labels':12}{'mAP of':18}{'mean':>8}   of each seed")
    for (name, figure), values in precision.items():
        print(f"{name:12}{figure:18}{np.mean(values):8.4f}   {'  '.join(f'{value:.4f}' for value in values)}")


if __name__ == "__main__":
    main()
