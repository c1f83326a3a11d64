"""`psla-pack`: puts the clips of an annotation into few large files, or verifies such files."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from psla_sb import add_version

EXAMPLES = """examples:
  psla-pack results/psla/1/train.csv --data-folder /data/audioset --out /data/packs
  psla-pack results/psla/1/eval.csv --data-folder /data/audioset --out /data/packs
  psla-pack --verify /data/packs
  python recipes/AudioSet/train.py hparams/psla.yaml --skip_prep=True --data_folder=/data/packs \\
      --train_annotation=/data/packs/train.csv --valid_annotation=/data/packs/eval.csv --class_list=class_labels_indices.csv

A packing that was interrupted goes on with the same command.

exit status: 0 if all is well, 1 if --verify found damage or packing was interrupted, 2 if the command line or the input is wrong"""


def pack(arguments: list[str] | None = None) -> None:
    """Runs `psla-pack`, by default with the arguments of this process."""
    description = "Puts the clips of an annotation, as they are, into few large tar files, and writes the annotation of these."
    parser = ArgumentParser("psla-pack", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("annotation", nargs="?", metavar="ANNOTATION", help="a CSV file (ID,wav,duration,labels)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="FOLDER", help="where to write the packs and their annotation, of the same name")
    what.add_argument("--verify", metavar="FOLDER", help="read all packed clips there again, and compare their checksums")
    parser.add_argument("--data-folder", metavar="FOLDER", help="what {data_root} in the annotation stands for")
    parser.add_argument("--shard-size", type=float, default=1000, metavar="MB", help="of a pack at most (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="files that are read at a time (default: %(default)s)")
    parser.add_argument("--leave-out", action="store_true", help="leave out, and list, clips whose file is missing")
    options = parser.parse_args(arguments)
    if (options.annotation is None) == (options.out is not None):
        parser.error("give an annotation and --out FOLDER to pack, or --verify FOLDER alone")
    if not 1e-6 <= options.shard_size <= 1e12 or options.workers < 1:
        parser.error("--shard-size must be above 0, --workers 1 or more")
    # after the command line was checked: it takes seconds
    from psla_sb.errors import InputError
    from psla_sb.prepare import pack_index, packing

    try:
        if options.out:
            size = round(options.shard_size * 1e6)
            packed = packing.pack(options.annotation, options.out, options.data_folder, size, options.workers, options.leave_out)
            print(f"{packed} is written. Its {{data_root}} is {options.out}. Verify it: psla-pack --verify {options.out}")
            return
        n_clips, damages = pack_index.verify(options.verify, options.workers)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
    for annotation, clip, problem in damages:
        print(f"error: {annotation}, clip '{clip}': {problem}" if clip else f"error: {annotation}: {problem}", file=sys.stderr)
    if damages:
        sys.exit(f"{len(damages)} problems with {n_clips} clips. Delete the damaged packs, and pack the annotations again.")
    print(f"{n_clips} clips, all as they were packed.")
