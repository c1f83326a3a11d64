"""Weights as people have them: wrapped, without counters, broken, of other networks, and of taggers with other classes."""

import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from efficientnet_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import nn

from psla_sb.checkpoints.psla import save_psla_checkpoint
from psla_sb.checkpoints.sources import Published, open_source
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.checkpoints.weights import load_weights, save_weights
from psla_sb.cli.import_psla import import_checkpoint
from psla_sb.cli.tag import tag
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.pooling import AttentionPooling, MeanPooling

MIDS = ["/m/dog", "/m/rain", "/m/bell"]


@pytest.fixture(scope="module")
def trained():
    """A published model of three classes: its encoder, its pooling, and its tensors as a plain file has them."""
    torch.manual_seed(5)
    encoder, pooling = EfficientNetEncoder("b0"), AttentionPooling(1280, 3, n_heads=2)
    parts = {"effnet": encoder, "attention": pooling}
    state = {f"{name}.{key}": value.contiguous() for name, part in parts.items() for key, value in part.state_dict().items()}
    return encoder, pooling, state


@pytest.fixture
def labels(tmp_path):
    Vocabulary(MIDS, ["Dog", "Rain", "Bell"]).to_csv(tmp_path / "labels.csv")
    return tmp_path / "labels.csv"


def error_of(command, capsys, *arguments):
    """What a command says that ends with an error."""
    with pytest.raises(SystemExit) as caught:
        command([str(argument) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def prefixed(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED = {
    "DataParallel twice": prefixed("module.module."),
    "compiled": prefixed("_orig_mod."),
    "compiled, then DataParallel": prefixed("module._orig_mod."),
    "a compiled encoder": lambda state: {re.sub(r"^effnet\.", "effnet._orig_mod.", key): value for key, value in state.items()},
    "state_dict": lambda state: {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": prefixed("module.")(state)},
    "model": lambda state: {"iteration": 7, "model": state},
    "one in another": lambda state: {"model": {"state_dict": state}},
    "no counters": lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("name", [*WRAPPED, "safetensors"])
def test_wrapped_checkpoints_are_imported(name, trained, labels, tmp_path):
    state, path = trained[2], tmp_path / "model.pth"
    if name == "safetensors":
        save_file(state, path)
    else:
        torch.save(WRAPPED[name](state), path)
    import_checkpoint([str(path), "--labels", str(labels), "--out", str(tmp_path / "tagger")])
    for file, part in (("embedding_model.ckpt", "effnet"), ("classifier.ckpt", "attention")):
        found = load_weights(tmp_path / "tagger" / file)
        assert {f"{part}.{key}" for key in found} == {key for key in state if key.startswith(f"{part}.")}
        for key, value in found.items():
            assert torch.equal(value, state[f"{part}.{key}"]), key


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module.module.", "within", "published"])
def test_wrapped_snapshots_start_a_training(wrap, trained, tmp_path):
    encoder, pooling, _ = trained
    name = "{}._orig_mod." if wrap == "within" else "{}." if wrap == "published" else f"{wrap}{{}}."
    names = ("effnet", "attention") if wrap == "published" else ("embedding_model", "classifier")
    parts = dict(zip(names, (encoder, pooling), strict=True))
    state = {name.format(part) + key: value.contiguous() for part in parts for key, value in parts[part].state_dict().items()}
    save_file({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "one.safetensors")
    modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": AttentionPooling(1280, 3, n_heads=2)}
    transfer = load_pretrained_tagger(tmp_path / "one.safetensors", modules)
    assert transfer.not_taken == []
    assert torch.equal(modules["embedding_model"]._conv_head.weight, encoder._conv_head.weight)
    assert torch.equal(modules["classifier"].head_weight, pooling.head_weight)


def test_names_that_two_tensors_would_share_are_left(trained, labels, tmp_path, capsys):
    state = {**trained[2], "module.effnet._bn0.weight": torch.zeros(32)}
    torch.save(state, tmp_path / "model.pth")
    error = error_of(import_checkpoint, capsys, tmp_path / "model.pth", "--labels", labels, "--out", tmp_path / "tagger")
    assert "unexpected module.effnet._bn0.weight" in error


@pytest.mark.parametrize("kind", ["folder", "snapshot", "published", "wrapped ImageNet"])
def test_pretrained_takes_the_encoder_of_any_trained_model(kind, trained, labels, tmp_path):
    encoder, pooling, state = trained
    expected = encoder.state_dict()
    if kind == "folder":
        torch.save(state, tmp_path / "model.pth")
        Published(tmp_path / "model.pth", labels).export(tmp_path / "tagger")
        path = tmp_path / "tagger" / "embedding_model.ckpt"
    elif kind == "snapshot":
        path = tmp_path / "epoch_01.safetensors"
        save_weights({"embedding_model": encoder, "classifier": pooling}, path)
    else:
        path = tmp_path / "file.pth"
        rgb = EfficientNet.from_name("efficientnet-b0").state_dict()
        torch.save(state if kind == "published" else {"state_dict": prefixed("module.")(rgb)}, path)
        if kind != "published":
            expected = {**rgb, "_conv_stem.weight": rgb["_conv_stem.weight"].sum(1, keepdim=True)}
    for key, value in EfficientNetEncoder("b0", pretrained=path, stem="sum").state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_nan_is_refused_by_name(trained, labels, tmp_path, capsys):
    state, clip = trained[2], tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(16000, np.float32), 16000)
    broken = state["effnet._bn1.bias"].clone()
    broken[:2] = torch.nan
    path, message = tmp_path / "model.pth", "2 of the 1280 numbers of '{}' are NaN: the training that wrote it had failed"
    torch.save({**state, "effnet._bn1.bias": broken}, path)
    error = error_of(import_checkpoint, capsys, path, "--labels", labels, "--out", tmp_path / "tagger")
    assert message.format("effnet._bn1.bias") in " ".join(error.split())
    with pytest.raises(InputError, match=r"'_bn1\.bias' are NaN"):
        EfficientNetEncoder("b0", pretrained=path)
    torch.save(state, path)
    import_checkpoint([str(path), "--labels", str(labels), "--out", str(tmp_path / "tagger")])
    file = tmp_path / "tagger" / "embedding_model.ckpt"
    save_file({**load_weights(file), "_bn1.bias": broken}, file)
    assert message.format("embedding_model._bn1.bias") in error_of(tag, capsys, clip, "--model", tmp_path / "tagger")
    with pytest.raises(InputError, match=r"tagger: 2 of the 1280 numbers of 'embedding_model\._bn1\.bias' are NaN"):
        load_pretrained_tagger(tmp_path / "tagger", {"embedding_model": EfficientNetEncoder("b0"), "classifier": nn.Identity()})


def test_infinity_may_be_meant(trained, labels, tmp_path):
    torch.save({**trained[2], "attention.head_weight": torch.tensor([1.0, torch.inf])}, tmp_path / "model.pth")
    import_checkpoint([str(tmp_path / "model.pth"), "--labels", str(labels), "--out", str(tmp_path / "tagger")])


def one(*names):
    return {name: torch.zeros(1) for name in names}


AST = one("module.v.cls_token", "module.v.patch_embed.proj.weight", "module.v.blocks.0.norm1.weight", "module.mlp_head.1.weight")
TRANSFORMERS = one("audio_spectrogram_transformer.embeddings.cls_token", "classifier.dense.weight")
PANNS = one("spectrogram_extractor.stft.conv_real.weight", "logmel_extractor.melW", "conv_block1.conv1.weight", "fc_audioset.bias")
OTHERS = {
    "page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"like a web page \(HTML\).*download the file itself"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
    "nothing": (b"", "it is empty: download it again"),
    "AST": (AST, r"looks like a checkpoint of AST \(Audio.*psla-compare reads such scores"),
    "AST of transformers": (TRANSFORMERS, r"looks like a checkpoint of AST \(Audio"),
    "PANNs": ({"iteration": 1, "model": PANNS}, r"looks like a checkpoint of PANNs.*bring the network \(README"),
    # what is beside the weights cannot be read without running code, but names can
    "PANNs with their sampler": ({"sampler": np.random.RandomState(0), "model": PANNS}, "looks like a checkpoint of PANNs"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_foreign_file_looks_like_is_said(name, labels, tmp_path, capsys):
    content, message = OTHERS[name]
    path = tmp_path / "model.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    found = re.compile(rf"model\.pth: .*{message}", re.DOTALL)
    assert found.search(error_of(import_checkpoint, capsys, path, "--labels", labels, "--out", tmp_path / "tagger"))
    assert found.search(error_of(tag, capsys, "x.wav", "--model", path))
    with pytest.raises(InputError) as caught:
        EfficientNetEncoder("b0", pretrained=path)
    assert found.search(str(caught.value))
    assert not (tmp_path / "tagger").exists()


@pytest.mark.parametrize("name", ["page", "pointer", "AST", "PANNs"])
def test_what_a_foreign_safetensors_file_looks_like_is_said(name, tmp_path):
    content, message = OTHERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content.get("model", content), path)
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}"):
        load_pretrained_tagger(path, {"embedding_model": EfficientNetEncoder("b0"), "classifier": nn.Identity()})


def test_own_snapshots_of_a_part_with_the_same_names_are_not_foreign(tmp_path):
    parts = {"embedding_model": nn.ModuleDict({"v": nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Linear(1, 1)})})})}
    parts["classifier"] = nn.ModuleDict({"mlp_head": nn.Linear(1, 1)})
    save_weights(parts, tmp_path / "one.safetensors")
    assert "embedding_model.v.patch_embed.proj.weight" in load_weights(tmp_path / "one.safetensors")
    assert load_pretrained_tagger(tmp_path / "one.safetensors", parts).not_taken == []
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file") as caught:
        load_pretrained_tagger(tmp_path / "one.safetensors", parts)
    assert "AST" not in str(caught.value)


def test_a_part_with_names_of_wrappers_keeps_them(tmp_path):
    """What the file and the model call alike is left alone, whatever it is called."""
    parts = {
        "embedding_model": nn.ModuleDict({"module": nn.Linear(1, 1), "_orig_mod": nn.Linear(1, 1)}),
        "classifier": nn.Linear(1, 1),
    }
    save_weights(parts, tmp_path / "one.safetensors")
    before = {key: value.clone() for key, value in parts["embedding_model"].state_dict().items()}
    for value in parts["embedding_model"].parameters():
        nn.init.zeros_(value)
    load_pretrained_tagger(tmp_path / "one.safetensors", parts)
    for key, value in parts["embedding_model"].state_dict().items():
        assert torch.equal(value, before[key]), key


def test_weights_without_a_pooling_and_own_snapshots_say_where_to_give_them(trained, labels, tmp_path, capsys):
    encoder, pooling, _ = trained
    torch.save(encoder.state_dict(), tmp_path / "imagenet.pth")
    save_weights({"embedding_model": encoder, "classifier": pooling}, tmp_path / "epoch_01.safetensors")
    for file, message in (("imagenet.pth", "such as ImageNet's: give it to pretrained"), ("epoch_01.safetensors", "psla-export")):
        error = error_of(import_checkpoint, capsys, tmp_path / file, "--labels", labels, "--out", tmp_path / "tagger")
        assert message in " ".join(error.split())


# a tagger's classes and a model's


@pytest.fixture
def tagger(trained, labels, tmp_path):
    torch.save(trained[2], tmp_path / "model.pth")
    Published(tmp_path / "model.pth", labels).export(tmp_path / "tagger")
    return tmp_path / "tagger"


@pytest.mark.parametrize(
    ("mids", "text"),
    [
        (["/m/bell", "/m/cat", "/m/dog", "/m/cow"], "by their mids 2 of 4 classes: c0, c2; the others start anew"),
        (["/m/rain", "/m/bell", "/m/dog"], "by their mids 3 of 3 classes: c0, c1, c2"),
        # as many classes as heads
        (["/m/rain", "/m/dog"], "by their mids 2 of 2 classes: c0, c1"),
    ],
)
def test_classes_that_both_have_are_taken_by_mid(mids, text, trained, tagger):
    pooling = trained[1]
    modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": AttentionPooling(1280, len(mids), n_heads=2)}
    before = {key: value.clone() for key, value in modules["classifier"].state_dict().items()}
    transfer = load_pretrained_tagger(tagger, modules, Vocabulary(mids, [f"c{i}" for i in range(len(mids))]))
    assert str(transfer).endswith(f"; 0 not taken; {text}")
    for key, value in modules["classifier"].state_dict().items():
        if key == "head_weight":
            assert torch.equal(value, pooling.head_weight)
            continue
        for i, mid in enumerate(mids):
            row = pooling.state_dict()[key][MIDS.index(mid)] if mid in MIDS else before[key][i]
            assert torch.equal(value[i], row), (key, mid)
    # what the model says of a class is what the tagger said of it
    feature_map = torch.rand(2, 1280, 2, 5)
    found, expected = modules["classifier"].eval()(feature_map), pooling.eval()(feature_map)
    both = [mid for mid in mids if mid in MIDS]
    to, of = ([names.index(mid) for mid in both] for names in (mids, MIDS))
    torch.testing.assert_close(found[:, to], expected[:, of])


@pytest.mark.parametrize(
    ("mids", "classifier", "text"),
    [
        (["/m/a", "/m/b", "/m/c"], AttentionPooling(1280, 3, 2), "by their mids 0 of 3 classes; the others start anew"),
        (["/m/dog", "/m/b"], AttentionPooling(1280, 2, 4), ""),
        (["/m/dog", "/m/b"], MeanPooling(1280, 2), ""),
    ],
)
def test_poolings_that_have_no_class_in_common_or_differ_otherwise_start_anew(mids, classifier, text, tagger):
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": classifier}
    transfer = load_pretrained_tagger(tagger, modules, Vocabulary(mids, mids))
    assert len(transfer.not_taken) == 9
    assert str(transfer).endswith(text or "classifier.head_weight")
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def head(hidden, n_classes):
    return nn.Sequential(nn.Linear(1280, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


@pytest.mark.parametrize(("hidden", "is_taken"), [(8, True), (3, False)])
def test_a_hidden_layer_as_wide_as_there_are_classes_is_not_taken_for_them(hidden, is_taken, trained, tmp_path):
    theirs, ours = head(hidden, 3), head(hidden, 3)
    before = ours[2].weight.clone()
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    Vocabulary(MIDS, MIDS).to_csv(tmp_path / "run" / "class_labels_indices.csv")
    file = tmp_path / "run" / "snapshots" / "epoch_01.safetensors"
    save_weights({"embedding_model": trained[0], "classifier": theirs}, file)
    modules, mids = {"embedding_model": EfficientNetEncoder("b0"), "classifier": ours}, MIDS[::-1]
    transfer = load_pretrained_tagger(file, modules, Vocabulary(mids, mids))
    assert transfer.classes == (mids if is_taken else None)
    assert torch.equal(ours[2].weight, theirs[2].weight.flip(0) if is_taken else before)
    if is_taken:
        assert torch.equal(ours[0].weight, theirs[0].weight)


def test_other_classes_than_a_checkpoints_that_does_not_say_its_own_are_as_before(trained, tmp_path):
    save_psla_checkpoint(tmp_path / "model.pth", trained[0], trained[1])
    modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": AttentionPooling(1280, 3, 2)}
    transfer = load_pretrained_tagger(tmp_path / "model.pth", modules, Vocabulary(["a", "b", "c"], ["A", "B", "C"]))
    assert transfer.not_taken == []
    assert torch.equal(modules["classifier"].cla[1].bias, trained[1].cla[1].bias)


def test_the_source_is_left_as_it_was(tagger, tmp_path):
    copy = shutil.copytree(tagger, tmp_path / "copy")
    modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": AttentionPooling(1280, 2, 2)}
    load_pretrained_tagger(tagger, modules, Vocabulary(MIDS[1:], MIDS[1:]))
    assert open_source(tagger).digest() == open_source(copy).digest()
