"""Kills training runs at random moments, starts each again, and compares what they end with.

    python benchmarks/kill_test.py --kills 30

Every run makes its own data, trains two epochs of the embedded data set on the CPU (with a checkpoint every two steps), scores,
exports and draws. It gets SIGKILL at a moment drawn uniformly from the time that a run takes which is left alone, and is started
again with the same command. Snapshots, predictions, the exported tagger and the figures of `results.json` must be those of the
run that was left alone, bit for bit. The exit status is 1 if any is not.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from runs import TRAIN, command, differences, finish, start

SETTINGS = {"ckpt_interval_steps": 2, "device": "cpu", "drop_connect": 0.2, "test_annotation": "null"}


def arguments_of(folder, workers):
    """The command of a run whose data and outcome are in `folder`."""
    paths = {"data_folder": folder / "data", "output_folder": folder}
    return command(TRAIN, "hparams/mini.yaml", **SETTINGS, **paths, num_workers=workers)


def latest(folder):
    """The file that a run touched last: where it was killed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".txt", ".wav", ".log")]
    return max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(folder) if files else "nothing yet"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="runs to kill (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: 0)")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        whole, durations = root / "whole", []
        # the first one also waits for the imports
        for folder in (root / "first", whole):
            begin = time.perf_counter()
            status = finish(arguments_of(folder, args.workers), root / "log")
            durations.append(time.perf_counter() - begin)
            if status != 0:
                sys.exit((root / "log").read_text())
        if differences(root / "first", whole):
            sys.exit(f"two runs that were left alone differ in {differences(root / 'first', whole)}")
        print(f"a run that is left alone takes {durations[-1]:.1f} s", flush=True)
        identical = killed = 0
        while killed < args.kills:
            folder, moment = root / f"run_{killed}", draw.uniform(0, durations[-1])
            argv, log = arguments_of(folder, args.workers), root / f"log_{killed}"
            process = start(argv, log)
            process.join(moment)
            if not process.is_alive():
                # faster than the one that was timed: not killed, so not counted
                folder.rename(root / f"missed_{killed}_{moment}")
                continue
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            where, killed = latest(folder), killed + 1
            status = finish(argv, log)
            differ = differences(folder, whole) if status == 0 else [f"exit status {status}:\n{log.read_text()}"]
            identical += not differ
            print(f"{killed:3d}  at {moment:5.2f} s, after {where}: {differ or 'identical'}", flush=True)
        print(f"{identical} of {args.kills} identical")
    sys.exit(identical < args.kills)


if __name__ == "__main__":
    main()
