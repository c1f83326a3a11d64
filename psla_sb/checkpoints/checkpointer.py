"""SpeechBrain's Checkpointer, with checkpoints that are whole or absent, and that run no code when they are loaded."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    DEFAULT_LOAD_HOOKS,
    METAFNAME,
    Checkpoint,
    Checkpointer,
    get_default_hook,
    torch_recovery,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only, run_on_main
from torch import nn

from psla_sb.checkpoints.weights import put_state, state_of
from psla_sb.errors import InputError
from psla_sb.files import UNFINISHED, flush, wait_for, write_errors


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

    def recover_if_possible(self, *args: Any, **kwargs: Any) -> Any:
        """As SpeechBrain's, after removing what a killed run has left unfinished."""
        if if_main_process():
            for folder in Path(self.checkpoints_dir).iterdir():
                unmarked = folder.name.startswith(CKPT_PREFIX) and not (folder / METAFNAME).exists()
                if folder.is_dir() and (folder.name.startswith(UNFINISHED) or unmarked):
                    shutil.rmtree(folder)
        ddp_barrier()
        return super().recover_if_possible(*args, **kwargs)

    def find_checkpoints(self, *args: Any, **kwargs: Any) -> list[Checkpoint]:
        """As SpeechBrain's, but the first process looks: over a network others may see what was there before."""
        return run_on_main(super().find_checkpoints, args, kwargs)

    def _new_checkpoint_dirpath(self) -> Path:
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def save_checkpoint(self, meta: Any = {}, end_of_epoch: bool = True, name: str | None = None, **kwargs: Any) -> Checkpoint:  # noqa: B006
        """As SpeechBrain's; `name` cannot be given, since a checkpoint of that name would be overwritten in place."""
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

    def save_and_keep_only(self, *args: Any, importance_keys: Iterable = (), **kwargs: Any) -> None:
        """As SpeechBrain's, whose default for `importance_keys` is one list that grows at every call."""
        super().save_and_keep_only(*args, importance_keys=list(importance_keys), **kwargs)

    def list_checkpoints(self) -> list[Checkpoint]:
        """As SpeechBrain's."""
        try:
            checkpoints = super().list_checkpoints()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.checkpoints_dir}: a {METAFNAME} in it is not YAML; remove its folder ({error})") from None
        for checkpoint in checkpoints:
            if not isinstance(checkpoint.meta, dict) or not {"unixtime", "end-of-epoch"} <= checkpoint.meta.keys():
                raise InputError(f"{checkpoint.path / METAFNAME}: not written by a training run; remove this folder")
        return checkpoints

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """As SpeechBrain's, which leaves to PyTorch's defaults and environment variables whether code in a file is run."""
        for name, recoverable in self.recoverables.items():
            if isinstance(recoverable, nn.Module) or get_default_hook(recoverable, DEFAULT_LOAD_HOOKS) is torch_recovery:
                self.custom_load_hooks.setdefault(name, load_tensors)
        for file in checkpoint.paramfiles.values():
            wait_for(file)
        try:
            super().load_checkpoint(checkpoint)
        except Exception as error:  # a broken file raises whatever the unpickler stumbles over
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{checkpoint.path}: cannot be loaded ({type(error).__name__}: {reason}). If the settings are those that it was "
                "trained with, remove this folder: the run goes on from the checkpoint before it, or begins again."
            ) from error


def save_tensors(recoverable: nn.Module, path: Path) -> None:
    """SpeechBrain's save hook for modules; unlike its own, it knows statistics that are in no state dict."""
    torch.save(state_of(recoverable), path)


def load_tensors(recoverable: Any, path: Path, end_of_epoch: bool) -> None:
    """SpeechBrain's load hook for what has a state dict, which never runs code that the file contains."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(recoverable, nn.Module):
        put_state(recoverable, state)
    else:
        recoverable.load_state_dict(state)
