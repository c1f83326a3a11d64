"""`psla-export`: makes the folder of a tagger from a run."""

import argparse

from psla_sb.cli.options import add_trust, trusted


def export(arguments=None):
    """`psla-export`: makes the folder of a tagger from a run.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2 if the command line or the run is wrong.

    Example
    -------
    >>> export(["nowhere", "--out", "tagger"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser("psla-export", description="Makes a tagger's folder, with a model card, from a training run.")
    parser.add_argument("run", metavar="RUN", help="the run's output folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument(
        "--weights", default="average", metavar="WHICH", help="average, best, last or an epoch's number (default: %(default)s)"
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too: waveform in, probabilities out")
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.weights not in ("average", "best", "last") and not options.weights.isdecimal():
        parser.error(f"--weights must be average, best, last or the number of an epoch, not {options.weights}")
    from psla_sb.errors import InputError
    from psla_sb.inference.model_card import export_run

    try:
        export_run(options.run, options.out, options.weights, options.onnx, trusted(options))
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out} FILE...")
