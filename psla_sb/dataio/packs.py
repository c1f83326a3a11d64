"""Many clips in few files: plain tar files (packs), out of which a single clip is read by its place."""

import os
import re
from pathlib import Path
from typing import NamedTuple

# Shared file systems suffer from millions of small files. A pack holds the encoded bytes of thousands of clips as they are:
#
#   packs/train-00000.tar   | tar header | bytes of a clip | zeros | tar header | bytes of the next | ...
#                                        ^ offset        ^ offset + size
#
# In an annotation, packs/train-00000.tar/<offset>+<size> stands for a clip wherever the path of a sound file does. No file can have
# such a path, because a pack is no folder. `psla_sb.prepare.packing.pack` writes packs; train-00000.index.csv lists ID, member,
# offset, size and SHA-256 of the clips in one; and train.csv, written once all packs are whole, is the annotation with such places.
PLACE = r"(?P<pack>.+)/(?P<offset>[0-9]{1,18})\+(?P<size>[0-9]{1,18})"  # 18 digits: fits into int64


class Place(NamedTuple):
    """Says where in a pack the bytes of a clip are."""

    pack: str
    offset: int
    size: int


def locate(path: str | Path) -> Place | None:
    """Takes a path apart if it is a place in a pack; whether there is such a pack is left open.

    >>> locate("packs/train-00000.tar/512+100")
    Place(pack='packs/train-00000.tar', offset=512, size=100)
    """
    match = re.fullmatch(PLACE, os.fspath(path), re.DOTALL)
    return match and Place(match["pack"], int(match["offset"]), int(match["size"]))


def read(place: Place) -> bytes:
    """Reads the bytes of a clip in a pack; an EOFError says that the pack ends before the clip does."""
    with open(place.pack, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if place.offset + place.size > length:
            raise EOFError(f"the pack ends at byte {length}, before the clip does")
        file.seek(place.offset)
        return file.read(place.size)
