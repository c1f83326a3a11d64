"""The baseline against scikit-learn's own figures, on features computed clip by clip."""

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import psla_sb.experiment.baseline
from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment.baseline import band_statistics, baseline
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import CentredFbank, KaldiFbank

VOCABULARY = Vocabulary(["low", "high", "never"], ["Low", "High", "Never"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Noise of two colours and of different lengths, as train, valid and test."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    sets = {}
    for name, n in (("train", 40), ("valid", 21), ("test", 30)):
        columns = [], [], [], []
        for i in range(n):
            noise = rng.standard_normal(rng.integers(4000, 12000))
            labels = [["low"], ["high"], ["low", "high"], []][i % 4]
            wave = noise + 0.4 * ("low" in labels) * np.cumsum(noise) / 8 + 0.3 * ("high" in labels) * np.diff(noise, prepend=0)
            soundfile.write(folder / f"{name}{i}.wav", 0.02 * wave, 16000)
            for column, value in zip(columns, (f"{i}", str(folder / f"{name}{i}.wav"), None, ";".join(labels)), strict=True):
                column.append(value)
        sets[name] = Manifest.from_columns(*columns, source=name)
    return sets


def hparams(front_end):
    return {
        "sample_rate": 16000,
        "n_frames": 60,
        "num_workers": 0,
        "eval_crop": "first",
        "modules": {"compute_features": front_end},
    }


def expected_statistics(front_end, clip):
    wave = read_audio(clip["wav"], 16000)
    # clips come without their mean
    feats = front_end((wave - wave.mean())[None])[0]
    return torch.cat([feats.mean(0), feats.std(0, correction=0)]).numpy()


@pytest.mark.parametrize("kind", [KaldiFbank, lambda **options: CentredFbank(16000, hop_length=160, highest=7800, **options)])
def test_statistics_are_those_of_each_clip_alone(clips, kind):
    found = band_statistics(clips["train"], hparams(kind(n_mels=16, n_frames=60)))
    alone = kind(n_mels=16)
    # what a clip has within 60 frames, without what fills it up; the longest ones are cut
    short = [row for row in range(40) if len(read_audio(clips["train"][row]["wav"], 16000)) < 9000]
    assert len(short) > 10
    expected = np.stack([expected_statistics(alone, clips["train"][row]) for row in short])
    np.testing.assert_allclose(found[short], expected, rtol=1e-3, atol=2e-3)


def test_figures_are_those_of_scikit_learn(clips):
    front_end = KaldiFbank(n_mels=16, n_frames=60)
    found = baseline(hparams(front_end), clips, VOCABULARY)
    statistics = {name: band_statistics(manifest, hparams(front_end)) for name, manifest in clips.items()}
    mean, spread = statistics["train"].mean(0), statistics["train"].std(0)
    targets = {name: manifest.targets(VOCABULARY) for name, manifest in clips.items()}
    precision = {"valid": {}, "test": {}}
    for strength in (0.01, 0.1, 1.0):
        for name, of_set in precision.items():
            each = []
            for c in range(2):
                model = LogisticRegression(C=strength, max_iter=1000)
                model.fit((statistics["train"] - mean) / spread, targets["train"][:, c])
                scores = model.predict_proba((statistics[name] - mean) / spread)[:, 1]
                each.append(average_precision_score(targets[name][:, c], scores))
            of_set[strength] = np.mean(each)
    chosen = max(precision["valid"], key=precision["valid"].get)
    assert found["C"] == chosen
    # a class that no clip has counts in no mean
    assert found["mAP"] == pytest.approx(precision["test"][chosen], abs=1e-6)
    assert found["mAP"] > 0.6


def test_the_same_whether_the_model_trains_or_not(clips):
    front_end = CentredFbank(16000, n_mels=16, n_frames=60, highest=7000, edge_ranges=(10, 1000))
    before = band_statistics(clips["valid"], hparams(front_end.eval()))
    np.testing.assert_array_equal(band_statistics(clips["valid"], hparams(front_end.train())), before)


def test_of_many_clips_some_are_learnt_from_wherever_they_are(clips, monkeypatch):
    """Clips may be sorted by class; those that are scored are all scored."""
    order = sorted(range(40), key=lambda row: clips["train"][row]["labels"])
    rows = [clips["train"][row] for row in order]
    columns = [[row[key] for row in rows] for key in ("id", "wav", "duration")]
    train = Manifest.from_columns(*columns, [";".join(row["labels"]) for row in rows], source="train")
    monkeypatch.setattr(psla_sb.experiment.baseline, "MOST_CLIPS", 20)
    found = baseline(hparams(KaldiFbank(n_mels=16, n_frames=60)), {**clips, "train": train}, VOCABULARY)
    # the first half of the clips has none of the one class
    assert {label for row in rows[:20] for label in row["labels"]} == {"high"}
    assert found["mAP"] > 0.6
