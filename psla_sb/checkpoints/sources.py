"""Any trained model, wherever it is kept -> what model it is, its weights and its classes.

A trained model is the folder of a tagger, the output folder of a run, a run's snapshot (`.safetensors`), a checkpoint folder of
SpeechBrain's (`save/CKPT+...`), a checkpoint that others have published, PSLA's or EfficientAT's (`.pth`, `.pt`), a repository on
Hugging Face (`hf://owner/name`) or the name of a published model, as `psla-models` lists them. `open_source` alone tells them
apart.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from speechbrain.dataio.encoder import CategoricalEncoder
from torch import Tensor, nn

from psla_sb.checkpoints import hub, models
from psla_sb.checkpoints.definitions import build, definitions_text, read_definitions, read_yaml, tags_of
from psla_sb.checkpoints.psla import PUBLISHED_PADDING
from psla_sb.checkpoints.published import PublishedModel, read_published
from psla_sb.checkpoints.run_folder import CALIBRATION, CLASSES, HPARAMS, average_path, best_epoch, snapshot_path, trained_epochs
from psla_sb.checkpoints.tagger_folder import LABEL_ENCODER, WEIGHTS, label_encoder, read_calibration, write_tagger
from psla_sb.checkpoints.trust import check_trusted
from psla_sb.checkpoints.weights import load_into, load_weights, trained_modules
from psla_sb.errors import InputError
from psla_sb.labels.calibration import Calibration
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.chain import MODULES
from psla_sb.lobes.mobilenet import STRIDES, MobileNetV3Encoder
from psla_sb.lobes.pretrained import part_of, read_state, refuse_family, refuse_nan

KINDS = (
    "the folder of a tagger or of a run, a snapshot (.safetensors), a published checkpoint (.pth, .pt), a repository on Hugging "
    "Face (hf://owner/name, hf://owner/name@revision) or a name that psla-models lists"
)


class Source(ABC):
    """A trained model on the disk.

    Arguments
    ---------
    path
        The file or folder.
    trust
        Modules whose classes may be constructed, besides this toolkit's lobes and installed plugins.
    """

    def __init__(self, path: str | Path, trust: Sequence[str] = ()):
        self.path, self.trust = Path(path), trust
        # the YAML file that defines the model
        self.hparams_file = self.path / HPARAMS

    @property
    @abstractmethod
    def definitions(self) -> Mapping[str, Any]:
        """What model it is, as YAML nodes."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Its classes."""

    @property
    def calibration(self) -> Calibration | None:
        """Probabilities and thresholds that were fitted to these weights; None if there are none."""
        return None

    @cached_property
    def padding(self) -> Any:
        """What an EfficientNet pads like; None if that is not known."""
        return self._of_encoder("padding", "tensorflow")

    @cached_property
    def strides(self) -> Any:
        """A MobileNetV3's strides; empty if they are not known."""
        return tuple(self._of_encoder("strides", STRIDES) or ())

    def _of_encoder(self, argument: str, default: Any) -> Any:
        encoder = read_yaml(self.hparams_file).get("embedding_model") if self.hparams_file.is_file() else None
        return encoder.get(argument, default) if isinstance(encoder, dict) else None

    @abstractmethod
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by the names of the modules; a module without any weights is left out."""

    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return [self.path]

    def digest(self) -> str:
        """SHA-256 of the files: what tells whether scores are of this model."""
        digest = hashlib.sha256()
        for file in self.files():
            if not file.is_file():
                raise InputError(f"{file}: no such file")
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def hparams(self) -> dict[str, Any]:
        """The four modules with their weights, on the CPU, and what else `AudioTagger` needs.

        Raises
        ------
        InputError
            The model names classes that are not trusted, or the weights are not of it.
        """
        hparams, weights = self._built(), flat(self.weights())
        refuse_nan(weights, self.path)
        load_into(trained_modules({name: hparams[name] for name in MODULES}), weights, self.path)
        plain = {"mids": self.vocabulary.mids, "label_encoder": label_encoder(self.vocabulary), "calibration": self.calibration}
        return {**hparams, **plain}

    def export(self, folder: str | Path, one_file: bool = False) -> None:
        """Writes the model as the folder of a tagger, which can be moved anywhere; `one_file` puts its weights into one file.

        Example
        -------
        >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
        >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
        >>> from psla_sb.lobes.pooling import MeanPooling
        >>> folder = getfixture("tmp_path")
        >>> save_psla_checkpoint(folder / "model.pth", EfficientNetEncoder("b0"), MeanPooling(1280, 2))
        >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "labels.csv")
        >>> open_source(folder / "model.pth", labels=folder / "labels.csv").export(folder / "tagger")
        >>> sorted(file.name for file in (folder / "tagger").iterdir())
        ['classifier.ckpt', 'embedding_model.ckpt', 'hyperparams.yaml', 'label_encoder.ckpt']
        """
        write_tagger(folder, self.definitions, self.hparams(), self.vocabulary, self.calibration, one_file)

    def _built(self) -> dict[str, Any]:
        hparams = build(self.definitions, self.path, self.trust)
        rate, wrong = hparams["sample_rate"], [name for name in MODULES if not isinstance(hparams[name], nn.Module)]
        if wrong or type(rate) is not int or rate <= 0:
            raise InputError(f"{self.path}: {', '.join(wrong) or 'sample_rate'} in its {HPARAMS} is not what it has to be")
        return hparams


class TaggerFolder(Source):
    """What a run exported, `psla-export` or `psla-import` wrote."""

    @cached_property
    def definitions(self) -> Mapping[str, Any]:
        if not self.hparams_file.is_file():
            other = "and not the output folder of a run that has trained an epoch"
            raise InputError(f"{self.path}: not the folder of a tagger (it has no {HPARAMS}), {other}")
        definitions = read_definitions(self.hparams_file)
        # nothing else in the file is built here, but SpeechBrain would
        check_trusted(tags_of(self.hparams_file.read_text(encoding="utf-8")), self.hparams_file, self.trust)
        return definitions

    @cached_property
    def vocabulary(self) -> Vocabulary:
        mids = read_yaml(self.hparams_file).get("mids")
        encoder, file = CategoricalEncoder(), self.path / LABEL_ENCODER
        try:
            encoder.load(file)
            encoder.ignore_len()
            names = [encoder.ind2lab[i] for i in range(len(encoder))]
        except (OSError, KeyError, ValueError, SyntaxError, AttributeError, TypeError) as error:
            raise InputError(f"{file}: not the class names of a tagger ({type(error).__name__}: {error})") from None
        if not isinstance(mids, list) or len(mids) != len(names):
            raise InputError(f"{self.path}: label_encoder.ckpt has not as many names as hyperparams.yaml has mids")
        return Vocabulary([str(mid) for mid in mids], names)

    @property
    def calibration(self) -> Calibration | None:
        return read_calibration(self.path, self.vocabulary)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        if (file := self.path / WEIGHTS).is_file():
            return parts_of(load_weights(file))
        return {name: load_weights(file) for name, file in module_files(self.path).items()}

    def files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file() and file.name != CALIBRATION)


class Snapshot(Source):
    """The weights of one epoch of a run, or their average, in the run's folder.

    Arguments
    ---------
    built
        What the run's own process has built: `sample_rate`, `n_frames` and the modules, which are copied.
    """

    def __init__(self, path: str | Path, trust: Sequence[str] = (), built: Mapping[str, Any] | None = None):
        super().__init__(path, trust)
        self.run, self.built = self.path.resolve().parents[1], built
        self.hparams_file = self.run / HPARAMS

    @cached_property
    def definitions(self) -> Mapping[str, Any]:
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file of weights")
        if not self.hparams_file.is_file():
            raise InputError(f"{self.path}: beside its folder there is no hyperparams.yaml that says what model it is of")
        return read_definitions(self.hparams_file)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_csv(self.run / CLASSES)

    @property
    def calibration(self) -> Calibration | None:
        # it is fitted to the weight average, when the run is evaluated
        is_average = self.path.resolve() == average_path(self.run).resolve()
        return read_calibration(self.run, self.vocabulary) if is_average else None

    def weights(self) -> dict[str, dict[str, Tensor]]:
        state = load_weights(self.path)
        refuse_family(state, self.path)
        return parts_of(state)

    def digest(self) -> str:
        digest = super().digest()
        if not self.hparams_file.is_file():
            return digest
        # a snapshot does not hold the model's definition
        return hashlib.sha256((digest + definitions_text(self.definitions)).encode()).hexdigest()

    def _built(self) -> dict[str, Any]:
        if self.built is None:
            return super()._built()
        modules = copy.deepcopy({name: self.built[name] for name in MODULES})
        return {"sample_rate": self.built["sample_rate"], "n_frames": self.built.get("n_frames"), **modules}


class SpeechBrainCheckpoint(Snapshot):
    """A folder `save/CKPT+...` of a run."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: read_state(file) for name, file in module_files(self.path).items()}

    def files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.stem in MODULES)


class Published(Source):
    """A checkpoint that the PSLA code, others that use its layout, or EfficientAT wrote; its class list is a file of its own.

    Of PSLA's, `padding` and `n_frames` may be given; of EfficientAT's, `hop` (milliseconds), `mels` and `strides`.
    """

    def __init__(
        self,
        path: str | Path,
        labels: str | Path | None = None,
        padding: str | None = None,
        n_frames: int | None = None,
        **options: Any,
    ):
        super().__init__(path)
        self.labels, self.padding = labels, padding or PUBLISHED_PADDING
        self.options = {"padding": padding, "n_frames": n_frames, **options}

    @cached_property
    def _model(self) -> PublishedModel:
        return read_published(self.path, self.options)

    @property
    def definitions(self) -> Mapping[str, Any]:
        return self._model.definitions

    @property
    def remark(self) -> str:
        """What the file was taken for, and what was assumed of it."""
        return self._model.remark

    @cached_property
    def strides(self) -> Any:
        return tuple(self.definitions["embedding_model"].get("strides", ()))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        vocabulary, n_classes = Vocabulary.from_csv(str(self.labels)), self.definitions["classifier"]["n_classes"]
        if len(vocabulary) != n_classes:
            is_imagenet = n_classes == 1000 and isinstance(self._model.encoder, MobileNetV3Encoder)
            hint = " (ImageNet's, it seems: such a file is for pretrained=, to train a tagger from)" if is_imagenet else ""
            raise InputError(
                f"{self.labels} has {len(vocabulary)} classes, but {self.path} is a model of {n_classes}{hint}: "
                "give the class list that it was trained with"
            )
        return vocabulary

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: module.state_dict() for name, module in zip(MODULES[2:], self._model[:2], strict=True)}

    def hparams(self) -> dict[str, Any]:
        if self.labels is None:
            if self.path.is_file():
                # what is no such checkpoint is said first
                read_published(self.path, self.options)
            raise InputError(f"{self.path}: a checkpoint of the published code needs a class list beside it, see --labels")
        return super().hparams()


def open_source(
    path: str | Path | Source, labels: str | Path | None = None, trust: Sequence[str] = (), weights: str | int = "average"
) -> Source:
    """Finds out what kind of trained model a path is. Nothing is constructed, and no weights are read, before they are asked for.

    What is not on this machine is fetched at once.

    Arguments
    ---------
    path
        See above. A file or a folder that is there comes before a published model of its name.
    labels
        The class list of a published checkpoint. Of a model by name, which has one, in place of it.
    trust
        See `Source`.
    weights
        Of a run's folder: "average" (of the last epochs), "best" (on the validation set), "last", or the number of an epoch.

    Raises
    ------
    InputError
        It is none of these, cannot be fetched, or a run has no such weights.

    Example
    -------
    >>> open_source("model.pth", labels="class_labels_indices.csv").padding
    'symmetric'
    """
    if isinstance(path, Source):
        return path
    path = on_disk(path, labels)
    if (path / "results.json").is_file():
        return Snapshot(run_weights(path, weights), trust)
    if (path / "CKPT.yaml").is_file():
        return SpeechBrainCheckpoint(path, trust)
    if path.is_dir():
        return TaggerFolder(path, trust)
    if path.suffix == ".safetensors":
        return Snapshot(path, trust)
    if not path.suffix and not path.exists():
        missing = f"({path}: no such file or folder)"
        raise InputError(f"{path}: not the folder of a tagger, nor any other trained model {missing}. A trained model is {KINDS}")
    return Published(path, labels)


def on_disk(path: str | Path, labels: str | Path | None = None) -> Path:
    """Where a trained model is; one that is a repository (`hf://`), or a name and no path that there is, is fetched for that."""
    if str(path).startswith(hub.PREFIX):
        return hub.download(str(path))
    return models.tagger_of(str(path), labels) if str(path) in models.MODELS and not Path(path).exists() else Path(path)


def run_weights(folder: str | Path, weights: str | int = "average") -> Path:
    """The file of a run's weights: "average" (of the last epochs), "best" (on the validation set), "last" or an epoch's number.

    Raises
    ------
    InputError
        The run has trained no epoch.
    """
    epochs = trained_epochs(folder)
    if weights == "average":
        return average_path(folder)
    named: dict[str | int, int] = {"last": epochs[-1]["epoch"], "best": best_epoch(epochs)}
    if weights not in named and not str(weights).isdecimal():
        raise InputError(f"{folder}: weights are average, best, last or the number of an epoch, not {weights!r}")
    return snapshot_path(folder, named.get(weights) or int(weights))


def parts_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights with keys `module.parameter` -> by module; an encoder and a classifier must have some."""
    return {name: part for name in MODULES if (part := part_of(name, state)) or name in MODULES[2:]}


def module_files(folder: Path) -> dict[str, Path]:
    """The modules' files of weights in a folder; an encoder and a classifier must have them."""
    files = {name: folder / f"{name}.ckpt" for name in MODULES}
    return {name: file for name, file in files.items() if file.exists() or name in MODULES[2:]}


def flat(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights by module -> one state dict with keys `module.parameter`, as in a snapshot."""
    return {f"{name}.{key}": value for name, state in weights.items() for key, value in state.items()}
