"""The official files of AudioSet that recipes need beside the clips: class list, ontology, segment lists."""

from collections.abc import Iterable
from pathlib import Path

from psla_sb.errors import InputError
from psla_sb.fetch import fetch

SEGMENTS = "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv"
ONTOLOGY = "https://raw.githubusercontent.com/audioset/ontology/master"
# By name: address, and SHA-256 of the file.
OFFICIAL = {
    name: (f"{folder}/{name}", digest)
    for folder, name, digest in (
        (SEGMENTS, "class_labels_indices.csv", "cdd1049833c4b86127c2773ac0d14a2754b6a6d0d1798002ed5c66e699708429"),
        (ONTOLOGY, "ontology.json", "9c685f4403eecc3ca9be37fd7285cf212feaaea6ff7229d3e7ca89e0d1f2d15d"),
        (SEGMENTS, "balanced_train_segments.csv", "3b83e5ff9ed72cfda37d4e36ce08250e107c1ea70f109f6ab6668ac200db5e94"),
        (SEGMENTS, "eval_segments.csv", "f7055f53935f70e74e39494a5c8c4c78f1700fce275028bd36e31186f33d45db"),
        (SEGMENTS, "unbalanced_train_segments.csv", "bb2dfd5e4f1ced39db9480633c510f813d7899f4b7472aa83a411b4a43a12698"),
    )
}


def fetch_metadata(paths: Iterable[str | Path]) -> None:
    """Downloads those of AudioSet's official files that are not there; files that are there are used as they are.

    Arguments
    ---------
    paths
        Where the files are to be, in folders that exist; their names are the official ones.

    Raises
    ------
    InputError
        A file is not there and has no official address, or cannot be downloaded, or its SHA-256 is not the official one's.

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
        fetch(url, path, expected)
