"""What resampling does to real clips: 16 kHz -> 44.1 kHz -> 16 kHz, by our settings and torchaudio's, against the clip itself.

python benchmarks/resampling.py FOLDER --model results/mini/1/tagger
"""

import argparse
import sys

import numpy as np
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.containers import sounds_in
from psla_sb.dataio.resampling import RESAMPLING
from psla_sb.inference import AudioTagger

RATE, OTHER = 16000, 44100


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with sounds of 16 kHz")
    parser.add_argument("--model", required=True, help="a tagger that takes 16 kHz")
    parser.add_argument("--clips", type=int, default=200, help="at most (default: %(default)s)")
    options = parser.parse_args()
    paths = sounds_in(options.folder)
    if not paths:
        sys.exit(f"error: {options.folder}: no sounds there")
    paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(options.clips, len(paths))).round().astype(int)]
    tagger = AudioTagger.from_any(options.model, device="cpu")
    ways = {"ours": RESAMPLING, "torchaudio's default": {}}
    features, scores = ({name: [] for name in ways} for _ in range(2))
    for path in tqdm(paths, unit=" clips", disable=None):
        wave = read_audio(path, RATE)[: tagger.window]
        higher = resample(wave, RATE, OTHER, **RESAMPLING)
        expected, score = tagger.features(wave)[0], tagger.score_batch(wave)[0]
        for name, settings in ways.items():
            back = resample(higher, OTHER, RATE, **settings)[: len(wave)]
            features[name].append((tagger.features(back)[0] - expected).mean(0))
            scores[name].append((tagger.score_batch(back)[0] - score).abs())
    std = getattr(tagger.mods.mean_var_norm, "std", 1.0)
    print(f"{len(paths)} clips at {OTHER / 1000} kHz against themselves at {RATE / 1000:.0f} kHz")
    for name in ways:
        bands, changes = std * torch.stack(features[name]).mean(0), torch.stack(scores[name])
        tenth = bands[-len(bands) // 10 :].mean()
        print(
            f"{name:22} log-mel: highest band {bands[-1]:+.2f}, highest tenth of the bands {tenth:+.2f}, all {bands.mean():+.3f};"
        )
        largest = f"{changes.amax(1).mean():.3f} a clip's largest, {changes.max():.2f} the largest"
        print(f"{'':22} scores: {changes.mean():.4f} on average, {largest}")


if __name__ == "__main__":
    main()
