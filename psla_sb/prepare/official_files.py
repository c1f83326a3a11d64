"""The official files of AudioSet that recipes need beside the clips: class list, ontology, segment lists."""

import hashlib
from http.client import HTTPException
from pathlib import Path

from speechbrain.utils.data_utils import download_file

from psla_sb.errors import InputError
from psla_sb.files import atomic_write

SEGMENTS = "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv"
# Address, and SHA-256 of the file.
OFFICIAL = {
    "class_labels_indices.csv": (
        f"{SEGMENTS}/class_labels_indices.csv",
        "cdd1049833c4b86127c2773ac0d14a2754b6a6d0d1798002ed5c66e699708429",
    ),
    "ontology.json": (
        "https://raw.githubusercontent.com/audioset/ontology/master/ontology.json",
        "9c685f4403eecc3ca9be37fd7285cf212feaaea6ff7229d3e7ca89e0d1f2d15d",
    ),
    "balanced_train_segments.csv": (
        f"{SEGMENTS}/balanced_train_segments.csv",
        "3b83e5ff9ed72cfda37d4e36ce08250e107c1ea70f109f6ab6668ac200db5e94",
    ),
    "eval_segments.csv": (
        f"{SEGMENTS}/eval_segments.csv",
        "f7055f53935f70e74e39494a5c8c4c78f1700fce275028bd36e31186f33d45db",
    ),
    "unbalanced_train_segments.csv": (
        f"{SEGMENTS}/unbalanced_train_segments.csv",
        "bb2dfd5e4f1ced39db9480633c510f813d7899f4b7472aa83a411b4a43a12698",
    ),
}


def fetch_metadata(paths):
    """Downloads those of AudioSet's official files that are not there; files that are there are used as they are.

    What is downloaded is compared with the official files' SHA-256 before it gets its name.

    Arguments
    ---------
    paths : list of str or Path
        Where the files are to be, in folders that exist; their names are the official ones.

    Raises
    ------
    InputError
        A file is not there and has no official address, or cannot be downloaded, or is not the official one.

    Example
    -------
    >>> path = getfixture("tmp_path") / "class_labels_indices.csv"
    >>> path.touch()
    >>> fetch_metadata([path])
    """
    for path in map(Path, paths):
        if path.is_file():
            continue
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder; {path.name} is looked for in it, and downloaded into it")
        if path.name not in OFFICIAL:
            raise InputError(f"{path}: no such file, and it is none of AudioSet's official ones, which can be downloaded")
        url, expected = OFFICIAL[path.name]
        remedy = f"Get {url} on a machine that can, and put it at {path}."
        with atomic_write(path) as temporary:
            try:
                download_file(url, str(temporary), replace_existing=True)
            except (OSError, HTTPException) as error:
                raise InputError(f"{path}: no such file, and {url} cannot be downloaded: {error}. {remedy}") from None
            found = _sha256(temporary)
            if found != expected:
                raise InputError(
                    f"what {url} gave is not the official {path.name}: its SHA-256 is {found}, not {expected}. It was not kept. "
                    f"{remedy}"
                )


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
