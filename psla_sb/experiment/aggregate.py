"""`main`: the body of every recipe's `aggregate.py`: trained models -> figures of each, of their ensemble, of their mean.

The YAML file, `hparams/aggregate.yaml` of a recipe, says which models and on which clips.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import speechbrain as sb
from speechbrain.utils.distributed import if_main_process, infer_device, run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from psla_sb.aggregation.averaging import average_weights, update_batch_norm
from psla_sb.aggregation.members import export_ensemble, find_members, on_cpu, why_no_average
from psla_sb.aggregation.report import ensemble_table, figures_of, greedy_selection, write_classes
from psla_sb.aggregation.scoring import front_end, score
from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import CLASSES
from psla_sb.checkpoints.sources import Snapshot, Source, open_source
from psla_sb.checkpoints.tagger_folder import write_tagger
from psla_sb.checkpoints.weights import load_into, trained_modules
from psla_sb.dataio.bad_clips import audio_check
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment import launch
from psla_sb.experiment.hparams import crop_of, load_hparams
from psla_sb.files import atomic_write, wait_for, write_json
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.teacher_scores import stamp
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import summarize
from psla_sb.prepare.annotations import official_counts

logger = get_logger(__name__)

REQUIRED_KEYS = (
    *("runs", "members", "first_epoch", "output_folder", "annotation", "class_list", "data_folder", "select"),
    *("selection_annotation", "batch_norm_annotation", "export", "batch_size", "num_workers"),
)
# Clips from which batch-norm statistics are estimated: more change no digit that matters.
NORM_CLIPS = 10_000


def main(recipe: str, arguments: list[str] | None = None) -> None:
    """Runs a recipe's `aggregate.py`; see `psla_sb.experiment.launch.main`.

    Example
    -------
    >>> main("recipes/AudioSet/aggregate.py", ["hparams/aggregate.yaml", "--runs=[nowhere]"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    launch.main(recipe, aggregate, arguments)


def aggregate(hparams_file: str | Path, run_opts: RunOptions, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """Runs one aggregation, from the YAML file to the figures, which it returns as `ensemble.json` has them."""
    run_opts = launch.start_processes(run_opts)
    hparams = load_hparams(hparams_file, overrides, REQUIRED_KEYS, ("output_folder",))
    crop, trust = crop_of("eval_crop", hparams), hparams.get("trust", ())
    paths = find_members(hparams["runs"], hparams["members"], hparams["first_epoch"])
    vocabulary, manifest, selection, class_list = _open_annotations(hparams)
    folder = Path(hparams["output_folder"])
    if (folder / "results.json").exists():
        raise InputError(
            f"{folder}: the output folder of a training run; choose another --output_folder, whose files may be replaced"
        )
    sources = {name: open_source(path, class_list, trust) for name, path in paths.items()}
    # loaded here, so that one that cannot be is refused before the others are scored
    front_ends = {front_end(on_cpu(source)) for source in sources.values()}
    if hparams["export"] and len(front_ends) > 1:
        raise InputError("members have different front ends, so their ensemble cannot be one tagger: pass --export=False")
    sb.create_experiment_directory(str(folder), hparams_file, overrides, save_env_desc=False)
    run_on_main(launch.write_environment, [folder])
    for signum in launch.STOP_SIGNALS:
        # what is scored is on disk at once: there is nothing more to save
        signal.signal(signum, launch.stop)
    device = run_opts.device or infer_device()
    options = {
        "batch_size": hparams["batch_size"],
        "num_workers": hparams["num_workers"],
        "run_opts": {"device": device, "precision": run_opts.eval_precision},
        "crop": crop,
    }

    def check(name: str, clips: Manifest) -> Callable:
        return audio_check(hparams.get("on_bad_audio", "error"), folder, name, len(clips))

    chosen, picked = list(sources), None
    if selection is not None:
        scores = score(sources, selection, vocabulary, folder / "selection_scores", check=check("selection", selection), **options)
        targets = selection.targets(vocabulary)
        order, precisions = run_on_main(greedy_selection, [[scores[name] for name in sources], targets])
        chosen = [chosen[i] for i in order]
        best = max(sources, key=lambda name: summarize(scores[name], targets)["mAP"])
        picked = {"annotation_file": selection.source, "mAP": precisions, "best_single": best}
    members = [sources[name] for name in chosen]
    reason, scored = why_no_average(members), dict(sources)
    if reason is None:
        average = folder / "weight_average"
        for file in run_on_main(_write_average, [members, hparams, manifest.data_root, average, device]):
            wait_for(file)
        scored["weight_average"] = open_source(average, trust=trust)
    scores = score(scored, manifest, vocabulary, folder / "scores", check=check("evaluation", manifest), **options)
    if not if_main_process():
        return None
    targets = manifest.targets(vocabulary)
    report, ensemble = figures_of(scores, chosen, targets)
    report = {
        "annotation_file": manifest.source,
        "n_clips": len(manifest),
        **stamp(manifest, vocabulary),
        "sources": {name: str(path) for name, path in paths.items()},
        "selection": picked,
        **report,
    }
    if reason is not None:
        report["weight_average"] = {"none": reason}
    if picked is not None:
        report["best_single"] = picked["best_single"]
    with atomic_write(folder / "ensemble.npy") as temporary:
        np.save(temporary, ensemble.astype(np.float32))
    write_json(folder / "ensemble.json", report)
    manifest.to_clips_csv(folder / "clips.csv")
    vocabulary.to_csv(folder / CLASSES)
    write_classes(
        folder / "classes.csv", vocabulary, targets, ensemble, scores[report["best_single"]], official_counts(manifest, vocabulary)
    )
    if hparams["export"]:
        export_ensemble(folder / "tagger", members, vocabulary)
    # matplotlib is slow to import, and only this process draws
    from psla_sb.plots.ensemble import ensemble_curve

    singles = [report["members"][name]["mAP"] for name in chosen]
    so_far = [figures["mAP"] for figures in report["so_far"]]
    ensemble_curve(singles, so_far, folder / "ensemble.png", report["weight_average"].get("mAP"))
    logger.info("\n%s", ensemble_table(report))
    return report


def _open_annotations(hparams: Mapping[str, Any]) -> tuple[Vocabulary, Manifest, Manifest | None, str]:
    """Classes, clips to report on, clips to select on, and the file with the classes.

    What the YAML file does not say is as in the first run.
    """
    first = str(hparams["runs"][0] if isinstance(hparams["runs"], list) else hparams["runs"])
    source = open_source(first)
    settings, class_list = {}, hparams["class_list"]
    if isinstance(source, Snapshot) and (source.run / CLASSES).is_file() and source.hparams_file.is_file():
        settings = read_yaml(source.hparams_file)
        class_list = class_list or str(source.run / CLASSES)
    data_folder = hparams["data_folder"] or settings.get("data_folder")
    annotation = hparams["annotation"] or settings.get("test_annotation") or settings.get("valid_annotation")
    if annotation is None or class_list is None:
        raise InputError(f"{first} is not a run that says on what it was evaluated: pass --annotation=... and --class_list=...")
    vocabulary, manifest = Vocabulary.from_csv(class_list), Manifest.from_file(annotation, data_folder)
    if hparams["select"] is None:
        return vocabulary, manifest, None, class_list
    if hparams["select"] != "greedy":
        raise InputError(f"select must be null or greedy, not {hparams['select']!r}")
    selection_annotation = hparams["selection_annotation"] or settings.get("valid_annotation")
    if selection_annotation is None:
        raise InputError("select=greedy needs --selection_annotation=..., clips on which nothing is reported")
    selection = Manifest.from_file(selection_annotation, data_folder)
    common = pc.sum(pc.is_in(selection.places(), value_set=pa.array(manifest.places()))).as_py()
    if common:
        raise InputError(
            f"{selection.source}: {common} of its clips are also in {manifest.source}, which is reported on, and what is picked on "
            "clips looks better on them than it is. Pass another --selection_annotation, such as a validation set"
        )
    return vocabulary, manifest, selection, class_list


def _write_average(
    sources: Sequence[Source], hparams: Mapping[str, Any], data_folder: str | None, folder: Path, device: str
) -> list[Path]:
    """Writes the mean of members' weights as the folder of a tagger, with new batch-norm statistics if asked for.

    Returns the folder's files.
    """
    tagger = AudioTagger.from_source(sources[0], run_opts={"device": device})
    load_into(trained_modules(tagger.mods), average_weights(sources))
    if hparams["batch_norm_annotation"] is not None:
        clips = Manifest.from_file(hparams["batch_norm_annotation"], data_folder)
        rows = np.linspace(0, len(clips) - 1, min(NORM_CLIPS, len(clips))).round().astype(int).tolist()
        size = hparams["batch_size"]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        loader = clip_loader(clips, tagger.hparams.sample_rate, tagger.n_samples, batches, hparams["num_workers"])
        update_batch_norm(tagger.mods, loader, tagger.n_samples)
    write_tagger(folder, sources[0].definitions, {**vars(tagger.hparams), **tagger.mods}, sources[0].vocabulary)
    return sorted(folder.iterdir())
