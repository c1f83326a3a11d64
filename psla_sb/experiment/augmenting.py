"""How a batch of waveforms becomes probabilities: with what the recipe does to training clips, and without."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor

from psla_sb.checkpoints.weights import move_statistics
from psla_sb.errors import InputError
from psla_sb.experiment.device import DeviceBrain
from psla_sb.experiment.losses import binary_cross_entropy
from psla_sb.lobes import chain


def as_list(value: Any) -> list[Any]:
    """One, several or none (None), as YAML files may say."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def n_partners_of(batch: PaddedBatch) -> int:
    """How many clips of a batch, its last ones, are there to be mixed into others."""
    return int(torch.as_tensor(batch.partner).sum())


class AugmentingBrain(DeviceBrain):
    """A Brain that mixes and masks training clips as the recipe lists it.

    Hyperparameters: `waveform_augment` (by default `mixup` alone) and `feature_augment` (by default `spec_augment` alone), each one
    callable or a list, done in this order; `loss`, by default the binary cross-entropy.
    """

    def scores(self, wavs: Tensor, wav_lens: Tensor, modules: Mapping[str, Any] | None = None) -> Tensor:
        """Probabilities `[batch, classes]` of `[batch, samples]` without augmentation, by the trained modules or an average's."""
        # the modules as they are, not wrapped for distributed training: ranks score different numbers of batches
        used = self.hparams.modules if modules is None else modules
        if self.n_samples is None:
            return chain.by_length(lambda clips: chain.probabilities(used, clips), wavs, wav_lens)
        return chain.probabilities(used, wavs, wav_lens, n_samples=self.n_samples)

    def augment_waveforms(self, wavs: Tensor, wav_lens: Tensor, targets: Tensor, n_partners: int) -> tuple[Tensor, Tensor, Tensor]:
        """Does what `waveform_augment` lists, in this order: mixup takes `targets` as well, others waveforms alone."""
        for augment in self._listed("waveform_augment", "mixup"):
            if "targets" in inspect.signature(getattr(augment, "forward", augment)).parameters:
                wavs, wav_lens, targets = augment(wavs, wav_lens, targets, n_partners)
                n_partners = 0
                continue
            augmented = chain.call(augment, wavs, wav_lens)
            wavs, wav_lens = augmented if isinstance(augmented, tuple) else (augmented, wav_lens)
            if len(wavs) != len(targets):
                raise InputError(f"waveform_augment: {type(augment).__qualname__} made {len(wavs)} clips of {len(targets)}")
        if n_partners:
            raise InputError(
                f"mixup_rate is {self.hparams.mixup_rate}, but nothing in waveform_augment mixes: "
                "add WaveformMixup, or set mixup_rate to 0"
            )
        return wavs, wav_lens, targets

    def augment_features(self, feats: Tensor, lens: Tensor) -> Tensor:
        """Does what `feature_augment` lists to features `[batch, frames, mels]`, in this order; by default `spec_augment`."""
        for augment in self._listed("feature_augment", "spec_augment"):
            feats = chain.call(augment, feats, lens)
        return feats

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Takes probabilities and targets `[batch, classes]`."""
        return getattr(self.hparams, "loss", None) or binary_cross_entropy

    def _listed(self, key: str, otherwise: str) -> list[Any]:
        return as_list(getattr(self.hparams, key, getattr(self.hparams, otherwise, None)))

    def parts_to_device(self) -> None:
        """Moves to the device what is no module of the model, or is left behind with one: augmentations, a loss, statistics."""
        augmentations = self._listed("waveform_augment", "mixup") + self._listed("feature_augment", "spec_augment")
        for part in (*augmentations, self.loss):
            if isinstance(part, torch.nn.Module):
                part.to(self.device)
        move_statistics(self.modules, self.device)
