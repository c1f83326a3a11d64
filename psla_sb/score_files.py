"""Scores of models on the disk: `.npy` files `[clips, classes]`, each with a `.json` file that tells of which clips and classes.

`psla_sb.aggregation` writes them; a training with a teacher reads them.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from psla_sb.errors import InputError


def stamp(manifest, vocabulary):
    """What tells whether scores are of these clips and classes; it is in the JSON file beside them.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> manifest = Manifest.from_columns(["a"], ["a.wav"], [1.0], ["/m/1"])
    >>> list(stamp(manifest, Vocabulary(["/m/1"], ["Bell"])))
    ['annotation', 'classes']
    """
    return {"annotation": manifest.digest(), "classes": hashlib.sha256(json.dumps(vocabulary.mids).encode()).hexdigest()}


def open_scores(path, manifest, vocabulary):
    """Scores of the clips of an annotation, which were written by `psla_sb.aggregation.score` or by a recipe's `aggregate.py`.

    Arguments
    ---------
    path : str or Path
        The `.npy` file; the `.json` file that was written with it lies beside it.
    manifest : Manifest
        The clips that the rows must be of, in this order.
    vocabulary : Vocabulary
        The classes that the columns must be of.

    Returns
    -------
    np.ndarray
        float32 `[clips, classes]`, memory-mapped.

    Raises
    ------
    InputError
        There are no such scores, or they are of other clips or classes.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> manifest, vocabulary = Manifest.from_columns(["a"], ["a.wav"], [1.0], [""]), Vocabulary(["/m/1"], ["Bell"])
    >>> path = getfixture("tmp_path") / "ensemble.npy"
    >>> np.save(path, np.zeros((1, 1), np.float32))
    >>> _ = path.with_suffix(".json").write_text(json.dumps(stamp(manifest, vocabulary)))
    >>> open_scores(path, manifest, vocabulary).shape
    (1, 1)
    """
    path, of_clips = Path(path), stamp(manifest, vocabulary)
    try:
        scores, said = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; aggregate.py writes scores as a pair of .npy and .json") from None
    except (ValueError, RecursionError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as scores with a .json file beside it: {error}") from None
    if not isinstance(said, dict) or not isinstance(scores, np.ndarray):
        raise InputError(f"{path}: not a pair of .npy and .json as aggregate.py writes it")
    for key, what in (("annotation", manifest.source), ("classes", "the class list")):
        if said.get(key) != of_clips[key]:
            raise InputError(
                f"{path}: scores of others than {what}, or in another order; score them with aggregate.py --annotation"
            )
    if scores.shape != (len(manifest), len(vocabulary)):
        raise InputError(f"{path}: has the shape {list(scores.shape)}, not {[len(manifest), len(vocabulary)]}; write it again")
    return scores


def new_array(path, shape):
    """A float32 `.npy` file of zeros, to be filled through memory.

    Its room on the disk is taken here: where there is none left when a page is written, the process ends by a signal.

    Returns
    -------
    np.memmap

    Raises
    ------
    OSError
        The disk is full.

    Example
    -------
    >>> new_array(getfixture("tmp_path") / "scores.npy", (2, 3)).sum()
    np.float32(0.0)
    """
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with open(path, "r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    return array
