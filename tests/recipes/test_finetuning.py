"""A run that starts from a trained tagger."""

import re

import torch

from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.tagger_folder import write_tagger
from psla_sb.checkpoints.weights import load_weights
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.pooling import AttentionPooling
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


def test_recipe_takes_over_the_classes_that_a_tagger_has_in_another_order(tiny_run, mini_data, tmp_path):
    """The tagger knows 37 of the recipe's 39 classes, the other way round, and a class of its own."""
    source = open_source(tiny_run[0] / "tagger")
    hparams, ours = source.hparams(), source.vocabulary
    mids, names = [*ours.mids[:1:-1], "/m/own"], [*ours.names[:1:-1], "Own"]
    definitions = {**source.definitions}
    heads, channels = hparams["classifier"].n_heads, hparams["embedding_model"].out_channels
    definitions["classifier"].update(in_channels=channels, n_classes=len(mids), n_heads=heads)
    theirs = AttentionPooling(channels, len(mids), heads)
    write_tagger(tmp_path / "tagger", definitions, {**hparams, "classifier": theirs}, Vocabulary(mids, names))
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "number_of_epochs": 1, "lr": 1e-30}
    run(command(TRAIN, "hparams/mini.yaml", pretrained_tagger=tmp_path / "tagger", **settings))
    ended = load_weights(snapshot_path(tmp_path / "run", 1))
    for key, value in theirs.state_dict().items():
        found = ended[f"classifier.{key}"]
        assert torch.equal(found if key == "head_weight" else found[2:], value if key == "head_weight" else value[:-1].flip(0)), key
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"; 0 not taken; by their mids 37 of 39 classes: {', '.join(ours.names[2:22])} and 17 more; the others start anew" in log
