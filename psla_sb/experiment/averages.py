"""Averages of the weights of a training, validated beside the weights that are trained.

    weights    w1 ---- w2 ---- w3 ---- w4 ---- w5 ---- w6 ----      after each epoch
    EMA        an exponential moving average, of every optimizer step (key `ema_decay`)
    SWA                         w3,     .       w3+w5   .           the mean of some epochs' (`average_start`, `average_every`)

SWA: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import if_main_process
from torch import Tensor, nn

from psla_sb.aggregation.averaging import average_weights, update_batch_norm
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import copy_statistics, load_into, persistent_buffers, state_of, trained_modules
from psla_sb.dataio.bad_clips import audio_check
from psla_sb.dataio.batches import Reading
from psla_sb.dataio.dataset import TaggingDataset, clip_loader
from psla_sb.dataio.sampler import Draw
from psla_sb.errors import InputError
from psla_sb.experiment.augmenting import AugmentingBrain
from psla_sb.files import wait_for
from psla_sb.lobes import chain
from psla_sb.lobes.features import LogMel
from psla_sb.metrics import TaggingStats, summarize

EMA, SWA = "ema", "swa"


class Ema(nn.Module):
    """Keeps an exponential moving average of modules' weights and statistics, in their own precision and on their device.

    Step n, counted from 0, weighs the average so far with min(1 - (1 + n)^(-2/3), `decay`), so that the random weights of the
    start are soon forgotten; as timm's `ModelEmaV3` with warm-up does. Buffers are averaged too; whole numbers are copied.
    PyTorch's `AveragedModel` sends its counter to the GPU in each step, and the program waits for that.

    Example
    -------
    >>> linear = nn.Linear(1, 1, bias=False)
    >>> ema = Ema({"classifier": linear}, decay=0.9)
    >>> for weight in (1.0, 2.0):
    ...     _ = nn.init.constant_(linear.weight, weight)
    ...     ema.update()
    >>> ema.modules_of["classifier"].weight.item()  # 2 ** (-2 / 3) = 0.63
    1.629960...
    """

    n_averaged: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"ema_decay must be at least 0 and less than 1, such as 0.999, or null for none; not {decay!r}")
        self.decay = decay
        self.averages = copy.deepcopy(nn.ModuleDict(modules)).requires_grad_(False).eval()
        # on the CPU, so that no GPU is waited for
        self.register_buffer("n_averaged", torch.tensor(0))
        # looked for once, since there are hundreds; by name, since a module may replace a buffer; shared ones once
        pairs = zip(self.averages.modules(), nn.ModuleDict(modules).modules(), strict=True)
        places = [(one, other, name) for one, other in pairs for name in (*other._parameters, *other._buffers)]
        self._places = list({id(getattr(other, name)): (one, other, name) for one, other, name in places}.values())

    @property
    def modules_of(self) -> dict[str, nn.Module]:
        """The averaged modules, by name."""
        return dict(self.averages.named_children())

    @torch.no_grad()
    def update(self) -> None:
        """Takes up the weights as they are now."""
        decay = min(1 - (1 + int(self.n_averaged)) ** (-2 / 3), self.decay)
        tensors = ((getattr(one, name), getattr(other, name)) for one, other, name in self._places)
        # a convolution without a bias has None in its place
        averages, weights = zip(*((one, other) for one, other in tensors if other is not None), strict=True)
        floats = [weight.is_floating_point() for weight in weights]
        torch._foreach_lerp_([*compress(averages, floats)], [*compress(weights, floats)], 1 - decay)
        if not all(floats):
            whole = [not one for one in floats]
            torch._foreach_copy_([*compress(averages, whole)], [*compress(weights, whole)])
        self.n_averaged += 1


def averaged_epochs(numbers: Sequence[int], last: int, start: int, every: int) -> list[int]:
    """Picks the epochs whose weights are averaged: `start` and every `every`-th after it; the last one there is, if there are none.

    A negative `start` counts back from `last`, -1 being that epoch itself.

    Example
    -------
    >>> averaged_epochs(range(1, 11), 10, 4, 3), averaged_epochs(range(1, 11), 10, -2, 1), averaged_epochs([1, 2], 2, 9, 1)
    ([4, 7, 10], [9, 10], [2])
    """
    if not (isinstance(every, int) and every >= 1):
        raise InputError(f"average_every must be a whole number of epochs, 1 or more, not {every!r}")
    first = start if start >= 0 else max(1, last + 1 + start)
    return [number for number in numbers if number >= first and (number - first) % every == 0] or list(numbers[-1:])


def check_averages(settings: Mapping[str, Any], file: Any) -> None:
    """Refuses, before hours of training, values of the keys of averages, and of a teacher, that mean nothing.

    Example
    -------
    >>> check_averages({"average_every": 0}, "psla.yaml")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: psla.yaml: average_every must be a whole number, 1 or more, not 0
    """

    def is_number(value: Any, kind: Any = (int, float)) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "ema_decay": ("at least 0 and less than 1, such as 0.999", lambda value: is_number(value) and 0 <= value < 1),
        "average_every": ("a whole number, 1 or more", lambda value: is_number(value, int) and value >= 1),
        "batch_norm_clips": ("a whole number, 1 or more", lambda value: is_number(value, int) and value >= 1),
        "validate_average": ("True or False", lambda value: isinstance(value, bool)),
        "distillation_temperature": ("above 0", lambda value: is_number(value) and value > 0),
        "distillation_weight": ("at least 0", lambda value: is_number(value) and value >= 0),
    }
    for key, (what, holds) in allowed.items():
        value = settings.get(key)
        if value is not None and not holds(value):
            raise InputError(f"{file}: {key} must be {what}, not {value!r}")


class AveragingBrain(AugmentingBrain):
    """A Brain that keeps averages of its weights and scores validation clips with them too.

    Hyperparameters, all optional: `ema_decay` (None: no moving average), `validate_average` (whether the mean of epochs is
    validated after each of them), `average_start`, `average_every`, and `batch_norm_clips`: from so many training clips, mixed and
    masked as in training, the batch-norm statistics of averaged weights are estimated anew (None: they are averaged like weights).
    """

    ema: Ema | None = None
    _mean: dict[str, nn.Module] = {}  # noqa: RUF012 - replaced, never changed
    epochs: list[dict[str, Any]]
    train_clips: TaggingDataset | None = None  # from which batch-norm statistics are estimated
    audio_checks: dict[sb.Stage, Callable] = {}  # noqa: RUF012
    n_clips: dict[sb.Stage, int] = {}  # noqa: RUF012
    # during a validation: the modules of each average, and what they have scored
    _validated: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    _average_stats: dict[str, TaggingStats] = {}  # noqa: RUF012

    def begin_averages(self) -> None:
        """Begins the moving average, or goes on with that of the checkpoint; to be called before the checkpoint is loaded."""
        trained = trained_modules(self.hparams.modules)
        if getattr(self.hparams, "validate_average", None):
            # copied before training: what a module keeps of a forward pass may be no copy
            self._mean = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in trained.items()}
        if (decay := getattr(self.hparams, "ema_decay", None)) is None:
            return
        self.ema = Ema(trained, decay)
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable(EMA, self.ema)

    def optimizers_step(self) -> None:
        """Changes the weights, and takes them up into the moving average."""
        super().optimizers_step()
        if self.ema is not None:
            self.ema.update()

    def averages_after(self, epoch: int) -> dict[str, dict[str, nn.Module]]:
        """Gives the averages that are to be validated after an epoch, by name, with statistics of their own."""
        averages: dict[str, dict[str, nn.Module]] = {}
        if self.ema is not None:
            averages[EMA] = self.ema.modules_of
        if self._is_averaged(epoch):
            averages[SWA] = self._mean_after(epoch)
        trained = trained_modules(self.hparams.modules)
        for modules in averages.values():
            for name, module in modules.items():
                copy_statistics(trained[name], module)
            if if_main_process():
                self.estimate_batch_norm(modules)
            if self.distributed_launch:
                # weights are the same in all processes
                for buffer in persistent_buffers(nn.ModuleDict(modules)):
                    torch.distributed.broadcast(buffer, 0)
        return averages

    def epochs_averaged(self, numbers: Sequence[int], last: int) -> list[int]:
        """Picks those of some epochs whose weights are averaged, if epoch `last` is the last one; see `averaged_epochs`."""
        return averaged_epochs(numbers, last, self.hparams.average_start, getattr(self.hparams, "average_every", None) or 1)

    def _averaged_so_far(self, epoch: int) -> list[int]:
        """Lists the epochs that the mean of weights is of after an epoch of training; none before the first of them."""
        limit = self.hparams.epoch_counter.limit
        found = self.epochs_averaged(range(1, limit + 1), limit)
        return [number for number in found if number <= epoch]

    def _is_averaged(self, epoch: int) -> bool:
        """Says whether an epoch changes the mean of weights that is validated."""
        return bool(getattr(self.hparams, "validate_average", None)) and epoch in self._averaged_so_far(epoch)

    def averages_validated(self, first: int, last: int) -> int:
        """Counts how often an average is validated after epochs `first` to `last`."""
        return sum((self.ema is not None) + self._is_averaged(epoch) for epoch in range(first, last + 1))

    def _mean_after(self, epoch: int) -> dict[str, nn.Module]:
        """The mean of epochs' weights, the last of which are in the modules and have no snapshot yet."""
        trained = trained_modules(self.hparams.modules)
        state = {f"{name}.{key}": value.cpu() for name, module in trained.items() for key, value in state_of(module).items()}
        paths = [snapshot_path(self.hparams.output_folder, number) for number in self._averaged_so_far(epoch)[:-1]]
        if paths:
            for path in paths:
                wait_for(path)
            mean, share = average_weights(paths), 1 / (len(paths) + 1)
            floats = {key: value for key, value in state.items() if value.is_floating_point()}
            state |= {key: torch.lerp(mean[key], value, share) for key, value in floats.items()}
        load_into(self._mean, state)
        return self._mean

    @property
    def n_statistics_clips(self) -> int:
        """From how many training clips statistics are estimated."""
        wanted = getattr(self.hparams, "batch_norm_clips", None) or 0
        n_clips = len(self.train_clips) if self.train_clips is not None else 0
        return min(wanted, n_clips, self.debug_batches * self.hparams.batch_size if self.debug else wanted)

    def estimate_batch_norm(self, modules: Mapping[str, nn.Module]) -> None:
        """Estimates batch-norm statistics of averaged weights, if `batch_norm_clips` says so, from clips as they are trained on."""
        clips = self.train_clips
        if not getattr(self.hparams, "batch_norm_clips", None):
            return
        if clips is None:
            raise ValueError("batch_norm_clips needs the Brain's train_clips, a TaggingDataset")
        used = {**self.hparams.modules, **modules}

        def features(batch: PaddedBatch) -> tuple[Tensor, Tensor]:
            batch, partners = self.on_device(batch), batch.partner
            # labels are of no matter
            (wavs, wav_lens), labels = batch.sig, torch.zeros(len(batch.id), 1, device=self.device)
            wavs, wav_lens, _ = self.augment_waveforms(wavs, wav_lens, labels, sum(partners))
            return chain.features(used, wavs, wav_lens, self.augment_features, self.n_samples)

        # there may have been no training in this process
        self.parts_to_device()
        policy, folder = getattr(self.hparams, "on_bad_audio", "error"), getattr(self.hparams, "output_folder", ".")
        check = audio_check(policy, folder, "train", len(clips))
        workers, on_gpu = getattr(self.hparams, "num_workers", 0), self.device_type == "cuda"
        batches = self._batches_of_some(len(clips), self.n_statistics_clips)
        loader = clip_loader(clips.data, clips.sample_rate, self.n_samples, batches, workers, clips.crop, pin_memory=on_gpu)
        for module in used.values():
            module.eval()
        with torch.random.fork_rng([self.device] if on_gpu else []), self.evaluation_ctx, torch.no_grad():
            # the same clips, mixed and masked alike, each time
            torch.manual_seed(self.hparams.seed)
            # ours draw their filters as in training; others might change their statistics
            front_end = used["compute_features"]
            front_end.train(isinstance(front_end, LogMel))
            update_batch_norm(used, loader, self.n_samples, check, features)
            front_end.eval()

    def _batches_of_some(self, n_clips: int, n_wanted: int) -> list[list[Draw]]:
        """Batches of clips, evenly spaced, each with as many partners as in training; none is short, unless it is the only one."""
        rows = np.linspace(0, n_clips - 1, n_wanted).round().astype(int)
        rng = np.random.default_rng(self.hparams.seed)
        # in the annotation's order those of a batch may be alike
        rng.shuffle(rows)
        size, batches = min(self.hparams.batch_size, n_wanted), list[list[Draw]]()
        for start in range(0, n_wanted - size + 1, size):
            chosen = rows[start : start + size].tolist()
            partners = rng.integers(n_clips, size=round(getattr(self.hparams, "mixup_rate", 0) * len(chosen))).tolist()
            drawn = [*((row, False) for row in chosen), *((row, True) for row in partners)]
            batches.append([Draw(row, 0, 2 * start + i, partner) for i, (row, partner) in enumerate(drawn)])
        return batches

    def begin_validation(self, epoch: int | None) -> None:
        """Prepares the averages that this validation scores as well."""
        self._validated = {} if epoch is None else self.averages_after(epoch)
        self._average_scores: deque[tuple[str, Tensor, Reading]] = deque()
        self._average_stats = {}
        for name in self._validated:
            self._average_stats[name] = TaggingStats(self.n_clips[sb.Stage.VALID], self.hparams.n_classes)

    def score_with_averages(self, batch: PaddedBatch) -> None:
        """Scores a batch of validation clips with each average."""
        if not self._validated:
            return
        wavs, wav_lens = batch.sig
        for name, modules in self._validated.items():
            scores = self.scores(wavs, wav_lens, {**self.hparams.modules, **modules})
            self._average_scores.append((name, batch.index, Reading(scores.float().clamp(0.0, 1.0))))
        self._collect_average_scores(self.most_behind * len(self._validated))

    def _collect_average_scores(self, still_running: int = 0) -> None:
        while len(self._average_scores) > still_running:
            name, index, reading = self._average_scores.popleft()
            (scores,) = reading.values()
            # targets are those of the trained weights' scores
            self._average_stats[name].append(index, scores, torch.zeros_like(scores))

    def end_validation(self) -> dict[str, np.ndarray]:
        """Gives what each average has scored, `[clips, classes]`."""
        self._collect_average_scores()
        for stats in self._average_stats.values():
            stats.reduce()
        scored = {name: stats.scores.numpy() for name, stats in self._average_stats.items()}
        self._validated, self._average_stats = {}, {}
        return scored

    def figures_of_averages(self, scored: Mapping[str, np.ndarray], targets: np.ndarray) -> dict[str, float]:
        """Computes what an epoch's record says of the averages; one that has not changed keeps its figure."""
        before, kept = self.epochs[-1] if self.epochs else {}, {}
        # an epoch that is none of those averaged
        goes_on = getattr(self.hparams, "validate_average", None) and self._averaged_so_far(int(before.get("epoch", 0)) + 1)
        if goes_on and f"{SWA}_mAP" in before:
            kept[f"{SWA}_mAP"] = before[f"{SWA}_mAP"]
        return {**kept, **{f"{name}_mAP": summarize(scores, targets)["mAP"] for name, scores in scored.items()}}
