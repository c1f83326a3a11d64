"""Parts of somebody else's, in a file beside the YAML file: what a person brings who knows SpeechBrain, not this toolkit."""

import torch
from speechbrain.lobes.models.ECAPA_TDNN import TDNNBlock
from torch import nn


class TinyEncoder(nn.Module):
    """Convolutions without batch normalisation, two of which share their weights; says neither its channels nor its steps."""

    def __init__(self, channels=16, pretrained=None):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=4, padding=1)
        self.one, self.two = (nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2))
        self.two.weight = self.one.weight

    def forward(self, feats, lens=None):
        x = self.stem(feats.transpose(1, 2)[:, None])
        return self.two(self.one(x.relu()).relu()).relu()


class EcapaEncoder(nn.Module):
    """SpeechBrain's block behind an adapter, and attention over the frames of a clip's true length: `[batch, channels, steps]`."""

    def __init__(self, n_mels, channels=24, activation=nn.ReLU):
        super().__init__()
        self.block = TDNNBlock(n_mels, channels, kernel_size=5, dilation=1, activation=activation)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x, lengths=None):
        x = self.block(x.transpose(1, 2))[:, :, ::4].transpose(1, 2)
        steps = torch.arange(x.shape[1], device=x.device)
        mask = None if lengths is None else steps >= (lengths[:, None] * x.shape[1]).clamp(min=1)
        return (x + self.attention(x, x, x, key_padding_mask=mask)[0]).transpose(1, 2)


class LazyEncoder(nn.Module):
    """Learns from the first clip how many mel bands there are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv1d(8, 5, stride=3)

    def forward(self, feats):
        return self.conv(feats.transpose(1, 2)).relu()


class LearntFrontEnd(nn.Module):
    """A front end with weights of its own."""

    def __init__(self, n_mels):
        super().__init__()
        self.conv = nn.Conv1d(1, n_mels, 400, stride=200)

    def forward(self, wavs):
        return (self.conv(wavs[:, None]).square() + 1e-4).log().transpose(1, 2)


class LearntNorm(nn.BatchNorm1d):
    """A normalisation with statistics of its own."""

    def forward(self, feats, lens=None):
        return super().forward(feats.transpose(1, 2)).transpose(1, 2)


class MaxPooling(nn.Module):
    """Takes lengths, and gives no scores by step."""

    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.out = nn.Linear(in_channels, n_classes)

    def forward(self, x, lens=None):
        return torch.sigmoid(self.out((x.mean(2) if x.dim() == 4 else x).amax(2)))


class Logits(MaxPooling):
    """Forgets the sigmoid."""

    def forward(self, x, lens=None):
        return torch.logit(super().forward(x))


class Fails(nn.Module):
    """Cannot be made."""

    def __init__(self):
        super().__init__()
        raise RuntimeError("not today")


class Louder(nn.Module):
    """An augmentation of waveforms."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, wavs):
        return self.gain * wavs


def squared_error(probabilities, targets):
    """Another loss."""
    return (probabilities - targets).square().mean()
