"""`psla-import`: makes the folder of a tagger from a checkpoint that others have published."""

import argparse

from psla_sb import add_version

DESCRIPTION = """\
Turns a published checkpoint into the folder of a tagger: PSLA's, or one of EfficientAT's MobileNetV3, such as mn10_as_mAP_471.pt.
Which it is is read off its tensors; what these do not tell can be given, and what was assumed is printed."""
CHECKPOINT = "a file of weights, .pth or .pt; or the name of a published model, see psla-models"
LABELS = "its class list, such as class_labels_indices.csv; a model by name has its own"
PADDING = "of PSLA's. symmetric: trained with efficientnet-pytorch 0.7.0, as official models (default); tensorflow: 0.7.1"
N_FRAMES = "of PSLA's: frames that it was trained on; 3000 for FSD50K (default: 1056)"
HOP = "of EfficientAT's: from a frame to the next (default: that of the file's name, such as hop_5, or 10)"
MELS = "of EfficientAT's (default: those of the file's name, such as mels_40, or 128)"
STRIDES = "of EfficientAT's (default: those of the file's name, such as s2221, or s2222)"


def import_checkpoint(arguments: list[str] | None = None) -> None:
    """Runs `psla-import`, by default with the arguments of this process."""
    parser = argparse.ArgumentParser("psla-import", description=DESCRIPTION)
    add_version(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--labels", metavar="CSV", help=LABELS)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument("--padding", choices=["tensorflow", "symmetric"], help=PADDING)
    parser.add_argument("--n-frames", type=int, metavar="N", help=N_FRAMES)
    parser.add_argument("--hop", type=int, metavar="MS", help=HOP)
    parser.add_argument("--mels", type=int, metavar="N", help=MELS)
    parser.add_argument("--strides", metavar="DIGITS", help=STRIDES)
    options = vars(parser.parse_args(arguments))
    path, labels, out = (options.pop(name) for name in ("checkpoint", "labels", "out"))
    for name, least in (("n_frames", 1), ("hop", 1), ("mels", 4)):
        if options[name] is not None and options[name] < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more")
    # after the command line was checked: it takes seconds
    from psla_sb.checkpoints.efficientat import as_strides
    from psla_sb.checkpoints.sources import Published, on_disk, open_source
    from psla_sb.errors import InputError

    try:
        options["strides"] = options["strides"] and as_strides(options["strides"])
        found = on_disk(path, labels)
        source = open_source(found) if found.is_dir() else Published(found, labels, **options)
        if found.is_dir() and (given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]):
            parser.error(f"{path} is no checkpoint of others that leaves something untold: leave {', '.join(given)} out")
        source.export(out)
    except (InputError, OSError) as error:
        parser.error(str(error))
    if isinstance(source, Published):
        print(f"{path} is read as {source.remark}.")
    print(f"{out} is written. Tag sounds with it: psla-tag --model {out} FILE...")
