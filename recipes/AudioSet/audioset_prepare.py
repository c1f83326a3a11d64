"""Annotations for AudioSet: its segment lists matched with the sound files that there are.

The official files (`balanced_train_segments.csv`, `class_labels_indices.csv`, ...) lie in the data folder; the clips lie in its
folder `audio`, or anywhere below the data folder if there is no such folder, at any depth and under any of the names
`<id>.wav`, `Y<id>.wav`, `<id>_<start>_<end>.wav`, `<id>_<start>-<end>.wav`, with any ending, where `<id>` is the YouTube ID of 11
characters, and the times are in seconds or milliseconds. Of several files of a clip the first one that can be read is taken.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from psla_sb.dataio.audio import AudioError, duration, read_blocks
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.prepare.annotations import are_made, in_annotation, origin, write_annotation
from psla_sb.prepare.copies import RESAMPLER, ending_of, resample_clips
from psla_sb.prepare.official_files import fetch_metadata

logger = get_logger(__name__)

SEGMENT = r'^(?P<id>[-_A-Za-z0-9]{11}), (?P<start>[0-9.]+), (?P<end>[0-9.]+), "(?P<mids>/[^",]+(?:,/[^",]+)*)"$'
FILE_NAME = r"^Y?(?P<id>[-_A-Za-z0-9]{11})(?:[-_][0-9]+(?:\.[0-9]+)?s?){0,2}(?:_?ms)?(?:\.f[0-9]+)?(?:\.[A-Za-z0-9]+)?$"
# what downloaders write beside the sounds
NO_SOUNDS = (".csv", ".json", ".txt", ".jpg", ".jpeg", ".png", ".webp", ".vtt", ".srt", ".part", ".ytdl", ".md", ".log", ".npy")
FILES_AT_ONCE = 256


def prepare_audioset(
    data_folder,
    train_annotation,
    train_segments,
    eval_annotation,
    eval_segments,
    n_threads=8,
    resampled_folder=None,
    sample_rate=16000,
    resampled_format="flac",
):
    """Writes the training and the evaluation annotation, and beside each a list of the clips that it had to leave out.

    Nothing is done if both annotations are there and were made from the same segment lists, even if clips have come or gone
    since: a run that goes on after an interruption needs the very clips that it began with. Delete the annotations to look for
    clips again.

    Arguments
    ---------
    data_folder : str or Path
        The folder with the segment lists and the clips.
    train_annotation, eval_annotation : str or Path
        The CSV files to write.
    train_segments, eval_segments : list of str
        Names of segment lists in the data folder; the clips of all of them together make up the set.
    n_threads : int
        Files that are opened at a time.
    resampled_folder : str or Path, optional
        Where to write mono copies of the clips, by as many processes as there are cores; the annotations then name these. An
        interrupted preparation goes on. Without it clips are resampled whenever they are read.
    sample_rate : int
        Of the copies, in Hz.
    resampled_format : str
        Of the copies: "flac" or "wav", see `psla_sb.prepare.copies.ending_of`.

    Raises
    ------
    InputError
        A segment list is not in the official form, or is missing and cannot be downloaded; or none of its clips is found.

    Example
    -------
    >>> from psla_sb.prepare.mini_audioset import write_mini_audioset
    >>> folder = getfixture("tmp_path")
    >>> _ = write_mini_audioset(folder, n_train=4, n_eval=2, seconds=0.5)
    >>> prepare_audioset(
    ...     folder, folder / "train.csv", ["balanced_train_segments.csv"], folder / "eval.csv", ["eval_segments.csv"]
    ... )
    >>> len(Manifest.from_csv(folder / "eval.csv", data_root=folder))
    2
    """
    sets = [(Path(train_annotation), train_segments), (Path(eval_annotation), eval_segments)]
    data_folder = Path(os.path.abspath(data_folder))
    if not data_folder.is_dir():
        raise InputError(f"{data_folder}: no such folder; data_folder is where AudioSet's segment lists and clips are")
    audio_folder = data_folder / "audio" if (data_folder / "audio").is_dir() else data_folder
    copies, ending = [], ending_of(resampled_format)
    if resampled_folder:
        resampled_folder = Path(os.path.abspath(resampled_folder))
        copies = [resampled_folder, sample_rate, ending]
        if os.path.realpath(resampled_folder) == os.path.realpath(audio_folder):
            raise InputError(
                f"resampled_folder: {resampled_folder} has the clips themselves; choose another folder for their copies"
            )
    lists = [data_folder / name for _, names in sets for name in names]
    fetch_metadata(lists)
    made_from = origin(lists, str(data_folder), *map(str, copies), *([RESAMPLER] if copies else []))
    if are_made([annotation for annotation, _ in sets], made_from):
        return
    ids, paths = find_clips(audio_folder, resampled_folder)
    for annotation, names in sets:
        lists = [data_folder / name for name in names]
        write_clips(annotation, lists, data_folder, audio_folder, ids, paths, n_threads, copies, made_from)


def read_segments(path):
    """A segment list as columns.

    Returns
    -------
    pyarrow.StructArray
        Fields `id`, `start` and `end` (seconds, as text) and `mids` (joined by `,`).

    Raises
    ------
    InputError
        A line is not in the official form: the message has its number.

    Example
    -------
    >>> path = getfixture("tmp_path") / "eval_segments.csv"
    >>> _ = path.write_text('# a\\n# b\\n# YTID, ...\\n--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\\n')
    >>> read_segments(path)[0]["mids"].as_py()
    '/m/068hy,/m/07q6cd_'
    """
    lines = pc.split_pattern(
        pa.array([Path(path).read_text(encoding="utf-8", errors="replace")], pa.large_string()), "\n"
    ).flatten()
    numbers = np.flatnonzero(pc.invert(pc.or_(pc.starts_with(lines, "#"), pc.equal(lines, ""))).to_numpy(zero_copy_only=False))
    lines = lines.take(pa.array(numbers))
    segments = pc.extract_regex(lines, SEGMENT)
    bad = np.flatnonzero(pc.is_null(segments).to_numpy(zero_copy_only=False))
    if len(bad) or len(lines) == 0:
        first = f"line {numbers[bad[0]] + 1} is {lines[int(bad[0])].as_py()!r}" if len(bad) else "it has no segments"
        raise InputError(
            f"{path}: not AudioSet's segment list as published: {first}, where it should be like "
            "'--PJHxphWEs, 30.000, 40.000, \"/m/09x0r,/t/dd00088\"' (a copy saved by a spreadsheet is not). "
            "Get the file again from https://research.google.com/audioset/download.html"
        )
    return segments


def find_clips(folder, besides=None):
    """The sound files below a folder whose names tell which clip they are.

    Arguments
    ---------
    folder : str or Path
        Where to look; links to other folders are followed.
    besides : Path, optional
        A folder in it that is not looked into: that of the copies.

    Returns
    -------
    (pyarrow.Array, pyarrow.Array)
        IDs, and paths relative to the folder, in the order of the paths.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("-abcdefghij.wav", "Y_abcdefghij.flac", "Yabcdefghij_30.000_40.000.mp3", "notes.txt"):
    ...     (folder / name).touch()
    >>> find_clips(folder)[0].to_pylist()
    ['-abcdefghij', '_abcdefghij', 'Yabcdefghij']
    """
    paths = [pa.array([], pa.string())]
    for top, folders, names in tqdm(
        os.walk(folder, followlinks=True), desc=f"Looking for clips in {folder}", unit=" folders", disable=None
    ):
        here = Path(os.path.realpath(top))
        inside = [path for path in (Path(top, name) for name in folders) if path != besides]
        # a link to a folder that it is in would lead round and round
        folders[:] = [path.name for path in inside if not (path.is_symlink() and here.is_relative_to(path.resolve()))]
        # names that are not UTF-8 are no clips of AudioSet, but may lie about
        names = [os.fsencode(name).decode(errors="replace") for name in names if not name.lower().endswith(NO_SOUNDS)]
        paths.append(pa.array([os.path.join(os.path.relpath(top, folder), name) for name in names], pa.string()))
    paths = pc.replace_substring_regex(pa.concat_arrays(paths), r"^\./", "")
    paths = paths.take(pc.sort_indices(paths))
    ids = pc.struct_field(pc.extract_regex(pc.replace_substring_regex(paths, r"^.*/", ""), FILE_NAME), "id")
    return ids.filter(ids.is_valid()), paths.filter(ids.is_valid())


def write_clips(annotation, segment_lists, data_folder, audio_folder, ids, paths, n_threads, copies, made_from):
    """Writes the clips of segment lists that are there as an annotation, and `<annotation>_left_out.csv` with the others.

    Arguments
    ---------
    annotation : Path
        The CSV file to write.
    segment_lists : list of Path
        Official segment lists.
    data_folder, audio_folder : Path
        Absolute; paths in the annotation are relative to the former, `paths` to the latter.
    ids, paths : pyarrow.Array
        The clips that there are, see `find_clips`.
    n_threads : int
        Files that are opened at a time.
    copies : (Path, int, str) or ()
        The folder, sample rate and ending of copies of the clips.
    made_from : str
        See `psla_sb.prepare.annotations.origin`.

    Raises
    ------
    InputError
        None of the clips can be used.
    """
    segments = pa.concat_arrays([read_segments(path) for path in segment_lists])
    wanted, mids = pc.struct_field(segments, "id").cast(pa.string()), pc.struct_field(segments, "mids").cast(pa.string())
    found = paths.take(first_readable(wanted, ids, paths, audio_folder, n_threads))
    missing = found.is_null().to_numpy(zero_copy_only=False)
    sources = pc.binary_join_element_wise(str(audio_folder), found, "/")
    faults = {}
    folder = audio_folder
    if copies:
        folder, sample_rate, ending = copies
        rows = np.flatnonzero(~missing)
        found = pc.binary_join_element_wise(pc.replace_substring_regex(found, r"\.[A-Za-z0-9]+$", ""), ending, "")
        durations = np.zeros(len(segments))
        durations[rows], errors = resample_clips(sources.drop_null(), found.drop_null(), folder, sample_rate)
        faults = {rows[i]: error for i, error in errors.items()}
    else:
        durations = durations_of(found, audio_folder, n_threads, annotation.name)
    usable = durations > 0

    def left_out():
        for row in np.flatnonzero(~usable):
            if missing[row]:
                yield wanted[row], "no file", ""
            else:
                reason = faults.get(row, "cannot be read as sound, or is empty").removeprefix(f"{sources[row]}: ")
                yield wanted[row], reason, sources[row]

    names = " + ".join(path.name for path in segment_lists)
    summary = f"{names}: {len(segments)} clips, {usable.sum()} usable, {missing.sum()} without a file, "
    summary += f"{(~usable & ~missing).sum()} that cannot be read"
    if not usable.any():
        raise InputError(
            f"{summary}. Looked below {audio_folder} for <id>, Y<id> and <id>_<start>_<end> with any ending (.wav, .flac, .m4a), "
            f"for example {wanted[0]}.wav; there are {len(paths)} files of such names, "
            f"{'none' if missing.all() else 'no readable one'} of a clip in the list."
        )
    keep = pa.array(usable)
    manifest = Manifest.from_columns(
        wanted.filter(keep),
        pc.binary_join_element_wise(in_annotation(folder, data_folder), found.filter(keep), ""),
        durations[usable].round(3),
        pc.replace_substring(mids.filter(keep), ",", ";"),
        source=annotation,
    )
    listed = write_annotation(annotation, manifest, left_out(), made_from, mids)
    logger.info("%s%s", summary, "" if usable.all() else f"; those left out are listed in {listed}")


def first_readable(wanted, ids, paths, folder, n_threads=8):
    """Chooses a file of each clip: the only one, or of several the first that can be read, or the first.

    Arguments
    ---------
    wanted : pyarrow.Array
        IDs of the clips.
    ids, paths : pyarrow.Array
        The files that there are, see `find_clips`.
    folder : str or Path
        Where they are.
    n_threads : int
        Files that are opened at a time.

    Returns
    -------
    pyarrow.Array
        Rows of `paths`, null where there is no file.
    """
    chosen = pc.index_in(wanted, value_set=ids).to_numpy(zero_copy_only=False).astype(float)
    encoded = ids.dictionary_encode()
    several = np.flatnonzero(np.bincount(encoded.indices.to_numpy(), minlength=len(encoded.dictionary)) > 1)
    several = np.intersect1d(several, pc.index_in(wanted, value_set=encoded.dictionary).drop_null().to_numpy())
    rows = np.flatnonzero(np.isin(encoded.indices.to_numpy(), several))
    # they are few, so all of them is read
    readable = rows[durations_of(paths.take(pa.array(rows)), folder, n_threads, "Clips with several files", decode=True) > 0]
    better = pc.index_in(wanted, value_set=ids.take(pa.array(readable)))
    has_better = better.is_valid().to_numpy(zero_copy_only=False)
    chosen[has_better] = readable[better.drop_null().to_numpy()]
    return pa.array(chosen, from_pandas=True).cast(pa.int64())


def durations_of(paths, folder, n_threads=8, name="", decode=False):
    """How long sound files are: what the header says, if it can be believed, or else what is counted.

    Arguments
    ---------
    paths : pyarrow.Array
        Relative to the folder; may have nulls.
    folder : str or Path
        Where they are.
    n_threads : int
        Files that are opened at a time.
    name : str
        For the progress bar.
    decode : bool
        Whether all of a file is read, to see whether it is whole.

    Returns
    -------
    np.ndarray
        Seconds `[clips]`: NaN where there is no path, 0 where there is no sound.

    Example
    -------
    >>> durations_of(pa.array([None, "nowhere.wav"]), "somewhere")
    array([nan,  0.])
    """
    durations = np.full(len(paths), np.nan)

    def open_files(rows):
        for row in rows:
            if paths[row].is_valid:
                try:
                    path = os.path.join(folder, paths[row].as_py())
                    durations[row] = sum(map(len, read_blocks(path))) / 16000 if decode else duration(path)
                except AudioError:
                    durations[row] = 0.0

    jobs = [range(start, min(start + FILES_AT_ONCE, len(paths))) for start in range(0, len(paths), FILES_AT_ONCE)]
    with ThreadPoolExecutor(n_threads) as pool, tqdm(total=len(paths), desc=name, unit=" clips", disable=None) as bar:
        for rows, _ in zip(jobs, pool.map(open_files, jobs), strict=True):
            bar.update(len(rows))
    return durations
