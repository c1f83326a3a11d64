"""One model from the weights of several: their mean, and batch-norm statistics estimated anew."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from psla_sb.checkpoints.sources import flat, open_source
from psla_sb.dataio.bad_clips import check_audio
from psla_sb.errors import InputError
from psla_sb.lobes import chain


def average_weights(paths):
    """The mean of the weights of several models, batch-norm statistics included.

    Sums are kept in float64, with one file in memory at a time; entries that are not floating point (batch norm counts its
    batches) are averaged and rounded.

    Arguments
    ---------
    paths : sequence of str or Path
        Snapshots (`.safetensors`), SpeechBrain's checkpoint folders, folders of taggers, checkpoints of the published code.

    Returns
    -------
    dict of str to torch.Tensor
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
    total, dtypes = {}, {}
    for path in paths:
        _add_weights(path, total, dtypes, paths[0])
    for key, dtype in dtypes.items():
        mean = total[key] / len(paths)
        total[key] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
    return total


def _add_weights(path, total, dtypes, first):
    state = flat(open_source(path).weights())
    if not dtypes:
        dtypes.update({key: value.dtype for key, value in state.items()})
        total.update({key: torch.zeros(value.shape, dtype=torch.float64) for key, value in state.items()})
    for key in sorted(state.keys() | total.keys()):
        if key not in state or key not in total:
            lacking, other = (path, first) if key not in state else (first, path)
            raise InputError(f"{path} and {first} are not weights of the same model: '{key}' is in {other}, not in {lacking}")
        if state[key].shape != total[key].shape:
            shapes = f"{list(state[key].shape)} and {list(total[key].shape)}"
            raise InputError(f"{path} and {first} are not weights of the same model: the shapes of '{key}' are {shapes}")
        total[key] += state[key]


class _TrainingNorms(nn.Module):
    """A network of which only the batch norms are ever in training mode: drop-connect would disturb what they measure."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def train(self, mode=True):
        self.training = mode
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    def forward(self, feats_and_lens):
        return chain.call(self.network, *feats_and_lens)


def update_batch_norm(modules, loader):
    """Estimates an encoder's batch-norm statistics anew, as averaged weights may need: their statistics are not those of any model
    that was trained (Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018).

    Every batch counts the same; clips are neither mixed nor masked.

    Arguments
    ---------
    modules : dict of str to torch.nn.Module
        `compute_features`, `mean_var_norm` and `embedding_model`, in evaluation mode; the last is changed in place.
    loader : iterable of PaddedBatch
        Of training clips, as `clip_loader` gives them.

    Raises
    ------
    AudioError
        A sound file cannot be read.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> from psla_sb.lobes.features import GlobalNorm, KaldiFbank
    >>> class Encoder(nn.BatchNorm1d):
    ...     def forward(self, feats):
    ...         return super().forward(feats.transpose(1, 2))
    >>> encoder = Encoder(64).eval()
    >>> modules = {"compute_features": KaldiFbank(n_mels=64), "mean_var_norm": GlobalNorm(), "embedding_model": encoder}
    >>> update_batch_norm(modules, [SimpleNamespace(sig=(torch.randn(2, 16000), torch.ones(2)), error=[None, None])])
    >>> bool(encoder.running_mean.abs().min() > 0), encoder.training
    (True, False)
    """
    encoder = modules["embedding_model"]
    device = next(encoder.parameters()).device

    def features():
        for batch in loader:
            check_audio(batch)
            # `update_bn` gives a network the first element of a list
            yield [chain.features(modules, *(x.to(device) for x in batch.sig))]

    update_bn(features(), _TrainingNorms(encoder).eval())
