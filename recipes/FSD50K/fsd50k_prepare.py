"""Annotations for FSD50K: its ground truth, and copies of its clips at the model's sample rate.

The official folders lie in the data folder as they are unpacked: `FSD50K.ground_truth` with `dev.csv`, `eval.csv` and
`vocabulary.csv`, `FSD50K.dev_audio/<fname>.wav`, `FSD50K.eval_audio/<fname>.wav`. Training and validation are the official
parts of dev.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from speechbrain.utils.logger import get_logger

from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.annotations import are_made, in_annotation, origin, write_annotation
from psla_sb.prepare.copies import RESAMPLER, ending_of, resample_clips

logger = get_logger(__name__)

GROUND_TRUTH = "FSD50K.ground_truth"
SETS = {"train": "dev", "valid": "dev", "eval": "eval"}  # and the ground truth that each is in
SPLITS = {"train": "train", "valid": "val"}  # names in dev.csv
SOURCE = "https://zenodo.org/records/4060432"
# a name that leads to another folder would be written there
FNAME = r"^[\w.-]+$"


def prepare_fsd50k(
    data_folder,
    train_annotation,
    valid_annotation,
    eval_annotation,
    class_list,
    resampled_folder,
    sample_rate=16000,
    expected_clips=None,
    n_workers=None,
    resampled_format="flac",
):
    """Writes the class list, 16-bit mono copies of all clips, the three annotations, and beside each a list of the clips
    that it had to leave out.

    Copies that are there are kept, see `psla_sb.prepare.copies.resample_clips`; killed, the same call goes on. Nothing but the
    class list is written if the annotations are there and were made from the same ground truth; delete them to look for clips
    again.

    Arguments
    ---------
    data_folder : str or Path
        The folder with the official folders.
    train_annotation, valid_annotation, eval_annotation : str or Path
        The CSV files to write.
    class_list : str or Path
        The class list to write, `index,mid,display_name`, with names as AudioSet has them ("Chirp, tweet").
    resampled_folder : str or Path
        Where the copies go: `dev/<fname>.flac`, `eval/<fname>.flac`, or `.wav`.
    sample_rate : int
        Of the copies, in Hz.
    expected_clips : dict of str to int, optional
        How many clips `train`, `valid` and `eval` should have; a warning says what is missing.
    n_workers : int, optional
        Processes that resample, by default as many as there are cores.
    resampled_format : str
        Of the copies: "flac" or "wav", see `psla_sb.prepare.copies.ending_of`.

    Raises
    ------
    InputError
        A file or folder is missing, the ground truth is not as published, or no clip of a set can be read.

    Example
    -------
    >>> from psla_sb.prepare.mini_fsd50k import write_mini_fsd50k
    >>> data = write_mini_fsd50k(getfixture("tmp_path"), n_train=3, n_valid=1, n_eval=2, seconds=0.5)
    >>> annotations = [data / f"{name}.csv" for name in SETS]
    >>> prepare_fsd50k(data, *annotations, data / "classes.csv", data / "audio_16k", n_workers=1)
    >>> Manifest.from_csv(annotations[0])[0]["wav"]
    '{data_root}/audio_16k/dev/....flac'
    """
    data_folder, resampled_folder = (Path(os.path.abspath(folder)) for folder in (data_folder, resampled_folder))
    ending = ending_of(resampled_format)
    annotations = dict(zip(SETS, map(Path, (train_annotation, valid_annotation, eval_annotation)), strict=True))
    if expected_clips is not None and (not isinstance(expected_clips, dict) or not expected_clips.keys() <= SETS.keys()):
        raise InputError(
            f"expected_clips: should be like {{train: 36796, valid: 4170, eval: 10231}}, or null, not {expected_clips}"
        )
    files = {name: data_folder / GROUND_TRUTH / f"{name}.csv" for name in ("vocabulary", "dev", "eval")}
    for path in files.values():
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; data_folder must hold {GROUND_TRUTH}, FSD50K.dev_audio and FSD50K.eval_audio, "
                f"unpacked from {SOURCE}"
            )
    vocabulary = read_vocabulary(files["vocabulary"])
    with atomic_write(class_list) as temporary:
        vocabulary.to_csv(temporary)
    made_from = origin(files.values(), str(data_folder), str(resampled_folder), sample_rate, ending, RESAMPLER)
    if are_made(annotations.values(), made_from):
        return
    tables = {name: read_ground_truth(files[name], vocabulary) for name in ("dev", "eval")}
    for name in tables:
        if not audio_folder(data_folder, name).is_dir() and not (resampled_folder / name).is_dir():
            raise InputError(f"{audio_folder(data_folder, name)}: no such folder; unpack it from {SOURCE}")
    clips = {name: tables[SETS[name]] for name in SETS}
    for name, split in SPLITS.items():
        clips[name] = clips[name].filter(pc.equal(clips[name]["split"], split))
        if not len(clips[name]):
            raise InputError(f"{files['dev']}: has no clips whose split is '{split}'; get the file again from {SOURCE}")
    targets = {
        name: pc.binary_join_element_wise(f"{SETS[name]}/", table["fname"], ending, "").combine_chunks()
        for name, table in clips.items()
    }
    sources = [
        pc.binary_join_element_wise(f"{audio_folder(data_folder, SETS[name])}/", table["fname"], ".wav", "").combine_chunks()
        for name, table in clips.items()
    ]
    durations, errors = resample_clips(
        pa.concat_arrays(sources), pa.concat_arrays(list(targets.values())), resampled_folder, sample_rate, n_workers
    )
    prefix = in_annotation(resampled_folder, data_folder)
    start = 0
    for (name, table), source in zip(clips.items(), sources, strict=True):
        stop = start + len(table)
        faults = {row - start: error for row, error in errors.items() if start <= row < stop}
        listed = f"{files[SETS[name]]}, {name}: {len(table)} clips, {len(table) - len(faults)} usable"
        if len(faults) == len(table):
            raise InputError(f"{listed}; the first: {faults[0]}")
        usable = np.isfinite(durations[start:stop])
        keep = pa.array(usable)
        manifest = Manifest.from_columns(
            table["fname"].filter(keep).combine_chunks(),
            pc.binary_join_element_wise(prefix, targets[name].filter(keep), ""),
            durations[start:stop][usable].round(3),
            pc.replace_substring(table["mids"].filter(keep), ",", ";").combine_chunks(),
            source=annotations[name],
        )
        reasons = ((table["fname"][row], error.removeprefix(f"{source[row]}: "), source[row]) for row, error in faults.items())
        left_out = write_annotation(annotations[name], manifest, reasons, made_from, table["mids"].combine_chunks())
        listed += f"; those left out are listed in {left_out}" if faults else ""
        missing = (expected_clips or {}).get(name, len(table)) - len(table) + len(faults)
        if missing:
            logger.warning(
                "%s. That is %d %s than FSD50K has: get the official files from %s, delete %s, and run the same command again.",
                *(listed, abs(missing), "fewer" if missing > 0 else "more", SOURCE, annotations[name]),
            )
        else:
            logger.info(listed)
        start = stop


def audio_folder(data_folder, name):
    """Where the official clips of dev or eval are.

    Example
    -------
    >>> str(audio_folder("data", "dev"))
    'data/FSD50K.dev_audio'
    """
    return Path(data_folder) / f"FSD50K.{name}_audio"


def read_vocabulary(path):
    """FSD50K's classes, with names for people: `Chirp_and_tweet` is "Chirp, tweet", as AudioSet has it.

    Returns
    -------
    Vocabulary

    Raises
    ------
    InputError
        The file is not such a list.

    Example
    -------
    >>> path = getfixture("tmp_path") / "vocabulary.csv"
    >>> _ = path.write_text("0,Chirp_and_tweet,/m/07pggtn\\n")
    >>> read_vocabulary(path).names
    ['Chirp, tweet']
    """
    vocabulary = Vocabulary.from_csv(path)
    return Vocabulary(vocabulary.mids, [name.replace("_and_", ", ").replace("_", " ") for name in vocabulary.names])


def read_ground_truth(path, vocabulary):
    """The columns `fname`, `mids` and, for `dev.csv`, `split` of a ground truth, as text.

    Arguments
    ---------
    path : Path
        `dev.csv` or `eval.csv`.
    vocabulary : Vocabulary
        What labels must be among.

    Returns
    -------
    pyarrow.Table

    Raises
    ------
    InputError
        It is not as published.

    Example
    -------
    >>> path = getfixture("tmp_path") / "eval.csv"
    >>> _ = path.write_text('fname,labels,mids\\n007,Bell,/m/1\\n8,"Bell,Rain","/m/1,/m/2"\\n')
    >>> read_ground_truth(path, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).to_pydict()
    {'fname': ['007', '8'], 'mids': ['/m/1', '/m/1,/m/2']}
    """
    columns = ["fname", "mids"] + ["split"] * (path.stem == "dev")
    again = f"get the file again from {SOURCE}"
    try:
        table = pyarrow.csv.read_csv(
            path,
            # with threads the message does not have the row
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                include_missing_columns=True,
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not FSD50K's ground truth as published: {error}; {again}") from None
    if missing := [name for name in columns if table[name].null_count]:
        raise InputError(f"{path}: no column {', '.join(missing)}; its header should have {', '.join(columns)}; {again}")
    if not len(table):
        raise InputError(f"{path}: no clips in it; {again}")
    rules = {"fname": (FNAME, "the name of a file without ending"), "mids": (".", "mids joined by commas")}
    if "split" in columns:
        rules["split"] = (f"^({'|'.join(SPLITS.values())})$", f"one of {', '.join(SPLITS.values())}")
    for name, (pattern, meaning) in rules.items():
        fits = pc.match_substring_regex(table[name], pattern)
        if not pc.all(fits).as_py():
            row = pc.index(fits, False).as_py()
            value = table[name][row].as_py()
            raise InputError(f"{path}, clip {row + 1}: the column '{name}' is {value!r}, not {meaning}; {again}")
    fnames, labels = table["fname"], pc.replace_substring(table["mids"], ",", ";")
    # refuses repeated names and unknown labels
    Manifest.from_columns(fnames, fnames, [None] * len(table), labels, source=path).label_sets(vocabulary)
    return table
