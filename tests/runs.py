"""Recipes run as a user runs them, on the smallest settings; and in processes that cost no imports, to be killed."""

import atexit
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "recipes" / "AudioSet" / "train.py"
# The smallest run of the real recipe: seconds, not minutes.
TINY = {
    "n_train": 40,
    "n_eval": 20,
    "seconds": 0.5,
    "n_frames": 48,
    "n_mels": 32,
    "number_of_epochs": 2,
    "average_start": 1,
    "num_workers": 0,
}
# Its children have everything imported: a tiny run takes a third of the time that it takes from the command line.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["psla_sb.experiment.train", "psla_sb.experiment.aggregate", "psla_sb.plots.training"])


def command(script, *arguments, **overrides):
    """The command line of a recipe's script, with the tiny settings, and with overrides of those."""
    settings = {"device": "cpu", **TINY, **overrides}
    given = {key: value for key, value in settings.items() if value is not None}
    return [sys.executable, str(script), *arguments, *(f"--{key}={value}" for key, value in given.items())]


def run(argv, check=True, cwd=None, env=None, fresh=False):
    """Runs a command, from another folder, on one thread (results depend on the number of threads).

    A script runs in a process of its own that has the toolkit imported, unless it is to be a `fresh` one, as a user's is, or has an
    environment that Python itself reads.
    """
    argv = [str(part) for part in argv]
    variables = {"OMP_NUM_THREADS": "1", **(env or {})}
    if fresh or argv[0] != sys.executable or not argv[1].endswith(".py") or "PYTHONPATH" in variables:
        environment = {**os.environ, **variables}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=600, cwd=cwd)
    else:
        with tempfile.TemporaryDirectory() as folder:
            said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            process = _process(argv, said, {**os.environ, **variables}, cwd, None)
            process.join(600)
            assert process.exitcode is not None, f"it runs for ten minutes: {argv}"
            texts = [Path(path).read_text() if os.path.exists(path) else "" for path in said]
        done = subprocess.CompletedProcess(argv, process.exitcode, *texts)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(argv, check=True, env=None, fresh=False):
    """As `run`, by two processes on this machine: those of torchrun itself, if they are to be `fresh`."""
    argv = [str(part) for part in argv]
    if fresh:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return run([*launcher, *argv[1:]], check=check, env=env, fresh=True)
    with tempfile.TemporaryDirectory() as folder:
        said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        ranks = _ranks(
            lambda _, given: _process(argv, said, {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), **given}, None, None)
        )
        # torchrun ends the others when one has failed
        while any(process.is_alive() for process in ranks):
            for process in ranks:
                process.join(0.1)
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()
        texts = [Path(path).read_text() if os.path.exists(path) else "" for path in said]
    done = subprocess.CompletedProcess(argv, int(any(process.exitcode for process in ranks)), *texts)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def at_start(folder, code, **variables):
    """The environment in which each process of a recipe, started by `run` or `torchrun`, does something first.

    `code` may import what lies in the tests' folder; it finds `variables` in the environment. The launcher of `torchrun` is none
    of the recipe's processes.
    """
    (folder / "start").mkdir()
    guard = 'import os\nimport sys\nif "torch.distributed.run" not in sys.orig_argv:\n'
    (folder / "start" / "sitecustomize.py").write_text(guard + textwrap.indent(textwrap.dedent(code), "    "))
    paths = [str(folder / "start"), str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), **{name: str(value) for name, value in variables.items()}}


def _process(*args):
    # a process that a GPU's was forked off cannot use the GPU
    context = SERVER if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else multiprocessing.get_context("spawn")
    process = context.Process(target=_main, args=args)
    process.start()
    return process


def _main(argv, said, env, cwd, at):
    """Runs the script as Python does, in this process, whose output and errors go to files."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    # as in a process of the command line: how loaders start their workers
    multiprocessing.set_start_method("fork", force=True)
    for descriptor, path in enumerate(said, 1):
        stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, descriptor)
    if cwd is not None:
        os.chdir(cwd)
    paths = list(filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = [str(Path(argv[1]).parent), *paths]
    sys.argv = argv[1:]
    # what `at_start` wants, which Python itself does at its start
    for path in paths:
        if (code := Path(path) / "sitecustomize.py").exists():
            runpy.run_path(str(code))
    import torch

    torch.set_num_threads(1)
    if at is not None:
        _happen(*at)
    try:
        runpy.run_path(argv[1], run_name="__main__")
    finally:
        # what a process does that ends by itself
        atexit._run_exitfuncs()


def _happen(event, target, count):
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == count:
            if event == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            else:
                # workers get it as well
                os.killpg(0, event)
        return function(*args, **kwargs)

    setattr(owner, name, call)


def start(argv, log, env=None, at=None):
    """Starts what `command` gave in a process, and session, of its own that has the toolkit imported.

    Its output is appended to the file `log`. `at` is (event, "module:function", n): at the n-th call of the function the process
    gets the signal `event`, or from then on can write no file of more than 10 kB ("disk full").
    """
    return _process(argv, [log, log], {**os.environ, **(env or {})}, None, at)


def finish(argv, log, **kwargs):
    """As `start`, and waits for the end; returns the exit status."""
    process = start(argv, log, **kwargs)
    process.join()
    return process.exitcode


@contextlib.contextmanager
def serve(folder):
    """A web server, which takes a second: gives its address, and the list of what it was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def do_GET(self):
            asked.append(self.path)
            time.sleep(1)
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _ranks(start_one):
    """Two processes, which `start_one(rank, environment)` starts, in the environment that torchrun gives them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [start_one(rank, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def two_ranks(argv, log, at=None, rank_of_event=None):
    """As `finish`, the exit statuses of two processes in the environment that torchrun gives them; `at` is of both, or of one."""

    def start_one(rank, env):
        return start(argv, log.with_suffix(f".{rank}"), env=env, at=at if rank_of_event in (None, rank) else None)

    ranks = _ranks(start_one)
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def differences(folder, other):
    """The files in which the outcomes of two runs differ: weights, predictions and taggers by their bytes, and figures.

    What is left of unfinished writes counts as well.
    """
    patterns = ("snapshots/*", "predictions/*.npy", "tagger/*.ckpt", "**/tmp+*")
    files = {path.relative_to(root) for root in (folder, other) for pattern in patterns for path in root.glob(pattern)}
    differ = [str(file) for file in sorted(files) if _bytes(folder / file) != _bytes(other / file)]
    if not files or _figures(folder) != _figures(other):
        differ.append("results.json")
    return differ


def _figures(folder):
    """What `results.json` says, but for how long it took."""
    results = json.loads(_bytes(folder / "results.json")) or {}
    # where the annotation is, and what lies beside it, differs too
    clips = {key: results.get("clips", {}).get(key) for key in ("set", "found", "ids", "labels_found")}
    return {**results, "timing": None, "clips": clips}


def _bytes(path):
    return path.read_bytes() if path.exists() else b"null"


def score_slowly(seconds, *args):
    """`score` on one thread, with a note of how far it has come after each batch, and a pause before it."""
    import torch

    from psla_sb.aggregation import scoring as aggregation

    torch.set_num_threads(1)
    aggregation.BATCHES_AT_ONCE, check = 1, aggregation.check_audio
    aggregation.check_audio = lambda batch: (time.sleep(seconds), check(batch))
    aggregation.score(*args)


def rows_by_file(printed):
    """{file: its rows} of what psla-tag printed as JSON or JSON lines."""
    rows = json.loads(printed)["rows"] if printed.startswith('{"schema": 1, ') else map(json.loads, printed.splitlines())
    answers = {}
    for row in rows:
        answers.setdefault(row["file"], []).append(row)
    return answers
