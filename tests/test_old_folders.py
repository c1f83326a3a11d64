"""Folders that the toolkit wrote before its modules moved, in November 2026: their text as it was, with seeded weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.inference.classifiers import EncoderClassifier

from psla_sb.checkpoints.weights import save_weights
from psla_sb.inference import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling

TAGGER = """\
sample_rate: 16000
compute_features: !new:psla_sb.lobes.features.KaldiFbank
  sample_rate: 16000
  n_mels: 64
  n_frames: 198
mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
  mean: -4.6476
  std: 4.5699

# Augmentation, in training only
embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder
  variant: b0
  pretrained:
  stem: random   # "sum": the sum of the RGB filters of the ImageNet weights
  norm_momentum: 0.1
  drop_connect: 0
  width: 0.5
  depth: 0.5
classifier: !new:psla_sb.lobes.pooling.AttentionPooling

# Sampling. A batch is what one process trains on at a time, before mixup's partners are added.
  in_channels: 640
  n_classes: 2
  n_heads: 4
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
mids:
- /m/1
- /m/2

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    custom_hooks:
        embedding_model: !name:psla_sb.checkpoints.load_module
        classifier: !name:psla_sb.checkpoints.load_module
"""
# as SpeechBrain wrote the settings of a run, with what a run's file has besides
RUN = """\
seed: 1
__set_seed: !apply:speechbrain.utils.seed_everything [1]
n_frames: 198
prepare:
- !name:psla_sb.dataio.mini.write_mini_audioset
  folder: /nowhere
sample_rate: 16000
compute_features: &id002 !new:psla_sb.lobes.features.KaldiFbank
  sample_rate: 16000
  n_mels: 64
  n_frames: 198
mean_var_norm: &id003 !new:psla_sb.lobes.features.GlobalNorm
  mean: -4.6476
  std: 4.5699
embedding_model: &id001 !new:psla_sb.lobes.efficientnet.EfficientNetEncoder
  variant: b0
  pretrained:
  stem: random
  norm_momentum: 0.1
  drop_connect: 0
  width: 0.5
  depth: 0.5
classifier: &id004 !new:psla_sb.lobes.pooling.AttentionPooling
  in_channels: !apply:getattr
  - *id001
  - out_channels
  n_classes: 2
  n_heads: 4
modules:
  compute_features: *id002
  mean_var_norm: *id003
  embedding_model: *id001
  classifier: *id004
schedule: !new:psla_sb.schedules.WarmupDecayScheduler
  lr: 0.002
checkpointer: !new:psla_sb.checkpoints.AtomicCheckpointer
  checkpoints_dir: results/mini/1/save
"""
RESULTS = '{"epochs": [{"epoch": 1, "mAP": 0.5, "mAUC": 0.5, "d_prime": 0.0}]}'


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    encoder = EfficientNetEncoder("b0", norm_momentum=0.1, drop_connect=0, width=0.5, depth=0.5).eval()
    return {"embedding_model": encoder, "classifier": AttentionPooling(640, 2).eval()}


@pytest.fixture(scope="module")
def wavs():
    return 0.1 * torch.randn(3, 32000, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(modules, wavs):
    with torch.no_grad():
        return modules["classifier"](modules["embedding_model"](GlobalNorm()(KaldiFbank(n_mels=64, n_frames=198)(wavs))))


@pytest.fixture(scope="module")
def old_tagger(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    (folder / "hyperparams.yaml").write_text(TAGGER)
    for name, module in modules.items():
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / f"{name}.ckpt")
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(["Bell", "Rain"])
    encoder.save(folder / "label_encoder.ckpt")
    return folder


@pytest.fixture(scope="module")
def old_run(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "hyperparams.yaml").write_text(RUN)
    (folder / "results.json").write_text(RESULTS)
    Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "class_labels_indices.csv")
    for name in ("average", "epoch_01"):
        save_weights(modules, folder / "snapshots" / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("load", [AudioTagger.from_folder, AudioTagger.from_hparams, AudioTagger.from_any])
def test_a_taggers_folder_gives_the_scores_that_it_gave(load, old_tagger, wavs, expected):
    tagger = load(old_tagger)
    np.testing.assert_allclose(tagger.score_batch(wavs), expected, atol=1e-6)
    assert [tagger.hparams.label_encoder.ind2lab[i] for i in range(2)] == ["Bell", "Rain"]


def test_speechbrains_interface_loads_it_too(old_tagger, wavs, expected, tmp_path):
    theirs = EncoderClassifier.from_hparams(source=str(old_tagger), savedir=str(tmp_path))
    np.testing.assert_allclose(theirs.classify_batch(wavs)[0], expected, atol=1e-6)


def test_a_runs_folder_gives_the_scores_that_it_gave(old_run, wavs, expected):
    taggers = [AudioTagger.from_experiment(old_run, weights) for weights in ("average", "best", "last", 1)]
    taggers += [AudioTagger.from_any(old_run), AudioTagger.from_snapshot(old_run / "snapshots" / "epoch_01.safetensors")]
    for tagger in taggers:
        np.testing.assert_allclose(tagger.score_batch(wavs), expected, atol=1e-6)
        assert tagger.hparams.mids == ["/m/1", "/m/2"]
