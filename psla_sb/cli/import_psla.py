"""`psla-import`: makes the folder of a tagger from a checkpoint of the published code."""

import argparse

PADDING = "symmetric: trained with efficientnet-pytorch 0.7.0, as official models; tensorflow: 0.7.1 (default: %(default)s)"
N_FRAMES = "frames that it was trained on; 3000 for FSD50K (default: %(default)s)"


def import_checkpoint(arguments: list[str] | None = None) -> None:
    """Runs `psla-import`, by default with the arguments of this process."""
    from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING
    from psla_sb.checkpoints.sources import Published
    from psla_sb.errors import InputError
    from psla_sb.lobes.efficientnet import PADDINGS

    parser = argparse.ArgumentParser("psla-import", description="Turns a PSLA checkpoint into the folder of a tagger.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file of the published code")
    parser.add_argument("--labels", required=True, metavar="CSV", help="its class list, such as class_labels_indices.csv")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument("--padding", choices=PADDINGS, default=PUBLISHED_PADDING, help=PADDING)
    parser.add_argument("--n-frames", type=int, default=AUDIOSET_FRAMES, metavar="N", help=N_FRAMES)
    options = parser.parse_args(arguments)
    if options.n_frames < 1:
        parser.error("--n-frames must be 1 or more")
    try:
        Published(options.checkpoint, options.labels, options.padding, options.n_frames).export(options.out)
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out} FILE...")
