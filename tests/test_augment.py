"""Each augmentation against a clip-by-clip restatement, and against the distribution that the published code draws from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from psla_sb.lobes.augment import FreqMixStyle, Gain, Roll, SpecAugment, WaveformMixup


def batch(lengths, n_classes=5):
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    wavs = torch.randn(len(lengths), width, generator=generator) + 0.3
    targets = (torch.rand(len(lengths), n_classes, generator=generator) < 0.5).float()
    return wavs, torch.tensor(lengths) / width, targets


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 300), min_size=2, max_size=9), data=st.data())
def test_mixup_is_the_formula_for_each_pair(lengths, data):
    n_partners = data.draw(st.integers(1, len(lengths) // 2))
    n_clips = len(lengths) - n_partners
    wavs, lens, targets = batch(lengths)
    targets[:, 0], targets[:, 1] = torch.arange(len(lengths)), 1.0
    before = wavs.clone()
    mixed, mixed_lens, mixed_targets = WaveformMixup()(wavs, lens, targets, n_partners)
    assert torch.equal(wavs, before)
    assert torch.equal(mixed_lens, lens[:n_clips])
    assert mixed.shape == (n_clips, wavs.shape[1])
    assert torch.equal(mixed[n_partners:], wavs[n_partners:n_clips])
    assert torch.equal(mixed_targets[n_partners:], targets[n_partners:n_clips])
    for k in range(n_partners):
        # column 0 numbers the clips, so lambda can be read from its mixture
        weight = 1 - (mixed_targets[k, 0].item() - k) / n_clips
        a, b = wavs[k, : lengths[k]], wavs[n_clips + k, : lengths[n_clips + k]]
        a, b = a - a.mean(), b - b.mean()
        b = F.pad(b, (0, max(0, len(a) - len(b))))[: len(a)]
        expected = weight * a + (1 - weight) * b
        torch.testing.assert_close(mixed[k, : len(a)], expected - expected.mean(), atol=1e-5, rtol=0)
        assert (mixed[k, len(a) :] == 0).all()
        torch.testing.assert_close(
            mixed_targets[k, 1:], weight * targets[k, 1:] + (1 - weight) * targets[n_clips + k, 1:], atol=1e-5, rtol=0
        )
        assert mixed_targets[k, 1] == 1


def test_each_pair_draws_its_own_beta():
    n = 4000
    torch.manual_seed(1)
    _, _, targets = WaveformMixup(alpha=10.0)(torch.zeros(2 * n, 1), None, torch.eye(2).repeat_interleave(n, 0), n)
    assert stats.kstest(targets[:, 0].numpy(), stats.beta(10, 10).cdf).pvalue > 1e-3
    torch.testing.assert_close(targets.sum(1), torch.ones(n))


def test_mixup_without_partners_changes_nothing():
    wavs, lens, targets = batch([3, 5])
    for given_tensor, returned in zip((wavs, lens, targets), WaveformMixup()(wavs, lens, targets, 0), strict=True):
        assert returned is given_tensor


@pytest.mark.parametrize("n_partners", [2, 3, -1])
def test_too_many_partners(n_partners):
    with pytest.raises(ValueError, match="partners"):
        WaveformMixup()(*batch([4, 4, 4]), n_partners)


def masks(module, n, frames, mels):
    """Widths and starts of each clip's frequency mask and time mask: `[n]` each, starts only where there is a mask."""
    torch.manual_seed(2)
    zero = module(torch.ones(n, frames, mels)) == 0
    found = []
    for zeros in (zero.all(1), zero.all(2)):
        width = zeros.sum(1)
        start = zeros.float().argmax(1)
        # one run without gaps
        position = torch.arange(zeros.shape[1])
        assert torch.equal(zeros, (position >= start[:, None]) & (position < (start + width)[:, None]))
        found.append((width, start[width > 0]))
    freq, time = zero.all(1), zero.all(2)
    assert torch.equal(zero, freq[:, None, :] | time[:, :, None])
    return found


def test_masks_are_distributed_as_published():
    n, frames, mels = 5000, 220, 128
    for (width, start), bound, size in zip(masks(SpecAugment(48, 192), n, frames, mels), (48, 192), (mels, frames), strict=True):
        generator = torch.Generator().manual_seed(3)
        unrounded = torch.rand(n, generator=generator) * bound
        expected_start = (torch.rand(n, generator=generator) * (size - unrounded)).long()
        expected_width = unrounded.long()
        assert width.min() == 0
        assert width.max() == bound - 1
        assert stats.ks_2samp(width, expected_width).pvalue > 1e-3
        assert stats.ks_2samp(start, expected_start[expected_width > 0]).pvalue > 1e-3


def test_zero_switches_a_mask_off():
    feats = torch.randn(20, 60, 40)
    assert torch.equal(SpecAugment(0, 0)(feats), feats)
    (freq, _), (time, _) = masks(SpecAugment(10, 0), 50, 60, 40)
    assert freq.max() > 0
    assert time.max() == 0
    (freq, _), (time, _) = masks(SpecAugment(0, 10), 50, 60, 40)
    assert freq.max() == 0
    assert time.max() > 0


def test_masks_longer_than_the_clip_and_what_they_leave():
    feats = torch.randn(50, 20, 16)
    before = feats.clone()
    masked = SpecAugment(48, 192)(feats)
    assert torch.equal(feats, before)
    assert torch.equal(masked[masked != 0], feats[masked != 0])


def test_the_global_seed_repeats_the_draws():
    wavs, lens, targets = batch([8, 8, 8, 8])
    feats = torch.ones(4, 50, 30)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append((*WaveformMixup()(wavs, lens, targets, 2), SpecAugment(20, 30)(feats)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_arguments():
    with pytest.raises(ValueError, match="alpha"):
        WaveformMixup(alpha=0)
    with pytest.raises(ValueError, match="time_mask=-1"):
        SpecAugment(time_mask=-1)


def test_a_clip_is_at_least_half_of_its_mixture():
    n = 4000
    torch.manual_seed(1)
    clips = torch.zeros(2 * n, 1), None, torch.eye(2).repeat_interleave(n, 0), n
    targets = WaveformMixup(alpha=2.0, at_least_half=True)(*clips)[2]
    assert targets[:, 0].min() >= 0.5
    # max(lambda, 1 - lambda) of lambda ~ Beta(2, 2), whose density is symmetric
    assert stats.kstest(targets[:, 0].numpy(), lambda x: 2 * stats.beta(2, 2).cdf(x) - 1).pvalue > 1e-3
    torch.manual_seed(1)
    plain = WaveformMixup(alpha=2.0)(*clips)[2]
    torch.testing.assert_close(torch.maximum(plain[:, 0], plain[:, 1]), targets[:, 0])


def test_gain_is_a_whole_number_of_decibels_each_as_often():
    torch.manual_seed(0)
    wavs = torch.rand(20000, 2) + 0.5
    decibels = 20 * torch.log10(Gain(7)(wavs) / wavs)
    # the same for the whole clip
    torch.testing.assert_close(decibels[:, 0], decibels[:, 1], atol=1e-4, rtol=0)
    whole = decibels[:, 0].round()
    torch.testing.assert_close(decibels[:, 0], whole, atol=1e-4, rtol=0)
    assert sorted(whole.unique().tolist()) == list(range(-7, 7))
    assert stats.chisquare(torch.unique(whole, return_counts=True)[1]).pvalue > 1e-3
    assert Gain(0)(wavs) is wavs


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), shift=st.integers(1, 90), seed=st.integers(0, 99))
def test_roll_is_numpys_of_each_clips_own_length(lengths, shift, seed):
    wavs, lens, _ = batch(lengths)
    torch.manual_seed(seed)
    rolled = Roll(shift)(wavs, lens)
    torch.manual_seed(seed)
    shifts = torch.randint(-shift, shift + 1, (len(wavs), 1))
    for clip, (length, by) in enumerate(zip(lengths, shifts.flatten().tolist(), strict=True)):
        assert torch.equal(rolled[clip, :length], wavs[clip, :length].roll(by))
        assert torch.equal(rolled[clip, length:], wavs[clip, length:])


def test_roll_goes_both_ways_as_far():
    torch.manual_seed(0)
    places = Roll(3)(torch.eye(1, 100).repeat(7000, 1)).argmax(1)
    assert sorted(places.unique().tolist()) == [0, 1, 2, 3, 97, 98, 99]
    assert stats.chisquare(torch.bincount(places)[places.unique()]).pvalue > 1e-3
    wavs = torch.rand(2, 5)
    assert Roll(0)(wavs) is wavs
    # as published, of clips that fill the batch
    assert not torch.equal(Roll(50)(torch.arange(800.0)[None])[0], torch.arange(800.0))


@settings(deadline=None, max_examples=30)
@given(frames=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99), alpha=st.sampled_from([0.4, 2.0]))
def test_freq_mixstyle_is_the_formula_for_each_clip_and_band(frames, seed, alpha):
    width, n = max(frames), len(frames)
    generator = torch.Generator().manual_seed(seed)
    feats = 3 * torch.randn(n, width, 5, generator=generator) - 4
    lens = torch.tensor(frames) / width
    before = feats.clone()
    torch.manual_seed(seed)
    mixed = FreqMixStyle(p=1.0, alpha=alpha)(feats, lens)
    assert torch.equal(feats, before)
    torch.manual_seed(seed)
    torch.rand(())
    weights = torch.distributions.Beta(alpha, alpha).sample((n, 1, 1)).flatten().double()
    others = torch.randperm(n)
    own = [feats[i, : frames[i]].double() for i in range(n)]
    mean = [clip.mean(0) for clip in own]
    spread = [(clip.var(0) if len(clip) > 1 else torch.zeros(5)).add(1e-6).sqrt() for clip in own]
    for i, j in enumerate(others.tolist()):
        weight = weights[i]
        scale, offset = weight * spread[i] + (1 - weight) * spread[j], weight * mean[i] + (1 - weight) * mean[j]
        expected = (own[i] - mean[i]) / spread[i] * scale + offset
        torch.testing.assert_close(mixed[i, : frames[i]].double(), expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(mixed[i, frames[i] :], feats[i, frames[i] :])


def test_freq_mixstyle_as_often_as_asked_and_without_gradients_through_statistics():
    feats = torch.randn(3, 20, 4)
    torch.manual_seed(0)
    module = FreqMixStyle(p=0.4)
    changed = sum(not torch.equal(module(feats), feats) for _ in range(2000))
    assert stats.binomtest(changed, 2000, 0.4).pvalue > 1e-3
    assert FreqMixStyle(p=0)(feats) is feats
    feats.requires_grad_()
    FreqMixStyle(p=1.0)(feats).sum().backward()
    # through the statistics the gradient of a band's sum would vanish in part; without, it is one positive factor for each band
    assert feats.grad.std(dim=1).max() < 1e-6
    assert (feats.grad > 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Gain(-1), "Gain needs a whole number of dB"),
        (lambda: Gain(1.5), "not 1.5"),
        (lambda: Roll(-5), "Roll needs a whole number of samples"),
        (lambda: FreqMixStyle(p=1.1), "p from 0 to 1"),
        (lambda: FreqMixStyle(alpha=0), "positive alpha"),
    ],
)
def test_wrong_arguments_of_later_augmentations(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
