"""The command lines: argument parsing only, the work is elsewhere."""

import argparse
import json
import sys

NO_MODEL = """psla-tag needs --model FOLDER, the folder of a trained tagger. A training run writes one:
    make demo                    trains a small one in minutes, results/mini/1/tagger
    recipes/AudioSet/README.md   says how to train the real one"""


def tag(arguments=None):
    """`psla-tag`: prints the tags of sound files.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 0 if all files were tagged, 1 if some could not be, 2 if the command line is wrong.

    Example
    -------
    >>> tag(["sound.wav", "--model", "nowhere"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser("psla-tag", description="Tags sound files: what can be heard in them, best first.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, MP3 or Ogg; any sample rate")
    parser.add_argument("--model", metavar="FOLDER", help="a trained tagger, such as a run's folder `tagger`")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tags per file (default: %(default)s)")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if options.model is None:
        parser.error(NO_MODEL)
    # imports take seconds, and --help and a wrong command line need none
    import torch

    from psla_sb.errors import InputError
    from psla_sb.inference import AudioTagger

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} cannot be used: {error}")
    try:
        tagger = AudioTagger.from_folder(options.model, run_opts={"device": options.device})
    except InputError as error:
        parser.error(str(error))
    failed, answers = False, {}
    for file in options.files:
        try:
            answers[file] = tagger.tag_file(file, options.top_k)
        except InputError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        if options.format == "table":
            print(f"{file}\n" + "".join(f"  {tag.score:.3f}  {tag.label}\n" for tag in answers[file]), end="")
    if options.format == "json":
        print(json.dumps({file: [tag._asdict() for tag in tags] for file, tags in answers.items()}, indent=1))
    sys.exit(1 if failed else 0)
