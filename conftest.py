"""What all tests and docstring examples need."""

import os

from speechbrain.utils.importutils import LazyModule

# hypothesis asks every loaded module for its file; SpeechBrain's lazy ones would import packages that are not installed to answer
LazyModule.__file__ = None


def pytest_configure(config):
    """Hides GPUs from all tests but those that are of them: figures that are compared bit by bit are a CPU's."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
