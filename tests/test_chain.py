"""Other people's parts between ours: lengths, what is refused before a training, and what is left as it was."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from torch import nn

from psla_sb.checkpoints.weights import state_of
from psla_sb.errors import InputError
from psla_sb.lobes import chain
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import MeanPooling

RATE, N_SAMPLES = 16000, 8000


class Strided(nn.Module):
    """A front end that has `n_frames` and `sample_rate` of its own, which mean nothing to us."""

    def __init__(self):
        super().__init__()
        self.n_frames, self.sample_rate = 7, 3

    def forward(self, wavs):
        return wavs.unfold(1, 400, 160)[:, :, :64].abs()


class Encoder(nn.Module):
    """Its feature map is of a clip's true length alone."""

    def forward(self, feats, lens):
        return (feats * (torch.arange(feats.shape[1]) < lens[:, None] * feats.shape[1])[..., None]).transpose(1, 2)[:, :, None]


class Counting(nn.Module):
    """Changes a buffer in training, which may be one that is not saved."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=persistent)

    def forward(self, feats):
        if self.training:
            self.seen += 1
        return feats.transpose(1, 2)[:, :, None]


def parts(front_end=None, encoder=None, classifier=None):
    torch.manual_seed(0)
    found = front_end or Strided(), GlobalNorm(), encoder or Encoder(), classifier or MeanPooling(64, 3)
    return dict(zip(chain.MODULES, found, strict=True))


@pytest.mark.parametrize("front_end", [Strided, lambda: Fbank(n_mels=64), lambda: KaldiFbank(n_mels=64, n_frames=48)])
@given(lengths=st.lists(st.integers(400, 12000), min_size=1, max_size=4))
@example(lengths=[1155, 1671])
def test_a_clip_scores_the_same_in_every_batch(front_end, lengths):
    modules = parts(front_end())
    wavs = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in lengths]
    batch = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    lens = torch.tensor(lengths) / max(lengths)
    together = chain.probabilities(modules, batch, lens, n_samples=N_SAMPLES)
    alone = torch.cat([chain.probabilities(modules, wav[None], n_samples=N_SAMPLES) for wav in wavs])
    torch.testing.assert_close(together, alone)


def test_only_our_front_end_cuts_to_its_n_frames():
    modules = parts()
    feats, lens = chain.features(modules, torch.randn(2, 16000), torch.tensor([0.25, 1.0]))
    assert feats.shape == (2, 98, 64)
    assert lens.tolist() == [0.25, 1.0]
    feats, lens = chain.features(modules, torch.randn(2, 16000), torch.tensor([0.25, 1.0]), n_samples=N_SAMPLES)
    assert feats.shape == (2, 48, 64)
    assert lens.tolist() == [0.5, 1.0]


def test_a_check_leaves_everything_as_it_was():
    modules = parts(encoder=Counting(persistent=True)) | {"mean_var_norm": InputNormalization()}
    modules["embedding_model"].train()
    modules["classifier"].eval()
    before = [{key: value.clone() for key, value in state_of(module).items()} for module in modules.values()]
    random = torch.get_rng_state()
    chain.check(modules, RATE, 3, N_SAMPLES)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close([state_of(module) for module in modules.values()], before, rtol=0, atol=0)
    assert modules["embedding_model"].training
    assert not modules["classifier"].training


def test_statistics_that_would_not_be_saved_are_refused():
    with pytest.raises(InputError, match="Counting changes its buffer 'seen', which is not persistent"):
        chain.check(parts(encoder=Counting(persistent=False)), RATE, 3, N_SAMPLES)


def test_what_fails_in_training_alone_is_refused():
    class Fails(Counting):
        def forward(self, feats):
            return 1 / 0 if self.training else super().forward(feats)

    with pytest.raises(InputError, match="do not run in training: ZeroDivisionError"):
        chain.check(parts(encoder=Fails(persistent=True)), RATE, 3, N_SAMPLES)


def test_complex_weights_are_refused():
    module = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(InputError, match="only tensors of real numbers"):
        state_of(module)
