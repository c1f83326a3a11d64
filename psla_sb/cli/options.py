"""Options that several commands have."""

import os
import sys

NO_MODEL = """give --model FOLDER, the folder of a trained tagger. A training run writes one:
    make demo                    trains a small one in minutes, results/mini/1/tagger
    recipes/AudioSet/README.md   says how to train the real one
    psla-import                  makes one from a checkpoint of the published PSLA code"""


def add_model(parser):
    """Adds the options that say which trained model to load."""
    parser.add_argument("--model", metavar="SOURCE", help="a tagger's folder, a run's folder, a snapshot, a published checkpoint")
    parser.add_argument("--labels", metavar="CSV", help="the class list of a published checkpoint")
    add_trust(parser)


def add_trust(parser):
    """Adds `--trust`."""
    parser.add_argument(
        "--trust",
        metavar="MODULE",
        action="append",
        default=[],
        help="a Python module whose classes the model may be made of, searched in this folder too; repeatable",
    )


def trusted(options):
    """What `--trust` named; modules in the current folder can then be imported, as they can where a script lies."""
    if options.trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return options.trust


def _check_device(parser, device):
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} cannot be used: {error}")
