"""Scores the training clips, each with taggers that were not trained on it: a teacher that does not give back the labels.

    python recipes/FSD50K/out_of_fold.py hparams/mini.yaml --folds 5
    python recipes/FSD50K/out_of_fold.py hparams/psla.yaml --data_folder=/data/fsd50k --seeds=1,2 --devices cuda:0,cuda:1

README.md in recipes/AudioSet, section "Distillation", says more, and so does `--help`.
"""

from psla_sb.experiment.out_of_fold import main

if __name__ == "__main__":
    main(__file__)
