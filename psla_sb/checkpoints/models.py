"""Published models by name: where their files are, what is known of them, and how they become taggers.

A name is fetched once, its file is checked and imported without running code, and the folder of the tagger is kept in the cache.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from psla_sb.checkpoints.efficientat import untold_of
from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING
from psla_sb.checkpoints.published import read_published
from psla_sb.checkpoints.tagger_folder import write_tagger
from psla_sb.errors import InputError
from psla_sb.fetch import fetch
from psla_sb.files import UNFINISHED, one_process, write_json
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.pretrained import refuse_nan

# The folder of what was fetched; by default psla_sb in XDG_CACHE_HOME, or in ~/.cache.
CACHE = "PSLA_CACHE"


class ClassList(NamedTuple):
    """The classes that models were trained with: where the list is, and which mids it has in which order."""

    url: str
    mids_sha256: str  # `Vocabulary.digest`
    sha256: str | None = None


class Model(NamedTuple):
    """A published model."""

    name: str
    url: str
    classes: str  # of `CLASS_LISTS`
    mAP: float  # as published, on the evaluation set of its classes
    source: str  # who says so
    licence: str | None  # None: none is stated
    options: Mapping[str, Any]  # of `psla_sb.checkpoints.published.read_published`
    sha256: str | None = None  # of the file; None: not published
    fetched: bool = False  # whether it was fetched from this address, and not only taken over from its authors' list

    @property
    def file(self) -> str:
        """Its file's published name."""
        return unquote(Path(urlsplit(self.url).path).name)


CLASS_LISTS = {
    "AudioSet": ClassList(
        "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/class_labels_indices.csv",
        "22803d171ac927180e4a61b2e0114190651198d62523bd132515307b631eb4ae",
        "cdd1049833c4b86127c2773ac0d14a2754b6a6d0d1798002ed5c66e699708429",
    ),
    "FSD50K": ClassList(
        "https://raw.githubusercontent.com/YuanGongND/psla/main/egs/fsd50k/class_labels_indices.csv",
        "e72326088c37c42ad503d985a4cb693628b986b16c48b4543f227bc3226d61b4",
    ),
}
EFFICIENTAT = "https://github.com/fschmid56/EfficientAT"
PSLA = "https://github.com/YuanGongND/psla"
# The release's files, and after each what its model is called here.
RELEASE = """
mn01_as_mAP_298.pt                  mn01
mn02_as_mAP_378.pt                  mn02
mn04_as_mAP_432.pt                  mn04
mn05_as_mAP_443.pt                  mn05
mn10_as_mAP_471.pt                  mn10
mn20_as_mAP_478.pt                  mn20
mn30_as_mAP_482.pt                  mn30
mn40_as_mAP_484.pt                  mn40
mn40_as_mAP_483.pt                  mn40-2
mn40_as_mAP_483(2).pt               mn40-3
mn40_as_ext_mAP_487.pt              mn40-ext
mn40_as_ext_mAP_486.pt              mn40-ext-2
mn40_as_ext_mAP_485.pt              mn40-ext-3
mn40_as_no_im_pre_mAP_483.pt        mn40-no-im-pre
mn40_as_no_im_pre_mAP_483(2).pt     mn40-no-im-pre-2
mn40_as_no_im_pre_mAP_482.pt        mn40-no-im-pre-3
mn10_as_hop_5_mAP_475.pt            mn10-hop-5
mn10_as_hop_15_mAP_463.pt           mn10-hop-15
mn10_as_hop_20_mAP_456.pt           mn10-hop-20
mn10_as_hop_25_mAP_447.pt           mn10-hop-25
mn10_as_mels_40_mAP_453.pt          mn10-mels-40
mn10_as_mels_64_mAP_461.pt          mn10-mels-64
mn10_as_mels_256_mAP_474.pt         mn10-mels-256
mn10_as_fc_mAP_465.pt               mn10-fc
mn10_as_fc_s2221_mAP_466.pt         mn10-fc-s2221
mn10_as_fc_s2211_mAP_466.pt         mn10-fc-s2211
"""


def _efficientat(file: str, name: str) -> Model:
    # what its name says: the authors' README has the same figures, of fewer files
    figure = int(file.partition("_mAP_")[2][:3]) / 1000
    url = f"{EFFICIENTAT}/releases/download/v0.0.1/{file}"
    untold = untold_of(file)[0]._asdict()
    return Model(f"efficientat-{name}", url, "AudioSet", figure, f"{EFFICIENTAT}, models/mn/model.py", "MIT", untold)


def _psla(name: str, path: str, classes: str, figure: float, n_frames: int) -> Model:
    options = {"padding": PUBLISHED_PADDING, "n_frames": n_frames}
    url = f"https://www.dropbox.com/s/{path}?dl=1"
    return Model(f"psla-{name}", url, classes, figure, f"{PSLA}, README.md", None, options)


MODELS = {
    model.name: model
    for model in (
        *(_efficientat(*line.split()) for line in RELEASE.strip().splitlines()),
        _psla("audioset", "d1z27wj30ew5qrs/as_mdl_0.pth", "AudioSet", 0.440, AUDIOSET_FRAMES),
        _psla("audioset-average", "ieggie0ara4x26d/as_mdl_0_wa.pth", "AudioSet", 0.444, AUDIOSET_FRAMES),
        _psla("fsd50k", "stzrmfty2oyqnnj/fsd_mdl_best_single.pth", "FSD50K", 0.559, 3000),
        _psla("fsd50k-average", "5fvybrbulvhsish/fsd_mdl_wa.pth", "FSD50K", 0.562, 3000),
    )
}


def cache_folder() -> Path:
    """Where fetched models are kept: the folder that PSLA_CACHE names, or `psla_sb` in XDG_CACHE_HOME or `~/.cache`.

    Example
    -------
    >>> getfixture("monkeypatch").setenv("PSLA_CACHE", "models")
    >>> str(cache_folder())
    'models'
    """
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psla_sb"


def tagger_path(name: str) -> Path:
    """Where the tagger's folder of a model of the table is, once it was fetched."""
    return cache_folder() / name


def tagger_of(name: str, labels: str | Path | None = None) -> Path:
    """Gives the tagger's folder of a model of the table; what is not in the cache is fetched, checked and imported.

    A file that was put into the cache by hand, under its published name, is taken in place of a download.

    Arguments
    ---------
    labels
        The class list, in place of the one that would be fetched; it must have the model's mids in their order.

    Raises
    ------
    InputError
        A file cannot be had, is not the published one, or is no checkpoint: with its address, and where to put it by hand.
    """
    model, folder = MODELS[name], tagger_path(name)
    given = None if labels is None else _read_classes(labels, model.classes)
    if folder.is_dir():
        return folder
    cache = cache_folder()
    with one_process(cache):
        # another process may have fetched it meanwhile
        if not folder.is_dir():
            vocabulary, file = given or _classes(model), cache / model.file
            if file.is_file():
                try:
                    _import(model, file, vocabulary, folder)
                except InputError as error:
                    raise InputError(f"{error}. Get {model.url} again, or delete the file: it is then downloaded") from None
            else:
                fetch(model.url, file, model.sha256, check=lambda found: _import(model, found, vocabulary, folder))
                # the tagger has all of it
                file.unlink()
    return folder


def _import(model: Model, file: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Writes the tagger's folder of a checkpoint, whole or not at all."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if model.sha256 not in (None, digest):
        raise InputError(f"{file}: not the published file: its SHA-256 is {digest}, not {model.sha256}")
    read = read_published(file, model.options)
    modules = {"embedding_model": read.encoder, "classifier": read.pooling}
    for module in modules.values():
        refuse_nan(module.state_dict(), file)
    if (n_classes := read.definitions["classifier"]["n_classes"]) != len(vocabulary):
        raise InputError(f"{file}: a model of {n_classes} classes, not of {model.classes}'s {len(vocabulary)}")
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tagger(unfinished, read.definitions, modules, vocabulary)
    write_json(unfinished / "fetched.json", {"name": model.name, "url": model.url, "sha256": digest, "bytes": file.stat().st_size})
    os.replace(unfinished, folder)


def _classes(model: Model) -> Vocabulary:
    """The class list of a model, from the cache or from where it was published."""
    name, classes = model.classes, CLASS_LISTS[model.classes]
    path = cache_folder() / name / "class_labels_indices.csv"
    if not path.is_file():
        try:
            fetch(classes.url, path, classes.sha256, check=lambda found: _read_classes(found, name))
        except InputError as error:
            need = f"The model itself, {model.url}, is looked for at {cache_folder() / model.file}"
            raise InputError(f"{error} Or give it as --labels CSV. {need}") from None
    return _read_classes(path, name)


def _read_classes(path: str | Path, name: str) -> Vocabulary:
    """Reads a class list; an InputError if its mids are not those of the data set, in their order."""
    vocabulary = Vocabulary.from_csv(path)
    if vocabulary.digest() != CLASS_LISTS[name].mids_sha256:
        raise InputError(
            f"{path}: not {name}'s classes in the order that the model was trained with: of its {len(vocabulary)} mids some are "
            f"others, or stand elsewhere. The list is at {CLASS_LISTS[name].url}"
        )
    return vocabulary
