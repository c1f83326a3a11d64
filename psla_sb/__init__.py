"""psla_sb: audio tagging with PSLA's training techniques, as parts of SpeechBrain."""

__version__ = "0.1.0"
