"""How much faster `psla-tag FOLDER --out` is than calls of `AudioTagger.tag_file` one by one, and whether its memory grows.

Files are generated: noise of random lengths, FLAC. Run on an otherwise idle machine, with a tagger such as `make demo` leaves:
`python benchmarks/bulk.py --model results/mini/1/tagger`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ONE_BY_ONE = """
import sys, time
from psla_sb.inference.tagger import AudioTagger
tagger = AudioTagger.from_folder(sys.argv[1])
files = sys.argv[2:]
tagger.tag_file(files[0])
begin = time.perf_counter()
for file in files:
    tagger.tag_file(file)
print(len(files) / (time.perf_counter() - begin))
"""
COMMAND = [sys.executable, "-c", "from psla_sb.cli.tag import tag; tag()"]


def measured(argv):
    """Wall seconds, the most memory of the process in MiB, and what it printed."""
    begin = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # of this process alone, not of its workers
    printed, said = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said)
    return time.perf_counter() - begin, usage.ru_maxrss / 1024, printed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="a tagger's folder")
    parser.add_argument("--files", type=int, default=2000, help="that are generated")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a file at most; half of this at least")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(options.files):
            part = Path(folder) / ("tenth" if i < options.files // 10 else "rest")
            part.mkdir(exist_ok=True)
            n_samples = round(16000 * options.seconds * rng.uniform(0.5, 1))
            soundfile.write(part / f"{i:06d}.flac", 0.1 * rng.standard_normal(n_samples), 16000)
            files.append(str(part / f"{i:06d}.flac"))
        one_by_one = float(measured([sys.executable, "-c", ONE_BY_ONE, options.model, *files[: options.files // 4]])[2])
        print(f"one by one: {one_by_one:.1f} files/s")
        bulk = [*COMMAND, "--model", options.model, "--workers", str(options.workers)]
        seconds, memory = {}, {}
        for name, where in (("tenth", f"{folder}/tenth"), ("all", folder)):
            seconds[name], memory[name], _ = measured([*bulk, where, "--out", f"{folder}/{name}.parquet"])
        # the time of imports and loading is in both
        rate = (options.files - options.files // 10) / (seconds["all"] - seconds["tenth"])
        print(f"psla-tag --out: {rate:.1f} files/s, {rate / one_by_one:.2f} times; {seconds['all']:.1f} s in all, start included")
        print(f"memory: {memory['tenth']:.0f} MiB with {options.files // 10} files, {memory['all']:.0f} MiB with {options.files}")


if __name__ == "__main__":
    main()
