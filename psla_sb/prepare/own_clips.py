"""What is known of somebody's own sounds before any of them is decoded: clips, their labels, and who belongs together."""

import itertools
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from psla_sb.errors import InputError

SPLITS = ("train", "valid", "test")
NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "validate"), "valid"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
# whose meaning depends on the others
VAGUE = ("dev", "development", "eval", "evaluation")


class Clip(NamedTuple):
    """Says where a clip is, and what the source says of it; what it does not say is empty.

    `start` and `end`, in seconds, are those of a segment of the file; without `end`, it goes to the file's end.
    """

    path: str
    labels: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    split: str = ""
    group: str = ""
    fold: str = ""

    def place(self) -> str:
        """Says where it is: its file, and where in it a segment begins."""
        return self.path if self.start is None else f"{self.path} from {self.start:g} s on"


class Found(NamedTuple):
    """Holds the clips of a source, what is to be said of how it was understood, and files and reasons of what was left out."""

    clips: list[Clip]
    said: list[str]
    left_out: list[tuple[str, str]]


def splits_of(names: Iterable[str]) -> dict[str, str] | None:
    """Finds which split each of these names stands for; None if they are no names of splits, with one for training among them.

    >>> splits_of(["Training", "val"]), splits_of(["dev", "eval"]), splits_of(["train", "dev"]), splits_of(["dog", "train"])
    ({'Training': 'train', 'val': 'valid'}, {'dev': 'train', 'eval': 'test'}, {'train': 'train', 'dev': 'valid'}, None)
    """
    plain = {name: name.strip().lower() for name in names}
    known = {name: NAMES[text] for name, text in plain.items() if text in NAMES}
    sure = set(known.values())
    for name, text in plain.items():
        if text in VAGUE:
            # `dev` is for training where there is no other, `eval` for testing
            preferred, otherwise = ("train", "valid") if text.startswith("dev") else ("test", "valid")
            known[name] = otherwise if preferred in sure else preferred
    return known if len(known) == len(plain) and "train" in known.values() else None


def clean_label(text: str) -> str:
    """Puts a label into one line, without spaces around it.

    >>> clean_label(" Dog\\n barks ")
    'Dog barks'
    """
    return re.sub(r"\s*=>\s*", " -> ", " ".join(unicodedata.normalize("NFC", text).split()))


def merged(clips: Iterable[Clip]) -> list[Clip]:
    """Unites the labels of clips that are the same part of the same file; the first one says all else.

    It is an `InputError` if they are said to be in different splits.
    """
    by_place: dict[tuple[str, float | None, float | None], Clip] = {}
    for clip in clips:
        place = (clip.path, clip.start, clip.end)
        before = by_place.get(place)
        if before and before.split != clip.split:
            splits = f"{before.split or 'no split'} and {clip.split or 'no split'}"
            raise InputError(f"{clip.path}: it is there twice, in {splits}; mend the table, or split anew with --split-column none")
        by_place[place] = before._replace(labels=(*before.labels, *clip.labels)) if before else clip
    return [clip._replace(labels=tuple(dict.fromkeys(clip.labels))) for clip in by_place.values()]


def identifiers(names: Iterable[str]) -> list[str]:
    """Makes of classes' names what annotations can list: without `;`, `,` and quotes, each another one.

    >>> identifiers(["Chirp, tweet", "Dog", "Chirp; tweet"])
    ['Chirp_ tweet', 'Dog', 'Chirp_ tweet_2']
    """
    made = dict[str, None]()
    for name in names:
        plain = re.sub('[;,"]', "_", name)
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in itertools.count(1))
        made[next(candidate for candidate in numbered if candidate not in made)] = None
    return list(made)
