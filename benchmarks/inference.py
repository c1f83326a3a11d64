"""How much faster a tagger is than the plain way: per-clip torchaudio features and the package's EfficientNet, clip by clip.

Both have the same weights and give the same feature map. Run on an otherwise idle machine:
`python benchmarks/inference.py --threads 2`.
"""

import argparse
import time

import torch
from efficientnet_pytorch import EfficientNet
from torchaudio.compliance.kaldi import fbank

from psla_sb.inference.tagger import AudioTagger
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling

N_CLASSES, N_FRAMES, RATE = 527, 1056, 16000


def plain_scores(network, pooling, norm, wavs, batch_size):
    """Features clip by clip on the CPU, as published code computes them in its data set, then the package's network."""
    feats = []
    for wav in wavs:
        feat = fbank(
            (wav - wav.mean())[None], htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0
        )
        feats.append(norm(torch.nn.functional.pad(feat, (0, 0, 0, N_FRAMES - len(feat)))))
    maps = [
        network.extract_features(torch.stack(feats[i : i + batch_size]).transpose(1, 2)[:, None])
        for i in range(0, len(feats), batch_size)
    ]
    return torch.cat([pooling(one) for one in maps])


def seconds(ways, repeats):
    """The fastest of some calls of each way, in turn, after one to warm up; and the answers."""
    answers, best = {name: way() for name, way in ways.items()}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            took = time.perf_counter() - begin
            best[name] = min(took, best.get(name, took))
    return best, answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--variant", default="b2", help="b0 to b7")
    parser.add_argument("--clips", type=int, default=16, help="clips of 10 s")
    parser.add_argument("--batch-size", type=int, default=16, help="clips a batch, of the tagger")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the fastest counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    network = EfficientNet.from_name(f"efficientnet-{options.variant}", in_channels=1, include_top=False)
    # statistics of the features themselves: with those of no training, numbers die out layer by layer
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    wavs = torch.randn(options.clips, 10 * RATE) / 10
    with torch.no_grad():
        network.train()(GlobalNorm()(KaldiFbank(n_frames=N_FRAMES)(wavs[:2])).transpose(1, 2)[:, None])
    network.eval()
    encoder = EfficientNetEncoder(options.variant)
    encoder.load_state_dict(network.state_dict())
    pooling = AttentionPooling(encoder.out_channels, N_CLASSES).eval()
    parts = (KaldiFbank(n_frames=N_FRAMES), GlobalNorm(), encoder, pooling)
    hparams = {"sample_rate": RATE, "mids": [], "label_encoder": None}
    tagger = AudioTagger(dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True)), hparams, run_opts={"device": "cpu"})

    size = options.batch_size
    ways = {
        "plain, 1 clip at a time": lambda: plain_scores(network, pooling, GlobalNorm(), wavs, 1),
        f"plain, batches of {size}": lambda: plain_scores(network, pooling, GlobalNorm(), wavs, size),
        f"AudioTagger, batches of {size}": lambda: torch.cat([tagger.score_batch(batch) for batch in wavs.split(size)]),
    }
    with torch.inference_mode():
        took, scores = seconds(ways, options.repeats)
    plain, plain_batches, _ = ways
    print(f"{options.variant}, {options.clips} clips of 10 s, {options.threads} threads")
    for name in ways:
        difference = (scores[name] - scores[plain]).abs().max().item()
        print(
            f"{name:30} {options.clips / took[name]:6.2f} clips/s, {took[plain] / took[name]:.2f} times one clip at a time, "
            f"{took[plain_batches] / took[name]:.2f} times plain batches; scores differ by {difference:.0e}"
        )


if __name__ == "__main__":
    main()
