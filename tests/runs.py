"""Recipes run as a user runs them, on the smallest settings."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "recipes" / "AudioSet" / "train.py"
# The smallest run of the real recipe: seconds, not minutes.
TINY = {
    "n_train": 40,
    "n_eval": 20,
    "seconds": 0.5,
    "n_frames": 48,
    "n_mels": 32,
    "number_of_epochs": 2,
    "average_start": 1,
    "num_workers": 0,
}


def command(script, *arguments, **overrides):
    """The command line of a recipe's script, with the tiny settings, and with overrides of those."""
    return [sys.executable, str(script), *arguments, *(f"--{key}={value}" for key, value in {**TINY, **overrides}.items())]


def run(argv, check=True, **kwargs):
    """Runs a command as a user would, from another folder, on one thread (results depend on the number of threads)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=600, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
