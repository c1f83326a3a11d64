"""Scores of models on the disk: `.npy` files `[clips, classes]`, each with a `.json` file that tells of which clips and classes.

`psla_sb.aggregation` writes them; a training with a teacher reads them.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from psla_sb.errors import InputError

# In a folder of scores: the scores, and the clips that their rows are of.
SCORES, IDS = "scores.npy", "ids.csv"


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
    """Scores of the clips of an annotation, as a recipe's `aggregate.py` writes them.

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


def read_scores(path):
    """A teacher's scores and the IDs of the clips that they are of.

    Arguments
    ---------
    path : str or Path
        A folder with `scores.npy`, floating-point `[clips, classes]`, or another such file. In the same folder is `ids.csv`,
        whose column `ID` (others do not matter) has the clip of each row.

    Returns
    -------
    scores : numpy.memmap [rows, classes]
    ids : pyarrow.ChunkedArray [rows]
    source : Path
        The file of scores.

    Raises
    ------
    InputError
        A file is missing or broken, or there are not as many IDs as rows.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> np.save(folder / "scores.npy", np.array([[0.1, 0.9]], dtype=np.float16))
    >>> _ = (folder / "ids.csv").write_text("ID\\na\\n")
    >>> scores, ids, source = read_scores(folder)
    >>> scores.shape, ids.to_pylist(), source.name
    ((1, 2), ['a'], 'scores.npy')
    """
    source = Path(path) / SCORES if Path(path).is_dir() else Path(path)
    try:
        scores = np.load(source, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file of a teacher's scores; the recipe's enhance_labels.py writes them") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{source}: not a whole .npy file of numbers ({error})") from None
    file = source.with_name(IDS)
    try:
        options = pyarrow.csv.ConvertOptions(column_types={"ID": pa.string()}, include_columns=["ID"], strings_can_be_null=False)
        ids = pyarrow.csv.read_csv(file, convert_options=options)["ID"]
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; it says in a column 'ID' which clips the rows of {source.name} are of") from None
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise InputError(f"{file}: not a CSV file with a column 'ID' ({error})") from None
    if scores.ndim != 2 or len(ids) != len(scores):
        raise InputError(f"{file} has {len(ids)} IDs for the scores in {source.name}, whose shape is {list(scores.shape)}")
    return scores, ids, source
