"""Seeded networks in the layout of EfficientAT's published files, and waveforms, of which its code's figures are known."""

import hashlib
import json

import numpy as np
import torch

from psla_sb.lobes.mobilenet import MobileNetV3Encoder, rounded
from psla_sb.lobes.pooling import ConvPooling, MLPPooling

LAYERS = {"hidden": "2", "output": "5", "conv": "0", "norm": "1"}


def layout(width, n_classes=527, is_conv=False):
    """Shapes by the published names."""
    with torch.device("meta"):
        encoder = MobileNetV3Encoder(width)
        channels = encoder.out_channels
        head = ConvPooling(channels, n_classes) if is_conv else MLPPooling(channels, n_classes, rounded(1280 * width))
    shapes = {key: list(value.shape) for key, value in encoder.state_dict().items()}
    for key, value in head.state_dict().items():
        layer, _, rest = key.partition(".")
        shapes[f"classifier.{LAYERS[layer]}.{rest}"] = list(value.shape)
    return shapes


def digest(shapes):
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def seeded(shapes, name):
    """Weights of these shapes that depend on the network's name alone."""
    generator = torch.Generator().manual_seed(sum(name.encode()))

    def drawn(key, shape):
        kind = key.rpartition(".")[2]
        if kind == "num_batches_tracked":
            return torch.tensor(7)
        if kind == "running_var":
            return 0.8 + 0.3 * torch.rand(shape, generator=generator)
        if kind == "weight" and len(shape) == 1:
            return 0.8 + 0.4 * torch.rand(shape, generator=generator)
        normal = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * normal
        return normal * (1.0 if key.startswith("features") else 0.02) * (2 / np.prod(shape[1:])) ** 0.5

    return {key: drawn(key, shapes[key]) for key in sorted(shapes)}


def waveform(i):
    """A chirp in noise at 32 kHz, `[samples]`: of 10 s, or of 2.7 s and louder."""
    seconds, amplitude = ((10.0, 0.2), (2.7, 0.5))[i]
    t = np.arange(int(seconds * 32000)) / 32000
    noise = np.random.default_rng(300 + i).standard_normal(len(t))
    chirp = np.sin(2 * np.pi * (300 + 500 * i) * t * (1 + 0.2 * t / seconds))
    return torch.from_numpy(np.clip(amplitude * (0.15 * noise + chirp), -1, 1).astype("float32"))


# Of the published code (commit a425fdc) in float32: the digests of its networks' names and shapes; of each waveform the normalised
# features [mels, frames] (every 25th band, every 148th frame), and of seeded mn04 logits (every 31st) and embeddings (every 24th).
DIGESTS = {
    "mn04": "256f8bf2280d9fde67ba2e02f9bf7ae86530f382d3ed2b79133542230ba635c5",
    "mn05": "66bb316d4467a065b7ae859b14c28d8a9bcadf880694138b5028863dd0c0dcd7",
    "mn10": "1dd8daf3d5f0db66ac0836cfd925a3a8a56d347513ba5215fbd1f6708afaf51c",
    "mn10_fc": "30fc0183b04587371377d268fb12c59e834975030836483704d80195bd8c88b6",
}
# fmt: off
FEATURES = [
    [
        [-0.02478666, -1.028312, -1.162067, -1.239828, -1.396795, -1.254103, -0.8411638],
        [-0.2281458, -0.1652128, -0.5644203, -0.1101129, -0.2931567, -0.2328549, -0.3151103],
        [-0.4420106, 0.2407577, 0.2688465, 0.2030916, -0.1375149, 0.2006662, 0.3155666],
        [0.5360757, 0.5648518, 0.6835395, 0.7838621, 0.9730687, 0.7130367, 0.7981779],
        [1.065034, 1.066356, 0.9750444, 1.059947, 1.105789, 1.291013, 1.161197],
        [1.481904, 1.483628, 1.27642, 1.294381, 1.435038, 1.33901, 1.362109],
    ],
    [
        [-0.2980694, -0.8848804], [0.4416403, 0.07754622], [0.7694513, 0.7378253],
        [1.071349, 1.223653], [1.523575, 1.443669], [1.596636, 1.737487],
    ],
]
N_FRAMES = [1000, 270]
LOGITS = [
    [
        0.02060951, 0.1092582, -0.1144218, -0.1206123, 0.05273956, 0.02420133, 0.1132776, 0.04615939, -0.08419992,
        0.06934115, 0.03825748, 0.1191959, -0.1394334, 0.00331619, -0.088004, 0.1904993, -0.2169632,
    ],
    [
        -0.001641718, 0.1086529, -0.1168865, -0.1211836, 0.04024907, 0.01684446, 0.1085149, 0.04426749, -0.08320853,
        0.0392032, 0.04279355, 0.09683987, -0.1310748, -0.02885798, -0.09024001, 0.1974286, -0.1986373,
    ],
]
EMBEDDINGS = [
    [
        170.505, 8.207612, 27.43596, 124.7197, 174.8635, 136.5252, 48.57777, 95.17891, 47.39045, 152.8532, 107.0931,
        47.44707, 105.6012, 3.933692, 16.88454, 4.102458,
    ],
    [
        146.2823, 55.19712, 25.00548, 126.5861, 117.157, 137.0095, 25.03324, 87.33759, 42.17177, 138.2639, 145.3452,
        105.0979, 64.17788, 3.325785, 24.19925, 9.679991,
    ],
]
# fmt: on
