"""Class weights against PSLA's published code; draws against their distributions; batches on one rank and on several."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.sampler import ReproducibleWeightedRandomSampler
from speechbrain.utils.checkpoints import Checkpointer
from torch.utils.data import SequentialSampler

from psla_sb.dataio.sampler import BalancedSampler, Draw, MixupBatchSampler, class_balanced_weights
from psla_sb.labels.label_sets import LabelSets


def chi_square(counts, probabilities):
    expected = counts.sum() * np.asarray(probabilities)
    return ((counts - expected) ** 2 / expected).sum()


# Class weights


def zipf_label_sets(n_clips=3000, n_classes=527):
    """The label sets whose weights the published code was asked for."""
    rng = np.random.default_rng(7)
    prior = 1 / np.arange(1, n_classes + 1) ** 0.7
    prior /= prior.sum()
    order = rng.permutation(n_classes)
    labels = [order[rng.choice(n_classes, rng.integers(1, 5), replace=False, p=prior)].tolist() for _ in range(n_clips)]
    for absent in sorted(set(range(n_classes)).difference(*labels)):
        labels[absent % n_clips].append(absent)
    return labels


def test_weights_of_the_published_code():
    labels = zipf_label_sets()
    published = [
        145.43105297320756,
        101.1179013620293,
        315.81146550357835,
        199.6007984031936,
        1268.7772733952463,
        308.9747258302209,
        196.20490189841846,
        238.79161562967067,
    ]
    for label_sets in (labels, LabelSets.from_lists(labels)):
        weights = class_balanced_weights(label_sets, 527)
        assert weights.dtype == np.float64
        np.testing.assert_allclose(weights[:8], published, rtol=1e-12)
        assert weights.sum() == pytest.approx(526233.7273343715, rel=1e-12)


def test_weights_by_hand():
    label_sets = [[2, 0, 2], [], [0], [0, 1]]  # classes 0 to 3 on 3, 1, 1 and 0 clips
    expected = [1000 / 103 + 1000 / 101, 0, 1000 / 103, 1000 / 103 + 1000 / 101]
    np.testing.assert_allclose(class_balanced_weights(label_sets, 4, offset=100), expected, rtol=1e-15)
    np.testing.assert_allclose(class_balanced_weights(label_sets, 4, offset=0), [4000 / 3, 0, 1000 / 3, 4000 / 3])


def test_weights_refuse():
    for label in (-1, 3):
        with pytest.raises(ValueError, match="class indices must be from 0 to 2"):
            class_balanced_weights([[0], [label]], 3)
    with pytest.raises(ValueError, match="offset"):
        class_balanced_weights([[0]], 3, offset=-1)


# BalancedSampler

WEIGHTS = np.array([0.0, 3.0, 1.0, 0.0, 2.0, 4.0, 0.0])


def test_draws_with_replacement_follow_the_weights():
    draws = BalancedSampler(WEIGHTS, num_samples=100_000).draw()
    counts = np.bincount(draws, minlength=7)
    assert (counts[WEIGHTS == 0] == 0).all()
    assert chi_square(counts[WEIGHTS > 0], [0.3, 0.1, 0.2, 0.4]) < 16.3  # 3 degrees of freedom, p = 0.001
    # Neighbours in the sequence are independent: sorted numbers were looked up.
    joint = np.zeros((7, 7))
    np.add.at(joint, (draws[:-1], draws[1:]), 1)
    p = WEIGHTS / 10
    drawn = np.outer(p, p) > 0
    assert chi_square(joint[drawn], np.outer(p, p)[drawn]) < 37.7  # 15 degrees of freedom, p = 0.001


def test_draws_without_replacement_follow_the_weights():
    p = np.array([0.3, 0.1, 0.2, 0.4])
    included, first, n_epochs = np.zeros(4), np.zeros(4), 5000
    sampler = BalancedSampler(p, num_samples=2, replacement=False)
    for epoch in range(n_epochs):
        sampler.set_epoch(epoch)
        a, b = sampler
        assert a != b
        included[[a, b]] += 1
        first[a] += 1
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)])
    expected = p + second
    assert (np.abs(included / n_epochs - expected) < 4 * np.sqrt(expected * (1 - expected) / n_epochs)).all()
    # Random order: either of the two comes first equally often, the heavier one included.
    assert (np.abs(first / n_epochs - expected / 2) < 4 * np.sqrt(expected / 2 / n_epochs)).all()


def test_equal_weights_without_replacement_are_a_shuffle():
    sampler = BalancedSampler(np.full(6, 0.25), replacement=False)
    place = np.zeros((6, 6))
    for epoch in range(3000):
        sampler.set_epoch(epoch)
        shuffled = list(sampler)
        assert sorted(shuffled) == list(range(6))
        place[shuffled, range(6)] += 1
    assert chi_square(place.ravel(), np.full(36, 1 / 36)) < 52.6  # 25 degrees of freedom, p = 0.001


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0, 1e300), st.just(5e-324)), min_size=1, max_size=30).filter(any),
    num_samples=st.integers(1, 50),
    seed=st.integers(0, 2**64),
)
def test_weight_zero_is_never_drawn(weights, num_samples, seed):
    drawn = list(BalancedSampler(weights, num_samples, seed=seed))
    assert len(drawn) == num_samples
    assert all(type(i) is int and weights[i] > 0 for i in drawn)
    n_positive = sum(w > 0 for w in weights)
    once = list(BalancedSampler(weights, min(num_samples, n_positive), replacement=False, seed=seed))
    assert len(set(once)) == len(once) == min(num_samples, n_positive)
    assert all(weights[i] > 0 for i in once)


def test_rounding_at_the_last_edge():
    assert set(BalancedSampler([5e-324, 0.0], num_samples=100)) == {0}


def test_seeds_and_epochs():
    def draws(seed, epoch):
        return BalancedSampler(np.ones(100), seed=seed, epoch=epoch).draw().tolist()

    assert draws(1, 2) == draws(1, 2)
    all_draws = [tuple(draws(seed, epoch)) for seed in range(1, 4) for epoch in range(4)]
    assert len(set(all_draws)) == 12
    sampler = BalancedSampler(np.ones(100), seed=3)
    assert isinstance(sampler, ReproducibleWeightedRandomSampler)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler) == draws(3, 2)
    assert len(sampler) == 100


@pytest.mark.parametrize("replacement", [True, False])
def test_more_weights_than_multinomial_allows(replacement):
    n = 2**24 + 1000
    draws = BalancedSampler(np.ones(n, np.float32), num_samples=1000, replacement=replacement).draw()
    assert draws.shape == (1000,)
    assert chi_square(np.bincount(draws * 4 // n, minlength=4), np.full(4, 0.25)) < 16.3


def test_iteration_across_chunks():
    sampler = BalancedSampler(np.arange(1.0, 1001), num_samples=150_001)
    np.testing.assert_array_equal(np.fromiter(sampler, np.int64), sampler.draw())


@pytest.mark.parametrize("weights", [[1, -1e-9], [1, float("nan")], [1, float("inf")], [0, 0], [], [1e308, 1e308]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be finite"):
        BalancedSampler(weights)


def test_bad_number_of_draws():
    with pytest.raises(ValueError, match="cannot draw 5 clips without replacement from 4"):
        BalancedSampler(WEIGHTS, num_samples=5, replacement=False)
    with pytest.raises(ValueError, match="num_samples"):
        BalancedSampler(WEIGHTS, num_samples=0)


# MixupBatchSampler


def mixup_batches(n=10, batch_size=4, n_clips=1000, **options):
    return MixupBatchSampler(BalancedSampler(np.ones(n), seed=5), n_clips, batch_size, **options)


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 13),
    rate=st.sampled_from([0, 0.1, 0.25, 0.5, 0.7, 1.0]),
    drop_last=st.booleans(),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_batches_of_one_process(n, batch_size, rate, drop_last, world_size, epoch):
    options = {"n": n, "batch_size": batch_size, "rate": rate, "drop_last": drop_last}
    n_batches = n // batch_size if drop_last else -(-n // batch_size)
    if n_batches < world_size:
        with pytest.raises(ValueError, match="no batch of"):
            mixup_batches(**options, world_size=world_size)
        return
    single = mixup_batches(**options)
    single.set_epoch(epoch)
    batches = list(single)
    assert len(batches) == len(single) == n_batches

    clips = [draw for batch in batches for draw in batch if not draw.partner]
    assert [draw.index for draw in clips] == BalancedSampler(np.ones(n), seed=5, epoch=epoch).draw().tolist()[: len(clips)]
    assert [draw.position for draw in clips] == list(range(len(clips)))
    for batch in batches:
        n_clips = sum(not draw.partner for draw in batch)
        assert [draw.partner for draw in batch] == [False] * n_clips + [True] * round(rate * n_clips)
        assert all(draw.epoch == epoch and 0 <= draw.index < 1000 for draw in batch)
    positions = [draw.position for batch in batches for draw in batch]
    assert len(set(positions)) == len(positions)

    ranks = [mixup_batches(**options, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    assert {len(rank) for rank in ranks} == {n_batches // world_size}
    shares = [list(rank) for rank in ranks]
    assert [len(share) for share in shares] == [n_batches // world_size] * world_size
    assert [batch for turn in zip(*shares, strict=True) for batch in turn] == batches[: n_batches // world_size * world_size]


def test_short_last_batch_has_its_own_number_of_partners():
    sizes = [(sum(not d.partner for d in batch), sum(d.partner for d in batch)) for batch in mixup_batches(n=11, batch_size=8)]
    assert sizes == [(8, 4), (3, 2)]


def test_partners_are_uniform_whatever_the_weights():
    weights = np.r_[np.full(4, 1000.0), np.full(4, 1e-3)]
    batches = MixupBatchSampler(BalancedSampler(weights, num_samples=20_000), 8, batch_size=20)
    partners = np.array([draw.index for batch in batches for draw in batch if draw.partner])
    assert len(partners) == 10_000
    assert chi_square(np.bincount(partners, minlength=8), np.full(8, 1 / 8)) < 24.3  # 7 degrees of freedom, p = 0.001


def test_partners_depend_on_seed_epoch_and_batch():
    def partners(seed, epoch):
        batches = MixupBatchSampler(SequentialSampler(range(60)), 10**6, batch_size=20, rate=1, seed=seed)
        batches.set_epoch(epoch)
        return [tuple(draw.index for draw in batch if draw.partner) for batch in batches]

    assert partners(1, 2) == partners(1, 2)
    assert len({batch for seed in range(1, 4) for epoch in range(3) for batch in partners(seed, epoch)}) == 27


def test_partners_share_no_random_numbers_with_the_draws():
    # numpy's default_rng([1, 2, 0]) is default_rng([1, 2])
    batches = MixupBatchSampler(SequentialSampler(range(20)), 10**6, batch_size=20, rate=1, seed=1)
    batches.set_epoch(2)
    partners = [draw.index for draw in next(iter(batches)) if draw.partner]
    assert partners != np.random.default_rng([1, 2]).integers(10**6, size=20).tolist()


def test_epoch_reaches_the_sampler():
    sampler = BalancedSampler(np.ones(50), seed=1, epoch=4)
    batches = MixupBatchSampler(sampler, 50, 10)
    assert next(iter(batches))[0].epoch == 4
    before = list(batches)
    batches.set_epoch(5)
    assert sampler.epoch == 5
    after = list(batches)
    assert {draw.epoch for batch in after for draw in batch} == {5}
    assert [[d.index for d in batch] for batch in before] != [[d.index for d in batch] for batch in after]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": -0.1}, "rate"),
        ({"rate": 1.1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_clips": 0}, "n_clips"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"world_size": 4}, "10 clips are no batch of 4 for each of 4 processes"),
        ({"batch_size": 11, "drop_last": True}, "keep the last batch"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        mixup_batches(**wrong)


class Clips(torch.utils.data.Dataset):
    """Shows what arrives in a worker."""

    def __len__(self):
        return 1000

    def __getitem__(self, draw):
        assert type(draw) is Draw
        return {"id": str(draw.index), "sig": torch.ones(1 + draw.index % 3), **draw._asdict()}


def loader(num_workers):
    return SaveableDataLoader(
        Clips(), batch_sampler=mixup_batches(n=30), collate_fn=PaddedBatch, num_workers=num_workers, pin_memory=False
    )


def seen(batch):
    return batch.id, batch.index.tolist(), batch.epoch.tolist(), batch.position.tolist(), batch.partner.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_speechbrain_resumes_in_the_middle_of_an_epoch(tmp_path, num_workers):
    first = loader(num_workers)
    first.batch_sampler.set_epoch(3)
    checkpointer = Checkpointer(tmp_path, {"loader": first})
    rest = []
    for i, batch in enumerate(first):
        if i == 2:
            checkpointer.save_checkpoint(end_of_epoch=False)
        if i > 2:
            rest.append(seen(batch))
    resumed = loader(num_workers)
    resumed.batch_sampler.set_epoch(3)
    Checkpointer(tmp_path, {"loader": resumed}).recover_if_possible()
    assert [seen(batch) for batch in resumed] == rest
    assert len(rest) == 5
    resumed.batch_sampler.set_epoch(4)
    assert len(list(resumed)) == 8
    assert [seen(batch) for batch in resumed] != [seen(batch) for batch in first]


def test_padded_batch_carries_partners_as_a_tensor():
    batch = next(iter(loader(0)))
    assert batch.partner.dtype == torch.bool
    assert batch.partner.tolist() == [False] * 4 + [True] * 2
    assert batch.sig.data.shape[0] == 6
