"""Which clips an epoch trains on, and in which batches: class-balanced draws and mixup's partners."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from speechbrain.dataio.sampler import ReproducibleWeightedRandomSampler
from torch.utils.data import BatchSampler, Sampler

from psla_sb.labels.label_sets import LabelSets

# Draws that are turned into Python integers at a time.
CHUNK = 65536
# Purposes of `draw_rng`.
CROP, REDRAW = 1, 2


def rank_and_world_size() -> tuple[int, int]:
    """Tells which of how many processes that train together this one is: 0 of 1 where there are no others.

    Environment variables do not tell: schedulers set some of them for processes that know nothing of each other.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def class_balanced_weights(label_sets: LabelSets | Sequence[Sequence[int]], n_classes: int, offset: float = 0.01) -> np.ndarray:
    """Computes the sampling weight of every clip: the sum over its classes of 1000 / (number of clips with the class + offset).

    Source: PSLA (Gong, Chung, Glass; IEEE/ACM TASLP 2021) with offset 0.01; later systems (PaSST, EfficientAT) use 100. The larger
    it is, the nearer to uniform sampling. The weights are float64 `[clips]`; a clip without a label has 0 and is never drawn. A
    class that is given twice for one clip counts once; one that is out of range, or a negative offset, is a ValueError.

    >>> class_balanced_weights([[0], [0, 1], []], n_classes=2, offset=0)
    array([ 500., 1500., 0.])
    """
    if not offset >= 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    label_sets = label_sets if isinstance(label_sets, LabelSets) else LabelSets.from_lists(label_sets)
    clips, classes = label_sets.pairs(n_classes)
    n_clips_with = np.bincount(classes, minlength=n_classes)
    return np.bincount(clips, weights=1000 / (n_clips_with[classes] + offset), minlength=len(label_sets))


class BalancedSampler(ReproducibleWeightedRandomSampler):
    """Draws clips by weight; call `set_epoch` before every epoch, otherwise the same ones are drawn again.

    Its parent seeds with seed + epoch, so that epoch 2 of seed 1 is epoch 1 of seed 2, and cannot draw from over 2^24 weights.

    Arguments
    ---------
    weights
        `[clips]`, finite, not negative, of any positive sum. A clip of weight 0 is never drawn.
    num_samples, replacement, seed, epoch
        Draws of an epoch (None: as many as weights), and whether a clip can be drawn repeatedly; if not, equal weights shuffle.
        They are those of `numpy.random.default_rng([seed, epoch])`.

    Example
    -------
    >>> sorted(BalancedSampler([0.1, 0.9, 0.4, 0.0, 3.0, 0.6], num_samples=5, replacement=False))
    [0, 1, 2, 4, 5]
    """

    def __init__(
        self, weights: ArrayLike, num_samples: int | None = None, replacement: bool = True, seed: int = 563375142, epoch: int = 0
    ) -> None:
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
        # its parent's is not used, and could not be sent to a worker that is not forked
        self.generator = None

    def draw(self) -> np.ndarray:
        """Draws the clips of the current epoch, int64 `[num_samples]`."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.replacement:
            # Sorted numbers are looked up many times faster; the shuffle makes the draws independent again.
            drawn = self._at(np.sort(rng.random(self.num_samples)))
        else:
            # The smallest of exponential variables with rates w are a weighted draw without replacement (Efraimidis and
            # Spirakis, 2006), heaviest clips first: hence the shuffle here too.
            weights = self.weights.numpy()
            positive = np.flatnonzero(weights)
            with np.errstate(over="ignore"):
                times = rng.standard_exponential(len(positive)) / weights[positive]
            drawn = positive[np.argpartition(times, self.num_samples - 1)[: self.num_samples]]
        rng.shuffle(drawn)
        return drawn

    def _at(self, points: np.ndarray | float) -> np.ndarray:
        """Finds the clips whose shares of the cumulative weight hold some points of [0, 1)."""
        edges = np.cumsum(self.weights.numpy())
        # With denormal weights the product can round up to the last edge, beyond every clip.
        return edges.searchsorted(np.minimum(points * edges[-1], np.nextafter(edges[-1], 0)), side="right")

    def redraw(self, rng: np.random.Generator) -> int:
        """Draws one clip more, by weight, from other random numbers than the epoch's draws."""
        return int(self._at(rng.random()))

    def __iter__(self) -> Iterator[int]:
        drawn = self.draw()
        return chain.from_iterable(drawn[i : i + CHUNK].tolist() for i in range(0, len(drawn), CHUNK))


class Draw(NamedTuple):
    """Tells a data set's `__getitem__` which clip of a batch it is to give."""

    index: int  # type: ignore[assignment]  # row in the data set; hides tuple.index, which nobody calls
    epoch: int
    # Its place in the epoch's sequence of clips over all ranks; partners have numbers from the end of that sequence on. No other
    # clip of the epoch has it, so (seed, epoch, position) seeds what is random about this clip.
    position: int
    partner: bool  # whether it is there to be mixed into another clip


def draw_rng(seed: int, epoch: int, position: int, purpose: int, attempt: int = 0) -> np.random.Generator:
    """Seeds the random numbers of one `Draw`, whichever process reads it; other purposes and attempts have independent ones."""
    # the partners' spawn keys have one number
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, position], spawn_key=(purpose, attempt)))


class MixupBatchSampler(BatchSampler):
    """Makes batches of a sampler's clips, each followed by `round(rate * len(batch))` partners for mixup.

    Partners are drawn uniformly from the whole set, as in PSLA, whatever the sampler does, and from (seed, epoch, number of the
    batch). Batch k goes to rank k mod `world_size`; batches that do not go round are dropped, so that all ranks have equally many,
    and a ValueError says that they have none.

    Arguments
    ---------
    sampler, n_clips
        Yields rows, the same ones on every rank; and the number of clips that partners come from.
    batch_size, rate, seed, drop_last
        Clips in a batch; partners for each of them, 0 to 1, and their seed; and whether to drop the last batch if it is not full.

    Example
    -------
    >>> from torch.utils.data import SequentialSampler
    >>> batches = MixupBatchSampler(SequentialSampler(range(5)), n_clips=5, batch_size=4, rate=0.5)
    >>> [[draw.index for draw in batch if not draw.partner] for batch in batches]
    [[0, 1, 2, 3], [4]]
    """

    sampler: Any  # torch's are not said to have a length

    def __init__(
        self,
        sampler: Sampler[int],
        n_clips: int,
        batch_size: int,
        rate: float = 0.5,
        seed: int = 563375142,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {rank=}, {world_size=}")
        if n_clips < 1:
            raise ValueError(f"n_clips must be at least 1, got {n_clips}")
        self.n_clips, self.rate, self.seed, self.rank, self.world_size = n_clips, rate, int(seed), rank, world_size
        self.epoch = getattr(sampler, "epoch", 0)
        if len(self) == 0:
            raise ValueError(
                f"{len(self.sampler)} clips are no batch of {batch_size} for each of {world_size} processes: lower batch_size or "
                "the number of processes" + (", or keep the last batch" if drop_last else "")
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses, also for the sampler, the epoch that the next iteration yields; call it before every epoch."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def redraw(self, draw: Draw, attempt: int) -> Draw:
        """Replaces a clip that cannot be read by another one, drawn as that one was: by the sampler, or uniformly for a partner."""
        rng = draw_rng(self.seed, draw.epoch, draw.position, REDRAW, attempt)
        by_weight = not draw.partner and hasattr(self.sampler, "redraw")
        return draw._replace(index=self.sampler.redraw(rng) if by_weight else int(rng.integers(self.n_clips)))

    def __len__(self) -> int:
        return super().__len__() // self.world_size

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]  # torch's yields integers
        epoch, n_partners = self.epoch, round(self.rate * self.batch_size)
        # Every rank walks through the whole sequence, so that the sampler draws the same clips on each, and takes its turns.
        turns = islice(enumerate(super().__iter__()), self.rank, len(self) * self.world_size, self.world_size)
        for k, clips in turns:
            # A spawn key, because default_rng([seed, epoch, 0]) is default_rng([seed, epoch]): the sampler's numbers.
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(k,)))
            partners = rng.integers(self.n_clips, size=round(self.rate * len(clips))).tolist()
            yield [
                *(Draw(row, epoch, i, False) for i, row in enumerate(clips, k * self.batch_size)),
                *(Draw(row, epoch, i, True) for i, row in enumerate(partners, len(self.sampler) + k * n_partners)),
            ]
