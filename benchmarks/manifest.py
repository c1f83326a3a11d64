"""What an annotation of AudioSet's size costs: to open, to hold, and in each worker process of a loader; and SpeechBrain's way.

python benchmarks/manifest.py
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.utils.data import DataLoader

from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.labels.vocabulary import Vocabulary

MEGABYTE = 1e6


def write_annotation(path, n_clips, wav, n_classes=527):
    """AudioSet's 11 characters, 2.5 labels a clip on average, and paths of a usual length, which all lead to one short clip."""
    rng = np.random.default_rng(0)
    ids = pa.array(np.char.zfill(np.arange(n_clips).astype(str), 11))
    mids = pa.array([f"/m/0{i:05d}" for i in range(n_classes)])
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, n_clips))])
    of_clips = pa.LargeListArray.from_arrays(pa.array(offsets), mids.take(pa.array(rng.integers(0, n_classes, offsets[-1]))))
    wavs = pa.array([f"{{data_root}}/{'./' * 12}{wav.name}"] * n_clips)
    Manifest.from_columns(ids, wavs, np.full(n_clips, 10.0), pc.binary_join(of_clips, ";")).to_csv(path)
    return Vocabulary(mids.to_pylist(), [f"class {i}" for i in range(n_classes)])


def private_megabytes(pid):
    """The process's pages that it shares with no other; on Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MEGABYTE


def status_megabytes(field):
    """Memory of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MEGABYTE


def opened(connection, path, function):
    """Seconds to open, and how much more memory the process then holds, and held at most."""
    resident = status_megabytes("VmRSS")
    before, start = private_megabytes("self"), time.perf_counter()
    kept = function(path)
    took = time.perf_counter() - start
    connection.send((took, private_megabytes("self") - before, status_megabytes("VmHWM") - resident, len(kept)))


def in_new_process(path, function):
    """In a process of its own: what an earlier measurement has freed would be used again."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=opened, args=(sender, path, function))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def speechbrain_dataset(path):
    return DynamicItemDataset.from_csv(path, replacements={"data_root": "."})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--rows", type=int, default=100_000, help="rows that a worker runs through")
    parser.add_argument(
        "--speechbrain-clips", type=int, default=200_000, help="for SpeechBrain's own reader, which has a dict a row"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        wav = folder / "clip.wav"
        soundfile.write(wav, np.zeros(160), 16000)
        vocabulary = write_annotation(folder / "all.csv", options.clips, wav)
        print(f"{options.clips:,} rows, {(folder / 'all.csv').stat().st_size / MEGABYTE:.0f} MB of CSV")
        took, held, peak, _ = in_new_process(folder / "all.csv", Manifest.from_csv)
        print(f"Manifest.from_csv: {took:.2f} s, {held:.0f} MB more held, {peak:.0f} MB more at most (bounds: 4 s, 500 MB)")
        write_annotation(folder / "some.csv", options.speechbrain_clips, wav)
        other, other_held, *_, n = in_new_process(folder / "some.csv", speechbrain_dataset)
        scale = options.clips / n
        print(
            f"SpeechBrain's from_csv on {n:,} rows: {other:.2f} s, {other_held:.0f} MB; times {scale:.0f}: "
            f"{other * scale / took:.1f} times as long, {other_held * scale / held:.1f} times the memory"
        )

        manifest = Manifest.from_csv(folder / "all.csv", folder)
        start = time.perf_counter()
        labels = manifest.label_sets(vocabulary)
        print(f"labels as classes: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        weights = class_balanced_weights(labels, len(vocabulary))
        print(f"class weights: {time.perf_counter() - start:.2f} s (bound: 1 s)")
        sampler = BalancedSampler(weights)
        start = time.perf_counter()
        drawn = sum(1 for _ in sampler)
        print(f"an epoch of {drawn:,} balanced draws: {time.perf_counter() - start:.2f} s (bound: 1.5 s)")

        batches = MixupBatchSampler(sampler, len(manifest), 100)
        dataset = TaggingDataset(manifest, labels, len(vocabulary), n_samples=160, redraw=batches.redraw, compact=True)
        loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=ClipBatch, num_workers=1, worker_init_fn=init_worker))
        next(loader)
        worker = loader._workers[0].pid
        before, start, rows, most = private_megabytes(worker), time.perf_counter(), 0, 0.0
        while rows < options.rows:
            rows += len(next(loader).id)
            most = max(most, private_megabytes(worker) if rows % 3000 == 0 else 0.0)
        print(
            f"a worker after its first batch: {before:.0f} MB of its own; in {rows:,} rows at most {most - before:.0f} MB more "
            f"(bound: 60 MB), {rows / (time.perf_counter() - start):.0f} rows/s of clips of 10 ms"
        )


if __name__ == "__main__":
    main()
