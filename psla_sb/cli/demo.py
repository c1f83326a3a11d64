"""`psla-demo`: serves a page that tags sounds."""

import argparse

from psla_sb import add_version
from psla_sb.cli.options import NO_MODEL, add_model, load_tagger


def demo(arguments: list[str] | None = None) -> None:
    """Runs `psla-demo`, by default with the arguments of this process."""
    parser = argparse.ArgumentParser("psla-demo", description="Serves a page: drop or record a sound, see its tags and timeline.")
    add_version(parser)
    add_model(parser)
    parser.add_argument("--examples", metavar="FOLDER", help="sound files that the page offers")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="sounds in work at a time (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    options = parser.parse_args(arguments)
    if options.model is None:
        parser.error(NO_MODEL)
    if options.at_once < 1:
        parser.error("--at-once must be 1 or more")
    # after the command line was checked: it takes seconds
    from psla_sb.demo import example_files, launch
    from psla_sb.errors import InputError

    try:
        examples = example_files(options.examples) if options.examples else ()
        tagger = load_tagger(parser, options)
        launch(tagger, options.model, examples, options.host, options.port, options.open, options.at_once)
    except InputError as error:
        parser.error(str(error))
