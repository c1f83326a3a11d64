"""Trained taggers to start a training from: their weights, wherever they are kept, and how much of them a model takes over."""

from pathlib import Path
from typing import NamedTuple

import ruamel.yaml
from speechbrain.utils.logger import get_logger

from psla_sb.checkpoints import load_into, load_weights
from psla_sb.errors import InputError
from psla_sb.interop import PUBLISHED_PADDING, below, load_psla_checkpoint, read_tensors
from psla_sb.lobes.efficientnet import EfficientNetEncoder

logger = get_logger(__name__)


class Transfer(NamedTuple):
    """Which tensors of a trained tagger a model has taken over; names as in a snapshot.

    Example
    -------
    >>> print(Transfer(["embedding_model._bn0.bias"], ["classifier.cla.bias"]))
    1 tensors taken; 1 not taken: classifier.cla.bias
    """

    taken: list
    not_taken: list

    def __str__(self):
        return f"{len(self.taken)} tensors taken; {len(self.not_taken)} not taken" + (
            f": {', '.join(self.not_taken)}" if self.not_taken else ""
        )


def load_pretrained_tagger(source, modules):
    """Fills a model with the weights of a trained tagger, to train it further.

    Where the pooling's tensors differ, as with another number of classes, only the encoder is taken.

    Arguments
    ---------
    source : str or Path
        The folder of a tagger, a checkpoint folder of SpeechBrain's, a run's snapshot (`.safetensors`), or a checkpoint of the
        published code.
    modules : dict of str to torch.nn.Module
        `embedding_model` and `classifier`, filled in place.

    Returns
    -------
    Transfer
        The names of the source's tensors that were taken, and that were not.

    Raises
    ------
    InputError
        The source cannot be read, or its encoder is another one.

    Example
    -------
    >>> from psla_sb.interop import save_psla_checkpoint
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), MeanPooling(1280, 527))
    >>> modules = {"embedding_model": EfficientNetEncoder("b0", padding="symmetric"), "classifier": MeanPooling(1280, 200)}
    >>> print(load_pretrained_tagger(path, modules))
    358 tensors taken; 2 not taken: classifier.cla.weight, classifier.cla.bias
    """
    trained, padding = read_tagger(Path(source))
    encoder, pooling = modules["embedding_model"], modules["classifier"]
    try:
        state = {f"embedding_model.{key}": value for key, value in trained["embedding_model"].items()}
        load_into({"embedding_model": encoder}, state, source)
    except InputError as error:
        raise InputError(f"{error}. The encoders differ: choose the variant that {source} has") from None
    theirs, ours = ({key: value.shape for key, value in state.items()} for state in (trained["classifier"], pooling.state_dict()))
    fits = theirs == ours
    if fits:
        pooling.load_state_dict(trained["classifier"])
    if padding is not None and isinstance(encoder, EfficientNetEncoder) and padding != encoder.padding:
        logger.warning(
            "%s was trained with padding '%s', but the model pads '%s': its outputs will differ. Set the padding of "
            "embedding_model, if that is not meant.",
            source,
            padding,
            encoder.padding,
        )
    names = {part: [f"{part}.{key}" for key in trained[part]] for part in ("embedding_model", "classifier")}
    if fits:
        return Transfer(names["embedding_model"] + names["classifier"], [])
    return Transfer(names["embedding_model"], names["classifier"])


def read_tagger(source):
    """The weights of a trained tagger.

    Arguments
    ---------
    source : Path
        The folder of a tagger, a checkpoint folder of SpeechBrain's, a run's snapshot, or a checkpoint of the published code.

    Returns
    -------
    (dict, str or None)
        `{"embedding_model": state dict, "classifier": state dict}`, and the encoder's padding, None if that is not known.

    Raises
    ------
    InputError
        The source cannot be read.

    Example
    -------
    >>> from psla_sb.interop import save_psla_checkpoint
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), MeanPooling(1280, 527))
    >>> weights, padding = read_tagger(path)
    >>> list(weights["classifier"]), padding
    (['cla.weight', 'cla.bias'], 'symmetric')
    """
    if (source / "CKPT.yaml").is_file():
        # as in `<output_folder>/save/CKPT+.../`
        trained = {part: read_tensors(source / f"{part}.ckpt") for part in ("embedding_model", "classifier")}
        return trained, _padding_in(source.resolve().parents[1] / "hyperparams.yaml")
    if source.is_dir():
        trained = {part: load_weights(source / f"{part}.ckpt") for part in ("embedding_model", "classifier")}
        return trained, _padding_in(source / "hyperparams.yaml")
    if source.suffix == ".safetensors":
        state = load_weights(source)
        # a run keeps its snapshots in a folder beside its YAML file
        trained = {part: below(part, state) for part in ("embedding_model", "classifier")}
        return trained, _padding_in(source.resolve().parents[1] / "hyperparams.yaml")
    encoder, pooling = load_psla_checkpoint(source)
    return {"embedding_model": encoder.state_dict(), "classifier": pooling.state_dict()}, PUBLISHED_PADDING


def _padding_in(hparams_file):
    """What a tagger's or run's YAML file says, None if there is no file."""
    if not hparams_file.is_file():
        return None
    try:
        return ruamel.yaml.YAML().load(hparams_file.read_text(encoding="utf-8"))["embedding_model"].get("padding", "tensorflow")
    except (ruamel.yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{hparams_file}: does not define an embedding_model ({error!r})") from None
