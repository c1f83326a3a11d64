"""A tagger without training, whose scores are known: each class is a band of frequencies, and scores high where it is loud."""

import torch
from torch import nn

from psla_sb.checkpoints.tagger_folder import label_encoder
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import GlobalNorm, KaldiFbank


class Steps(nn.Module):
    """`[batch, frames, mels]` -> `[batch, mels, 1, steps]`, means of 32 frames."""

    frames_per_step = 32

    def forward(self, feats, lens=None):
        # padding is 0.0 and does not count
        pooled, counted = (nn.functional.avg_pool1d(x.transpose(1, 2), 32, ceil_mode=True) for x in (feats, (feats != 0).float()))
        return (pooled / counted.clamp(min=1e-3))[:, :, None]


class Bands(nn.Module):
    """Two classes: the lower and the upper half of the mel bands."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def segment_scores(self, feature_map):
        halves = torch.stack([half.mean((1, 2)) for half in feature_map.chunk(2, dim=1)], dim=1)
        return torch.sigmoid((halves + 4) * self.scale)

    def forward(self, feature_map):
        return self.segment_scores(feature_map).mean(2)


def band_tagger(n_frames=998):
    parts = (KaldiFbank(n_mels=16, n_frames=n_frames), GlobalNorm(0.0, 1.0), Steps(), Bands())
    vocabulary = Vocabulary(["/m/low", "/m/high"], ["Low", "High"])
    hparams = {"sample_rate": 16000, "mids": vocabulary.mids, "label_encoder": label_encoder(vocabulary)}
    return AudioTagger(dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True)), hparams, run_opts={"device": "cpu"})
