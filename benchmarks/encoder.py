"""How much faster EfficientNetEncoder is than the package's network that it is made from.

Both have the same weights and give the same feature map. Measured: a forward pass in evaluation mode, and a training step
(forward, backward, Adam). Run on an otherwise idle machine: `python benchmarks/encoder.py`.
"""

import argparse
import time

import torch
from efficientnet_pytorch import EfficientNet

from psla_sb.lobes.efficientnet import EfficientNetEncoder


def seconds_per_clip(function, n_clips, repeats, device):
    """The fastest of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:]) / n_clips


def measure(network, inputs, extract, repeats):
    """Seconds a clip: (forward, training step)."""

    @torch.inference_mode()
    def forward():
        extract(inputs)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def training_step():
        optimizer.zero_grad()
        extract(inputs).square().mean().backward()
        optimizer.step()

    network.eval()
    forward_seconds = seconds_per_clip(forward, len(inputs), repeats, inputs.device)
    network.train()
    return forward_seconds, seconds_per_clip(training_step, len(inputs), repeats, inputs.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--variant", default="b2", help="b0 to b7")
    parser.add_argument("--batch-size", type=int, default=4, help="clips a batch")
    parser.add_argument("--frames", type=int, default=1056, help="frames a clip; 1056 are PSLA's for 10 s")
    parser.add_argument("--repeats", type=int, default=3, help="calls of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, ...")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    package = EfficientNet.from_name(f"efficientnet-{options.variant}", in_channels=1, include_top=False)
    ours = EfficientNetEncoder(options.variant)
    ours.load_state_dict(package.state_dict())
    package, ours = package.to(options.device), ours.to(options.device)
    feats = torch.randn(options.batch_size, options.frames, 128, device=options.device)

    before = measure(package, feats.transpose(1, 2)[:, None].contiguous(), package.extract_features, options.repeats)
    after = measure(ours, feats, ours, options.repeats)
    print(f"{options.variant}, {options.batch_size} x {options.frames} frames, {options.device}, {options.threads} threads")
    for name, old, new in zip(("forward", "training step"), before, after, strict=True):
        print(f"{name:13}  package {old:.4f} s a clip, ours {new:.4f} s a clip, {old / new:.1f} times faster")


if __name__ == "__main__":
    main()
