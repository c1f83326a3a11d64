"""`psla-prepare`: makes a data set to train on of somebody's own sounds."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from psla_sb import add_version

EXAMPLES = """SOURCE is one of
  a folder with a folder of sounds for each class, also nested; folders train, valid and test, at the top or the bottom, are splits
  a folder of recordings with Audacity's label tracks beside them (x.wav, x.txt): each segment is a clip, and nothing is copied
  a table: CSV or TSV of any delimiter and encoding, with any names of columns. They are guessed, the guess is shown, and an option
      says otherwise. Files are found in the table's folder and below, by path or by name, with or without ending
  the folder of ESC-50 or UrbanSound8K, as they are unpacked

examples:
  psla-prepare sounds --out data/mine
  psla-prepare clips.csv --audio recordings --group-column speaker --out data/mine
  psla-prepare clips.csv --label-column species --split-column none --folds 5 --out data/mine
  psla-prepare sounds --group-pattern '^(.+?)_' --out data/mine       clips x_1.wav, x_2.wav, ... stay together

Clips of one group are never in two of train, valid and test, nor in two folds, unless the source says so. Clips that sound the
same are found, named, and treated as a group. Clips that are broken, silent or shorter than 50 ms are left out, and listed in
left_out.csv. prepared.html says what was found: look at it before a training.

exit status: 0 if all is well, 1 if it was interrupted, 2 if the command line or the input is wrong"""
COLUMNS = {
    "file": "the files' names or paths",
    "label": "the classes, one or several; 'none' if each class has a column of 0 and 1",
    "start": "where in its file a clip begins, in seconds; 'none' if clips are whole files",
    "end": "where it ends",
    "duration": "how long it is",
    "split": "train, valid or test; 'none' to split anew",
    "group": "what stays together, such as the recording or the speaker",
    "fold": "the fold",
}


def prepare(arguments: list[str] | None = None) -> None:
    """Runs `psla-prepare`, by default with the arguments of this process."""
    description = (
        "Makes a data set to train on of your own sounds: train, valid and test sets, and a page that says what was found."
    )
    parser = ArgumentParser("psla-prepare", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("source", metavar="SOURCE", help="a folder or a table, see below")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write; sounds are not copied")
    parser.add_argument(
        "--nested", choices=["last", "all"], default="last", help="which of nested folders are classes (default: last)"
    )
    table = parser.add_argument_group("tables")
    table.add_argument("--audio", metavar="FOLDER", help="where the sound files are (default: where the table is, and below)")
    for role, what in COLUMNS.items():
        table.add_argument(f"--{role}-column", metavar="NAME", help=f"the column with {what}" if role == "file" else what)
    table.add_argument("--label-separator", metavar="TEXT", help="between the labels of a clip (default: guessed; '' for none)")
    splits = parser.add_argument_group("splits")
    splits.add_argument("--valid", type=float, default=0.15, metavar="SHARE", help="of clips to validate on (default: %(default)s)")
    splits.add_argument(
        "--test", type=float, default=0.15, metavar="SHARE", help="of clips to test on, or 0 (default: %(default)s)"
    )
    splits.add_argument("--folds", type=int, default=0, metavar="K", help="also write fold_1 to fold_K, for cross-validation")
    splits.add_argument("--group-pattern", metavar="REGEX", help="group files by this part of their names")
    splits.add_argument("--min-clips", type=int, default=1, metavar="N", help="leave out classes with fewer clips")
    splits.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what was prepared in the folder from another source")
    options = parser.parse_args(arguments)
    if not (options.valid > 0 and options.test >= 0 and options.valid + options.test < 1):
        parser.error("--valid must be above 0, --test 0 or more, and both together below 1, so that clips are left to train on")
    if options.folds and options.folds < 3:
        parser.error("--folds must be 3 or more: one tests, one validates, the others train")
    if options.min_clips < 1 or options.seed < 0:
        parser.error("--min-clips must be 1 or more, --seed 0 or more")
    # after the command line was checked: it takes seconds
    from psla_sb.errors import InputError
    from psla_sb.prepare.own_sounds import Settings
    from psla_sb.prepare.own_sounds import prepare as prepare_sounds

    columns = {role: name for role in COLUMNS if (name := getattr(options, f"{role}_column")) is not None}
    given = {name: getattr(options, name) for name in Settings._fields if name != "columns"}
    try:
        report = prepare_sounds(options.source, options.out, Settings(columns, **given))
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command begins anew.")
    sets = ", ".join(f"{n:,} {name}" for name, n in report["clips"].items() if n)
    lengths, left_out = report["durations"], report["left_out_reasons"]
    print("\n".join(report["said"]))
    print(f"\n{sets} clips, {report['n_classes']} classes, {report['hours']:.2f} hours")
    print(f"lengths: median {lengths['median']:.2f} s, 95 % up to {lengths['p95']:.2f} s, the longest {lengths['max']:.2f} s")
    for remark in report["remarks"]:
        print(f"look: {remark}")
    if left_out:
        print(f"left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}; {options.out}/left_out.csv lists them")
    print(f"\n{options.out}/prepared.html says more. Train on it:  psla-fit {options.out}")
