"""`psla-export`: makes the folder of a tagger from a run, or from another trained model."""

import argparse
import re

from psla_sb import add_version
from psla_sb.cli.options import LABELS, SOURCE, add_trust, trusted

PUSH = "upload it to Hugging Face, as this repository; its weights are then one file, model.safetensors"
LICENCE = "for the model card, as Hugging Face calls it, such as cc-by-4.0"
INT8 = "write model_int8.onnx as well, by a few hundred clips with labels, half of which say what is lost"
DATASET = "for the model card: a data set on Hugging Face that it was trained on, such as owner/name; repeatable"


def export(arguments: list[str] | None = None) -> None:
    """Runs `psla-export`, by default with the arguments of this process."""
    parser = argparse.ArgumentParser("psla-export", description="Makes a tagger's folder, with a model card, from a run.")
    add_version(parser)
    parser.add_argument("run", metavar="RUN", help=f"its output folder; also {SOURCE}")
    parser.add_argument("--out", metavar="FOLDER", help="where to write the tagger; with --push it need not be given")
    which = "of a run: average, best, last or an epoch's number (default: %(default)s)"
    parser.add_argument("--weights", default="average", metavar="WHICH", help=which)
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too: waveform in, probabilities out")
    parser.add_argument("--int8", metavar="ANNOTATION", help=INT8)
    parser.add_argument("--data-folder", metavar="FOLDER", help="what {data_root} in the annotation stands for")
    parser.add_argument("--push", metavar="OWNER/NAME", help=PUSH)
    parser.add_argument("--private", action="store_true", help="with --push: a repository that others cannot see")
    parser.add_argument("--licence", "--license", metavar="ID", help=LICENCE)
    parser.add_argument("--dataset", metavar="ID", action="append", default=[], help=DATASET)
    parser.add_argument("--labels", metavar="CSV", help=LABELS)
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.weights not in ("average", "best", "last") and not options.weights.isdecimal():
        parser.error(f"--weights must be average, best, last or the number of an epoch, not {options.weights}")
    if options.out is None and options.push is None:
        parser.error("give --out FOLDER, or --push OWNER/NAME")
    if options.private and options.push is None:
        parser.error("--private is of --push")
    if options.push is not None and not re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", options.push):
        parser.error(f"--push {options.push}: repositories are OWNER/NAME")
    # after the command line was checked: it takes seconds
    from psla_sb.checkpoints.tagger_folder import trust_options
    from psla_sb.dataio.manifest import Manifest
    from psla_sb.errors import InputError
    from psla_sb.inference.model_card import export_model, push_model

    how = {name: getattr(options, name) for name in ("weights", "onnx", "labels", "licence")}
    how |= {"datasets": options.dataset, "trust": trusted(options)}
    try:
        how["int8"] = options.int8 and Manifest.from_csv(options.int8, options.data_folder)
        if options.push:
            address, loss = push_model(options.run, options.push, options.out, options.private, **how)
        else:
            loss = export_model(options.run, options.out, **how)
    except (InputError, OSError) as error:
        parser.error(str(error))
    if loss:
        print(loss)
    if options.out:
        trust = trust_options(options.out)
        print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out}{trust} FILE...")
    if options.push:
        print(f"It is uploaded. Tag sounds with it: psla-tag --model {address} FILE...")
