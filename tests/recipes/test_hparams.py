"""The full recipes' settings against the numbers of PSLA's publication."""

import math

import pytest
import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml

from runs import REPOSITORY

HPARAMS = REPOSITORY / "recipes" / "AudioSet" / "hparams"


@pytest.fixture(params=["psla", "psla_balanced", "psla_balanced_enhanced", "baseline"])
def recipe(request, tmp_path):
    """The name of a full recipe, its values as they stand in the file, and what they build, without ImageNet weights."""
    text = (HPARAMS / f"{request.param}.yaml").read_text(encoding="utf-8")
    overrides = {"data_folder": str(tmp_path), "output_folder": str(tmp_path / "run"), "pretrained": None}
    return request.param, ruamel.yaml.YAML().load(text), load_hyperpyyaml(text, overrides)


def test_optimisation(recipe):
    name, _, built = recipe
    lr, epochs, average_start, decay_start = {
        "psla": (1e-4, 30, 16, 10),
        "psla_balanced": (1e-3, 60, 41, 35),
        "psla_balanced_enhanced": (1e-3, 60, 41, 35),
        "baseline": (1e-4, 30, 16, 10),
    }[name]
    optimizer = built["optimizer"]([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == lr
    assert optimizer.defaults["betas"] == (0.95, 0.999)
    assert optimizer.defaults["weight_decay"] == 5e-7
    assert not optimizer.defaults["decoupled_weight_decay"]
    assert built["max_grad_norm"] == math.inf
    schedule = built["schedule"]
    assert (schedule.lr, schedule.warmup_steps, schedule.warmup_interval) == (lr, 1000, 50)
    assert (schedule.decay_start, schedule.decay_interval, schedule.decay_factor) == (decay_start, 5, 0.5)
    assert built["epoch_counter"].limit == epochs
    assert built["average_start"] == average_start
    assert built["batch_size"] == 100


def test_data_and_augmentation(recipe):
    name, values, built = recipe
    front_end, norm = built["compute_features"], built["mean_var_norm"]
    assert (front_end.sample_rate, front_end.n_mels, front_end.n_frames) == (16000, 128, 1056)
    assert (norm.mean, norm.std) == (-4.6476, 4.5699)
    assert built["mixup"].alpha == 10
    masks = (built["spec_augment"].freq_mask, built["spec_augment"].time_mask)
    techniques = (values["pretrained"], values["mixup_rate"], *masks)
    assert techniques == ((None, 0, 0, 0) if name == "baseline" else ("imagenet", 0.5, 48, 192))
    assert built["balanced_sampling"] == (name == "psla")
    enhancement = built["label_enhancement"]
    assert (enhancement and enhancement.keywords["threshold"]) == ("mean" if name == "psla_balanced_enhanced" else None)
    assert (built["class_weight_offset"], built["draws_per_epoch"], built["replacement"]) == (0.01, None, True)


def test_model(recipe):
    _, _, built = recipe
    encoder, pooling = built["embedding_model"], built["classifier"]
    assert values_of(encoder) == (1408, 0.2, {0.01}, {1e-3})
    assert (pooling.n_heads, pooling.cla[0].out_channels) == (4, 527)
    assert sum(p.numel() for module in (encoder, pooling) for p in module.parameters()) == 13_640_766


def values_of(encoder):
    """Output channels, drop-connect, and momentum and epsilon of all batch norms, rounded."""
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    drop_connect = encoder._global_params.drop_connect_rate
    return encoder.out_channels, drop_connect, {round(norm.momentum, 9) for norm in norms}, {norm.eps for norm in norms}
