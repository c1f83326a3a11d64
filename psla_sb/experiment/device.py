"""A training step that does not wait for the GPU: the program is ahead of it, and looks at a step's numbers when they are there.

    program   | step 1 |            | step 2, look at 1 |        | step 3, look at 2 |
    copies     batch 1               batch 2                      batch 3
    GPU                | step 1 ..................... | step 2 .................. | step 3 ...

Whether a gradient is finite decides on the GPU itself what becomes of it. On a CPU each step is looked at as soon as it is done.
"""

import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.logger import get_logger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from psla_sb.checkpoints.weights import remember_statistics
from psla_sb.dataio.bad_clips import csv_line
from psla_sb.dataio.batches import Reading
from psla_sb.errors import InputError, largest_that_fits
from psla_sb.files import append
from psla_sb.lobes import chain
from psla_sb.lobes.compiled import Compiled

logger = get_logger(__name__)

# Fewer do not repay the minutes that compiling takes: it saves about 25 ms a step of B2 on an H200.
STEPS_WORTH_COMPILING = 8000
COMPILE = (True, False, "auto")


class Step(NamedTuple):
    """A step of training that the device may still be at."""

    optimizer_step: int
    step: int
    ids: Sequence[str]
    loss_and_finite: Reading


class DeviceBrain(sb.Brain):
    """A Brain whose training and validation keep a GPU busy, with SpeechBrain's protections.

    * A gradient that is not finite never reaches the weights, and batch-norm statistics of such a step are put back.
    * Batches are copied to a GPU while it computes the step before.
    * `compile_model` of the hyperparameters, "auto", True or False, says whether the encoder is compiled for training.
    """

    _step_looked_at: Step | None = None
    _copies: Any = None
    put_statistics_back: Any = None
    opt_class: Any
    n_steps: int | None = None  # of an epoch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most_behind = int(self.device_type == "cuda")
        self._steps: deque[Step] = deque()
        self._asked: deque[Reading] = deque()
        if self.device_type == "cuda":
            self._copies = torch.cuda.Stream(self.device)

    def init_optimizers(self) -> None:
        """Makes SpeechBrain's optimizer; on a GPU in its fused form, if there is one: that leaves a step out as the GPU says."""
        makes = self.opt_class
        if self.device_type == "cuda" and makes is not None and "fused" in inspect.signature(makes).parameters:
            given = getattr(makes, "keywords", {})
            if not {"fused", "foreach"} & set(given):
                self.opt_class = functools.partial(makes, fused=True)
        super().init_optimizers()
        for optimizer in (self.optimizers_dict or {}).values():
            optimizer.register_load_state_dict_pre_hook(_keep_form)

    def on_device(self, batch: PaddedBatch) -> PaddedBatch:
        """Moves a batch to the device."""
        if self._copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._copies):
            batch = batch.to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        for value in vars(batch).values():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    # its memory belongs to the stream that copied it, which must not use it again too soon
                    tensor.record_stream(now)
        return batch

    def fit_batch(self, batch: PaddedBatch) -> Tensor:
        """Does SpeechBrain's step, but looks at the loss, and whether gradients are finite, `most_behind` steps later."""
        try:
            return self._fit_batch(batch)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        raise self._too_large(len(batch.id), "batch_size", reason, self._try_to_train)

    def _too_large(self, n_clips: int, key: str, reason: str, attempt: Callable[[Tensor], None]) -> InputError:
        """Says which batch the GPU has memory for; a training's includes the partners that are mixed into it."""
        self._steps.clear()
        self.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        n_samples = self.n_samples or 10 * getattr(self.hparams, "sample_rate", 16000)
        # a tenth is left to the waveforms of the partners, which are not tried
        fits = largest_that_fits(lambda n: attempt(torch.randn(n, n_samples, device=self.device)), n_clips) * 9 // 10
        given = getattr(self.hparams, key, n_clips)
        advice = f"--{key}={min(fits, given * 3 // 4)} fits" if fits else f"not even a clip of {n_samples} samples fits"
        if fits and key == "batch_size":
            advice += "; --grad_accumulation_factor=2 then trains on as many clips between two changes of the weights"
        return InputError(f"{self.device} has too little memory for {key}={given}: {advice} ({reason})")

    def _try_to_train(self, wavs: Tensor) -> None:
        try:
            with self.training_ctx:
                loss = chain.probabilities(self.hparams.modules, wavs, torch.ones(len(wavs)), n_samples=self.n_samples).mean()
            loss.backward()
        finally:
            self.zero_grad(set_to_none=True)

    def _try_to_score(self, wavs: Tensor) -> None:
        with self.evaluation_ctx, torch.no_grad():
            chain.probabilities(self.hparams.modules, wavs, torch.ones(len(wavs)), n_samples=self.n_samples)

    def _fit_batch(self, batch: PaddedBatch) -> Tensor:
        should_step = (self.step % self.grad_accumulation_factor) == 0
        taken = self.optimizer_step, self.step, batch.id
        if (self.step - 1) % self.grad_accumulation_factor == 0:
            self.put_statistics_back = remember_statistics(self.modules)
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        self.is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        if should_step:
            self.optimizers_step()
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        self._steps.append(Step(*taken, Reading(loss, self.is_finite)))
        self.look_at_steps(self.most_behind)
        return loss.detach()

    def look_at_steps(self, still_running: int = 0) -> None:
        """Takes up the losses of steps, and says what was wrong with them; the last `still_running` may not be done."""
        while len(self._steps) > still_running:
            step = self._step_looked_at = self._steps.popleft()
            loss, finite = step.loss_and_finite.values()
            self.check_loss_isfinite(loss)
            if not finite and not self.scaler.is_enabled():
                logger.warning("A gradient is not finite: optimizer step %d is left out.", step.optimizer_step)
            if torch.isfinite(loss):
                self.avg_train_loss -= self.avg_train_loss / step.step
                self.avg_train_loss += float(loss) / step.step

    def update_average(self, loss: Tensor, avg_loss: Any) -> Any:
        """Averages losses as SpeechBrain does; those of training are taken up by `look_at_steps`."""
        if self.modules.training:
            return avg_loss
        return avg_loss + torch.where(torch.isfinite(loss), loss - avg_loss, 0.0) / self.step

    def check_loss_isfinite(self, loss: Tensor) -> None:
        """As SpeechBrain's, but lists the clips of batches whose loss is not finite in `nonfinite_batches.csv`."""
        step = self._step_looked_at
        if step is not None and not torch.isfinite(loss):
            file = Path(self.hparams.output_folder) / "nonfinite_batches.csv"
            append(file, "".join(csv_line([step.optimizer_step, step.step, clip]) for clip in step.ids))
            if self.nonfinite_count >= self.nonfinite_patience:
                raise InputError(
                    f"the loss was not finite in more than nonfinite_patience={self.nonfinite_patience} batches of this epoch; "
                    f"{file} lists their clips (optimizer step, step, ID). The weights are as they were before these batches. "
                    "Look at these clips, or lower lr, in another output_folder."
                )
        super().check_loss_isfinite(loss)

    def optimizers_step(self) -> None:
        """SpeechBrain's step, left out when a gradient is not finite; batch-norm statistics are then put back as well."""
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        self.is_finite = torch.isfinite(get_total_norm(gradients))
        optimizers = list((self.optimizers_dict or {}).values())
        if self.scaler.is_enabled():
            # with a scaler (fp16) SpeechBrain leaves the step out itself
            super().optimizers_step()
        elif self.device_type == "cuda" and all(getattr(one, "_step_supports_amp_scaling", False) for one in optimizers):
            for optimizer in optimizers:
                # as the scaler says it to fused optimizers
                optimizer.found_inf, optimizer.grad_scale = (~self.is_finite).float(), None
            super().optimizers_step()
            for optimizer in optimizers:
                del optimizer.found_inf, optimizer.grad_scale
        elif self.is_finite:
            super().optimizers_step()
        else:
            self.zero_grad(set_to_none=True)
            self.optimizer_step += 1
        self.put_statistics_back(self.is_finite)

    def _compile(self) -> None:
        if self.compile and getattr(self, "compile_module_keys", None) is None:
            # the compiler's order of operations moves the log of nearly empty mel bands
            self.compile_module_keys = ["embedding_model", "classifier"]
        super()._compile()
        wanted = getattr(self.hparams, "compile_model", None)
        wanted = "auto" if wanted is None else wanted
        if wanted not in COMPILE:
            raise InputError(f"compile_model must be True, False or auto, not {wanted!r}")
        module = self.modules["embedding_model"]
        if wanted is False or not hasattr(self.hparams, "batch_size") or chain.unwrapped(module) is not module:
            return
        if wanted is True or self._compiling_pays():
            logger.info("Compiling %s, which takes a minute or two", type(module).__qualname__)
            # of clips of any length, one shape would be compiled after the other
            dynamic = None if self.n_samples is None else False
            fallback = None if wanted is True else lambda reason: logger.warning("%s. Training goes on without.", reason)
            self.modules["embedding_model"] = Compiled(module, self.hparams.batch_size, fallback=fallback, dynamic=dynamic)

    def _compiling_pays(self) -> bool:
        return self.device_type == "cuda" and self.n_samples is not None and self.total_steps >= STEPS_WORTH_COMPILING

    @property
    def total_steps(self) -> int:
        """How many steps the whole training is, at most."""
        steps = (self.n_steps or 0) * self.hparams.epoch_counter.limit
        return min(steps, self.debug_batches * self.debug_epochs if self.debug else steps)

    @property
    def n_samples(self) -> int | None:
        """What the model takes of a clip; None if all of it."""
        n_frames, rate = getattr(self.hparams, "n_frames", None), getattr(self.hparams, "sample_rate", 16000)
        return chain.n_samples_of(self.hparams.modules, n_frames, rate)

    def _wrap_distributed(self) -> None:
        # SpeechBrain converts to synchronised batch norm, which has no CPU version, and which PSLA did not use
        if not self.distributed_launch:
            super()._wrap_distributed()
            return
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                device_ids = [self.device] if self.device_type == "cuda" else None
                # statistics are each rank's own in training: at its end those of the first are sent to all
                self.modules[name] = DistributedDataParallel(
                    module, device_ids=device_ids, find_unused_parameters=self.find_unused_parameters, broadcast_buffers=False
                )

    def is_due(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        """Says whether it is time for a checkpoint within the epoch, as SpeechBrain does, which asks all processes each time."""
        elapsed = (time.time() - last_ckpt_time) / 60
        return 0 < self.ckpt_interval_minutes < elapsed or 0 < self.ckpt_interval_steps <= steps_since_ckpt

    def anywhere(self, *flags: bool) -> list[bool]:
        """Says of each flag whether it is set in any process; on GPUs, whether it was `most_behind` calls before."""
        if not self.distributed_launch:
            return list(flags)
        together = torch.tensor(flags, dtype=torch.float32).to(self.device, non_blocking=True)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        self._asked.append(Reading(together))
        if len(self._asked) <= self.most_behind:
            return [False] * len(flags)
        return self._asked.popleft().values()[0].bool().tolist()

    def _any_rank(self, flag: bool) -> bool:
        """Says whether a flag is set in any process, now."""
        self._asked.clear()
        answer = self.anywhere(flag)
        return (self._asked.popleft().values()[0].bool().tolist() if self._asked else answer)[0]


def _keep_form(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Lets an optimizer go on in the form that suits its device, whatever device its checkpoint was written on."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        saved.update({key: own[key] for key in ("fused", "foreach") if key in own})
