"""A run that starts from a trained tagger."""

import re

import torch

from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_weights
from runs import TRAIN, command, run


def test_recipe_starts_from_a_trained_tagger(tiny_run, mini_data, tmp_path):
    """With a learning rate of 0 what the run ends with is what it began with."""
    hparams = re.sub(r"(?m)^pretrained_tagger:.*\n", "", (TRAIN.parent / "hparams" / "mini.yaml").read_text(encoding="utf-8"))
    (tmp_path / "mini.yaml").write_text(f"{hparams}pretrained_tagger: {tiny_run[0] / 'tagger'}\n", encoding="utf-8")
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "number_of_epochs": 1, "lr": 1e-30, "n_heads": 1}
    run(command(TRAIN, str(tmp_path / "mini.yaml"), **settings))
    begun = load_weights(tiny_run[0] / "tagger" / "embedding_model.ckpt")
    ended = load_weights(snapshot_path(tmp_path / "run", 1))
    for key, value in begun.items():
        if key.endswith((".weight", ".bias")):
            assert torch.equal(ended[f"embedding_model.{key}"], value), key
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{len(begun)} tensors taken; 17 not taken: classifier." in log
