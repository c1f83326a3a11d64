"""A tagger's four modules, called one after another: waveforms -> features -> feature map -> probabilities.

Whatever class a YAML file names for one of them, it is called from here and nowhere else: by SpeechBrain's conventions, with
relative lengths for the classes that take them, and in float32 wherever PSLA computes in float32.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from psla_sb.errors import InputError
from psla_sb.lobes.features import LogMel, full_float32, n_samples_for, true_lengths

MODULES = ("compute_features", "mean_var_norm", "embedding_model", "classifier")
SHAPES = {
    "compute_features": "[batch, frames, mels]",
    "mean_var_norm": "[batch, frames, mels]",
    "embedding_model": "[batch, channels, freq, steps] or [batch, channels, steps]",
    "classifier": "[batch, n_classes]",
}
LENGTHS = re.compile(r"((wavs?|x|feats?|features|audio|input|rel|relative)_)?len(s|gths?)?")
# How far probabilities may be outside of [0, 1]: rounding, not the scale of logits.
ROUNDING = 1e-3


def unwrapped(module: Any) -> Any:
    """The module itself, without what distributed training and the compiler put around it."""
    if isinstance(module, DistributedDataParallel):
        module = module.module
    return getattr(module, "_orig_mod", module)


@functools.lru_cache(maxsize=256)
def _lengths_argument(function: Callable) -> str | None:
    try:
        names = list(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):
        # code that is not written in Python
        return None
    return next((name for name in names if LENGTHS.fullmatch(name)), None)


def call(module: Any, x: Any, lens: Tensor | None = None) -> Any:
    """Calls a module, with relative lengths if its `forward` has an argument for them: `lens`, `lengths`, `wav_lens` and the like.

    Example
    -------
    >>> call(nn.Identity(), torch.zeros(1), torch.ones(1))
    tensor([0.])
    """
    kind = type(unwrapped(module))
    name = _lengths_argument(kind.forward if issubclass(kind, nn.Module) else kind.__call__)
    return module(x) if name is None else module(x, **{name: lens})


def features(
    modules: Mapping[str, Any],
    wavs: Tensor,
    wav_lens: Tensor | None = None,
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    n_samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes normalised features `[batch, frames, mels]`, float32, and their relative lengths, of waveforms `[batch, samples]`.

    `augment` takes the features and their relative lengths before they are normalised. Waveforms are cut or filled up to
    `n_samples`, so that a clip's features do not depend on the batch that it is in; a `LogMel`, such as `KaldiFbank`, does this by
    itself, to its `n_frames`.
    """
    front_end = unwrapped(modules["compute_features"])
    lens = torch.ones(len(wavs), device=wavs.device) if wav_lens is None else wav_lens.to(wavs.device)
    length = wavs.shape[1]
    with full_float32(wavs.device):
        if isinstance(front_end, LogMel):
            feats, n_samples = call(modules["compute_features"], wavs, wav_lens), front_end.n_samples
        else:
            wavs = wavs if n_samples is None else F.pad(wavs, (0, n_samples - wavs.shape[1]))
            feats = call(modules["compute_features"], wavs, rescaled(lens, length, n_samples))
        lens = rescaled(lens, length, n_samples)
        if augment is not None:
            feats = augment(feats, lens)
        return call(modules["mean_var_norm"], feats, lens), lens


def by_length(function: Callable[[Tensor], Tensor], wavs: Tensor, wav_lens: Tensor) -> Tensor:
    """Calls a function with padded clips, those of equal length together and without padding, which some models would hear.

    Example
    -------
    >>> by_length(lambda clips: torch.full((len(clips), 1), clips.shape[1]), torch.rand(3, 8), torch.tensor([1.0, 0.5, 1.0]))
    tensor([[8],
            [4],
            [8]])
    """
    lengths = true_lengths(wavs, wav_lens)
    rows = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
    answers = [function(wavs[alike, : int(lengths[alike[0]])]) for alike in rows]
    return torch.cat(answers)[torch.cat(rows).argsort()]


def n_samples_of(modules: Mapping[str, Any], n_frames: int | None, sample_rate: int) -> int | None:
    """How many samples of a clip a model takes: a `LogMel` itself knows its frames; None if it takes all."""
    front_end = unwrapped(modules["compute_features"])
    return front_end.n_samples if isinstance(front_end, LogMel) else n_samples_for(n_frames, sample_rate)


def rescaled(lens: Tensor, n_given: int, n_samples: int | None) -> Tensor:
    """Lengths relative to `n_given` samples -> relative to the `n_samples` that they are cut or filled up to (None: neither)."""
    # by way of whole samples: a length must not depend, in its last digit, on the batch that the clip is in
    return lens if n_samples is None else ((lens * n_given).round() / n_samples).clamp(max=1.0)


def classify(modules: Mapping[str, Any], feature_map: Any, lens: Tensor | None = None) -> Tensor:
    """Pools a feature map to probabilities `[batch, classes]`, in float32."""
    with full_float32(_device_of_map(feature_map)):
        return call(modules["classifier"], _as_float(feature_map), lens)


def has_segment_scores(classifier: Any) -> bool:
    """Says whether a classifier, or each member of an ensemble's, gives scores by step."""
    return all(hasattr(member, "segment_scores") for member in getattr(classifier, "members", [classifier]))


def segment_scores(modules: Mapping[str, Any], feature_map: Any) -> Tensor:
    """Pools a feature map to scores of each step, `[batch, classes, steps]`, in float32."""
    with full_float32(_device_of_map(feature_map)):
        return modules["classifier"].segment_scores(_as_float(feature_map))


def _device_of_map(feature_map: Any) -> torch.device:
    return (feature_map if isinstance(feature_map, Tensor) else feature_map[0]).device


def _as_float(feature_map: Any) -> Any:
    return feature_map.float() if isinstance(feature_map, Tensor) else tuple(map(_as_float, feature_map))


def probabilities(
    modules: Mapping[str, Any],
    wavs: Tensor,
    wav_lens: Tensor | None = None,
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    n_samples: int | None = None,
) -> Tensor:
    """Computes probabilities `[batch, classes]` of waveforms; arguments as of `features`.

    Example
    -------
    >>> from psla_sb.lobes.features import GlobalNorm, KaldiFbank
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> class Encoder(nn.Conv1d):
    ...     def forward(self, feats):
    ...         return super().forward(feats.transpose(1, 2))
    >>> parts = KaldiFbank(n_mels=64), GlobalNorm(), Encoder(64, 8, kernel_size=9), MeanPooling(8, n_classes=3)
    >>> probabilities(dict(zip(MODULES, parts, strict=True)), torch.randn(2, 16000)).shape
    torch.Size([2, 3])
    """
    feats, lens = features(modules, wavs, wav_lens, augment, n_samples)
    return classify(modules, call(modules["embedding_model"], feats, lens), lens)


def _noise(n_clips: int, n_samples: int) -> Tensor:
    return 0.1 * torch.randn(n_clips, n_samples, generator=torch.Generator().manual_seed(0))


@contextmanager
def _trying(modules: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives modules to try: in evaluation mode, without gradients; their modes and the random generators are put back.

    A normalisation may need to have seen a batch, so a copy of it is tried in training mode.
    """
    parts = [part for module in modules.values() if isinstance(module, nn.Module) for part in module.modules()]
    modes = [part.training for part in parts]
    tried = {**modules, "mean_var_norm": copy.deepcopy(modules["mean_var_norm"])}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module in tried.items():
            if isinstance(module, nn.Module):
                module.train(name == "mean_var_norm")
        try:
            yield tried
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode


def check(modules: Mapping[str, Any], sample_rate: int, n_classes: int, n_samples: int | None = None) -> None:
    """Tries the modules on two clips of noise, before hours of training; refuses what fails or gives a wrong shape or range."""
    x: Any = _noise(2, n_samples or sample_rate)
    with _trying(modules) as tried:
        for name in MODULES:
            given = f"{name} ({type(modules[name]).__qualname__})"
            taken = f"waveforms {list(x.shape)}" if name == MODULES[0] else f"{_shape(x)} of {MODULES[MODULES.index(name) - 1]}"
            try:
                answer = call(tried[name], x, torch.ones(2))
            except Exception as error:  # other people's code
                raise InputError(f"{given} cannot take the {taken}: {type(error).__name__}: {error}") from error
            _check_shape(name, given, answer, n_classes)
            x = answer
    _check_statistics(modules, sample_rate, n_samples)
    least, most = x.min().item(), x.max().item()
    if not (least >= -ROUNDING and most <= 1 + ROUNDING):
        raise InputError(
            f"{given} gives {least:.3g} to {most:.3g} where probabilities in [0, 1] are wanted; if these are logits, add a sigmoid"
        )


def _check_statistics(modules: Mapping[str, Any], sample_rate: int, n_samples: int | None) -> None:
    """Refuses buffers that training changes and that are not saved: what was evaluated would not be what is loaded."""
    copies = copy.deepcopy(dict(modules))
    parts = [part for module in copies.values() if isinstance(module, nn.Module) for part in module.train().modules()]
    buffers = [(part, name) for part in parts for name in part._non_persistent_buffers_set]
    before = copy.deepcopy([part._buffers[name] for part, name in buffers])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            probabilities(copies, _noise(2, n_samples or sample_rate), torch.ones(2), n_samples=n_samples)
        except Exception as error:  # other people's code
            raise InputError(f"the parts do not run in training: {type(error).__name__}: {error}") from error
    for (part, name), value in zip(buffers, before, strict=True):
        now = part._buffers[name]
        if now is not value and (now is None or value is None or not torch.equal(now, value)):
            kind = type(part).__qualname__
            raise InputError(f"{kind} changes its buffer '{name}', which is not persistent: it would not be saved")


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else f"{type(x).__name__} of {', '.join(map(_shape, x))}"


def _check_shape(name: str, given: str, answer: Any, n_classes: int) -> None:
    parts = answer if isinstance(answer, tuple) and name == "embedding_model" else (answer,)
    dims = {"embedding_model": (3, 4), "classifier": (2,)}.get(name, (3,))
    for part in parts:
        if not (isinstance(part, Tensor) and part.dim() in dims and len(part) == 2 and part.is_floating_point()):
            what = _shape(part) if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise InputError(f"{given} gives {what} for a batch of 2, where {SHAPES[name]} is wanted")
    if name == "classifier" and answer.shape[1] != n_classes:
        raise InputError(f"{given} gives {answer.shape[1]} classes, but n_classes is {n_classes}")


def attribute(module: Any, name: str, *front_end: nn.Module) -> Any:
    """Gives what `!ref <module.name>` stands for in a YAML file: a number or a text.

    An encoder's `out_channels` is measured if need be, with the front end: `compute_features` and `mean_var_norm`.
    """
    value = None if name.startswith("_") else getattr(module, name, None)
    if value is None and name == "out_channels" and front_end:
        modules = dict(zip(MODULES, (*front_end, module), strict=False))
        with _trying(modules) as tried:
            feats, lens = features(tried, _noise(1, 2 * getattr(front_end[0], "sample_rate", 16000)))
            value = call(tried["embedding_model"], feats, lens).shape[1]
    if not isinstance(value, bool | int | float | str):
        raise InputError(f"{type(module).__qualname__} has no number or text '{name}' to refer to; write the value itself")
    return value


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def frame_shift(compute_features: Any, sample_rate: int) -> int:
    """Gives the samples from a frame of the features to the next: an attribute of that name, or measured.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> frame_shift(Fbank(hop_length=20), sample_rate=16000)
    320
    """
    shift = getattr(compute_features, "frame_shift", None)
    if shift is not None:
        return shift
    device = _device_of(compute_features)
    with torch.no_grad():
        one, two = (call(compute_features, torch.zeros(1, seconds * sample_rate, device=device)).shape[1] for seconds in (1, 2))
    if one == two:
        raise InputError(
            f"compute_features ({type(compute_features).__qualname__}) gives {one} frames for a clip of any length: "
            "only an attribute frame_shift, in samples, could say when a frame is"
        )
    return round(sample_rate / (two - one))


def frames_per_step(encoder: Any, n_frames: int, n_mels: int) -> int | None:
    """Gives the frames from a step of the feature map to the next: an attribute of the encoder, or measured.

    The encoder is in evaluation mode, and takes features of `n_frames` and `n_mels`. None, if all lengths give as many steps.

    Example
    -------
    >>> class Encoder(nn.Conv1d):
    ...     def forward(self, feats):
    ...         return super().forward(feats.transpose(1, 2))
    >>> frames_per_step(Encoder(64, 8, kernel_size=9, stride=4), n_frames=200, n_mels=64)
    4
    """
    if hasattr(encoder, "members"):
        # an ensemble's feature maps are brought to the finest of its members' steps
        found = [frames_per_step(member, n_frames, n_mels) for member in encoder.members]
        return min((frames for frames in found if frames is not None), default=None)
    for part in encoder.modules():
        if hasattr(part, "frames_per_step"):
            return part.frames_per_step
    device = _device_of(encoder)

    def n_steps(length: int) -> int:
        answer = call(encoder, torch.zeros(1, length, n_mels, device=device), torch.ones(1, device=device))
        return answer.shape[-1]

    with torch.no_grad():
        steps = n_steps(n_frames)
        # the longer, the less it matters how the ends are rounded; some encoders take no more than they were trained on
        for other in (n_frames + 4096, n_frames // 2):
            try:
                difference = n_steps(other) - steps
            except Exception:
                continue
            return round((other - n_frames) / difference) if difference else None
    return round(n_frames / steps) if steps > 1 else None


def step_offset(encoder: Any) -> int | None:
    """Gives the frame on which the first step of the feature map is centred: an encoder's attribute; None for half a step.

    Example
    -------
    >>> from psla_sb.lobes.mobilenet import MobileNetV3Encoder
    >>> step_offset(MobileNetV3Encoder(0.1)), step_offset(nn.Conv1d(64, 8, kernel_size=9, stride=4))
    (0, None)
    """
    found = {getattr(member, "step_offset", None) for member in getattr(encoder, "members", [encoder])}
    return found.pop() if len(found) == 1 else None
