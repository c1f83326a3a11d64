"""Trained models on disk: weights, runs' folders, taggers' folders, published checkpoints; and which is which."""

from psla_sb.checkpoints.checkpointer import AtomicCheckpointer
from psla_sb.checkpoints.psla import load_psla_checkpoint
from psla_sb.checkpoints.tagger_folder import OneFilePretrainer
from psla_sb.checkpoints.weights import load_module

__all__ = ["AtomicCheckpointer", "OneFilePretrainer", "load_module", "load_psla_checkpoint"]
