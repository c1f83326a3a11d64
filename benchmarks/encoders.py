"""A table of encoders: size, work, and speed on this CPU, with peers of timm, if it is installed, in the same run.

Random weights, which cost what trained ones do. GMAC and activations (outputs of convolutions) are of one clip; speed is that of
features -> probabilities: by PyTorch as `AudioTagger` computes it, by ONNX Runtime if it is installed, and of a training step
(forward, backward, Adam). Run it on an otherwise idle machine: `python benchmarks/encoders.py --threads 2`.

With `--int8 FOLDER` also with an encoder in 8 bits by ONNX Runtime. Whether that keeps the accuracy only a trained network can
tell: each is trained on the embedded set, for minutes, once; its weights are kept in the folder. Its mAP there is given in float
and in 8 bits, and speed in 8 bits only where that is worse by .005 at most.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.inference.encoder import CPU_FRAMES
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder, fold_norms
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pooling import AttentionPooling
from psla_sb.metrics import average_precision
from psla_sb.prepare.mini_audioset import write_mini_audioset

N_CLASSES, N_FRAMES, N_MELS = 527, 1056, 128
LARGEST_LOSS = 0.005  # of mAP, in 8 bits


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


FEW_CLIPS = {"norm_momentum": 0.1, "drop_connect": 0}
IMAGENET = {**FEW_CLIPS, "pretrained": "imagenet", "stem": "sum"}
# how each is made for the figures of speed; how it is made for training, and for how many epochs
ENCODERS = {
    "b0": (lambda: EfficientNetEncoder("b0"), lambda: EfficientNetEncoder("b0", **FEW_CLIPS), 16),
    "b2": (lambda: EfficientNetEncoder("b2"), lambda: EfficientNetEncoder("b2", **FEW_CLIPS), 16),
    "lite0": (lambda: EfficientNetEncoder("lite0"), lambda: EfficientNetEncoder("lite0", **IMAGENET), 8),
    "lite1": (lambda: EfficientNetEncoder("lite1"), lambda: EfficientNetEncoder("lite1", **IMAGENET), 8),
    "lite2": (lambda: EfficientNetEncoder("lite2"), lambda: EfficientNetEncoder("lite2", **IMAGENET), 8),
    "mn04": (lambda: MobileNetV3Encoder(0.4), lambda: MobileNetV3Encoder(0.4, norm_momentum=0.1), 20),
    "mn10": (lambda: MobileNetV3Encoder(1.0), lambda: MobileNetV3Encoder(1.0, norm_momentum=0.1), 16),
    **{f"timm {name}": (lambda name=name: Timm(name),) * 2 + (16,) for name in ("efficientnet_b2", "mobilenetv4_conv_small")},
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


def write_onnx(model, feats, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"feats": {0: "batch", 1: "frames", 2: "mels"}}
        torch.onnx.export(model, (feats,), path, input_names=["feats"], dynamic_axes=axes, opset_version=17, dynamo=False)


def session_of(model, threads):
    """Model is a file, or its bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_rates(session, feats, repeats):
    """As `rate`, of one clip and of all."""
    return [rate(lambda n=n: session.run(None, {"feats": feats[:n].numpy()}), n, repeats) for n in (1, len(feats))]


def embedded_set(folder):
    """Features and targets of the embedded set's clips: those for training, and those for evaluation."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "AudioSet"))
    from audioset_prepare import prepare_audioset

    annotations = [folder / "train.csv", folder / "eval.csv"]
    write_mini_audioset(folder)
    prepare_audioset(folder, annotations[0], ["balanced_train_segments.csv"], annotations[1], ["eval_segments.csv"])
    vocabulary, front_end = Vocabulary.from_csv(folder / "class_labels_indices.csv"), KaldiFbank(n_mels=64, n_frames=198)
    for manifest in (Manifest.from_csv(annotation, data_root=folder) for annotation in annotations):
        wavs = torch.stack([read_clip(clip["wav"]) for clip in manifest])
        yield GlobalNorm()(front_end(wavs)), torch.from_numpy(manifest.targets(vocabulary)).float()


def train(model, feats, targets, n_epochs, batch_size=16, lr=1e-3):
    """Trains plainly: what is wanted is a network that knows the classes, not the best one."""
    optimizer, n_clips = torch.optim.Adam(model.parameters(), lr), len(feats) // batch_size * batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_epochs * n_clips // batch_size)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(feats), generator=generator)[:n_clips].split(batch_size):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy(model(feats[rows]).clamp(1e-7, 1 - 1e-7), targets[rows]).backward()
            optimizer.step()
            schedule.step()


def int8_cells(name, channels, folder, data, repeats, threads):
    """mAP in float and in 8 bits, and clips a second in 8 bits, of one clip and of 16, if mAP holds."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (feats, targets), (others, wanted) = data
    weights = folder / f"{name}.pt"
    torch.manual_seed(1)
    model = nn.Sequential(ENCODERS[name][1](), AttentionPooling(channels, targets.shape[1]))
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, feats, targets, ENCODERS[name][2])
        torch.save(model.state_dict(), weights)

    class Clips(CalibrationDataReader):
        batches = iter(feats[torch.randperm(len(feats), generator=torch.Generator().manual_seed(0))[:100]].split(10))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"feats": batch.numpy()}

    def score(session):
        scores = np.concatenate([session.run(None, {"feats": batch.numpy()})[0] for batch in others.split(20)])
        return np.nanmean(average_precision(scores, wanted.numpy()))

    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        paths = [f"{temporary}/{step}.onnx" for step in ("float", "prepared", "int8")]
        write_onnx(model.eval(), feats[:2], paths[0])
        quant_pre_process(*paths[:2], skip_symbolic_shape=True)
        head = [node.name for node in onnx.load(paths[1]).graph.node if node.name.startswith("/1/")]
        options = {"per_channel": True, "nodes_to_exclude": head, "extra_options": {"CalibMovingAverage": True}}
        quantize_static(*paths[1:], Clips(), **options)
        sessions = [session_of(path, threads) for path in (paths[0], paths[2])]
        both = [score(session) for session in sessions]
        if both[1] < both[0] - LARGEST_LOSS:
            return [*both, None, None]
        return both + onnx_rates(sessions[1], torch.randn(16, N_FRAMES, N_MELS), repeats)


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
    cells += [None, None]
    with contextlib.suppress(ImportError):
        file = io.BytesIO()
        write_onnx(model, feats, file)
        cells[-2:] = onnx_rates(session_of(file.getvalue(), threads), feats, repeats)
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
    parser.add_argument(
        "--int8", type=Path, metavar="FOLDER", help="8 bits as well, with what is trained for it kept in the folder"
    )
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
    if options.int8:
        heads += ["mAP", "mAP in 8 bits", "8 bits, 1", "8 bits, 16"]
        data = list(embedded_set(options.int8 / "data"))
    print(" | ".join(heads), flush=True)
    for name in options.names or ENCODERS:
        torch.manual_seed(0)
        try:
            cells, channels = figures(ENCODERS[name][0](), options.repeats, options.threads)
            more = int8_cells(name, channels, options.int8, data, options.repeats, options.threads) if options.int8 else []
        except ImportError as error:
            print(f"{name} | {error}")
            continue
        texts = [*("" if cell is None else f"{cell:.2f}" for cell in cells), str(channels)]
        texts += ["" if cell is None else f"{cell:.3f}" if cell < 1 else f"{cell:.2f}" for cell in more]
        print(" | ".join([name, *texts]), flush=True)


if __name__ == "__main__":
    main()
