"""Options that several commands have, and what they say."""

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

NO_MODEL = """give --model FOLDER, the folder of a trained tagger. A training run writes one:
    make demo                    trains a small one in minutes, results/mini/1/tagger
    recipes/AudioSet/README.md   says how to train the real one
    psla-import                  makes one from a published checkpoint, PSLA's or EfficientAT's
or its name: psla-models lists those that are fetched; or hf://owner/name, a repository on Hugging Face"""
SOURCE = (
    "a tagger's folder, a run's folder, a snapshot, a published checkpoint, hf://owner/name[@revision] on Hugging Face, or the "
    "name of a published model, see psla-models"
)
LABELS = "the class list of a published checkpoint; a model by name has its own"
TRUST = "a Python module whose classes the model may be made of, searched in this folder too; repeatable"


def add_model(parser: ArgumentParser) -> None:
    """Adds the options that say which trained model to load."""
    parser.add_argument("--model", metavar="SOURCE", help=SOURCE)
    parser.add_argument("--labels", metavar="CSV", help=LABELS)
    add_trust(parser)


def add_trust(parser: ArgumentParser) -> None:
    """Adds `--trust`."""
    parser.add_argument("--trust", metavar="MODULE", action="append", default=[], help=TRUST)


def trusted(options: Namespace) -> list[str]:
    """Returns what `--trust` named; modules in the current folder can then be imported, as they can where a script lies."""
    if options.trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return options.trust


def load_tagger(parser: ArgumentParser, options: Namespace) -> Any:
    """Loads the model that the options name, an `AudioTagger`, on their device; what is wrong ends the command, with status 2.

    `options.source` becomes what `open_source` has opened.
    """
    # imports take seconds, and --help and a wrong command line need none
    import torch

    from psla_sb.checkpoints.sources import open_source
    from psla_sb.errors import InputError
    from psla_sb.inference.tagger import AudioTagger

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} cannot be used: {error}")
    try:
        options.source = open_source(options.model, options.labels, trusted(options))
        return AudioTagger.from_source(options.source, run_opts={"device": options.device})
    except InputError as error:
        parser.error(str(error))
