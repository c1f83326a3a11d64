"""`--dry_run`: what a run would be, without training: its settings, sizes, and how long and how large its steps are here."""

import itertools
import time
from collections.abc import Mapping
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from psla_sb.checkpoints.definitions import definitions_text
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.pace import duration_text

STEPS = 4  # that are tried: the first one is left out of the times


def dry_run(
    brain: TaggingBrain, settings: Mapping[str, Any], sets: Mapping[str, TaggingDataset], loaders: Mapping[str, Mapping[str, Any]]
) -> str:
    """Tries some steps of training and validation, with weights that are not kept, and describes the run.

    Arguments
    ---------
    settings
        The YAML file's keys, without references.
    sets, loaders
        The data sets "train", "valid" and, if there is one, "test"; and what `make_dataloader` takes for "train" and "valid".
    """
    train = brain.make_dataloader(sets["train"], sb.Stage.TRAIN, ckpt_prefix=None, **loaders["train"])
    valid = brain.make_dataloader(sets["valid"], sb.Stage.VALID, ckpt_prefix=None, **loaders["valid"])
    brain.on_fit_start()
    # SpeechBrain's fit begins to count here
    brain.nonfinite_count = 0
    brain.modules.train()
    brain.on_stage_start(sb.Stage.TRAIN)
    read, step = _times(train, brain, lambda batch: brain.fit_batch(batch))
    brain.modules.eval()
    brain.on_stage_start(sb.Stage.VALID)
    with torch.no_grad():
        _, scoring = _times(valid, brain, lambda batch: brain.evaluate_batch(batch, sb.Stage.VALID))
    epochs, accumulated = brain.hparams.epoch_counter.limit, brain.grad_accumulation_factor
    # workers read while the device computes
    epoch = len(train) * max(step, read) + len(valid) * scoring
    # each average is scored too, and its statistics are estimated, from clips that are mixed
    averages = brain.averages_validated(1, epochs)
    mixed = brain.n_statistics_clips * (1 + getattr(brain.hparams, "mixup_rate", 0)) / max(1, len(sets["valid"]))
    of_averages = averages * (1 + mixed) * len(valid) * scoring
    tested = len(sets["test"]) / len(sets["valid"]) * len(valid) * scoring * epochs if "test" in sets else 0.0
    memory = brain.measured(0)["peak_memory_MiB"]
    parameters = sum(p.numel() for p in brain.modules.parameters())
    rows = {
        "clips": ", ".join(f"{len(dataset):,} {name}" for name, dataset in sets.items()),
        "classes": f"{brain.hparams.n_classes:,}",
        "parameters": f"{parameters:,}, {sum(p.numel() for p in brain.modules.parameters() if p.requires_grad):,} of them trained",
        "steps": f"{len(train) // accumulated:,} an epoch, {len(train) // accumulated * epochs:,} in {epochs} epochs",
        "device": f"{brain.device}, {brain.precision}",
        "memory": f"{memory:,.0f} MiB at most, of {'the GPU' if brain.device_type == 'cuda' else 'this process'}, in {STEPS} steps",
        "a step": f"{1000 * step:.0f} ms to compute, {1000 * read:.0f} ms to wait for its clips (num_workers)",
        "an epoch": f"{duration_text(epoch)}, of which {duration_text(len(valid) * scoring)} to validate",
        "averages": f"{averages} validations of averages of weights, {duration_text(of_averages)}",
        "the run": duration_text(epochs * epoch + of_averages + tested) + (", with the evaluation of all epochs" if tested else ""),
    }
    if not averages:
        del rows["averages"]
    described = "\n".join(f"{name:12}{value}" for name, value in rows.items())
    return f"{definitions_text(settings)}\n{described}\nNothing was trained or kept. Without --dry_run the run begins."


def _times(loader: DataLoader, brain: TaggingBrain, work: Any) -> tuple[float, float]:
    """Seconds that a batch is waited for, and worked on, on average."""
    batches = iter(loader)
    waited, worked = [], []
    for _ in itertools.repeat(None, STEPS):
        begun = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            break
        waited.append(time.monotonic() - begun)
        begun = time.monotonic()
        brain.step += 1
        work(batch)
        if brain.device_type == "cuda":
            torch.cuda.synchronize(brain.device)
        worked.append(time.monotonic() - begun)
    if not waited:
        # a process without a batch
        return 0.0, 0.0
    # the first one compiles, fills caches, starts workers
    waiting, working = (sum(times[1:] or times) / len(times[1:] or times) for times in (waited, worked))
    return waiting, working
