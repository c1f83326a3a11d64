"""Runs commands as processes, several at a time, and passes on to them what stops this one."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from psla_sb.experiment.launch import STOP_SIGNALS
from psla_sb.files import LOCK, write_file

SECONDS_BETWEEN_LOOKS = 0.2


class Job(NamedTuple):
    """A command, what it is called, the folder that it alone may write to, and what is noted there before it begins."""

    title: str
    command: list[str]
    folder: Path
    record: dict[str, Any]
    of: str = "ablation"  # what it is a part of

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / f"{self.of}.log"

    @property
    def record_file(self) -> Path:
        """What it was run with."""
        return self.folder / f"{self.of}.json"


class Running(NamedTuple):
    """A process of a job, the slot that it takes, and when it began, in seconds."""

    job: Job
    process: subprocess.Popen
    slot: Sequence[str]
    since: float


class Listener:
    """Is told of each start and each end of a job; what it does by default is nothing."""

    def started(self, job: Job) -> None:
        """A job has been started."""

    def ended(self, job: Job, status: int | None, seconds: float) -> None:
        """A job has ended, with a status below 0 if by a signal; with None if it was not begun, its folder being in use."""


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Sequence[str]],
    listener: Listener,
    prepared: Callable[[Job], bool] = lambda job: True,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Runs all jobs, as many at a time as there are slots; returns whether a signal has stopped it.

    SIGTERM and SIGINT, also a second one, are passed on to the processes, which have sessions of their own: a Ctrl-C reaches each
    of them once. No more are started then, and their ends are waited for.

    Arguments
    ---------
    slots
        For each job that can run at the same time: further arguments of its command, such as a device.
    prepared
        Whether the first job has done what all others rely on; until then it is alone.
    """
    waiting, free, stopped = deque(jobs), list(slots), False
    running: list[Running] = []
    signals: deque[int] = deque()
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda number, frame: signals.append(number))
    try:
        while running or (waiting and not stopped):
            while signals:
                stopped, number = True, signals.popleft()
                for one in running:
                    one.process.send_signal(number)
            alone = bool(running) and running[0].job is jobs[0] and not prepared(jobs[0])
            if waiting and free and not (stopped or alone):
                job, slot = waiting.popleft(), free.pop(0)
                process = start(job, slot, environment)
                if process is None:
                    free.append(slot)
                    listener.ended(job, None, 0)
                else:
                    running.append(Running(job, process, slot, time.monotonic()))
                    listener.started(job)
                continue
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.slot)
                listener.ended(one.job, one.process.returncode, time.monotonic() - one.since)
    finally:
        # what is not expected must not leave processes behind
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    return stopped


def start(job: Job, arguments: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen | None:
    """Starts a job's process, which holds the lock of its folder for as long as it lives, also if this process is killed.

    Returns None if another process holds it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOCK, "a") as lock, open(job.log, "ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            # a file system without locks: several processes at once are then the user's business
            pass
        write_file(job.record_file, json.dumps(job.record, indent=1) + "\n")
        kwargs: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            [*job.command, *arguments],
            **kwargs,
            env=dict(os.environ if environment is None else environment),
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )


def last_line(job: Job) -> str:
    """The last line that is not empty of what a job has printed."""
    with open(job.log, "rb") as log:
        log.seek(max(0, os.path.getsize(job.log) - 10_000))
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has printed nothing")


def cores_of_each(n_jobs: int) -> dict[str, str]:
    """The environment of processes that share this machine's cores, unless the user has shared them out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if n_jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores // n_jobs))}
    return {**threads, **os.environ}
