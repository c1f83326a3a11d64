"""What a run leaves on disk to go on from: whole checkpoints, and one file of model weights for each epoch.

A snapshot holds the weights of the modules `embedding_model` and `classifier` alone, as safetensors; aggregation reads snapshots.
A checkpoint holds the whole state of training and is SpeechBrain's business, except that it appears whole or not at all.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    DEFAULT_LOAD_HOOKS,
    METAFNAME,
    Checkpoint,
    Checkpointer,
    get_default_hook,
    torch_recovery,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only
from speechbrain.utils.logger import get_logger
from torch import nn
from torch.nn.parameter import is_lazy

from psla_sb.errors import InputError
from psla_sb.lobes.chain import MODULES

logger = get_logger(__name__)

UNFINISHED = "tmp+"
LOCK = ".lock"


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, with checkpoints that are whole or absent.

    SpeechBrain marks a checkpoint as one before it has written the rest of it, so a run killed in between cannot start again. Here
    it is written under another name, flushed to disk and renamed; what a killed run left unfinished is removed at the next start,
    and so is what it left of a checkpoint that it was deleting.

    Loading a checkpoint runs no code that its files contain.

    Example
    -------
    >>> import torch
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"model": torch.nn.Linear(2, 1)})
    >>> checkpoint = checkpointer.save_checkpoint()
    >>> sorted(file.name for file in checkpoint.path.iterdir())
    ['CKPT.yaml', 'model.ckpt']
    """

    def recover_if_possible(self, *args, **kwargs):
        """As SpeechBrain's, after removing what a killed run has left unfinished."""
        if if_main_process():
            for folder in Path(self.checkpoints_dir).iterdir():
                unmarked = folder.name.startswith(CKPT_PREFIX) and not (folder / METAFNAME).exists()
                if folder.is_dir() and (folder.name.startswith(UNFINISHED) or unmarked):
                    shutil.rmtree(folder)
        ddp_barrier()
        return super().recover_if_possible(*args, **kwargs)

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def save_checkpoint(self, meta={}, end_of_epoch=True, name=None, **kwargs):  # noqa: B006
        """As SpeechBrain's; `name` cannot be given, since a checkpoint of that name would be overwritten in place.

        Raises
        ------
        InputError
            The disk is full, or cannot be written to. Earlier checkpoints are as they were.
        """
        if name is not None:
            raise ValueError("Checkpoints are named by time: a checkpoint with a name would be overwritten in place.")
        for name_, recoverable in self.recoverables.items():
            if isinstance(recoverable, nn.Module):
                self.custom_save_hooks.setdefault(name_, main_process_only(save_tensors))
        with write_errors(self.checkpoints_dir):
            checkpoint = super().save_checkpoint(meta, end_of_epoch, **kwargs)
        ddp_barrier()
        if if_main_process():
            final = checkpoint.path.with_name(checkpoint.path.name.removeprefix(UNFINISHED))
            with write_errors(self.checkpoints_dir):
                for file in checkpoint.path.iterdir():
                    flush(file)
                os.replace(checkpoint.path, final)
                flush(final.parent)
            files = {name: final / file.name for name, file in checkpoint.paramfiles.items()}
            checkpoint = Checkpoint(final, checkpoint.meta, files)
        ddp_barrier()
        return checkpoint

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs):
        """As SpeechBrain's, whose default for `importance_keys` is one list that grows at every call."""
        super().save_and_keep_only(*args, importance_keys=list(importance_keys), **kwargs)

    def list_checkpoints(self):
        """As SpeechBrain's.

        Raises
        ------
        InputError
            A checkpoint's `CKPT.yaml` cannot be read.
        """
        try:
            checkpoints = super().list_checkpoints()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.checkpoints_dir}: a {METAFNAME} in it is not YAML; remove its folder ({error})") from None
        for checkpoint in checkpoints:
            if not isinstance(checkpoint.meta, dict) or not {"unixtime", "end-of-epoch"} <= checkpoint.meta.keys():
                raise InputError(f"{checkpoint.path / METAFNAME}: not written by a training run; remove this folder")
        return checkpoints

    def load_checkpoint(self, checkpoint):
        """As SpeechBrain's, which leaves to PyTorch's defaults and environment variables whether code in a file is run.

        Raises
        ------
        InputError
            A file is broken, contains more than tensors and numbers, or is not of this model.
        """
        for name, recoverable in self.recoverables.items():
            if isinstance(recoverable, nn.Module) or get_default_hook(recoverable, DEFAULT_LOAD_HOOKS) is torch_recovery:
                self.custom_load_hooks.setdefault(name, load_tensors)
        try:
            super().load_checkpoint(checkpoint)
        except Exception as error:  # a broken file raises whatever the unpickler stumbles over
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{checkpoint.path}: cannot be loaded ({type(error).__name__}: {reason}). If the settings are those that it was "
                "trained with, remove this folder: the run goes on from the checkpoint before it, or begins again."
            ) from error


def save_tensors(recoverable, path):
    """SpeechBrain's save hook for modules; unlike its own, it knows statistics that are in no state dict."""
    torch.save(state_of(recoverable), path)


def load_tensors(recoverable, path, end_of_epoch):
    """SpeechBrain's load hook for what has a state dict, which never runs code that the file contains.

    Raises
    ------
    pickle.UnpicklingError
        The file contains more than tensors, numbers and their containers.

    Example
    -------
    >>> path = getfixture("tmp_path") / "model.ckpt"
    >>> torch.save(torch.nn.Linear(2, 1).state_dict(), path)
    >>> load_tensors(torch.nn.Linear(2, 1), path, end_of_epoch=True)
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(recoverable, nn.Module):
        put_state(recoverable, state)
    else:
        recoverable.load_state_dict(state)


@contextlib.contextmanager
def write_errors(path):
    """What the several libraries raise when they cannot write, as one clear error.

    Raises
    ------
    InputError
        In place of what is raised within.

    Example
    -------
    >>> with write_errors("results/figures.json"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: results/figures.json: cannot be written (No space left on device...). ...
    """
    try:
        yield
    # PyTorch raises RuntimeErrors; numpy OSErrors without a number
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free // 2**20
        # what PyTorch says of a full disk is of no use
        reason = getattr(error, "strerror", None) or (str(error).partition("\n")[0] if free else "the disk is full")
        raise InputError(
            f"{path}: cannot be written ({reason}; {free} MiB are free there). All that was saved before is as it was: make room, "
            "and the same command goes on from it."
        ) from error


def flush(path):
    """Makes the operating system write a file, or a folder's list of files, to disk.

    Example
    -------
    >>> flush(getfixture("tmp_path"))
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path):
    """Gives the name to write to; the file gets its own name once it is written and flushed, or never.

    Arguments
    ---------
    path : str or Path
        The file to write. Its folder is made if there is none.

    Raises
    ------
    InputError
        The disk is full, or cannot be written to. An earlier file of this name is as it was.

    Example
    -------
    >>> path = getfixture("tmp_path") / "results" / "figures.json"
    >>> with atomic_write(path) as temporary:
    ...     _ = temporary.write_text("{}")
    >>> path.read_text()
    '{}'
    """
    path = Path(path)
    # the name keeps its ending: numpy and others choose the format by it
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_process(folder):
    """Waits until no other process on this machine, or on this file system if it can tell, is in such a block for the folder.

    The workers of a process that was killed belong to it until they have noticed.

    Arguments
    ---------
    folder : str or Path
        Made if there is none; the file `.lock` in it stays.

    Raises
    ------
    InputError
        The folder cannot be written to.

    Example
    -------
    >>> with one_process(getfixture("tmp_path")):
    ...     pass
    """
    lock = Path(folder) / LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{lock.parent}: cannot be written to ({error.strerror}); choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is at work in %s; waiting for it to end.", lock.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # a file system without locks: several processes at once are then the user's business
            logger.info("%s: its file system has no locks; start no second process that writes there.", lock.parent)
        yield


def snapshot_path(folder, epoch):
    """Where the weights of an epoch are.

    Example
    -------
    >>> str(snapshot_path("results", 3))
    'results/snapshots/epoch_03.safetensors'
    """
    return Path(folder) / "snapshots" / f"epoch_{epoch:02d}.safetensors"


def _normalisers(module: nn.Module) -> Iterator[tuple[str, InputNormalization]]:
    """SpeechBrain's normalisations whose statistics are in no state dict, with their names."""
    for name, part in module.named_modules():
        if isinstance(part, InputNormalization) and part.norm_type == "global":
            yield f"{name}." if name else "", part


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a module, with the statistics that SpeechBrain's `InputNormalization` keeps apart from it.

    Raises
    ------
    InputError
        Something in it is no tensor, so that it could be lost.

    Example
    -------
    >>> list(state_of(InputNormalization()))
    ['count', 'glob_mean', 'glob_std']
    """
    state = dict(module.state_dict())
    for name, part in _normalisers(module):
        state |= {f"{name}{key}": torch.as_tensor(value) for key, value in part._statistics_dict().items()}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{type(module).__qualname__} keeps a {type(value).__name__} in its state ('{key}'): only tensors are saved"
            )
    return state


def put_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts what `state_of` gave into a module."""
    state = dict(state)
    for name, part in _normalisers(module):
        count, mean, std = (state.pop(f"{name}{key}") for key in ("count", "glob_mean", "glob_std"))
        part._load_statistics_dict({"count": int(count), "glob_mean": mean.to(part.device), "glob_std": std.to(part.device)})
    module.load_state_dict(state)


def persistent_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The buffers that are in a module's state dict, such as the statistics of its batch normalisations."""
    return [
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    ]


def remember_statistics(module: nn.Module) -> Callable[[], None]:
    """Remembers what a forward pass in training changes; returns what puts it back.

    Example
    -------
    >>> norm = nn.BatchNorm1d(1)
    >>> put_back = remember_statistics(norm)
    >>> _ = norm(torch.ones(2, 1))
    >>> put_back()
    >>> norm.running_mean
    tensor([0.])
    """
    buffers = persistent_buffers(module)
    before, counted = [buffer.clone() for buffer in buffers], [(part, part._statistics_dict()) for _, part in _normalisers(module)]

    def put_back() -> None:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        for part, statistics in counted:
            part._load_statistics_dict(statistics)

    return put_back


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


def save_weights(modules, path):
    """Writes the weights of modules into one safetensors file, keys `module.parameter`.

    Arguments
    ---------
    modules : dict of str to torch.nn.Module
        For a tagger, what `trained_modules` gives.
    path : str or Path
        The file, written whole or not at all.

    Example
    -------
    >>> import torch
    >>> path = getfixture("tmp_path") / "weights.safetensors"
    >>> save_weights({"classifier": torch.nn.Linear(2, 1)}, path)
    >>> sorted(load_weights(path))
    ['classifier.bias', 'classifier.weight']
    """
    write_tensors({f"{name}.{key}": value for name, module in modules.items() for key, value in state_of(module).items()}, path)


def write_tensors(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as safetensors, which hold no two names for one memory: what is shared is written twice."""
    with atomic_write(path) as temporary:
        save_file(
            {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}, temporary
        )


def load_weights(path):
    """Reads a safetensors file as a state dict on the CPU.

    Raises
    ------
    InputError
        The file is missing or is not whole.

    Example
    -------
    >>> load_weights("nowhere.safetensors")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: nowhere.safetensors: no such file of weights
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of weights") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def load_into(modules, state, source="state dict"):
    """Puts a state dict with keys `module.parameter` into modules.

    Raises
    ------
    InputError
        Keys or shapes differ; the message names them.

    Example
    -------
    >>> import torch
    >>> load_into({"classifier": torch.nn.Linear(1, 1)}, {"classifier.weight": torch.ones(1, 1)})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: state dict does not fit the model: missing classifier.bias
    """
    own = {f"{name}.{key}": value for name, module in modules.items() for key, value in state_of(module).items()}
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


def load_module(module, path):
    """Puts the weights in a safetensors file into a module: a hook for SpeechBrain's Pretrainer, whose own reads pickles.

    Raises
    ------
    InputError
        The file is missing or broken, or does not fit the module.

    Example
    -------
    >>> import torch
    >>> path = getfixture("tmp_path") / "classifier.ckpt"
    >>> save_file(torch.nn.Linear(2, 1).state_dict(), path)
    >>> load_module(torch.nn.Linear(2, 1), path)
    """
    state = {f"weights.{key}": value for key, value in load_weights(path).items()}
    load_into({"weights": module}, state, path)


def read_tensors(path):
    """A state dict that `torch.save` wrote. Code in the file is never run.

    Raises
    ------
    InputError
        The file cannot be read, or holds anything but names and plain tensors.

    Example
    -------
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> torch.save({"bias": torch.zeros(2)}, path)
    >>> read_tensors(path)
    {'bias': tensor([0., 0.])}
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a broken file raises whatever the unpickler stumbles over; PyTorch's message advises to run the code in the file
        raise InputError(
            f"{path}: not a checkpoint that can be loaded without running code: it is damaged, or holds more than tensors "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; a checkpoint is a dict of names and tensors")
    for key, value in state.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(key, str) and plain):
            raise InputError(f"{path}: {key!r} is not a name with a plain tensor; a checkpoint holds nothing else")
    return state


def below(name, state):
    """The entries `name.*` of a state dict, without `name.`.

    Example
    -------
    >>> below("classifier", {"classifier.bias": 1, "other.bias": 2})
    {'bias': 1}
    """
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
