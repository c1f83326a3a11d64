"""Trained taggers at work."""

from psla_sb.inference.tagger import AudioTagger

__all__ = ["AudioTagger"]
