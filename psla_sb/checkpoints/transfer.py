"""Starting a training from a trained tagger: its encoder, and of its pooling the classes that both have."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from speechbrain.utils.logger import get_logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from psla_sb.checkpoints.sources import Source, flat, open_source
from psla_sb.checkpoints.weights import load_into, put_state, state_of
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pretrained import adapted, refuse_nan

logger = get_logger(__name__)
# Names of classes that a report lists.
LISTED = 20


class Transfer(NamedTuple):
    """Which tensors of a trained tagger a model has taken over; names as in a snapshot.

    `classes` are the names of those that the pooling has taken over by their mids, None where it was taken, or left, as a whole.
    """

    taken: list[str]
    not_taken: list[str]
    classes: list[str] | None = None
    n_classes: int = 0

    def __str__(self) -> str:
        left = f": {', '.join(self.not_taken)}" if self.not_taken else ""
        text = f"{len(self.taken)} tensors taken; {len(self.not_taken)} not taken{left}"
        if self.classes is None:
            return text
        n_taken, listed = len(self.classes), ", ".join(self.classes[:LISTED])
        more = f" and {n_taken - LISTED} more" if n_taken > LISTED else ""
        others = "" if n_taken == self.n_classes else "; the others start anew"
        return f"{text}; by their mids {n_taken} of {self.n_classes} classes{listed and f': {listed}{more}'}{others}"


def load_pretrained_tagger(source: str | Path, modules: Mapping[str, nn.Module], vocabulary: Vocabulary | None = None) -> Transfer:
    """Fills a model with the weights of a trained tagger, to train it further. Nothing of the source is constructed.

    Where the classes are others, or in another order, the pooling's rows of those that both have are taken, by mid. Where nobody
    knows the tagger's classes, the pooling is taken as a whole if its tensors fit. Of a front end that differs nothing is taken.
    It is an `InputError` if the source cannot be read, has NaN in it, or its encoder is another one.

    Arguments
    ---------
    vocabulary
        The classes of the model.

    Example
    -------
    >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), MeanPooling(1280, 527))
    >>> modules = {"embedding_model": EfficientNetEncoder("b0", padding="symmetric"), "classifier": MeanPooling(1280, 200)}
    >>> print(load_pretrained_tagger(path, modules))
    358 tensors taken; 2 not taken: classifier.cla.weight, classifier.cla.bias
    """
    opened = open_source(source)
    trained, encoder = opened.weights(), modules["embedding_model"]
    refuse_nan(flat(trained), source)
    try:
        load_into({"embedding_model": encoder}, flat({"embedding_model": trained["embedding_model"]}), source)
    except InputError as error:
        raise InputError(f"{error}. The encoders differ: choose the variant, or the encoder, that {source} has") from None
    for name, does, kind in (("padding", "pads", EfficientNetEncoder), ("strides", "has", MobileNetV3Encoder)):
        if isinstance(encoder, kind) and (was := getattr(opened, name)) and (now := getattr(encoder, name)) != was:
            logger.warning(
                "%s was trained with %s %r, but the model %s %r: its outputs will differ. Set the %s of embedding_model, if that "
                "is not meant.",
                *(source, name, was, does, now, name),
            )
    theirs = _classes_of(opened) if vocabulary is not None else None
    taken, not_taken, classes = [*flat({"embedding_model": trained["embedding_model"]})], list[str](), None
    for name in ("compute_features", "mean_var_norm", "classifier"):
        if name in trained:
            state, is_taken = flat({name: trained[name]}), True
            if name == "classifier" and vocabulary is not None and theirs is not None and theirs.mids != vocabulary.mids:
                classes = _take_classes(modules[name], trained[name], theirs, vocabulary)
                is_taken = bool(classes)
            else:
                try:
                    load_into({name: modules[name]}, state, source)
                except InputError:
                    is_taken = False
            (taken if is_taken else not_taken).extend(state)
    return Transfer(taken, not_taken, classes, len(vocabulary) if vocabulary is not None else 0)


def _classes_of(opened: Source) -> Vocabulary | None:
    """The classes of a trained model, if they are known: published checkpoints and single snapshots do not say them."""
    try:
        return opened.vocabulary
    except InputError:
        return None


def _take_classes(classifier: nn.Module, state: Mapping[str, Tensor], theirs: Vocabulary, ours: Vocabulary) -> list[str] | None:
    """Puts the rows of the classes that both have into a classifier; gives their names, or None if it does not fit otherwise.

    A layer whose weight `[classes, ...]` has as many rows as there are classes, on both sides, has a row for each; its bias too.
    """
    own = state_of(classifier)
    state = adapted(state, own)
    shared = [mid for mid in ours.mids if mid in theirs]
    if not shared or own.keys() != state.keys() or any(map(is_lazy, own.values())):
        return [] if not shared else None
    sizes = len(theirs), len(ours)
    layers = [key.removesuffix("weight") for key, value in state.items() if key.endswith("weight") and value.dim() > 1]
    by_class = {f"{layer}{kind}" for layer in layers if _rows(f"{layer}weight", state, own) == sizes for kind in ("weight", "bias")}
    alike = all(own[key].shape == value.shape for key, value in state.items() if key not in by_class)
    # as many units in a hidden layer as there are classes: its rows would be none of classes
    unclear = any(sizes[0] == state[key].shape[1] for key in by_class & state.keys() if state[key].dim() > 1)
    if not by_class or not alike or unclear:
        return None
    to, of = ([vocabulary.index(mid) for mid in shared] for vocabulary in (ours, theirs))
    for key in own:
        own[key] = own[key].clone()
        if key in by_class:
            own[key][to] = state[key][of].to(own[key])
        else:
            own[key] = state[key]
    put_state(classifier, own)
    return [ours.names[i] for i in to]


def _rows(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """How many rows a tensor has there and here, if it has nothing else that differs."""
    there, here = state[key].shape, own[key].shape
    return (there[0], here[0]) if there[1:] == here[1:] else None
