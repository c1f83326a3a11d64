"""Combines trained taggers: their figures, those of their ensemble and of the average of their weights.

    python recipes/FSD50K/aggregate.py hparams/aggregate.yaml --runs=[results/fsd50k_psla/1]
    python recipes/FSD50K/aggregate.py hparams/aggregate.yaml --members=last \\
        --runs=[results/fsd50k_psla/1,results/fsd50k_psla/2]

README.md in this folder, section "Aggregation", says more. Every key of the YAML file can be overridden by `--KEY=VALUE`.
"""

from psla_sb.experiment.aggregate import main

if __name__ == "__main__":
    main(__file__)
