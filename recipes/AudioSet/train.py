"""Trains and evaluates a tagger on AudioSet, or on the embedded data set.

    python recipes/AudioSet/train.py hparams/mini.yaml
    python recipes/AudioSet/train.py hparams/psla.yaml --data_folder=/data/audioset

README.md in this folder says what has to be in the data folder. `--help` lists SpeechBrain's run options; besides these, every
key of the YAML file can be overridden by `--KEY=VALUE`.
"""

from psla_sb.experiment.train import main

if __name__ == "__main__":
    main(__file__)
