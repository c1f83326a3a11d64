"""What all tests and docstring examples need."""

from speechbrain.utils.importutils import LazyModule

# hypothesis asks every loaded module for its file; SpeechBrain's lazy ones would import packages that are not installed to answer
LazyModule.__file__ = None
