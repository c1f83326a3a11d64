"""What a run leaves on disk to go on from: whole checkpoints, and one file of model weights for each epoch.

A snapshot holds the weights of the modules `embedding_model` and `classifier` alone, as safetensors; aggregation reads snapshots.
A checkpoint holds the whole state of training and is SpeechBrain's business, except that it appears whole or not at all.
"""

import contextlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from psla_sb.errors import InputError

UNFINISHED = "tmp+"


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, with checkpoints that are whole or absent.

    SpeechBrain marks a checkpoint as one before it has written the rest of it, so a run killed in between cannot start again. Here
    it is written under another name, flushed to disk and renamed; what a killed run left unfinished is removed at the next start.

    Example
    -------
    >>> import torch
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"model": torch.nn.Linear(2, 1)})
    >>> checkpoint = checkpointer.save_checkpoint()
    >>> sorted(file.name for file in checkpoint.path.iterdir())
    ['CKPT.yaml', 'model.ckpt']
    """

    def __init__(self, checkpoints_dir, *args, **kwargs):
        super().__init__(checkpoints_dir, *args, **kwargs)
        if if_main_process():
            for leftover in Path(checkpoints_dir).glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def save_checkpoint(self, meta={}, end_of_epoch=True, name=None, **kwargs):  # noqa: B006
        """As SpeechBrain's; `name` cannot be given, since a checkpoint of that name would be overwritten in place."""
        if name is not None:
            raise ValueError("Checkpoints are named by time: a checkpoint with a name would be overwritten in place.")
        checkpoint = super().save_checkpoint(meta, end_of_epoch, **kwargs)
        ddp_barrier()
        if if_main_process():
            for file in checkpoint.path.iterdir():
                flush(file)
            final = checkpoint.path.with_name(checkpoint.path.name.removeprefix(UNFINISHED))
            os.replace(checkpoint.path, final)
            flush(final.parent)
            files = {name: final / file.name for name, file in checkpoint.paramfiles.items()}
            checkpoint = Checkpoint(final, checkpoint.meta, files)
        ddp_barrier()
        return checkpoint

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs):
        """As SpeechBrain's, whose default for `importance_keys` is one list that grows at every call."""
        super().save_and_keep_only(*args, importance_keys=list(importance_keys), **kwargs)


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

    Example
    -------
    >>> path = getfixture("tmp_path") / "results" / "figures.json"
    >>> with atomic_write(path) as temporary:
    ...     _ = temporary.write_text("{}")
    >>> path.read_text()
    '{}'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name keeps its ending: numpy and others choose the format by it
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def snapshot_path(folder, epoch):
    """Where the weights of an epoch are.

    Example
    -------
    >>> str(snapshot_path("results", 3))
    'results/snapshots/epoch_03.safetensors'
    """
    return Path(folder) / "snapshots" / f"epoch_{epoch:02d}.safetensors"


def save_weights(modules, path):
    """Writes the weights of modules into one safetensors file, keys `module.parameter`.

    Arguments
    ---------
    modules : dict of str to torch.nn.Module
        For a tagger, `embedding_model` and `classifier`.
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
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)


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
    own = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(problems[:8])}{more}")
    for name, module in modules.items():
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")})


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
