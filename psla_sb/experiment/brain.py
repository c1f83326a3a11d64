"""What happens to a batch, and at the end of an epoch."""

import json
import logging
import resource
import signal
import sys
from collections import deque
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import register_checkpoint_hooks
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.epoch_loop import EpochCounterWithStopper
from speechbrain.utils.logger import get_logger
from torch import Tensor

from psla_sb.checkpoints.run_folder import (
    ema_path,
    prediction_path,
    read_results,
    snapshot_path,
    sounds_path,
    write_results,
    write_scores,
)
from psla_sb.checkpoints.weights import persistent_buffers, save_weights, trained_modules
from psla_sb.dataio.bad_clips import audio_check, check_audio, state_of_bad_clips
from psla_sb.dataio.batches import ClipBatch, Reading
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import rank_and_world_size
from psla_sb.errors import Interrupted
from psla_sb.experiment.augmenting import as_list, n_partners_of
from psla_sb.experiment.averages import EMA, SWA, AveragingBrain
from psla_sb.experiment.losses import DISTILLATION_WEIGHT, EPSILON, binary_cross_entropy, softened, with_teacher
from psla_sb.experiment.pace import Pace, duration_text
from psla_sb.experiment.trackers import go_on, log_epoch
from psla_sb.files import write_file
from psla_sb.lobes import chain
from psla_sb.metrics import FIGURES, MeanScores, TaggingStats, summarize

logger = get_logger(__name__)
# SpeechBrain does not, and its checkpoints have the epoch alone: a training that has ended early would go on
register_checkpoint_hooks(EpochCounterWithStopper)

STEPS_BEFORE_ETA = 8


class TaggingBrain(AveragingBrain):
    """Trains and scores a tagger made of `compute_features`, `mean_var_norm`, `embedding_model` and `classifier`.

    Besides SpeechBrain's own, the hyperparameters `seed`, `n_classes`, `output_folder`, `modules`, `waveform_augment`
    (by default `mixup` alone), `spec_augment`, `loss`, `schedule` and `train_logger` (one, or a list) are used.

    * Before each batch all random generators are reseeded from (seed, optimizer step, step, rank): a resumed run goes on exactly.
    * Validation scores all clips, sharded over the ranks, and computes its figures from the collected scores. It writes the scores
      and the epoch's weights, and reports the ensemble of all epochs so far.
    * After `request_stop` the run saves at the end of the step (of the accumulation, of a validation) and raises `Interrupted`.

    Example
    -------
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> from psla_sb.lobes.features import GlobalNorm, KaldiFbank
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> modules = {
    ...     "compute_features": KaldiFbank(n_mels=64),
    ...     "mean_var_norm": GlobalNorm(),
    ...     "embedding_model": EfficientNetEncoder("b0"),
    ...     "classifier": MeanPooling(1280, 5),
    ... }
    >>> brain = TaggingBrain(modules, hparams={"modules": modules, "seed": 1, "n_classes": 5}, run_opts={"device": "cpu"})
    >>> _ = brain.modules.eval()
    >>> brain.scores(torch.randn(2, 16000), torch.ones(2)).shape
    torch.Size([2, 5])
    """

    stop_requested = has_said_how_long = False
    pace: Any = None  # a Pace, once an epoch has begun
    _scored: deque[tuple[Tensor, Reading]]
    valid_manifest: Manifest | None = None

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> tuple[Tensor, Tensor]:
        """Probabilities and targets, both `[batch, classes]`; training mixes clips and masks features first.

        If clips have the scores of a teacher, these follow the targets as further columns, and are mixed as they are.
        """
        batch = self.on_device(batch)
        wavs, wav_lens = batch.sig
        targets = batch.target.data
        if hasattr(batch, "teacher"):
            # before clips are mixed: in a mixture, too, a clip that no teacher has heard has its own labels
            teacher = softened(batch.teacher.data, getattr(self.hparams, "distillation_temperature", None) or 1.0)
            targets = torch.cat([targets, torch.where(teacher.isnan(), targets, teacher)], dim=1)
        if stage != sb.Stage.TRAIN:
            return self.scores(wavs, wav_lens), targets
        wavs, wav_lens, targets = self.augment_waveforms(wavs, wav_lens, targets, n_partners_of(batch))
        return chain.probabilities(self.modules, wavs, wav_lens, self.augment_features, self.n_samples), targets

    def compute_objectives(self, predictions: tuple[Tensor, Tensor], batch: PaddedBatch, stage: sb.Stage) -> Tensor:
        """Binary cross-entropy, mean over clips and classes, of probabilities clamped to [1e-7, 1 - 1e-7].

        With a teacher, `with_teacher`: the mean of that and of the cross-entropy with its scores, by `distillation_weight`.
        """
        probabilities, targets = predictions
        if stage != sb.Stage.TRAIN:
            self._scored.append((batch.index, Reading(probabilities.float().clamp(0.0, 1.0), targets)))
            self.collect_scores(self.most_behind)
        with torch.autocast(self.device_type, enabled=False):
            p = probabilities.float().clamp(EPSILON, 1 - EPSILON)
            return with_teacher(self.loss, p, targets, getattr(self.hparams, "distillation_weight", DISTILLATION_WEIGHT))

    def collect_scores(self, still_running: int = 0) -> None:
        """Takes up the scores of batches; the last `still_running` may not be there."""
        while len(self._scored) > still_running:
            index, reading = self._scored.popleft()
            self.stats.append(index, *reading.values())

    def on_fit_batch_start(self, batch: PaddedBatch, should_step: bool) -> None:
        """Looks for broken sound files, reseeds, and sets the learning rate of this step."""
        self.audio_checks.get(sb.Stage.TRAIN, check_audio)(batch)
        if self.pace is None:
            self.pace = Pace(self.step - 1)
        self.pace.clips += len(batch.id) - n_partners_of(batch)
        self.say_how_long()
        self.heartbeat()
        rank, _ = rank_and_world_size()
        seeds = np.random.SeedSequence([self.hparams.seed, self.optimizer_step, self.step, rank]).generate_state(2)
        torch.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
        np.random.seed(seeds[0])  # noqa: NPY002 - for augmentations that use the global generator
        self.hparams.schedule.on_step(self.optimizer, self.optimizer_step)

    def say_how_long(self) -> None:
        """Says once, after some steps, how long the training will take."""
        done = self.step - 1 - self.pace.first_step
        if self.has_said_how_long or done < STEPS_BEFORE_ETA or not if_main_process():
            return
        self.has_said_how_long = True
        n_steps, counter = self.n_steps or self.step, self.hparams.epoch_counter
        # a clip is scored in a third of the time that it is trained in: backwards takes twice as long as forwards
        size = getattr(self.hparams, "batch_size", None) or 1
        scoring = self.n_clips.get(sb.Stage.VALID, 0) / size / 3 / rank_and_world_size()[1]
        epochs_left = counter.limit - counter.current + 1
        validations = epochs_left + self.averages_validated(counter.current, counter.limit)
        seconds = self.pace.seconds() / done * (epochs_left * n_steps + validations * scoring - self.step + 1)
        logger.info("%d epochs of %d steps: about %s, before the evaluation", counter.limit, n_steps, duration_text(seconds))

    def heartbeat(self) -> None:
        """Says every few minutes how far the epoch is, where no progress bar does."""
        if self.noprogressbar and if_main_process() and self.pace.is_due():
            n_steps, rate = self.n_steps or self.step, self.pace.clips_per_second()
            done = max(1, self.step - 1 - self.pace.first_step)
            left = duration_text((n_steps - self.step + 1) * self.pace.seconds() / done)
            logger.info(
                "Epoch %d: step %d of %d, %.1f clips/s, loss %.4f, %s to the end of the epoch's training",
                *(self.hparams.epoch_counter.current, self.step, n_steps, rate, self.avg_train_loss, left),
            )

    @torch.no_grad()
    def evaluate_batch(self, batch: PaddedBatch, stage: sb.Stage) -> Tensor:
        """As SpeechBrain's, after a look for broken sound files; the loss stays on the device."""
        self.audio_checks.get(stage, check_audio)(batch)
        if self.noprogressbar and if_main_process() and self.pace is not None and self.pace.is_due():
            logger.info(
                "Epoch %d: validation, clip %d of %d", self.hparams.epoch_counter.current, max(batch.index), self.n_clips[stage]
            )
        try:
            with self.evaluation_ctx:
                out = self.compute_forward(batch, stage=stage)
                loss = self.compute_objectives(out, batch, stage=stage).detach()
                self.score_with_averages(batch)
                return loss
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        raise self._too_large(len(batch.id), "valid_batch_size", reason, self._try_to_score)

    def make_dataloader(self, dataset: Any, stage: sb.Stage, ckpt_prefix: str | None = "dataloader-", **loader_kwargs: Any) -> Any:
        """As SpeechBrain's; validation and test clips are shared out over the ranks, none twice and none left out."""
        policy, folder = getattr(self.hparams, "on_bad_audio", "error"), getattr(self.hparams, "output_folder", ".")
        check = audio_check(policy, folder, stage.name.lower(), len(dataset))
        self.audio_checks = {**self.audio_checks, stage: check}
        if stage != sb.Stage.TRAIN:
            rank, world_size = rank_and_world_size()
            size = loader_kwargs.pop("batch_size")
            n_clips = min(len(dataset), self.debug_batches * size * world_size) if self.debug else len(dataset)
            starts = range(rank * size, n_clips, world_size * size)
            loader_kwargs["batch_sampler"] = [range(start, min(start + size, n_clips)) for start in starts]
            self.n_clips = {**self.n_clips, stage: n_clips}
        if stage == sb.Stage.VALID and isinstance(getattr(dataset, "data", None), Manifest) and not self.debug:
            self.valid_manifest = dataset.data
        if getattr(dataset, "compact", False):
            loader_kwargs.setdefault("collate_fn", ClipBatch)
        loader = super().make_dataloader(dataset, stage, ckpt_prefix, **loader_kwargs)
        if stage == sb.Stage.TRAIN:
            self.n_steps = len(loader)
        return loader

    def _train_loader_specifics(self, dataset: Any, loader_kwargs: dict[str, Any]) -> dict[str, Any]:
        # SpeechBrain would wrap the batch sampler, which shards itself; and would not tell it the epoch
        self.train_sampler = loader_kwargs["batch_sampler"]
        return loader_kwargs

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        if self.checkpointer is None:
            return False
        # of clocks, that of the first process counts
        due = rank_and_world_size()[0] == 0 and self.is_due(last_ckpt_time, steps_since_ckpt)
        due, self.stopping = self.anywhere(due, self.stop_requested)
        # gradients that wait for the rest of an accumulation are not saved
        return (due or self.stopping) and self.step % self.grad_accumulation_factor == 0

    def _save_intra_epoch_ckpt(self) -> None:
        self.look_at_steps()
        # what was asked meanwhile is answered by this checkpoint
        self._asked.clear()
        super()._save_intra_epoch_ckpt()
        if self.stopping:
            raise Interrupted

    def request_stop(self, signum: int, frame: Any) -> None:
        """A signal handler: asks to finish the step, to save and to stop; a second Ctrl-C stops at once."""
        if self.stop_requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True
        logger.warning("%s: finishing the step, then saving. Ctrl-C again leaves at once.", signal.Signals(signum).name)

    def on_fit_start(self) -> None:
        """As SpeechBrain's, and takes up the record of the epochs that a resumed run already has."""
        self.begin_averages()
        super().on_fit_start()
        self.parts_to_device()
        # what a killed run wrote of an epoch that it did not finish is written again
        counter = self.hparams.epoch_counter
        if isinstance(counter, EpochCounterWithStopper):
            # the patience may be another one now
            counter.should_stop = counter.current - counter.best_limit >= counter.limit_to_stop
        results, n_epochs = read_results(self.hparams.output_folder), counter.current
        self.epochs = results.get("epochs", [])[:n_epochs]
        self.timing = [timing for timing in results.get("timing", []) if timing["epoch"] <= n_epochs]
        go_on(as_list(self.hparams.train_logger), n_epochs)
        self.mean_scores: MeanScores | None = None

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Begins to measure an epoch; makes room for the scores of a validation or test."""
        self._asked.clear()
        if stage == sb.Stage.TRAIN:
            self.pace = Pace(self.step)
            if self.device_type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.stats, self._scored = TaggingStats(self.n_clips[stage], self.hparams.n_classes), deque()
            self.begin_validation(epoch if stage == sb.Stage.VALID else None)
            if self.valid_manifest is not None and stage == sb.Stage.VALID and if_main_process():
                # before they are read: what is changed while they are is not what was scored
                self.valid_sounds = {"sounds": self.valid_manifest.state_of_files()}

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Ends an epoch of training or the scoring of a set."""
        if stage == sb.Stage.TRAIN:
            self.look_at_steps()
            self.pace.end(self.step)
            self.train_figures = {"lr": self.optimizer.param_groups[0]["lr"], "train_loss": self.avg_train_loss}
            self.hparams.schedule.on_epoch_end(self.optimizer, epoch)
            if self.distributed_launch:
                # each rank has seen other clips; all evaluate with the statistics of rank 0, which are the ones that are saved
                for buffer in persistent_buffers(self.modules):
                    torch.distributed.broadcast(buffer, 0)
            return
        self.collect_scores()
        self.stats.reduce()
        self.average_scores = self.end_validation()
        if stage == sb.Stage.VALID and epoch is not None:
            self.on_epoch_end(epoch)

    def on_epoch_end(self, epoch: int) -> None:
        """Records the epoch, then writes a checkpoint; keeps the last and the best by validation mAP."""
        record = run_on_main(self.record_epoch, [epoch])
        if isinstance(self.hparams.epoch_counter, EpochCounterWithStopper):
            # before the checkpoint, which has what it decides
            self.hparams.epoch_counter.update_metric(record["mAP"])
        if self.checkpointer is not None:
            meta = {"epoch": epoch, "mAP": record["mAP"]}
            self.checkpointer.save_and_keep_only(meta=meta, max_keys=["mAP"], verbosity=logging.DEBUG)
        if self._any_rank(self.stop_requested):
            raise Interrupted

    def record_epoch(self, epoch: int) -> dict[str, Any]:
        """Writes the epoch's scores, weights and figures; returns the figures."""
        folder, figures = self.hparams.output_folder, self.stats.summarize()
        record = {
            "epoch": epoch,
            **self.train_figures,
            "valid_loss": figures["loss"] if self.loss is binary_cross_entropy else self.loss_of(self.stats),
            **{name: figures[name] for name in FIGURES},
            "ensemble_mAP": self.ensemble_with(epoch, self.stats.scores.numpy())["mAP"],
            **self.figures_of_averages(self.average_scores, self.stats.targets.numpy()),
        }
        self.epochs.append(record)
        self.timing.append({"epoch": epoch, **self.measured(epoch)})
        if self.valid_manifest is not None:
            bad = state_of_bad_clips(self.valid_manifest, self.audio_checks[sb.Stage.VALID])
            write_file(sounds_path(folder, epoch), json.dumps({**self.valid_sounds, **bad, "precision": self.eval_precision}))
        save_weights(trained_modules(self.hparams.modules), snapshot_path(folder, epoch))
        if self.ema is not None:
            save_weights(self.ema.modules_of, ema_path(folder))
        write_results(folder, {"epochs": self.epochs, "timing": self.timing})
        log_epoch(
            as_list(self.hparams.train_logger), record, self.timing[-1], [*FIGURES, "ensemble_mAP", f"{EMA}_mAP", f"{SWA}_mAP"]
        )
        return record

    def measured(self, epoch: int) -> dict[str, float]:
        """How long the epoch took, as a whole, how many clips all processes trained on in a second, what is left, and memory."""
        seconds, of_training = self.pace.total(), self.pace.whole_epoch(self.n_steps)
        if self.device_type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            # in KiB, but on macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        whole = seconds - self.pace.trained + of_training
        left = max(0, self.hparams.epoch_counter.limit - epoch) * whole
        rate = self.pace.clips_per_second() * rank_and_world_size()[1]
        return {"seconds": whole, "clips_per_second": rate, "eta_seconds": left, "peak_memory_MiB": peak}

    def loss_of(self, stats: TaggingStats) -> float:
        """A stage's loss, which is not the mean over its batches: a short last one would count like a full one."""
        return float(self.loss(stats.scores.clamp(EPSILON, 1 - EPSILON), stats.targets))

    def ensemble_with(self, epoch: int, scores: np.ndarray) -> dict[str, Any]:
        """Writes an epoch's scores; returns the figures of the mean of the scores of all epochs up to it."""
        folder = self.hparams.output_folder
        if self.mean_scores is None:
            self.mean_scores = MeanScores()
            for earlier in range(1, epoch):
                self.mean_scores.add(np.load(prediction_path(folder, f"valid_epoch_{earlier:02d}")))
        write_scores(folder, f"valid_epoch_{epoch:02d}", scores)
        return summarize(self.mean_scores.add(scores), self.stats.targets.numpy())

    def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
        """Evaluates the weights that are in the modules, where SpeechBrain would load its best checkpoint."""
