"""What a run should be told of its settings: a schedule that it does not reach, clips that are never drawn, figures of others."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.identity import MAY_CHANGE, OPTIONS
from psla_sb.experiment.schedules import ExponentialLinearScheduler, WarmupDecayScheduler
from psla_sb.labels.label_sets import LabelSets
from psla_sb.prepare.annotations import official_counts_path

# Of the published set's labels, so that figures of the rest can be laid beside published ones: copies of AudioSet lack a tenth.
MOST_OF_THEM = 0.8
# They may change in a run's folder, but are part of a published setting.
OF_A_SETTING = {"number_of_epochs", "average_start", "average_every"}


def on_schedule(hparams: Mapping[str, Any], n_steps: int) -> Iterator[str]:
    """Says what a run of `n_steps` optimizer steps never reaches."""
    epochs, first = hparams["epoch_counter"].limit, hparams["average_start"]
    if first > epochs:
        yield f"average_start is {first}, but the last epoch is {epochs}: the weight average is that epoch alone."
    schedule = hparams["schedule"]
    if isinstance(schedule, WarmupDecayScheduler):
        if n_steps < schedule.warmup_steps:
            yield (
                f"The learning rate is still rising when the run ends: it has {n_steps} steps, warmup_steps is "
                f"{schedule.warmup_steps}."
            )
        zero = min(schedule.warmup_interval, schedule.warmup_steps)
        if 10 * zero > n_steps:
            yield f"The learning rate is 0 in the first {zero} of {n_steps} steps (warmup_interval)."
    if isinstance(schedule, ExponentialLinearScheduler) and epochs <= schedule.warmup_epochs:
        rises = schedule.warmup_epochs
        yield f"The learning rate is still rising when the run ends: it has {epochs} epochs, warmup_epochs is {rises}."


def on_labels(name: str, annotation: Manifest, labels: LabelSets, balanced: bool) -> Iterator[str]:
    """Says how many clips have no label; an `InputError` if that is all of them."""
    n_without = int((np.diff(labels.offsets) == 0).sum())
    if n_without == len(labels):
        raise InputError(
            f"{annotation.source}: none of its {n_without} clips has a label, so there is nothing to learn or to score"
        )
    if n_without and name == "train" and balanced:
        yield (
            f"{annotation.source}: {n_without} of {len(labels)} clips have no label; balanced sampling never draws them, "
            "except as partners of mixup (--balanced_sampling=False draws all clips)."
        )


def why_not_published(
    file: str | Path, overrides: Mapping[str, Any], run_opts: RunOptions, sets: Mapping[str, Manifest], epochs_to_go: int = 0
) -> str | None:
    """Says why published figures cannot be laid beside a run's: another setting, or far fewer clips; None if they can."""
    written = read_yaml(file)
    free = (MAY_CHANGE - OF_A_SETTING) | {"seed"}
    changed = [key for key, value in overrides.items() if key not in free and written.get(key) != value]
    # a file that was edited, and kept the figures
    now, published = {**written, **overrides}, written.get("published_with") or {}
    changed += [key for key, value in published.items() if key not in changed and now.get(key) != value]
    changed += [option for option in OPTIONS if option in run_opts.overridden_args]
    if changed:
        return f"{', '.join(changed)} differ{'s' * (len(changed) == 1)} from the published setting"
    if epochs_to_go > 0:
        return f"{epochs_to_go} epochs are not trained yet"
    for name, manifest in sets.items():
        path = official_counts_path(manifest.source)
        if not path.is_file():
            return f"how much of the published set is in {manifest.source} is not known"
        official = sum(int(line.rpartition(",")[2]) for line in path.read_text(encoding="utf-8").splitlines()[1:])
        found = manifest.n_labels()
        if found < MOST_OF_THEM * official:
            return f"{name}_annotation has {found} of the published set's {official} labels"
    return None


def on_device(device: str | None) -> Iterator[str]:
    """Says why a run that was not told its device has no GPU."""
    if device is None and not torch.accelerator.is_available():
        reason = "this PyTorch is built for none"
        if torch.version.cuda:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                reason = str(error).partition(".")[0].partition("\n")[0]
        yield f"No GPU can be used ({reason}), so this runs on the CPU; --device=cpu says that it is meant to."
