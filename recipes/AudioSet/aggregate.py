"""Combines trained taggers: their figures, those of their ensemble and of the average of their weights.

    python recipes/AudioSet/aggregate.py hparams/aggregate.yaml --runs=[results/psla/1]
    python recipes/AudioSet/aggregate.py hparams/aggregate.yaml --runs=[results/psla/1,results/psla/2] --members=last

README.md in this folder, section "Aggregation", says what each way is for. Every key of the YAML file can be overridden by
`--KEY=VALUE`.
"""

from psla_sb.experiment.aggregate import main

if __name__ == "__main__":
    main(__file__)
