"""How a recipe's script runs: processes, signals, exit statuses, and errors in one line."""

import contextlib
import ctypes
import dataclasses
import errno
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import ddp_init_group, get_local_rank, if_main_process, infer_device
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.dataset import end_workers, shared_memory
from psla_sb.errors import InputError, Interrupted
from psla_sb.experiment.hparams import CommandLine
from psla_sb.files import NotSeen, write_file

# At its import SpeechBrain says that it cannot save figures, which nothing here lets it do.
logging.disable(logging.WARNING)
importlib.import_module("speechbrain.utils.train_logger")
logging.disable(logging.NOTSET)

logger = get_logger(__name__)

EXIT_BAD_INPUT = 2
# sysexits.h: a temporary failure, try again. torchrun does not pass it on.
EXIT_INTERRUPTED = 75
# a file size limit is how some clusters enforce a quota
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_TO_BE_ENDED = 5.0
# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def main(recipe: str, job: Callable[[Path, RunOptions, dict[str, Any]], Any], arguments: list[str] | None = None) -> None:
    """Runs a recipe's script; what is wrong with the input is printed without a traceback.

    Arguments
    ---------
    recipe
        The script: a YAML file that is not found from the current folder is looked for beside it.
    job
        What is done with the YAML file, the run options and the overrides.
    arguments
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2, if the input is wrong or the disk is full; 75, if the run was interrupted by SIGTERM or Ctrl-C and has saved
        its state.
    """
    handlers = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    try:
        file, run_opts, overrides = CommandLine.from_command_line_args(arguments)
        beside = Path(recipe).resolve().parent / file
        if not Path(file).is_file() and not beside.is_file():
            raise InputError(f"{file}: no such file, neither here nor in {beside.parent.parent}")
        try:
            torch.empty(0, device=run_opts.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"--device={run_opts.device} cannot be used: {reason}") from None
        if (run_opts.device or infer_device()) == "cpu":
            _keep_memory()
        with shared_memory():
            job(Path(file) if Path(file).is_file() else beside, run_opts, overrides)
    except Interrupted:
        if if_main_process():
            print("Interrupted, and saved. The same command goes on from here.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        file = error.filename2 or error.filename or "a file of the output folder"
        reason = f"{file}: cannot be written ({error.strerror})"
        print(
            f"error: {reason}. All that was saved before is as it was: make room, and the same command goes on from it.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)
    except InputError as error:
        # a broken sound file, and one that is not there, is known only to the process that reads it
        if not (if_main_process() or isinstance(error, AudioError | NotSeen)):
            # what all have found the first one says, and torchrun then ends the others; what it has not found is said here
            for signum in STOP_SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
            time.sleep(SECONDS_TO_BE_ENDED)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        print(
            f"error: the GPU has too little memory: {reason}. Give smaller batches (batch_size, valid_batch_size), or a GPU that "
            "nobody else uses.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit("Stopped at once. The same command goes on from what was saved last.")
    finally:
        for signum, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(signum, handler)
        end_workers()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _keep_memory() -> None:
    """Has glibc keep large blocks that are freed; it would give them back, and get the next ones from the system page by page."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def stop(signum: int, frame: Any) -> None:
    """Handles a signal where nothing has to be saved first."""
    raise Interrupted


def write_environment(folder: Path) -> None:
    """Writes what this process runs on into `env.log`: SpeechBrain's own has the packages of the first pip that is found."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = sorted({f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}, key=str.lower)
    lines = [f"Python {sys.version}", sys.executable, platform.platform(), f"CUDA {torch.version.cuda}, {gpus or 'no GPU'}"]
    write_file(folder / "env.log", "\n".join([*lines, "", *packages, ""]))


def start_processes(run_opts: RunOptions, knows_dry_run: bool = False) -> RunOptions:
    """Joins the processes that torchrun has started, if it has.

    Returns options with defaults for where the process runs: gloo without a GPU, no progress bars where nobody looks. A job that
    does not know `--dry_run` refuses it, since it would do what it was not meant to.
    """
    if getattr(run_opts, "dry_run", False) and not knows_dry_run:
        raise InputError("--dry_run is an option of train.py, ablate.py and out_of_fold.py")
    if run_opts.device == "cuda":
        # of several, that of this process
        device = f"cuda:{get_local_rank() or 0}"
        run_opts = dataclasses.replace(run_opts, device=device, overridden_args=run_opts.overridden_args)
    defaults: dict[str, Any] = {}
    if not torch.cuda.is_available() or str(run_opts.device).startswith("cpu"):
        defaults["distributed_backend"] = "gloo"
    if not sys.stderr.isatty():
        defaults["noprogressbar"] = True
    if run_opts.ckpt_interval_steps > 0:
        # a YAML file may have minutes, and SpeechBrain takes no two intervals
        defaults["ckpt_interval_minutes"] = 0
    defaults = {key: value for key, value in defaults.items() if key not in run_opts.overridden_args}
    run_opts = dataclasses.replace(run_opts, **defaults, overridden_args=run_opts.overridden_args | set(defaults))
    if not torch.distributed.is_initialized():
        ddp_init_group(run_opts)
    if os.environ.get("WORLD_SIZE", "1") != "1" and not torch.distributed.is_initialized():
        logger.warning(
            "WORLD_SIZE is %s, but RANK or LOCAL_RANK is not set: this process works alone. torchrun sets them all.",
            os.environ["WORLD_SIZE"],
        )
    return run_opts
