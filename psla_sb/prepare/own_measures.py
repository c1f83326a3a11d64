"""What is found out of sounds by decoding each file once: lengths, rates, levels, and what tells that two are the same."""

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from psla_sb.dataio.audio import AudioError, own_blocks
from psla_sb.prepare.fingerprints import SECONDS, Fingerprint, fingerprint
from psla_sb.prepare.own_clips import Clip
from psla_sb.prepare.pack_index import in_threads

# half of what lies between the lowest and the highest sample; -80 dB of full scale
SILENT = 1e-4
FULL_SCALE, CLIPPED_SHARE = 0.9995, 0.001
SHORTEST = 0.05  # seconds


@dataclass
class Measured:
    """Holds what was found out of a clip; `problem` says why it cannot be used, and is empty if it can."""

    seconds: float = 0.0
    rate: int = 0
    clipped: bool = False
    digest: bytes = b""
    print: Fingerprint | None = None
    problem: str = ""


@dataclass
class _Meter:
    """Takes up the samples of a clip as they are decoded."""

    n_samples: int = 0
    seconds: float = 0.0
    rates: Counter = field(default_factory=Counter)
    low: float = math.inf
    high: float = -math.inf
    n_full: int = 0
    sha: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    beginning: list = field(default_factory=list)

    def add(self, rate: int, samples: np.ndarray) -> None:
        """Takes up samples `[samples, channels]`."""
        self.low, self.high = min(self.low, float(samples.min())), max(self.high, float(samples.max()))
        self.n_full += int((np.abs(samples).max(axis=1) >= FULL_SCALE).sum())
        mono = samples.mean(axis=1)
        # of 16 bits, as which one format and another give the same samples
        self.sha.update(np.round(mono * 2**15).astype("<i4").tobytes())
        if self.seconds < SECONDS:
            self.beginning.append(mono)
        self.n_samples, self.seconds = self.n_samples + len(mono), self.seconds + len(mono) / rate
        self.rates[rate] += len(mono)

    def result(self) -> Measured:
        if not self.n_samples:
            return Measured(problem="begins after the end of its recording")
        rate = self.rates.most_common(1)[0][0]
        found = Measured(self.seconds, rate, self.n_full > CLIPPED_SHARE * self.n_samples)
        if self.seconds < SHORTEST:
            found.problem = f"shorter than {1000 * SHORTEST:.0f} ms"
        elif (self.high - self.low) / 2 < SILENT:
            found.problem = "silent"
        else:
            self.sha.update(str(rate).encode())
            found.digest, found.print = self.sha.digest(), fingerprint(np.concatenate(self.beginning), rate)
        return found


def measure_file(path: str, spans: Sequence[tuple[float, float]], stop: threading.Event | None = None) -> list[Measured]:
    """Decodes a file, and measures its parts from a start to an end, in seconds; infinity is the file's end."""
    meters, results = [_Meter() for _ in spans], dict[int, Measured]()
    begin = 0.0
    try:
        for rate, block in own_blocks(path):
            if stop is not None and stop.is_set():
                break
            samples, length = block.numpy(), len(block) / rate
            for number, (start, end) in enumerate(spans):
                if number in results or start >= begin + length:
                    continue
                first, last = (max(0, round(min(time - begin, length) * rate)) for time in (start, end))
                if last > first:
                    meters[number].add(rate, samples[first:last])
                if end <= begin + length:
                    # what is done needs no memory
                    results[number] = meters[number].result()
                    meters[number] = _Meter()
            begin += length
    except AudioError as error:
        said = str(error).removeprefix(f"{path}: ")
        return [Measured(problem=said)] * len(spans)
    if not begin:
        return [Measured(problem="has no samples")] * len(spans)
    return [results.get(number) or meter.result() for number, meter in enumerate(meters)]


def measure(clips: Sequence[Clip], n_workers: int | None = None) -> list[Measured]:
    """Measures clips, decoding each file once."""
    if n_workers is None:
        n_workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    by_file = dict[str, list[int]]()
    for row, clip in enumerate(clips):
        by_file.setdefault(clip.path, []).append(row)
    measured = [Measured()] * len(clips)
    stop = threading.Event()

    def one(path: str) -> None:
        rows = by_file[path]
        spans = [(clips[row].start or 0.0, math.inf if (end := clips[row].end) is None else end) for row in rows]
        for row, found in zip(rows, measure_file(path, spans, stop), strict=True):
            measured[row] = found

    with tqdm(total=len(by_file), desc="Listening", unit=" files", disable=None) as bar:
        for _ in in_threads(one, zip(by_file), n_workers, stop):
            bar.update()
    return measured
