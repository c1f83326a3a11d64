"""Says what each technique gives: trains without each, with each alone, and with other values, over several seeds.

    python recipes/AudioSet/ablate.py hparams/mini.yaml --seeds=1,2,3
    python recipes/AudioSet/ablate.py hparams/psla.yaml --data_folder=/data/audioset --devices cuda:0,cuda:1 --vary "n_heads=1,8"

README.md in this folder, section "Ablation", says more, and so does `--help`.
"""

from psla_sb.experiment.ablate import main

if __name__ == "__main__":
    main(__file__)
