"""Files that are fetched from the web: whole, and as they were published, or not at all."""

import hashlib
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from psla_sb.errors import InputError
from psla_sb.files import atomic_write

# A server that sends nothing for so long, in seconds, has failed.
TIMEOUT = 60.0
BLOCK = 1 << 20


def fetch(url: str, path: str | Path, sha256: str | None = None, check: Callable[[Path], object] | None = None) -> str:
    """Downloads a file; it gets its name once it is there as a whole, or never. Returns its SHA-256.

    What a download that failed has left is deleted: the next one begins anew.

    Arguments
    ---------
    path
        Where to write it; the folder is made if there is none.
    sha256
        What it has to be; None if that is not known.
    check
        Looks at the file before it gets its name; may raise an InputError.

    Raises
    ------
    InputError
        The file cannot be had, is not whole, or is another one: with its address, and where to put it by hand.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "published.csv").write_text("index,mid,display_name")
    >>> fetch((folder / "published.csv").as_uri(), folder / "mine.csv")[:8]
    '5952c98e'
    """
    path, remedy = Path(path), f"Get {url} on a machine that can, and put it at {path}."
    with atomic_write(path) as temporary:
        try:
            found = _download(url, temporary)
        except (OSError, HTTPException) as error:
            raise InputError(f"{path}: no such file, and {url} cannot be downloaded: {error}. {remedy}") from None
        if sha256 is not None and found != sha256:
            said = f"what {url} gave is not the official {path.name}: its SHA-256 is {found}, not {sha256}."
            raise InputError(f"{said} It was not kept. {remedy}")
        if check is not None:
            try:
                check(temporary)
            except InputError as error:
                raise InputError(
                    f"what {url} gave was not kept: {str(error).replace(str(temporary), path.name)}. {remedy}"
                ) from None
    return found


def _download(url: str, path: Path) -> str:
    digest, n_bytes = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        expected = int(length) if length and length.isdecimal() else None
        with tqdm(total=expected, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None, leave=False) as bar:
            # the length is compared below: `read` gives less, and no error, of a connection that was cut
            while block := response.read(BLOCK):
                file.write(block)
                digest.update(block)
                n_bytes += len(block)
                bar.update(len(block))
    if expected is not None and n_bytes != expected:
        raise OSError(f"the connection ended after {n_bytes} of {expected} bytes")
    return digest.hexdigest()
