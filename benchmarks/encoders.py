"""A table of encoders: size, work, and speed on this CPU, with peers of timm, if it is installed, in the same run.

Random weights, which cost what trained ones do. GMAC and activations (outputs of convolutions) are of one clip; speed is that of
features -> probabilities: by PyTorch as `AudioTagger` computes it, by ONNX Runtime if it is installed, and of a training step
(forward, backward, Adam). Run it on an otherwise idle machine: `python benchmarks/encoders.py --threads 2`.
"""

import argparse
import contextlib
import io
import time
import warnings

import torch
from torch import nn

from psla_sb.inference.encoder import CPU_FRAMES
from psla_sb.lobes.efficientnet import EfficientNetEncoder, fold_norms
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pooling import AttentionPooling

N_CLASSES, N_FRAMES, N_MELS = 527, 1056, 128


class Timm(nn.Module):
    """timm's network: features `[batch, frames, mels]` to a feature map, in channels-last memory."""

    def __init__(self, name):
        super().__init__()
        import timm

        self.network = timm.create_model(name, in_chans=1, num_classes=0, global_pool="")
        self.out_channels = self.network.num_features
        self.to(memory_format=torch.channels_last)

    def forward(self, feats):
        return self.network(feats.transpose(1, 2)[:, None].contiguous(memory_format=torch.channels_last))


ENCODERS = {
    "b0": lambda: EfficientNetEncoder("b0"),
    "b2": lambda: EfficientNetEncoder("b2"),
    "lite0": lambda: EfficientNetEncoder("lite0"),
    "lite1": lambda: EfficientNetEncoder("lite1"),
    "lite2": lambda: EfficientNetEncoder("lite2"),
    "mn04": lambda: MobileNetV3Encoder(0.4),
    "mn10": lambda: MobileNetV3Encoder(1.0),
    "timm efficientnet_b2": lambda: Timm("efficientnet_b2"),
    "timm mobilenetv4_conv_small": lambda: Timm("mobilenetv4_conv_small"),
}


def work(encoder, feats):
    """Multiplications of the convolutions, and the numbers that come out of them, of one clip."""
    macs, activations = [], []

    def count(conv, _, output):
        macs.append(output[0].numel() * conv.weight[0].numel())
        activations.append(output[0].numel())

    hooks = [part.register_forward_hook(count) for part in encoder.modules() if isinstance(part, nn.Conv2d)]
    feature_map = encoder(feats[:1])
    for hook in hooks:
        hook.remove()
    return sum(macs), sum(activations), feature_map.shape[1]


def rate(function, n_clips, repeats):
    """Clips a second, of the fastest of some calls after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return n_clips / min(times)


def onnx_rate(model, feats, repeats, threads):
    """As `rate`, by ONNX Runtime; None without it."""
    with contextlib.suppress(ImportError):
        import onnxruntime

        file, options = io.BytesIO(), onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (feats,), file, input_names=["feats"], dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        return rate(lambda: session.run(None, {"feats": feats.numpy()}), len(feats), repeats)
    return None


def figures(encoder, repeats, threads):
    """The cells of a row, and the encoder's channels."""
    feats = torch.randn(16, N_FRAMES, N_MELS)
    with torch.no_grad():
        macs, activations, channels = work(encoder.eval(), feats)
        model = nn.Sequential(encoder, AttentionPooling(channels, N_CLASSES)).eval()
        fast = fold_norms(model)
        cells = [sum(p.numel() for p in encoder.parameters()) / 1e6, macs / 1e9, activations / 1e6]
        cells += [
            rate(lambda: fast(feats[:1]), 1, 3 * repeats),
            rate(lambda: [fast(part) for part in feats.split(CPU_FRAMES // N_FRAMES)], 16, repeats),
        ]
    cells += [onnx_rate(model, feats[:n], repeats, threads) for n in (1, 16)]
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        model(feats[:4]).square().mean().backward()
        optimizer.step()

    return [*cells, rate(step, 4, repeats)], channels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENCODERS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of which the fastest counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ENCODERS):
        parser.error(f"no such encoder: {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    heads = [
        "",
        "M parameters",
        "GMAC",
        "M activations",
        "clips/s, 1",
        "clips/s, 16",
        "ONNX, 1",
        "ONNX, 16",
        "training clips/s",
        "channels",
    ]
    print(" | ".join(heads), flush=True)
    for name in options.names or ENCODERS:
        torch.manual_seed(0)
        try:
            cells, channels = figures(ENCODERS[name](), options.repeats, options.threads)
        except ImportError as error:
            print(f"{name} | {error}")
            continue
        print(" | ".join([name, *("" if cell is None else f"{cell:.2f}" for cell in cells), str(channels)]), flush=True)


if __name__ == "__main__":
    main()
