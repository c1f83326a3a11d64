"""`psla-models`: lists published models that commands take by name, and fetches them."""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from psla_sb import add_version

EXAMPLES = """examples:
  psla-models
  psla-models fetch efficientat-mn10 efficientat-mn04
  psla-tag --model efficientat-mn10 sound.wav           fetches it too, the first time

Models are kept in the folder that PSLA_CACHE names, by default psla_sb in XDG_CACHE_HOME or ~/.cache. Where that cannot be
downloaded to, the error says which files to put where.

exit status: 0 if all is well, 2 if the command line is wrong or a model cannot be fetched"""
NEVER = """
Figures are as published. Models that are marked * were never fetched from their address by whoever wrote it down here: it is the
one that the model's authors give. A file is taken for what it should be by its tensors; no checksums are published."""


def models(arguments: list[str] | None = None) -> None:
    """Runs `psla-models`, by default with the arguments of this process."""
    description = "Lists published models that every command takes by name, or fetches some of them."
    parser = ArgumentParser("psla-models", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("what", nargs="?", choices=["list", "fetch"], default="list", help="(default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the models to fetch")
    parser.add_argument("--labels", metavar="CSV", help="their class list, where it cannot be fetched")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="of the list (default: %(default)s)")
    options = parser.parse_args(arguments)
    if (options.what == "fetch") != bool(options.names):
        parser.error("give the names of models to fetch: psla-models fetch NAME ...; psla-models lists them")
    # after the command line was checked: it takes seconds
    from psla_sb.checkpoints.models import MODELS, tagger_of
    from psla_sb.errors import InputError

    if unknown := [name for name in options.names if name not in MODELS]:
        parser.error(f"{', '.join(unknown)}: no such model; psla-models lists them")
    try:
        for name in options.names:
            print(f"{name} is in {tagger_of(name, options.labels)}. Tag sounds with it: psla-tag --model {name} FILE...")
    except InputError as error:
        parser.error(str(error))
    if options.what == "list":
        rows = [_row(model) for model in MODELS.values()]
        print(json.dumps(rows, indent=1) if options.format == "json" else _table(rows))


def _row(model: Any) -> dict[str, Any]:
    """What is known of a model; `folder` is null before it was fetched."""
    from psla_sb.checkpoints.models import tagger_path

    folder = tagger_path(model.name)
    return {**model._asdict(), "folder": str(folder) if folder.is_dir() else None}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"  {'name':28}{'mAP':>6}  {'classes':10}{'licence':12}here"]
    for row in rows:
        mark, here = " " if row["fetched"] else "*", row["folder"] or "no"
        lines.append(f"{mark} {row['name']:28}{row['mAP']:6.3f}  {row['classes']:10}{row['licence'] or 'not stated':12}{here}")
    return "\n".join([*lines, NEVER])
