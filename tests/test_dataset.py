"""TaggingDataset behind SpeechBrain's loader, as training uses it."""

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader

from psla_sb.dataio.audio import centred, read_clip
from psla_sb.dataio.batches import ClipBatch, pad_right
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, Draw, MixupBatchSampler
from psla_sb.labels.label_sets import LabelSets

LABELS = [[0], [2, 1], [], [3], [0, 3], [1], [2]]
BROKEN = 3


@pytest.fixture(params=["plain", "compact"])
def dataset(request, tmp_path):
    """Seven clips of different lengths, of which one is a text file."""
    rng = np.random.default_rng(0)
    for i in range(len(LABELS)):
        soundfile.write(tmp_path / f"{i}.wav", rng.uniform(-1, 1, 500 + 100 * i), 16000)
    (tmp_path / f"{BROKEN}.wav").write_text("no sound")
    manifest = Manifest.from_columns(
        [f"-{i}" for i in range(len(LABELS))],
        [f"{{data_root}}/{i}.wav" for i in range(len(LABELS))],
        [1.0] * len(LABELS),
        [""] * len(LABELS),
        data_root=tmp_path,
    )
    compact = request.param == "compact"
    return TaggingDataset(manifest, LabelSets.from_lists(LABELS), n_classes=4, n_samples=900, compact=compact)


def test_items(dataset, tmp_path):
    assert len(dataset) == len(LABELS)
    for i, labels in enumerate(LABELS):
        item = dataset[i]
        assert (item["id"], item["index"], item["partner"]) == (f"-{i}", i, False)
        assert torch.equal(item["target"], torch.tensor([float(c in labels) for c in range(4)]))
        if i != BROKEN:
            assert item["error"] is None
            clip = centred(item["samples"], item["mean"]) if dataset.compact else item["sig"]
            assert torch.equal(clip, read_clip(tmp_path / f"{i}.wav", n_samples=900))


def loader_batches(dataset, num_workers, epoch=1):
    sampler = MixupBatchSampler(BalancedSampler(np.ones(len(LABELS)), replacement=False, seed=5), len(LABELS), 4, seed=5)
    sampler.set_epoch(epoch)
    kwargs = {"num_workers": num_workers, "worker_init_fn": init_worker}
    kwargs["collate_fn"] = ClipBatch if dataset.compact else PaddedBatch
    return list(sampler), list(SaveableDataLoader(dataset, batch_sampler=sampler, **kwargs))


def test_batches_with_and_without_workers(dataset, tmp_path):
    draws, batches = loader_batches(dataset, num_workers=0)
    _, others = loader_batches(dataset, num_workers=2)
    assert [len(batch) for batch in batches] == [6, 5]
    for drawn, batch, other in zip(draws, batches, others, strict=True):
        assert list(batch.index) == list(other.index) == [draw.index for draw in drawn]
        assert list(batch.partner) == list(other.partner) == [draw.partner for draw in drawn]
        assert list(batch.id) == list(other.id) == [f"-{draw.index}" for draw in drawn]
        assert list(batch.error) == list(other.error)
        for key in ("sig", "target"):
            assert torch.equal(getattr(batch, key).data, getattr(other, key).data)
            assert torch.equal(getattr(batch, key).lengths, getattr(other, key).lengths)
        for i, draw in enumerate(drawn):
            if draw.index != BROKEN:
                clip = read_clip(tmp_path / f"{draw.index}.wav", n_samples=900)
                assert torch.equal(batch.sig.data[i, : len(clip)], clip)
                assert not batch.sig.data[i, len(clip) :].any()
                assert batch.sig.lengths[i] == pytest.approx(len(clip) / batch.sig.data.shape[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_file_arrives_as_a_value(num_workers, dataset, tmp_path):
    _, batches = loader_batches(dataset, num_workers)
    errors = {int(i): error for batch in batches for i, error in zip(batch.index, batch.error, strict=True)}
    assert sorted(errors) == list(range(len(LABELS)))
    assert errors.pop(BROKEN).startswith(f"{tmp_path / f'{BROKEN}.wav'}: cannot be decoded")
    assert set(errors.values()) == {None}


def test_a_draw_carries_its_place_in_the_epoch(dataset):
    dataset.add_dynamic_item(lambda epoch, position: (epoch, position), ["epoch", "position"], "seed")
    dataset.set_output_keys(["seed", "partner"])
    assert dataset[Draw(index=2, epoch=4, position=77, partner=True)] == {"seed": (4, 77), "partner": True}


KINDS = {
    "16 bits": {"subtype": "PCM_16"},
    "FLAC": {"subtype": "PCM_16", "format": "FLAC"},
    "24 bits": {"subtype": "PCM_24"},
    "floats": {"subtype": "FLOAT"},
    "stereo": {"subtype": "PCM_16", "channels": 2},
    "8 kHz": {"subtype": "PCM_16", "rate": 8000},
}


def mixed_files(folder, kinds):
    """Two data sets of the same clips, one of these kinds each, the second one compact."""
    rng = np.random.default_rng(0)
    for i, kind in enumerate(kinds):
        options = {"channels": 1, "rate": 16000, "format": "WAV", **KINDS[kind]}
        wave = rng.uniform(-0.5, 1, (300 + 500 * i, options.pop("channels")))
        soundfile.write(folder / f"{i}", wave, options.pop("rate"), **options)
    names = [str(i) for i in range(len(kinds))]
    manifest = Manifest.from_columns(names, [str(folder / name) for name in names], [1.0] * len(names), [""] * len(names))
    labels = LabelSets.from_lists([[0]] * len(names))
    return [TaggingDataset(manifest, labels, 1, n_samples=1000, crop="centre", compact=compact) for compact in (False, True)]


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["16 bits", "FLAC", "16 bits", "FLAC"], torch.int16),
        (["16 bits", "24 bits"], torch.float32),
        (["floats", "16 bits", "FLAC"], torch.float32),
        (["16 bits", "stereo"], torch.float32),
        (["8 kHz", "16 bits"], torch.float32),
    ],
)
def test_compact_batches_have_the_same_waveforms_to_the_last_bit(kinds, dtype, tmp_path):
    plain, compact = mixed_files(tmp_path, kinds)
    expected = PaddedBatch([plain[i] for i in range(len(kinds))], padding_func=pad_right)
    batch = ClipBatch([compact[i] for i in range(len(kinds))])
    assert batch.samples.data.dtype == dtype
    assert torch.equal(batch.sig.data, expected.sig.data)
    assert torch.equal(batch.sig.lengths, expected.sig.lengths)
    assert torch.equal(batch.to("cpu")["sig"].data, expected.sig.data)
    assert torch.equal(batch.target.data, expected.target.data)
    assert expected.sig.data.abs().max() > 0.5


def test_lengths_of_minutes_are_exact():
    lengths = [9_600_000, 6_964_981]
    batch = ClipBatch([{"samples": torch.zeros(n, dtype=torch.int16), "mean": 0.25} for n in lengths])
    assert (batch.sig.data == -0.25).sum(1).tolist() == lengths


def test_only_what_a_device_needs_goes_there(tmp_path):
    _, compact = mixed_files(tmp_path, ["16 bits", "FLAC"])
    batch = ClipBatch([compact[0], compact[1]]).to("meta")
    assert {batch.sig.data.device.type, batch.sig.lengths.device.type, batch.target.data.device.type} == {"meta"}
    assert batch.index.tolist() == [0, 1]
    assert sum(batch.partner) == 0


@pytest.mark.parametrize("dataset", ["compact"], indirect=True)
def test_a_broken_file_does_not_make_a_batch_larger(dataset):
    batch = ClipBatch([dataset[i] for i in range(len(LABELS))])
    assert batch.samples.data.dtype == torch.int16
    assert not batch.sig.data[BROKEN].any()
    assert [error is not None for error in batch.error] == [i == BROKEN for i in range(len(LABELS))]
