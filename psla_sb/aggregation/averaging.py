"""One model from the weights of several: their mean, and batch-norm statistics estimated anew."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from psla_sb.checkpoints.sources import Source, flat, open_source
from psla_sb.dataio.bad_clips import check_audio
from psla_sb.errors import InputError
from psla_sb.lobes import chain


def average_weights(paths: Sequence[str | Path | Source]) -> dict[str, Tensor]:
    """Computes the mean of the weights of several models, batch-norm statistics included.

    Sums are kept in float64, with one file in memory at a time; entries that are not floating point (batch norm counts its
    batches) are averaged and rounded.

    Arguments
    ---------
    paths
        Snapshots (`.safetensors`), SpeechBrain's checkpoint folders, folders of taggers, checkpoints of the published code.

    Returns
    -------
    A state dict, keys as in a snapshot, each entry of the dtype that it has in the first file.

    Raises
    ------
    InputError
        There are no files, one cannot be read, or two of them differ in keys or shapes.

    Example
    -------
    >>> from psla_sb.checkpoints.weights import save_weights
    >>> folder = getfixture("tmp_path")
    >>> for i in (1, 2):
    ...     linear = torch.nn.Linear(1, 1)
    ...     _ = torch.nn.init.constant_(linear.weight, i)
    ...     save_weights({"classifier": linear}, folder / f"{i}.safetensors")
    >>> average_weights([folder / "1.safetensors", folder / "2.safetensors"])["classifier.weight"]
    tensor([[1.5000]])
    """
    if not paths:
        raise InputError("no snapshots to average")
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    first = open_source(paths[0])
    for path in paths:
        _add_weights(open_source(path), total, dtypes, first)
    for key, dtype in dtypes.items():
        mean = total[key] / len(paths)
        total[key] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
    return total


def _add_weights(source: Source, total: dict[str, Tensor], dtypes: dict[str, torch.dtype], first: Source) -> None:
    state, unlike = flat(source.weights()), f"{source.path} and {first.path} are not weights of the same model"
    if not dtypes:
        dtypes.update({key: value.dtype for key, value in state.items()})
        total.update({key: torch.zeros(value.shape, dtype=torch.float64) for key, value in state.items()})
    for key in sorted(state.keys() | total.keys()):
        if key not in state or key not in total:
            lacking, other = (source, first) if key not in state else (first, source)
            raise InputError(f"{unlike}: '{key}' is in {other.path}, not in {lacking.path}")
        if state[key].shape != total[key].shape:
            raise InputError(f"{unlike}: the shapes of '{key}' are {list(state[key].shape)} and {list(total[key].shape)}")
        total[key] += state[key]


class _TrainingNorms(nn.Module):
    """An encoder and its classifier; only batch norms are ever in training mode: drop-connect would disturb what they measure."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.network = nn.ModuleDict({name: modules[name] for name in ("embedding_model", "classifier") if name in modules})

    def train(self, mode: bool = True) -> "_TrainingNorms":
        self.training = mode
        for norm in _norms(self.network):
            norm.train(mode)
        return self

    def forward(self, feats_and_lens: tuple[Tensor, Tensor]) -> Any:
        feature_map = chain.call(self.network["embedding_model"], *feats_and_lens)
        if "classifier" in self.network and any(True for _ in _norms(self.network["classifier"])):
            chain.classify({"classifier": self.network["classifier"]}, feature_map, feats_and_lens[1])
        return feature_map


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(part, _BatchNorm))


def update_batch_norm(
    modules: Mapping[str, nn.Module],
    loader: Iterable[Any],
    n_samples: int | None = None,
    check: Callable[[Any], None] = check_audio,
    features: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Estimates the batch-norm statistics of an encoder and its classifier anew, as averaged weights may need.

    Theirs are those of no model that was trained (Izmailov et al., "Averaging weights leads to wider optima and better
    generalization", UAI 2018). Every batch of training clips counts the same. `check` looks for broken sounds in each batch, and
    `features` gives its features and relative lengths, by default of clips that are neither mixed nor masked. A network whose
    training mixes and masks is better off with statistics of such clips.
    """
    encoder = modules["embedding_model"]
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))

    def of_clips(batch: Any) -> tuple[Tensor, Tensor]:
        wavs, lens = (x.to(device) for x in batch.sig)
        return chain.features(modules, wavs, lens, n_samples=n_samples)

    def batches() -> Iterator[list]:
        for batch in loader:
            check(batch)
            # `update_bn` gives a network the first element of a list
            yield [(features or of_clips)(batch)]

    update_bn(batches(), _TrainingNorms(modules).eval())
