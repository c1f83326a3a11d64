"""What the Brain does to a batch: the published loss, and the order of augmentation and normalisation."""

import math

import pytest
import torch
from speechbrain import Stage
from torch import nn
from torch.nn import functional as F

from psla_sb.experiment.brain import TaggingBrain
from psla_sb.lobes.augment import SpecAugment, WaveformMixup
from psla_sb.lobes.features import GlobalNorm, KaldiFbank


class Recorder(nn.Module):
    """Stands for the model, and keeps what it is given."""

    def forward(self, feats):
        self.seen = feats
        return feats


class Batch:
    """What the Brain reads from a batch of one second of noise and half a second."""

    def __init__(self, n_clips=2):
        wavs = torch.randn(n_clips, 16000, generator=torch.Generator().manual_seed(0)) + 0.1
        self.sig = (wavs, torch.tensor([1.0, 0.5] * (n_clips // 2)))
        self.target = nn.Module()
        self.target.data = torch.eye(n_clips)
        self.partner = [0] * (n_clips // 2) + [1] * (n_clips // 2)

    def to(self, device):
        return self


@pytest.fixture
def brain():
    modules = {
        "compute_features": KaldiFbank(n_frames=120),
        "mean_var_norm": GlobalNorm(),
        "embedding_model": Recorder(),
        "classifier": Recorder(),
    }
    hparams = {"modules": modules, "mixup": WaveformMixup(), "spec_augment": SpecAugment(48, 192)}
    return TaggingBrain(modules, hparams=hparams, run_opts={"device": "cpu"})


def loss(brain, probabilities, targets):
    return brain.compute_objectives((torch.tensor(probabilities), torch.tensor(targets)), None, Stage.TRAIN).item()


def test_loss_is_binary_cross_entropy_over_clips_and_classes(brain):
    probabilities, targets = [[0.2, 0.9], [0.5, 0.4]], [[0.0, 1.0], [0.3, 1.0]]
    expected = F.binary_cross_entropy(torch.tensor(probabilities), torch.tensor(targets))
    assert loss(brain, probabilities, targets) == pytest.approx(expected.item())
    assert loss(brain, [[0.5]], [[0.3]]) == pytest.approx(math.log(2))


def test_loss_clamps_probabilities_to_1e_7(brain):
    for probability in (0.0, 1e-9, -0.1):
        assert loss(brain, [[probability]], [[1.0]]) == pytest.approx(-math.log(1e-7), rel=1e-5)
    # 1 - 1e-7 in float32
    for probability in (1.0, 1.2):
        assert loss(brain, [[probability]], [[0.0]]) == pytest.approx(-math.log(2**-23), rel=1e-5)
        assert loss(brain, [[probability]], [[1.0]]) == pytest.approx(2**-23, rel=1e-3)


def test_masks_and_padding_are_zero_before_normalisation(brain):
    torch.manual_seed(1)
    brain.compute_forward(Batch(), Stage.TRAIN)
    feats = brain.modules.embedding_model.seen
    assert feats.shape == (1, 120, 128)
    filled = 4.6476 / 4.5699  # +1.017
    is_filled = (feats - filled).abs() < 1e-6
    assert is_filled[:, 98:].all()
    masked = is_filled[0, :98]
    assert masked.all(0).any() or masked.all(1).any()
    assert torch.equal(masked, masked.all(0)[None] | masked.all(1)[:, None])


def test_validation_masks_and_mixes_nothing(brain):
    batch = Batch()
    brain.compute_forward(batch, Stage.VALID)
    expected = GlobalNorm()(KaldiFbank(n_frames=120)(*batch.sig))
    assert torch.equal(brain.modules.embedding_model.seen, expected)


def test_half_of_a_batch_is_mixed_and_the_partners_are_dropped(brain):
    torch.manual_seed(1)
    batch = Batch(4)
    _, targets = brain.compute_forward(batch, Stage.TRAIN)
    assert targets.shape == (2, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert (targets[0] > 0).tolist() == [True, False, True, False]
    assert (targets[1] > 0).tolist() == [False, True, False, True]
