"""What a run does with sound files that cannot be read: it stops, or it goes on and lists them."""

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.logger import get_logger

from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import append

logger = get_logger(__name__)

POLICIES = ("error", "skip")
FILE = "bad_clips.csv"
HEADER = ["set", "ID", "error"]
MOST = 0.01  # of a set's clips


def check_audio(batch: PaddedBatch) -> None:
    """Raises, as an `AudioError`, what went wrong with the first sound file of a batch that could not be read."""
    for error in filter(None, batch.error):
        raise AudioError(error)


class BadClips:
    """Lists the clips that cannot be read in a run's `bad_clips.csv`, once each, and stops the run if they are too many.

    It is called with every batch of a set ("train", "valid" or "test") of `n_clips`. A clip of training that cannot be read has
    been replaced by another draw (see `TaggingDataset`); one of another set is scored as silence, so that figures stay those of
    the whole set. All processes of a run, and a resumed run, go on with the list in its output folder.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> folder = getfixture("tmp_path")
    >>> check = BadClips(folder, "valid", n_clips=200)
    >>> check(SimpleNamespace(id=["a", "b"], error=[None, "b.wav: has no samples"]))
    >>> (folder / "bad_clips.csv").read_text().splitlines()
    ['set,ID,error', 'valid,b,b.wav: has no samples']
    """

    def __init__(self, folder: str | Path, name: str, n_clips: int) -> None:
        self.file, self.name, self.n_clips = Path(folder) / FILE, name, n_clips
        self.known, self.n_read = set[str](), 0

    def __call__(self, batch: PaddedBatch) -> None:
        """Looks through a batch; raises if a clip of training could not be replaced, or more than 1 % of the set are listed."""
        # only those that are drawn can be replaced
        if hasattr(batch, "skipped"):
            check_audio(batch)
            found = [clip for clips in batch.skipped for clip in clips]
        else:
            found = [(clip, error) for clip, error in zip(batch.id, batch.error, strict=True) if error is not None]
        for clip, error in found:
            if clip not in self.known:
                self._read()
            if clip not in self.known:
                self._add(clip, error)
        if len(self.known) > MOST * self.n_clips:
            raise InputError(
                f"At least {len(self.known)} of the {self.n_clips} clips of the {self.name} set cannot be read, which is more than "
                f"{MOST:.0%}; {self.file} lists them. Mend these files, or take them out of the annotation; then delete that list."
            )

    def _add(self, clip: str, error: str) -> None:
        append(self.file, csv_line([self.name, clip, " ".join(error.split())]), csv_line(HEADER))
        self.known.add(clip)
        logger.warning(
            f"{error} (so far {len(self.known)} of the {self.n_clips} clips of the {self.name} set; {self.file} lists them)"
        )

    def listed(self) -> list[str]:
        """Gives the clips of the set that are in the list."""
        self.known, self.n_read = set(), 0
        self._read()
        return sorted(self.known)

    def _read(self) -> None:
        """Takes up what has been added to the list since the last time."""
        if not self.file.exists():
            return
        with open(self.file, newline="", encoding="utf-8") as stream:
            stream.seek(self.n_read)
            # a kill may have cut the last row, and a person may have edited the list
            self.known.update(row[1] for row in csv.reader(stream) if row[:1] == [self.name] and len(row) > 1)
            self.n_read = stream.tell()


def csv_line(cells: Sequence[Any]) -> str:
    """Writes the row of a CSV file.

    >>> csv_line(["a", "b, c", "d\\re"])
    'a,"b, c","d\\re"\\n'
    """
    text = io.StringIO()
    # with another end of lines, a cell with a carriage return would get no quotes
    csv.writer(text).writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def listed(check: Callable) -> list[str]:
    """Gives the clips that are scored as silence by what `audio_check` returned."""
    return check.listed() if isinstance(check, BadClips) else []


def state_of_sounds(manifest: Manifest, check: Callable) -> dict[str, str]:
    """Tells whether scores are of sounds as they are now: size and time of their files, and which are scored as silence."""
    return {"sounds": manifest.state_of_files(), **state_of_bad_clips(manifest, check)}


def state_of_bad_clips(manifest: Manifest, check: Callable) -> dict[str, str]:
    """Tells which of a set's clips are scored as silence: known after a pass, where files are as they were before it."""
    silent = pa.array(listed(check), pa.string())
    known = manifest.table["ID"].filter(pc.is_in(manifest.table["ID"], silent)).to_pylist()
    return {"bad_clips": hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()}


def audio_check(policy: str, folder: str | Path, name: str, n_clips: int) -> Callable[[PaddedBatch], None]:
    """Chooses what a run does with each batch of a set (see `BadClips`): "error" stops it at a bad clip, "skip" lists the clip."""
    if policy not in POLICIES:
        raise InputError(f"on_bad_audio must be one of {', '.join(POLICIES)}, not {policy!r}")
    return check_audio if policy == "error" else BadClips(folder, name, n_clips)
