"""Which clips an epoch trains on, and in which batches: class-balanced draws and mixup's partners."""

import math
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from speechbrain.dataio.sampler import ReproducibleWeightedRandomSampler
from torch.utils.data import BatchSampler

from psla_sb.labels.label_sets import LabelSets

# Draws that are turned into Python integers at a time.
CHUNK = 65536
# Purposes of `draw_rng`.
CROP, REDRAW = 1, 2


def class_balanced_weights(label_sets, n_classes, offset=0.01):
    """Sampling weight of every clip: the sum over its classes of 1000 / (number of clips with the class + offset).

    Source: PSLA (Gong, Chung, Glass; IEEE/ACM TASLP 2021) with offset 0.01; later systems (PaSST, EfficientAT) use 100.

    Arguments
    ---------
    label_sets : LabelSets | sequence of sequences of int
        The class indices of every clip. A class that is given twice for one clip counts once.
    n_classes : int
        Number of classes.
    offset : float
        Added to every class's number of clips: the larger, the nearer to uniform sampling.

    Returns
    -------
    np.ndarray
        float64 [clips]. A clip without a label has the weight 0 and is never drawn.

    Raises
    ------
    ValueError
        If a class index is negative or not below `n_classes`, or the offset is negative.

    Example
    -------
    >>> class_balanced_weights([[0], [0, 1], []], n_classes=2, offset=0)
    array([ 500., 1500., 0.])
    """
    if not offset >= 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    if not isinstance(label_sets, LabelSets):
        label_sets = LabelSets.from_lists(label_sets)
    clips, classes = label_sets.pairs(n_classes)
    n_clips_with = np.bincount(classes, minlength=n_classes)
    return np.bincount(clips, weights=1000 / (n_clips_with[classes] + offset), minlength=len(label_sets))


class BalancedSampler(ReproducibleWeightedRandomSampler):
    """A `ReproducibleWeightedRandomSampler` for any number of clips, whose seeds share no draws.

    Its parent seeds with seed + epoch, so that epoch 2 of seed 1 is epoch 1 of seed 2, and cannot draw from more than 2^24
    weights.

    Note
    ----
    Call `set_epoch` before every epoch. Otherwise the same clips are drawn again.

    Arguments
    ---------
    weights : array_like
        [clips], not negative; they need not sum to one. A clip of weight 0 is never drawn.
    num_samples : int | None
        Draws of an epoch; None: as many as there are weights.
    replacement : bool
        Whether a clip can be drawn more than once in an epoch. Without replacement, equal weights give a plain shuffle.
    seed : int
        Draws are those of `numpy.random.default_rng([seed, epoch])`.
    epoch : int
        The epoch to start at.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, all are 0, or there are fewer positive weights than draws without replacement.

    Example
    -------
    >>> sampler = BalancedSampler([0.1, 0.9, 0.4, 0.0, 3.0, 0.6], num_samples=5, replacement=False)
    >>> sorted(sampler)
    [0, 1, 2, 4, 5]
    >>> first = list(sampler)
    >>> sampler.set_epoch(1)
    >>> list(sampler) == first
    False
    """

    def __init__(self, weights, num_samples=None, replacement=True, seed=563375142, epoch=0):
        weights = np.asarray(weights, np.float64)
        with np.errstate(over="ignore"):
            total = weights.sum()
        if not ((weights >= 0).all() and 0 < total < math.inf):
            raise ValueError("weights must be finite and not negative, and at least one of them positive")
        num_samples = len(weights) if num_samples is None else num_samples
        if not replacement and num_samples > np.count_nonzero(weights):
            raise ValueError(
                f"cannot draw {num_samples} clips without replacement from {np.count_nonzero(weights)} with a positive "
                "weight: lower num_samples or draw with replacement"
            )
        super().__init__(weights, num_samples, replacement, seed=seed, epoch=epoch)

    def draw(self):
        """The clips of the current epoch.

        Returns
        -------
        np.ndarray
            int64 [num_samples].

        Example
        -------
        >>> BalancedSampler([0, 1.0, 0], num_samples=4).draw()
        array([1, 1, 1, 1])
        """
        rng = np.random.default_rng([self.seed, self.epoch])
        weights = self.weights.numpy()
        if self.replacement:
            # Sorted numbers are looked up many times faster; the shuffle makes the draws independent again.
            points = rng.random(self.num_samples)
            points.sort()
            drawn = self._at(points)
        else:
            # The smallest of exponential variables with rates w are a weighted draw without replacement (Efraimidis and
            # Spirakis, 2006), heaviest clips first: hence the shuffle here too.
            positive = np.flatnonzero(weights)
            with np.errstate(over="ignore"):
                times = rng.standard_exponential(len(positive)) / weights[positive]
            drawn = positive[np.argpartition(times, self.num_samples - 1)[: self.num_samples]]
        rng.shuffle(drawn)
        return drawn

    def _at(self, points):
        """The clips whose shares of the cumulative weight hold some points of [0, 1)."""
        edges = np.cumsum(self.weights.numpy())
        # With denormal weights the product can round up to the last edge, beyond every clip.
        return edges.searchsorted(np.minimum(points * edges[-1], np.nextafter(edges[-1], 0)), side="right")

    def redraw(self, rng):
        """One clip more, by weight, from other random numbers than the epoch's draws.

        Arguments
        ---------
        rng : np.random.Generator
            Where its random number comes from.

        Returns
        -------
        int

        Example
        -------
        >>> BalancedSampler([0, 1.0, 0]).redraw(np.random.default_rng(7))
        1
        """
        return int(self._at(rng.random()))

    def __iter__(self):
        drawn = self.draw()
        return chain.from_iterable(drawn[i : i + CHUNK].tolist() for i in range(0, len(drawn), CHUNK))


class Draw(NamedTuple):
    """One clip of a batch, as a data set's `__getitem__` gets it.

    Arguments
    ---------
    index : int
        Row of the clip in the data set.
    epoch : int
        The epoch it was drawn for.
    position : int
        Its place in the epoch's sequence of clips over all ranks; partners have numbers from the end of that sequence on. No
        other clip of the epoch has it, so (seed, epoch, position) seeds what is random about this clip.
    partner : bool
        Whether it is there to be mixed into another clip.

    Example
    -------
    >>> Draw(index=7, epoch=1, position=0, partner=False)
    Draw(index=7, epoch=1, position=0, partner=False)
    """

    index: int
    epoch: int
    position: int
    partner: bool


def draw_rng(seed, epoch, position, purpose, attempt=0):
    """The random numbers of one clip of an epoch, whichever process reads it.

    Arguments
    ---------
    seed, epoch, position : int
        Of the run, and of the `Draw`.
    purpose : int
        What the numbers are for: of different purposes, they are independent.
    attempt : int
        How often numbers have been asked for before.

    Returns
    -------
    np.random.Generator

    Example
    -------
    >>> draw_rng(1, 2, 3, CROP).random() == draw_rng(1, 2, 3, REDRAW).random()
    False
    """
    # the partners' spawn keys have one number
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, position], spawn_key=(purpose, attempt)))


class MixupBatchSampler(BatchSampler):
    """Batches of a sampler's clips, each followed by `round(rate * len(batch))` partners for mixup.

    Partners are drawn uniformly from the whole set, as in PSLA, whatever the sampler does, and from (seed, epoch, number of
    the batch): a batch is the same whichever rank makes it. Batch k goes to rank k mod `world_size`; batches that do not go
    round are dropped, so that all ranks have equally many.

    Note
    ----
    Call `set_epoch` before every epoch; it is passed on to the sampler.

    Arguments
    ---------
    sampler : torch.utils.data.Sampler
        Yields rows; the same ones on every rank.
    n_clips : int
        Number of clips of the set that partners come from.
    batch_size : int
        Clips in a batch, partners not counted.
    rate : float
        Partners per clip of the batch, 0 to 1.
    seed : int
        Seed of the partners.
    drop_last : bool
        Whether to drop the last batch if it is not full.
    rank, world_size : int
        This process and the number of processes.

    Raises
    ------
    ValueError
        If an argument is out of range or some rank would get no batch.

    Example
    -------
    >>> from torch.utils.data import SequentialSampler
    >>> batches = MixupBatchSampler(SequentialSampler(range(5)), n_clips=5, batch_size=4, rate=0.5)
    >>> [[draw.index for draw in batch if not draw.partner] for batch in batches]
    [[0, 1, 2, 3], [4]]
    >>> [sum(draw.partner for draw in batch) for batch in batches]
    [2, 0]
    """

    def __init__(self, sampler, n_clips, batch_size, rate=0.5, seed=563375142, drop_last=False, rank=0, world_size=1):
        super().__init__(sampler, batch_size, drop_last)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {rank=}, {world_size=}")
        if n_clips < 1:
            raise ValueError(f"n_clips must be at least 1, got {n_clips}")
        self.n_clips = n_clips
        self.rate = rate
        self.seed = int(seed)
        self.rank = rank
        self.world_size = world_size
        self.epoch = getattr(sampler, "epoch", 0)
        if len(self) == 0:
            raise ValueError(
                f"{len(sampler)} clips are no batch of {batch_size} for each of {world_size} processes: lower batch_size or the "
                "number of processes" + (", or keep the last batch" if drop_last else "")
            )

    def set_epoch(self, epoch):
        """Choose the epoch whose batches the next iteration yields.

        Example
        -------
        >>> batches = MixupBatchSampler(BalancedSampler([1.0, 2.0]), n_clips=2, batch_size=2)
        >>> batches.set_epoch(3)
        >>> batches.sampler.epoch
        3
        """
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def redraw(self, draw, attempt):
        """Another clip in place of one that cannot be read, drawn as that one was: by the sampler, or uniformly for a partner.

        Arguments
        ---------
        draw : Draw
            The clip that cannot be read.
        attempt : int
            How many clips in its place this one is, from 1.

        Returns
        -------
        Draw
            Of the same epoch and position.

        Example
        -------
        >>> batches = MixupBatchSampler(BalancedSampler([0, 1.0, 0]), n_clips=3, batch_size=2)
        >>> batches.redraw(Draw(index=0, epoch=1, position=5, partner=False), attempt=1)
        Draw(index=1, epoch=1, position=5, partner=False)
        """
        rng = draw_rng(self.seed, draw.epoch, draw.position, REDRAW, attempt)
        by_weight = not draw.partner and hasattr(self.sampler, "redraw")
        return draw._replace(index=self.sampler.redraw(rng) if by_weight else int(rng.integers(self.n_clips)))

    def __len__(self):
        n_clips, size = len(self.sampler), self.batch_size
        return (n_clips // size if self.drop_last else math.ceil(n_clips / size)) // self.world_size

    def __iter__(self):
        rows, epoch = iter(self.sampler), self.epoch
        n_partners = round(self.rate * self.batch_size)
        for k in range(len(self) * self.world_size):
            clips = list(islice(rows, self.batch_size))
            if k % self.world_size != self.rank:
                continue
            # A spawn key, because default_rng([seed, epoch, 0]) is default_rng([seed, epoch]): the sampler's numbers.
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(k,)))
            partners = rng.integers(self.n_clips, size=round(self.rate * len(clips))).tolist()
            first, first_partner = k * self.batch_size, len(self.sampler) + k * n_partners
            yield [
                *(Draw(row, epoch, i, False) for i, row in enumerate(clips, first)),
                *(Draw(row, epoch, i, True) for i, row in enumerate(partners, first_partner)),
            ]
