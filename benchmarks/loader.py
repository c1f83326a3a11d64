"""Clips that one worker process gets ready for training, from files and from packs, and in the way of the published code.

Both ways decode files of 10 s at 16 kHz (wav44: at 44.1 kHz; m4a: AAC at 44.1 kHz) and mix half of the clips with another one. The
published code's data set also computes and masks each clip's features, with torchaudio; here this happens on the device, a batch at
a time. Run on an otherwise idle machine:

    OMP_NUM_THREADS=1 python benchmarks/loader.py
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from speechbrain.dataio import audio_io
from torch.utils.data import DataLoader, Dataset
from torchaudio.compliance.kaldi import fbank
from torchaudio.functional import resample
from torchaudio.transforms import FrequencyMasking, TimeMasking

from psla_sb.dataio.batches import ClipBatch
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler
from psla_sb.labels.label_sets import LabelSets
from psla_sb.lobes.features import n_samples_for
from psla_sb.prepare.copies import FORMATS
from psla_sb.prepare.mini_sounds import SOUNDS, synthesise
from psla_sb.prepare.packing import pack

RATE, SECONDS, N_FRAMES, N_CLASSES, MIXUP_RATE = 16000, 10, 1056, 527, 0.5
KINDS = {"wav": ("wav", RATE), "flac": ("flac", RATE), "wav44": ("wav", 44100), "m4a": ("m4a", 44100)}
ONE_WORKER = {"num_workers": 1, "persistent_workers": True}


class PerClipFeatures(Dataset):
    """Decoding, mixup, features and masks clip by clip, as published code does it in its data set."""

    def __init__(self, paths):
        self.paths = paths
        self.freq_mask, self.time_mask = FrequencyMasking(48), TimeMasking(192)

    def __len__(self):
        return len(self.paths)

    def decode(self, row):
        if self.paths[row].endswith(".m4a"):
            with av.open(self.paths[row]) as file:
                frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
                wave, rate = torch.from_numpy(np.concatenate(frames, axis=1)), file.streams.audio[0].rate
        else:
            wave, rate = audio_io.load(self.paths[row])
        wave = resample(wave, rate, RATE)
        return wave - wave.mean(), RATE

    def __getitem__(self, row):
        wave, rate = self.decode(row)
        rng = np.random.default_rng(row)
        if rng.random() < MIXUP_RATE:
            other, _ = self.decode(rng.integers(len(self)))
            share = rng.beta(10, 10)
            wave = share * wave + (1 - share) * other[:, : wave.shape[1]]
            wave = wave - wave.mean()
        feats = fbank(
            wave,
            htk_compat=True,
            sample_frequency=rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        feats = torch.nn.functional.pad(feats, (0, 0, 0, max(0, N_FRAMES - len(feats))))[:N_FRAMES]
        feats = self.time_mask(self.freq_mask(feats.T[None]))[0].T
        return (feats + 4.6476) / (4.5699 * 2), torch.zeros(N_CLASSES)


def write_aac(path, wave, rate):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate, resampler = rate, av.AudioResampler("fltp", "mono", rate, frame_size=1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


def write_clips(folder, n_clips, ending, rate):
    """Events of several kinds in noise, which compress about as recordings do, in files like the recipes' copies; returns the
    annotation's path."""
    rng, names = np.random.default_rng(0), list(SOUNDS)
    for row in range(n_clips):
        wave = rng.normal(0, 0.01, SECONDS * rate) + 0.4 * synthesise(names[row % len(names)], rng, SECONDS * rate, rate)
        path, wave = folder / f"{row}.{ending}", wave.clip(-1, 1)
        if ending == "m4a":
            write_aac(path, wave, rate)
        else:
            soundfile.write(path, wave, rate, subtype="PCM_16", **FORMATS[f".{ending}"])
    rows = range(n_clips)
    paths = [str(folder / f"{row}.{ending}") for row in rows]
    Manifest.from_columns([str(row) for row in rows], paths, [SECONDS] * n_clips, [""] * n_clips).to_csv(folder / "all.csv")
    return folder / "all.csv"


def our_loader(manifest, batch_size):
    labels = LabelSets.from_lists([[row % N_CLASSES] for row in range(len(manifest))])
    batches = MixupBatchSampler(BalancedSampler(np.ones(len(manifest))), len(manifest), batch_size, MIXUP_RATE)
    dataset = TaggingDataset(manifest, labels, N_CLASSES, RATE, n_samples_for(N_FRAMES, RATE), compact=True)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=ClipBatch, worker_init_fn=init_worker, **ONE_WORKER)


def cpu_seconds(pid):
    """Processor time that a process has taken, on Linux."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def clips_per_core_second(loader, seconds):
    """Clips, partners not counted, over the processor time of the worker, from its first batch on."""
    done, start, begun = 0, None, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        batches = iter(loader)
        worker = batches._workers[0].pid
        for batch in batches:
            if start is None:
                # it is started, and has filled its queue
                start = cpu_seconds(worker)
                continue
            done += len(batch[0]) if isinstance(batch, list) else len(batch.id) - sum(batch.partner)
    return done / (cpu_seconds(worker) - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=600, help="files (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="that each way is measured, at least (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts, for each way (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), *KINDS[kind], options)


def compare(folder, ending, rate, options):
    annotation = write_clips(folder, options.clips, ending, rate)
    files = Manifest.from_csv(annotation)
    packed = Manifest.from_csv(pack(annotation, folder / "packs"), folder / "packs")
    size = sum(path.stat().st_size for path in folder.glob(f"*.{ending}")) / options.clips
    print(f"{options.clips} clips of {SECONDS} s at {rate} Hz, {ending} of {size / 1000:.0f} kB each, one worker with one thread")
    ways = {
        "published way": DataLoader(PerClipFeatures(files.paths().to_pylist()), options.batch_size, **ONE_WORKER),
        "from files": our_loader(files, options.batch_size),
        "from packs": our_loader(packed, options.batch_size),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(options.repeats):
        for name, loader in ways.items():
            best[name] = max(best[name], clips_per_core_second(loader, options.seconds))
    for name, rate in best.items():
        print(f"{name:15} {rate:7.1f} clips/s of one core, {rate / best['published way']:.2f} times the published way")


if __name__ == "__main__":
    main()
