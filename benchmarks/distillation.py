"""Whether a student gains from the ensemble's scores: the model of a recipe, trained without and with them, over several seeds.

The runs without are also the teachers: the mean of the scores of all of them, on the training clips, teaches each student. A
student has the seed, and so the first weights and the draws, of one of the runs without. What is done is in the folder and is not
done again:

    python benchmarks/distillation.py --folder results/distillation
    python benchmarks/distillation.py --folder results/distillation --distillation_weight=3.0

Whatever is not an option here is an override of the recipe's YAML file. Takes about 2 * seeds times as long as `make demo`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "AudioSet"
REPORTED = ("weight_average", "ensemble", "last")


def call(script, hparams, **overrides):
    """Runs a recipe's script."""
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    subprocess.run([sys.executable, RECIPE / script, f"hparams/{hparams}.yaml", *arguments], check=True)


def train(folder, hparams, **overrides):
    """Trains a model, unless that is done; returns its figures."""
    results = folder / "results.json"
    if not results.exists() or "evaluation" not in json.loads(results.read_text()):
        call("train.py", hparams, output_folder=folder, **overrides)
    return json.loads(results.read_text())["evaluation"]


def aggregate(folder, runs, **overrides):
    """The figures of the ensemble of the weight averages of runs."""
    runs = "[" + ",".join(f'"{run}"' for run in runs) + "]"
    call("aggregate.py", "aggregate", runs=runs, members="average", output_folder=folder, **overrides)
    return json.loads((folder / "ensemble.json").read_text())["ensemble"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are, and go")
    parser.add_argument("--hparams", default="mini", help="the recipe (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    options, rest = parser.parse_known_args()
    overrides = dict(argument.removeprefix("--").split("=", 1) for argument in rest)
    weight = overrides.pop("distillation_weight", "1.0")
    folder = options.folder.resolve()
    overrides.setdefault("data_folder", folder / "data")

    runs = {seed: folder / f"alone_{seed}" for seed in options.seeds}
    alone = [train(run, options.hparams, seed=seed, **overrides) for seed, run in runs.items()]
    teacher = aggregate(folder / "ensemble", runs.values())
    aggregate(folder / "teacher", runs.values(), annotation=runs[options.seeds[0]] / "train.csv")
    scores = {"teacher_scores": folder / "teacher" / "ensemble.npy", "distillation_weight": weight}
    taught = [train(folder / f"taught_{weight}_{s}", options.hparams, seed=s, **scores, **overrides) for s in options.seeds]

    print(f"\nmAP over {len(options.seeds)} seeds, mean and standard deviation; distillation_weight {weight}")
    print(f"{'':16}{'alone':>18}{'taught':>18}{'difference of pairs':>24}")
    for name in REPORTED:
        columns = np.array([[one[name]["mAP"] for one in group] for group in (alone, taught)])
        cells = [*columns, columns[1] - columns[0]]
        texts = [f"{values.mean():.4f} +- {values.std(ddof=1) if len(values) > 1 else 0:.4f}" for values in cells]
        print(f"{name:16}{texts[0]:>18}{texts[1]:>18}{texts[2]:>24}")
    print(f"the teacher itself, the ensemble of {len(runs)} weight averages: {teacher['mAP']:.4f}")


if __name__ == "__main__":
    main()
