"""The full recipes' settings against the numbers of PSLA's publication."""

import math

import pytest
import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml

from runs import REPOSITORY

RECIPES = [f"AudioSet/{name}" for name in ("psla", "psla_balanced", "psla_balanced_enhanced", "baseline")]
RECIPES += [f"FSD50K/{name}" for name in ("psla", "psla_enhanced", "baseline")]


@pytest.fixture(params=RECIPES)
def recipe(request, tmp_path):
    """The name of a full recipe, its values as they stand in the file, and what they build, without ImageNet weights."""
    folder, name = request.param.split("/")
    text = (REPOSITORY / "recipes" / folder / "hparams" / f"{name}.yaml").read_text(encoding="utf-8")
    overrides = {"data_folder": str(tmp_path), "output_folder": str(tmp_path / "run"), "pretrained": None}
    return request.param, ruamel.yaml.YAML().load(text), load_hyperpyyaml(text, overrides)


def test_optimisation(recipe):
    name, _, built = recipe
    lr, epochs, average_start, decay_start, batch_size = {
        "AudioSet/psla": (1e-4, 30, 16, 10, 100),
        "AudioSet/psla_balanced": (1e-3, 60, 41, 35, 100),
        "AudioSet/psla_balanced_enhanced": (1e-3, 60, 41, 35, 100),
        "AudioSet/baseline": (1e-4, 30, 16, 10, 100),
        "FSD50K/psla": (5e-4, 40, 21, 10, 24),
        "FSD50K/psla_enhanced": (5e-4, 40, 21, 10, 24),
        "FSD50K/baseline": (5e-4, 40, 21, 10, 24),
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
    assert built["batch_size"] == batch_size


def test_data_and_augmentation(recipe):
    name, values, built = recipe
    front_end, norm = built["compute_features"], built["mean_var_norm"]
    assert (front_end.sample_rate, front_end.n_mels, front_end.n_frames) == (16000, 128, 3000 if "FSD50K" in name else 1056)
    assert (norm.mean, norm.std) == (-4.6476, 4.5699)
    assert built["mixup"].alpha == 10
    masks = (built["spec_augment"].freq_mask, built["spec_augment"].time_mask)
    techniques = (values["pretrained"], values["mixup_rate"], *masks)
    assert techniques == ((None, 0, 0, 0) if "baseline" in name else ("imagenet", 0.5, 48, 192))
    assert built["balanced_sampling"] == (name in ("AudioSet/psla", "FSD50K/psla", "FSD50K/psla_enhanced"))
    enhancement = built["label_enhancement"]
    assert (enhancement and enhancement.keywords["threshold"]) == ("mean" if "enhanced" in name else None)
    assert (built["class_weight_offset"], built["draws_per_epoch"], built["replacement"]) == (0.01, None, True)


def test_model(recipe):
    name, _, built = recipe
    encoder, pooling = built["embedding_model"], built["classifier"]
    assert values_of(encoder) == (1408, 0.2, {0.01}, {1e-3})
    n_classes = 200 if "FSD50K" in name else 527
    assert (pooling.n_heads, pooling.cla[0].out_channels) == (4, n_classes)
    # each head has two convolutions of 1408 weights and a bias for a class
    n_parameters = sum(p.numel() for module in (encoder, pooling) for p in module.parameters())
    assert n_parameters == 13_640_766 - 4 * 2 * 1409 * (527 - n_classes)


def values_of(encoder):
    """Output channels, drop-connect, and momentum and epsilon of all batch norms, rounded."""
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    drop_connect = encoder._global_params.drop_connect_rate
    return encoder.out_channels, drop_connect, {round(norm.momentum, 9) for norm in norms}, {norm.eps for norm in norms}


def test_published_figures_are_of_the_labels_that_are_trained_on(recipe):
    name, values, _ = recipe
    published = {
        "AudioSet/psla": {"last": 0.440, "weight_average": 0.444, "ensemble": 0.453},
        "FSD50K/psla": {"best": 0.558},
        "FSD50K/psla_enhanced": {"best": 0.558, "weight_average": 0.562, "ensemble": 0.573},
    }
    assert values["published"] == published.get(name, {})


def test_fsd50k_is_picked_on_validation_and_reported_on_eval(recipe):
    name, values, built = recipe
    if "FSD50K" in name:
        assert values["expected_clips"] == {"train": 36796, "valid": 4170, "eval": 10231}
        assert (built["valid_annotation"].rpartition("/")[2], built["test_annotation"].rpartition("/")[2]) == (
            "valid.csv",
            "eval.csv",
        )
        assert built["prepare"][-1].keywords["expected_clips"] == values["expected_clips"]
