"""Scores of models on the disk: `.npy` files `[clips, classes]`, each with a `.json` file that tells of which clips and classes.

`psla_sb.aggregation` writes them; a training with a teacher reads them.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary

# In a folder of scores: the scores, and the clips that their rows are of.
SCORES, IDS = "scores.npy", "ids.csv"


def stamp(manifest: Any, vocabulary: Vocabulary) -> dict[str, str]:
    """Tells whether scores are of these clips and classes: what the JSON file beside them has."""
    return {"annotation": manifest.digest(), "classes": vocabulary.digest()}


def open_scores(path: str | Path, manifest: Any, vocabulary: Vocabulary) -> np.ndarray:
    """Maps scores of a `Manifest`'s clips, as a recipe's `aggregate.py` writes them: float32 `[clips, classes]`.

    Refuses those of other clips, another order or other classes.
    """
    path, of_clips = Path(path), stamp(manifest, vocabulary)
    try:
        scores, said = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; aggregate.py writes scores as a pair of .npy and .json") from None
    except (ValueError, RecursionError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as scores with a .json file beside it: {error}") from None
    # np.load reads .npz too, as another kind of object
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


def new_array(path: str | Path, shape: tuple[int, ...]) -> np.memmap:
    """Makes a float32 `.npy` file of NaN, to be filled through memory; `OSError` if the disk is full."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with open(path, "r+b") as stream:
        # Where there is no room left when a mapped page is written, the process ends by a signal: take the room now.
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    array[:] = np.nan
    return array


def read_scores(path: str | Path) -> tuple[np.ndarray, pa.ChunkedArray, Path]:
    """Maps a teacher's scores `[rows, classes]`, and reads the IDs of the clips that they are of; the third is the scores' file.

    `path` is a folder with `scores.npy`, or another such file. The column `ID` of `ids.csv` in the same folder has the IDs.
    """
    source = Path(path) / SCORES if Path(path).is_dir() else Path(path)
    try:
        scores = np.load(source, mmap_mode="r")
        if not isinstance(scores, np.ndarray):
            raise ValueError("an archive of several")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file of a teacher's scores; the recipe's enhance_labels.py writes them") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{source}: not a whole .npy file of numbers ({error})") from None
    file = source.with_name(IDS)
    try:
        # IDs are text: 007 is not 7, and NA is a name
        options = pyarrow.csv.ConvertOptions(column_types={"ID": pa.string()}, include_columns=["ID"], strings_can_be_null=False)
        ids = pyarrow.csv.read_csv(file, convert_options=options)["ID"]
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; it says in a column 'ID' which clips the rows of {source.name} are of") from None
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise InputError(f"{file}: not a CSV file with a column 'ID' ({error})") from None
    if scores.ndim != 2 or len(ids) != len(scores):
        raise InputError(f"{file} has {len(ids)} IDs for the scores in {source.name}, whose shape is {list(scores.shape)}")
    return scores, ids, source
