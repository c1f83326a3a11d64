"""CPU time, delay and peak memory of `AudioTagger.stream` with its events, on one core and hours of generated sound.

The model is a tagger's folder, or "mini" or "b2", an untrained network of the size of `hparams/mini.yaml` (half of B0, clips of
2 s, 39 classes) or `hparams/psla.yaml` (B2, clips of 10 s, 527 classes): `OMP_NUM_THREADS=1 python benchmarks/stream.py mini`.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch

from psla_sb.checkpoints.tagger_folder import label_encoder
from psla_sb.inference.tagger import AudioTagger
from psla_sb.inference.timeline import Begun, EventDetector
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling

SIZES = {"mini": ("b0", 0.5, 0.5, 64, 198, 39), "b2": ("b2", None, None, 128, 1056, 527)}


def untrained(variant, width, depth, n_mels, n_frames, n_classes):
    """A tagger of such a size."""
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(variant, width=width, depth=depth)
    parts = (KaldiFbank(n_mels=n_mels, n_frames=n_frames), GlobalNorm(), encoder, AttentionPooling(encoder.out_channels, n_classes))
    vocabulary = Vocabulary([f"/m/{c}" for c in range(n_classes)], [f"class {c}" for c in range(n_classes)])
    hparams = {"sample_rate": 16000, "mids": vocabulary.mids, "label_encoder": label_encoder(vocabulary)}
    modules = {name: part.eval() for name, part in zip(AudioTagger.MODULES_NEEDED, parts, strict=True)}
    return AudioTagger(modules, hparams, run_opts={"device": "cpu"})


def blocks(rate, seconds, n_samples, rng):
    """Noise, with tones of a second now and then: int16, block by block."""
    for start in range(0, int(rate * seconds), n_samples):
        wave = rng.normal(0, 300, n_samples)
        if start // rate % 5 == 0:
            t = np.arange(start, start + n_samples) / rate
            wave += 8000 * np.sin(2 * np.pi * (300 + 100 * (t[0] // 5 % 20)) * t)
        yield wave.astype(np.int16)


def memory():
    """What this process has in memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="a tagger's folder, mini or b2")
    parser.add_argument("--hours", type=float, default=1.0, help="of sound")
    parser.add_argument("--rate", type=int, default=16000, help="its sample rate in Hz")
    parser.add_argument("--block", type=float, default=0.1, help="seconds of a block")
    parser.add_argument("--window", type=float, default=10.0, help="seconds heard together")
    parser.add_argument("--hop", type=float, default=1.0, help="seconds from a window to the next")
    parser.add_argument("--threshold", type=float, default=0.3, help="of events")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tagger = untrained(*SIZES[options.model]) if options.model in SIZES else AudioTagger.from_folder(options.model, device="cpu")
    stream, detector = tagger.stream(options.rate, options.window, options.hop), EventDetector(tagger.labels, options.threshold)
    half = tagger.step_times(2).diff().item() / 2
    n_steps = n_begun = n_events = n_heard = 0
    delay = slowest = total = heard = 0.0
    sizes = []
    n_samples = max(1, round(options.block * options.rate))
    for block in blocks(options.rate, 3600 * options.hours, n_samples, np.random.default_rng(0)):
        begin = time.process_time()
        steps = stream.push(block)
        found = detector.push(*steps)
        took = time.process_time() - begin
        total, slowest, n_heard = total + took, max(slowest, took), n_heard + len(block)
        heard = n_heard / options.rate
        if len(steps.times):
            delay = max(delay, heard - steps.times[0] + half)
        n_steps += len(steps.times)
        begun = sum(isinstance(one, Begun) for one in found)
        n_begun, n_events = n_begun + begun, n_events + len(found) - begun
        # after each sixth of the sound
        if heard >= (len(sizes) + 1) * 600 * options.hours:
            sizes.append(memory())
    n_steps += len(stream.finish().times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.model}: {heard:.0f} s of sound at {options.rate} Hz in blocks of {n_samples} samples, {n_steps} steps")
    print(f"CPU {total:.1f} s, {total / heard:.4f} of real time; the slowest block {slowest:.3f} s")
    print(f"delay {delay:.2f} s at most ({stream.delay:.2f} s and a block are promised)")
    print(f"memory after each sixth {', '.join(f'{size:.0f}' for size in sizes)} MB, peak {peak:.0f} MB")
    print(f"{n_begun} beginnings, {n_events} events")


if __name__ == "__main__":
    main()
