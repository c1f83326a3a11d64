"""Weights of modules as state dicts and as safetensors files: whole, and read without running code."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from speechbrain.processing.features import InputNormalization
from torch import nn
from torch.nn.parameter import is_lazy

from psla_sb.errors import InputError
from psla_sb.files import write_file
from psla_sb.lobes.chain import MODULES
from psla_sb.lobes.pretrained import adapted, read_safetensors


def _normalisers(module: nn.Module) -> Iterator[tuple[str, InputNormalization]]:
    """SpeechBrain's normalisations whose statistics are in no state dict, with their names."""
    for name, part in module.named_modules():
        if isinstance(part, InputNormalization) and part.norm_type == "global":
            yield f"{name}." if name else "", part


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a module, with the statistics that SpeechBrain's `InputNormalization` keeps apart from it.

    Example
    -------
    >>> list(state_of(InputNormalization()))
    ['count', 'glob_mean', 'glob_std']
    """
    state = dict(module.state_dict())
    for name, part in _normalisers(module):
        state |= {f"{name}{key}": torch.as_tensor(value) for key, value in part._statistics_dict().items()}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_complex():
            kept = f"a {type(value).__name__} in its state ('{key}')"
            raise InputError(f"{type(module).__qualname__} keeps {kept}: only tensors of real numbers are saved")
    return state


def put_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts what `state_of` gave into a module."""
    state = dict(state)
    for name, part in _normalisers(module):
        count, mean, std = (state.pop(f"{name}{key}") for key in ("count", "glob_mean", "glob_std"))
        part._load_statistics_dict({"count": int(count), "glob_mean": mean.to(part.device), "glob_std": std.to(part.device)})
    module.load_state_dict(state)


def move_statistics(module: nn.Module, device: str | torch.device) -> None:
    """Moves the statistics of SpeechBrain's normalisations, which stay behind where a module that contains them is moved."""
    for _, part in _normalisers(module):
        part.to(device)


def copy_statistics(module: nn.Module, other: nn.Module) -> None:
    """Copies the statistics of SpeechBrain's normalisations, which an average of weights knows nothing of, to another module."""
    for (_, part), (_, copied) in zip(_normalisers(module), _normalisers(other), strict=True):
        copied._load_statistics_dict(part._statistics_dict())


def persistent_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The buffers that are in a module's state dict, such as the statistics of its batch normalisations."""
    return [
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    ]


def remember_statistics(module: nn.Module) -> Callable[[torch.Tensor], None]:
    """Remembers what a forward pass in training changes; returns what puts it back unless it is told that all was finite.

    That is a tensor `[]`, bool, on the device of the module, which does not wait for it.

    Example
    -------
    >>> norm = nn.BatchNorm1d(1)
    >>> put_back_unless = remember_statistics(norm)
    >>> _ = norm(torch.ones(2, 1))
    >>> put_back_unless(torch.tensor(False))
    >>> norm.running_mean
    tensor([0.])
    """
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for buffer in persistent_buffers(module):
        alike[buffer.device, buffer.dtype].append(buffer)
    # few large copies, not hundreds of small ones
    before = {key: _joined(buffers) for key, buffers in alike.items()}
    counted = [(part, part._statistics_dict()) for _, part in _normalisers(module)]

    def put_back_unless(finite: torch.Tensor) -> None:
        if (finite.device.type == "cpu" or counted) and finite:
            return
        for key, buffers in alike.items():
            kept = torch.where(finite.to(key[0]), _joined(buffers), before[key]).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [one.view_as(buffer) for one, buffer in zip(kept, buffers, strict=True)])
        for part, statistics in counted:
            part._load_statistics_dict(statistics)

    return put_back_unless


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def trained_modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a tagger's modules that have weights, or statistics, to keep: the encoder, the pooling, some front ends.

    Example
    -------
    >>> linear = torch.nn.Linear(1, 1)
    >>> trained_modules({"compute_features": torch.nn.Identity(), "embedding_model": linear, "classifier": linear})
    {'embedding_model': Linear(...), 'classifier': Linear(...)}
    """
    always = ("embedding_model", "classifier")
    return {name: modules[name] for name in MODULES if name in modules and (name in always or state_of(modules[name]))}


def save_weights(modules: Mapping[str, nn.Module], path: str | Path) -> None:
    """Writes the weights of modules into one safetensors file, keys `module.parameter`; whole or not at all.

    Example
    -------
    >>> path = getfixture("tmp_path") / "weights.safetensors"
    >>> save_weights({"classifier": torch.nn.Linear(2, 1)}, path)
    >>> sorted(load_weights(path))
    ['classifier.bias', 'classifier.weight']
    """
    write_tensors({f"{name}.{key}": value for name, module in modules.items() for key, value in state_of(module).items()}, path)


def write_tensors(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as safetensors, which hold no two names for one memory: what is shared is written twice."""
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    # `save_file` writes to a file of its own first, whose random name would stay behind a process that is killed
    write_file(path, save(own))


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file as a state dict on the CPU."""
    return read_safetensors(path)


def load_into(modules: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], source: str | Path = "state dict") -> None:
    """Puts a state dict with keys `module.parameter` into modules; an `InputError` names the keys and shapes that differ.

    What distributed training and the compiler add to names is no difference, and batch normalisations' counters may be missing.

    Example
    -------
    >>> load_into({"classifier": torch.nn.Linear(1, 1)}, {"classifier.weight": torch.ones(1, 1)})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: state dict does not fit the model: missing classifier.bias
    """
    own = {f"{name}.{key}": value for name, module in modules.items() for key, value in state_of(module).items()}
    state = adapted(state, own)
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own
        # lazy parameters have no shape yet, and statistics that nothing has been counted for are empty
        if key in state and not is_lazy(own[key]) and own[key].shape not in (state[key].shape, (0,))
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(problems[:8])}{more}")
    for name, module in modules.items():
        put_state(module, below(name, state))


def load_module(module: nn.Module, path: str | Path, part: str | None = None) -> None:
    """Puts the weights in a safetensors file into a module: a hook for SpeechBrain's Pretrainer, whose own reads pickles.

    `part` is what the module is called in a file of several, with keys `module.parameter`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "classifier.ckpt"
    >>> _ = path.write_bytes(save(torch.nn.Linear(2, 1).state_dict()))
    >>> load_module(torch.nn.Linear(2, 1), path)
    """
    found = load_weights(path) if part is None else below(part, load_weights(path))
    state = {f"weights.{key}": value for key, value in found.items()}
    load_into({"weights": module}, state, path)


def below(name: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picks the entries `name.*` of a state dict, without `name.`."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
