"""Whether a student gains from a teacher's scores: a recipe trained without and with them, over several seeds.

Two teachers, both ensembles:

* in-sample: the mean of the scores of the runs without a teacher, which have been trained on the clips that they score;
* out-of-fold: `out_of_fold.py`, whose taggers have not.

Each teaches one student of each seed with each weight. A student has the seed, and so the first weights and the draws, of one of
the runs without. What is done is in the folder and is not done again:

    python benchmarks/distillation.py --folder results/distillation --seeds 1 2 3 4 5 --weights 1 4 9 --jobs 2

Whatever is not an option here is an override of the recipe's YAML file, for all runs. Takes as long as
(1 + 2 * weights) * seeds + folds * teacher seeds runs of the recipe.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from psla_sb.experiment.differences import paired_difference
from psla_sb.experiment.jobs import cores_of_each

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "AudioSet"
ROW = "weight_average"


def call(script, hparams, *arguments, env=None, **overrides):
    """Runs a recipe's script."""
    given = [f"--{key}={value}" for key, value in overrides.items()]
    subprocess.run([sys.executable, RECIPE / script, f"hparams/{hparams}.yaml", *arguments, *given], check=True, env=env)


def is_done(folder):
    results = folder / "results.json"
    return results.exists() and "evaluation" in json.loads(results.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are, and go")
    parser.add_argument("--hparams", default="mini", help="the recipe (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 4.0, 9.0], help="distillation_weight (default: 1 4 9)")
    parser.add_argument("--folds", type=int, default=5, help="of the out-of-fold teacher (default: %(default)s)")
    parser.add_argument("--teacher-seeds", default="1,2", help="of each fold's taggers (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    options, rest = parser.parse_known_args()
    overrides = dict(argument.removeprefix("--").split("=", 1) for argument in rest)
    folder = options.folder.resolve()
    overrides.setdefault("data_folder", folder / "data")
    environment = {**os.environ, **cores_of_each(options.jobs)}

    def train_all(runs):
        """Trains what is not done; the first run alone, which makes the data."""
        to_do = [(run, more) for run, more in runs.items() if not is_done(run)]

        def train(job):
            run, more = job
            call("train.py", options.hparams, env=environment, output_folder=run, **overrides, **more)

        first = to_do[:1] if not (folder / "data").exists() else []
        list(map(train, first))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(train, to_do[len(first) :]))

    def figures(runs):
        return {
            more["seed"]: json.loads((run / "results.json").read_text())["evaluation"][ROW]["mAP"] for run, more in runs.items()
        }

    alone = {folder / f"alone_{seed}": {"seed": seed} for seed in options.seeds}
    train_all(alone)
    members = "[" + ",".join(f'"{run}"' for run in alone) + "]"
    annotation = folder / f"alone_{options.seeds[0]}" / "train.csv"
    ensemble = {"runs": members, "members": "average", "output_folder": folder / "in_sample", "annotation": annotation}
    call("aggregate.py", "aggregate", **ensemble)
    split = [f"--folds={options.folds}", f"--seeds={options.teacher_seeds}", f"--jobs={options.jobs}"]
    call("out_of_fold.py", options.hparams, *split, output_folder=folder / "out_of_fold", **overrides)
    teachers = {"in-sample": folder / "in_sample" / "ensemble.npy", "out-of-fold": folder / "out_of_fold"}

    students = {
        (name, weight): {
            folder / f"{name}_{weight:g}_{seed}": {"seed": seed, "teacher_scores": scores, "distillation_weight": weight}
            for seed in options.seeds
        }
        for name, scores in teachers.items()
        for weight in options.weights
    }
    train_all({run: more for runs in students.values() for run, more in runs.items()})

    own = figures(alone)
    print(f"\nmAP of the weight average over {len(own)} seeds; differences of runs of the same seed, with 95 % intervals")
    print(f"{'teacher':14}{'weight':>8}{'mAP':>18}{'difference':>14}{'interval':>22}")
    for name, weight, values in [("none", 0.0, own), *((*key, figures(runs)) for key, runs in students.items())]:
        numbers, pairs = np.array(list(values.values())), paired_difference(values, own)
        spread = f" +- {numbers.std(ddof=1):.3f}" if len(numbers) > 1 else ""
        cells = ["", ""]
        if name != "none":
            low_high = pairs["interval"]
            cells = [f"{pairs['mean']:+.3f}", "" if low_high is None else f"[{low_high[0]:+.3f}, {low_high[1]:+.3f}]"]
        print(f"{name:14}{weight:8g}{numbers.mean():11.3f}{spread:7}{cells[0]:>14}{cells[1]:>22}")


if __name__ == "__main__":
    main()
