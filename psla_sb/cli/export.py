"""`psla-export`: makes the folder of a tagger from a run, or from another trained model."""

import argparse

from psla_sb.cli.options import add_trust, trusted


def export(arguments: list[str] | None = None) -> None:
    """Runs `psla-export`, by default with the arguments of this process."""
    parser = argparse.ArgumentParser("psla-export", description="Makes a tagger's folder, with a model card, from a run.")
    parser.add_argument("run", metavar="RUN", help="its output folder; also a snapshot, a tagger's folder, a published checkpoint")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    which = "of a run: average, best, last or an epoch's number (default: %(default)s)"
    parser.add_argument("--weights", default="average", metavar="WHICH", help=which)
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too: waveform in, probabilities out")
    parser.add_argument("--labels", metavar="CSV", help="the class list of a published checkpoint")
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.weights not in ("average", "best", "last") and not options.weights.isdecimal():
        parser.error(f"--weights must be average, best, last or the number of an epoch, not {options.weights}")
    # after the command line was checked: it takes seconds
    from psla_sb.checkpoints.tagger_folder import trust_options
    from psla_sb.errors import InputError
    from psla_sb.inference.model_card import export_model

    try:
        export_model(options.run, options.out, options.weights, options.onnx, options.labels, trusted(options))
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out}{trust_options(options.out)} FILE...")
