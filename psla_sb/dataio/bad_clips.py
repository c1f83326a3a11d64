"""What a run does with sound files that cannot be read: it stops, or it goes on and lists them."""

import csv
import io
from pathlib import Path

from speechbrain.utils.logger import get_logger

from psla_sb.dataio.audio import AudioError
from psla_sb.errors import InputError

logger = get_logger(__name__)

POLICIES = ("error", "skip")
FILE = "bad_clips.csv"
HEADER = ["set", "ID", "error"]
MOST = 0.01  # of a set's clips


def check_audio(batch):
    """Raises what went wrong while the sound files of a batch were read.

    Raises
    ------
    AudioError
        The message names the first such file.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> check_audio(SimpleNamespace(error=[None, "a.wav: has no samples"]))
    Traceback (most recent call last):
    ...
    psla_sb.dataio.audio.AudioError: a.wav: has no samples
    """
    for error in batch.error:
        if error is not None:
            raise AudioError(error)


class BadClips:
    """Lists the clips that cannot be read in a run's `bad_clips.csv`, once each, and stops the run if they are too many.

    A clip of training that cannot be read has been replaced by another draw (see `TaggingDataset`); one of another set is scored as
    silence, so that figures stay those of the whole set.

    Arguments
    ---------
    folder : str or Path
        The run's output folder. What is in its list already counts: all processes of a run, and a resumed run, go on with it.
    name : str
        Of the set: "train", "valid" or "test".
    n_clips : int
        Clips of the set.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> folder = getfixture("tmp_path")
    >>> check = BadClips(folder, "valid", n_clips=200)
    >>> check(SimpleNamespace(id=["a", "b"], error=[None, "b.wav: has no samples"]))
    >>> (folder / "bad_clips.csv").read_text().splitlines()
    ['set,ID,error', 'valid,b,b.wav: has no samples']
    """

    def __init__(self, folder, name, n_clips):
        self.file, self.name, self.n_clips = Path(folder) / FILE, name, n_clips
        self.known, self.n_read = set(), 0

    def __call__(self, batch):
        """Looks through a batch.

        Raises
        ------
        AudioError
            A clip of training could not be replaced.
        InputError
            More than 1 % of the set's clips cannot be read.
        """
        # only those that are drawn can be replaced
        if hasattr(batch, "skipped"):
            check_audio(batch)
            found = [clip for clips in batch.skipped for clip in clips]
        else:
            found = [(clip, error) for clip, error in zip(batch.id, batch.error, strict=True) if error is not None]
        for clip, error in found:
            if clip in self.known:
                continue
            self._read()
            if clip not in self.known:
                self._write(clip, error)
                self.known.add(clip)
                logger.warning(
                    "%s (so far %d of the %d clips of the %s set; %s lists them)",
                    *(error, len(self.known), self.n_clips, self.name, self.file),
                )
        if len(self.known) > MOST * self.n_clips:
            raise InputError(
                f"At least {len(self.known)} of the {self.n_clips} clips of the {self.name} set cannot be read, which is more than "
                f"{MOST:.0%}; {self.file} lists them. Mend these files, or take them out of the annotation; then delete that list."
            )

    def _write(self, clip, error):
        # in one piece: other processes write to it as well
        with open(self.file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if stream.tell() == 0:
                writer.writerow(HEADER)
            writer.writerow([self.name, clip, " ".join(error.split())])

    def _read(self):
        """Takes up what has been added to the list since the last time."""
        if not self.file.exists():
            return
        with open(self.file, newline="", encoding="utf-8") as stream:
            stream.seek(self.n_read)
            rows = stream.read()
            self.n_read = stream.tell()
        # a kill may have cut the last row, and a person may have edited the list
        self.known.update(row[1] for row in csv.reader(io.StringIO(rows, newline="")) if row[:1] == [self.name] and len(row) > 1)


def audio_check(policy, folder, name, n_clips):
    """What a run does with each batch of a set.

    Arguments
    ---------
    policy : str
        "error": a clip that cannot be read stops the run. "skip": it is listed.
    folder, name, n_clips
        See `BadClips`.

    Returns
    -------
    callable
        Takes a batch.

    Raises
    ------
    InputError
        There is no such policy.

    Example
    -------
    >>> audio_check("error", "results", "train", n_clips=500).__name__
    'check_audio'
    """
    if policy not in POLICIES:
        raise InputError(f"on_bad_audio must be one of {', '.join(POLICIES)}, not {policy!r}")
    return check_audio if policy == "error" else BadClips(folder, name, n_clips)
