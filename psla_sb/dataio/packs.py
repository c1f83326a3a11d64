"""Many clips in few files: plain tar files, out of which a single clip is read by its place.

Shared file systems suffer from millions of small files. A pack is a tar file that holds the encoded bytes of thousands of clips as
they are. In an annotation, `<pack>/<offset>+<size>`, in bytes, stands for a clip wherever the path of a sound file does: the tar
file is opened, these bytes are read, and that is all. No file can have such a path, because a pack is no folder.

`psla_sb.prepare.packing.pack` writes to a folder, for the annotation `train.csv`,

* `train-00000.tar`, ...: the packs; a clip is a member `<ID>.flac`, or whatever its file's ending was;
* `train-00000.index.csv`, ...: for each pack, ID, member, offset, size and SHA-256 of its clips;
* `train.csv`: the same annotation with places in packs, once all packs are whole.
"""

import os
import re
from typing import NamedTuple

PLACE = r"(?P<pack>.+)/(?P<offset>[0-9]{1,18})\+(?P<size>[0-9]{1,18})"  # 18 digits: fits into int64


class Place(NamedTuple):
    """Where in a pack the bytes of a clip are.

    Example
    -------
    >>> Place("packs/train-00000.tar", offset=512, size=100).size
    100
    """

    pack: str
    offset: int
    size: int


def locate(path):
    """What a path says if it is a place in a pack; whether there is such a pack is left open.

    Arguments
    ---------
    path : str or Path
        Of a sound file, or a place in a pack.

    Returns
    -------
    Place or None

    Example
    -------
    >>> locate("packs/train-00000.tar/512+100")
    Place(pack='packs/train-00000.tar', offset=512, size=100)
    >>> locate("sounds/a.wav") is None
    True
    """
    match = re.fullmatch(PLACE, os.fspath(path), re.DOTALL)
    return match and Place(match["pack"], int(match["offset"]), int(match["size"]))


def read(place):
    """The bytes of a clip in a pack.

    Arguments
    ---------
    place : Place
        See `locate`.

    Returns
    -------
    bytes

    Raises
    ------
    OSError
        The pack cannot be read.
    EOFError
        The pack ends before the clip does.

    Example
    -------
    >>> path = getfixture("tmp_path") / "any"
    >>> _ = path.write_bytes(b"0123456789")
    >>> read(Place(path, offset=4, size=2))
    b'45'
    """
    with open(place.pack, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if place.offset + place.size > length:
            raise EOFError(f"the pack ends at byte {length}, before the clip does")
        file.seek(place.offset)
        return file.read(place.size)
