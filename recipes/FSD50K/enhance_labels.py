"""Finds labels of training clips that annotators missed, with a trained tagger as the teacher.

    python recipes/FSD50K/enhance_labels.py hparams/psla_enhanced.yaml --data_folder=/data/fsd50k --teacher=results/fsd50k_psla/1
    python recipes/FSD50K/enhance_labels.py hparams/psla.yaml --data_folder=/data/fsd50k --audit

README.md in this folder has a section on it; `--help` lists the options. `ontology.json` must be in the data folder.
"""

from psla_sb.experiment.enhance_labels import main

if __name__ == "__main__":
    main(__file__)
