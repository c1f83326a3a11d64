"""Published checkpoints: the published code's probabilities, exact round trips, and files that must be refused."""

import re

import numpy as np
import pytest
import soundfile
import torch
from efficientnet_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import nn

from psla_sb.checkpoints.psla import load_psla_checkpoint, save_psla_checkpoint
from psla_sb.checkpoints.sources import Published
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.checkpoints.weights import load_into, load_weights, save_weights
from psla_sb.cli.import_psla import import_checkpoint as main
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling, MeanPooling

# What the published code gave for clips 0 and 1 through state_dict("b0", 4, 200): the probabilities of every tenth class.
# fmt: off
PUBLISHED = {
    "symmetric": [
        [0.36455675959587097, 0.4352891147136688, 0.38352757692337036, 0.5537372827529907, 0.5529122352600098,
         0.3123038709163666, 0.6889766454696655, 0.49443453550338745, 0.4674844741821289, 0.744879961013794,
         0.4815162718296051, 0.31623315811157227, 0.4813515543937683, 0.6078622341156006, 0.31927645206451416,
         0.2765870690345764, 0.5113610625267029, 0.21057984232902527, 0.43102264404296875, 0.5248978137969971],
        [0.4685654938220978, 0.41055387258529663, 0.47799432277679443, 0.5646229982376099, 0.47429442405700684,
         0.4602866470813751, 0.5020161271095276, 0.5677220821380615, 0.5346159934997559, 0.56389981508255,
         0.45574069023132324, 0.42304861545562744, 0.4487859606742859, 0.6050474643707275, 0.45413705706596375,
         0.39646878838539124, 0.5548940896987915, 0.4741537272930145, 0.42633360624313354, 0.6121869087219238],
    ],
    "tensorflow": [
        [0.4850122928619385, 0.40213242173194885, 0.4984135329723358, 0.5454765558242798, 0.4835365414619446,
         0.44135797023773193, 0.5439836978912354, 0.5641891956329346, 0.5437671542167664, 0.5536996126174927,
         0.46912962198257446, 0.42973649501800537, 0.4859294295310974, 0.5993660688400269, 0.466516375541687,
         0.40266579389572144, 0.5551590323448181, 0.44817841053009033, 0.4491688013076782, 0.5797631740570068],
        [0.47628259658813477, 0.41894352436065674, 0.488486111164093, 0.5735214948654175, 0.48032814498901367,
         0.45082563161849976, 0.4885740876197815, 0.5693614482879639, 0.542884349822998, 0.5470526814460754,
         0.45386064052581787, 0.4284272789955139, 0.480853796005249, 0.5921670198440552, 0.45268362760543823,
         0.3987810015678406, 0.5650033354759216, 0.46799683570861816, 0.4432852864265442, 0.6100713610649109],
    ],
}
# fmt: on


def clip(i):
    """A chirp in noise with an offset, int16 `[samples]` at 16 kHz."""
    seconds, amplitude = [(10.0, 0.1), (3.21, 0.5)][i]
    n = int(seconds * 16000)
    t = np.arange(n) / 16000
    noise = np.random.default_rng(100 + i).standard_normal(n)
    chirp = np.sin(2 * np.pi * (200 + 300 * i) * t * (1 + 0.1 * t / seconds))
    wave = amplitude * (0.5 * noise * 0.3 + chirp) + 0.01 * i
    return np.clip(np.round(wave * 32767), -32768, 32767).astype("int16")


def layout(variant, n_heads, n_classes, prefix="module."):
    """Names and shapes of the published layout; 0 heads: mean pooling."""
    encoder = EfficientNet.from_name(f"efficientnet-{variant}", in_channels=1)
    shapes = {f"effnet.{key}": value.shape for key, value in encoder.state_dict().items() if not key.startswith("_fc.")}
    for part in ["att", "cla"] if n_heads else ["cla"]:
        for head in [f".{head}" for head in range(n_heads)] if n_heads > 1 else [""]:
            shapes[f"attention.{part}{head}.weight"] = (n_classes, encoder._conv_head.out_channels, 1, 1)
            shapes[f"attention.{part}{head}.bias"] = (n_classes,)
    if n_heads > 1:
        shapes["attention.head_weight"] = (n_heads,)
    return {prefix + key: torch.Size(shape) for key, shape in shapes.items()}


def state_dict(variant, n_heads, n_classes, prefix="module."):
    """Seeded weights in the published layout, the ones that the published figures were computed with."""
    generator = torch.Generator().manual_seed(1000 + int(variant[1]) * 10 + n_heads)
    state = {}
    for key, shape in sorted(layout(variant, n_heads, n_classes, prefix="").items()):
        if "num_batches" in key:
            value = torch.tensor(7)
        elif "running_var" in key:
            value = torch.rand(shape, generator=generator) * 0.3 + (0.7 if variant == "b0" else 0.8)
        elif "running_mean" in key:
            value = torch.randn(shape, generator=generator) * 0.1
        elif key.endswith("head_weight"):
            value = torch.arange(1, n_heads + 1) / 10
        elif len(shape) == 1 and key.endswith("weight"):
            value = torch.rand(shape, generator=generator) * 0.4 + 0.8
        elif len(shape) == 1:
            value = torch.randn(shape, generator=generator) * 0.1
        else:
            value = torch.randn(shape, generator=generator) * (2.0 / (shape.numel() // shape[0])) ** 0.5
        state[prefix + key] = value
    return state


@pytest.fixture
def save(tmp_path):
    def save_to_file(state):
        torch.save(state, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return save_to_file


@pytest.fixture(scope="module")
def published_state():
    return state_dict("b0", 4, 200)


@pytest.fixture(scope="module")
def small_state():
    return state_dict("b0", 2, 3)


@pytest.fixture
def labels(tmp_path):
    """Writes a class list."""

    def write(n_classes):
        names = [f"Sound, number {i}" for i in range(n_classes)]
        Vocabulary([f"/m/{i}" for i in range(n_classes)], names).to_csv(tmp_path / f"labels_{n_classes}.csv")
        return tmp_path / f"labels_{n_classes}.csv"

    return write


def feats(i, n_frames=1056):
    wave = torch.from_numpy(clip(i).astype("float32") / 32768)
    return GlobalNorm()(KaldiFbank(n_frames=n_frames)(wave[None]))


# The published figures


@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
@torch.no_grad()
def test_probabilities_are_those_of_the_published_code(save, published_state, padding):
    encoder, pooling = load_psla_checkpoint(save(published_state), padding)
    found = torch.cat([pooling(encoder(feats(i))) for i in (0, 1)])
    assert found.shape == (2, 200)
    torch.testing.assert_close(found[:, ::10], torch.tensor(PUBLISHED[padding]), atol=1e-5, rtol=0)


def test_official_checkpoints_are_padded_symmetrically_unless_told_otherwise(save, published_state, labels):
    tagger = AudioTagger.from_psla_checkpoint(save(published_state), labels=labels(200))
    scores = torch.cat([tagger.score_batch(torch.from_numpy(clip(i).astype("float32") / 32768)[None]) for i in (0, 1)])
    torch.testing.assert_close(scores[:, ::10], torch.tensor(PUBLISHED["symmetric"]), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
@torch.no_grad()
def test_published_figures_on_a_gpu(save, published_state, padding, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    encoder, pooling = (module.cuda() for module in load_psla_checkpoint(save(published_state), padding))
    x = torch.cat([feats(0), feats(1)]).cuda()
    exact = pooling(encoder(x))
    torch.testing.assert_close(exact[:, ::10].cpu(), torch.tensor(PUBLISHED[padding]), atol=1e-3, rtol=0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = pooling(encoder(x))
    torch.testing.assert_close(half, exact, atol=0.02, rtol=0)


class PublishedModel(nn.Module):
    """The published model restated: efficientnet_pytorch's network, mean over frequency, multi-head attention."""

    def __init__(self, n_heads, n_classes):
        super().__init__()
        self.effnet = EfficientNet.from_name("efficientnet-b0", in_channels=1)
        self.effnet._fc = nn.Identity()
        self.attention = nn.Module()
        self.attention.att = nn.ModuleList(nn.Conv2d(1280, n_classes, 1) for _ in range(n_heads))
        self.attention.cla = nn.ModuleList(nn.Conv2d(1280, n_classes, 1) for _ in range(n_heads))
        self.attention.head_weight = nn.Parameter(torch.zeros(n_heads))

    def forward(self, x):
        x = self.effnet.extract_features(x.unsqueeze(1).transpose(2, 3)).mean(2, keepdim=True)
        answer = 0.0
        for att, cla, weight in zip(self.attention.att, self.attention.cla, self.attention.head_weight, strict=True):
            a = torch.sigmoid(att(x))[:, :, 0].clamp(1e-7, 1 - 1e-7)
            a = a / a.sum(2, keepdim=True)
            answer = answer + weight * (a * torch.sigmoid(cla(x))[:, :, 0]).sum(2)
        return answer


@torch.no_grad()
def test_saved_model_computes_the_same_in_the_published_code(tmp_path):
    torch.manual_seed(0)
    encoder, pooling = EfficientNetEncoder("b0").eval(), AttentionPooling(1280, 5, n_heads=4)
    pooling.head_weight.copy_(torch.tensor([0.4, 0.1, 0.2, 0.3]))
    save_psla_checkpoint(tmp_path / "model.pth", encoder, pooling)
    published = nn.DataParallel(PublishedModel(4, 5)).eval()
    published.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    x = torch.randn(2, 200, 128)
    torch.testing.assert_close(pooling(encoder(x)), published.module(x), atol=1e-5, rtol=0)


# Reading and writing


@pytest.mark.parametrize(
    ("variant", "n_heads", "n_classes"), [("b0", 4, 527), ("b0", 1, 3), ("b0", 0, 11), ("b0", 3, 200), ("b1", 2, 1), ("b3", 0, 50)]
)
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_round_trip_is_exact(save, tmp_path, variant, n_heads, n_classes, prefix):
    state = state_dict(variant, n_heads, n_classes, prefix)
    encoder, pooling = load_psla_checkpoint(save(state))
    assert isinstance(pooling, AttentionPooling if n_heads else MeanPooling)
    assert getattr(pooling, "n_heads", 0) == n_heads
    assert not encoder.training
    assert not pooling.training
    save_psla_checkpoint(tmp_path / "again.pth", encoder, pooling)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert {key: value.shape for key, value in again.items()} == layout(variant, n_heads, n_classes)
    for key, value in state.items():
        saved = again[f"module.{key.removeprefix('module.')}"]
        assert torch.equal(saved, value), key
        assert saved.dtype == value.dtype
        assert saved.is_contiguous()
    assert not list(tmp_path.glob("tmp+*"))


@pytest.mark.parametrize(("variant", "out_channels"), [("b1", 1280), ("b2", 1408), ("b5", 2048)])
def test_variant_is_read_off_the_tensors(save, variant, out_channels):
    with torch.device("meta"):
        shapes = layout(variant, 0, 7)
    zero = torch.zeros(())
    # one stored number for each tensor keeps the files small
    encoder, pooling = load_psla_checkpoint(save({key: zero.expand(shape) for key, shape in shapes.items()}))
    expected = {key.removeprefix("module.effnet."): shape for key, shape in shapes.items() if "effnet" in key}
    assert {key: value.shape for key, value in encoder.state_dict().items()} == expected
    assert encoder.out_channels == out_channels
    assert pooling.cla.out_channels == 7


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_leftovers_of_the_imagenet_classifier_are_ignored(save, prefix):
    state = state_dict("b0", 1, 4, prefix)
    left = {f"{prefix}effnet._fc.weight": torch.ones(1000, 1280), f"{prefix}effnet._fc.bias": torch.ones(1000)}
    encoder, _ = load_psla_checkpoint(save({**state, **left}))
    assert torch.equal(encoder._bn1.weight, state[f"{prefix}effnet._bn1.weight"])


def test_half_precision_is_read_as_float32(save, small_state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in small_state.items()}
    encoder, pooling = load_psla_checkpoint(save(half))
    assert {p.dtype for module in (encoder, pooling) for p in module.parameters()} == {torch.float32}
    assert torch.equal(pooling.head_weight, half["module.attention.head_weight"].float())


# What is refused


class WritesAFile:
    """A pickle that would write a file if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("wrap", [lambda code, state: {**state, "code": code}, lambda code, state: code])
def test_code_in_a_file_is_not_run(save, small_state, tmp_path, wrap):
    trace = tmp_path / "code_was_run"
    path = save(wrap(WritesAFile(trace), small_state))
    with pytest.raises(InputError, match=r"model\.pth: not a checkpoint that can be loaded without running code"):
        load_psla_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert trace.exists()


@pytest.mark.parametrize("size", [0, 10, 5000, -100])
def test_cut_off_files(save, small_state, size):
    path = save(small_state)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.pth: not a checkpoint"):
        load_psla_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"module.effnet._bn0.weight": "tensor"}, "'module.effnet._bn0.weight' is not a name with a plain tensor"),
        ({"state_dict": {"attention.cla.weight": torch.zeros(3, 1280, 1, 1)}}, r"no tensor 'effnet\.\*'"),
        ({"state_dict": {"effnet._bn0.weight": "tensor"}}, "'effnet._bn0.weight' is not a name with a plain tensor"),
        ({"state_dict": "elsewhere"}, "'state_dict' is not a name with a plain tensor"),
        ({7: torch.zeros(1)}, "7 is not a name with a plain tensor"),
        ({"effnet._bn0.weight": torch.zeros(32).to_sparse()}, "'effnet._bn0.weight' is not a name with a plain tensor"),
        ({"effnet._bn0.weight": torch.zeros(32, device="meta")}, "'effnet._bn0.weight' is not a name with a plain tensor"),
        ({}, r"no tensor 'effnet\.\*'"),
        ({"attention.cla.weight": torch.zeros(3, 1280, 1, 1)}, r"no tensor 'effnet\.\*'"),
    ],
)
def test_files_that_hold_something_else(save, content, message):
    with pytest.raises(InputError, match=rf"model\.pth: .*{message}"):
        load_psla_checkpoint(save(content))


def test_no_file(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(InputError, match=f"{re.escape(str(path))}: no such checkpoint file"):
            load_psla_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.effnet._bn0.weight"), "missing module.effnet._bn0.weight"),
        (lambda s: s.pop("module.effnet._conv_head.weight"), "missing module.effnet._conv_head.weight"),
        (lambda s: s.pop("module.attention.head_weight"), "missing module.attention.head_weight"),
        (lambda s: s.pop("module.attention.att.1.bias"), "missing module.attention.att.1.bias"),
        (lambda s: s.update({"module.extra": torch.zeros(1)}), "unexpected module.extra"),
        (lambda s: s.update({"effnet._bn0.weight": torch.zeros(32)}), "unexpected effnet._bn0.weight"),
        (lambda s: s.update({"module.effnet._bn0.bias": torch.zeros(5)}), r"module.effnet._bn0.bias is \[5\], not \[32\]"),
        (lambda s: s.update({"module.attention.cla.0.bias": torch.zeros(9)}), r"module.attention.cla.0.bias is \[9\], not \[3\]"),
        (lambda s: s.update({"module.attention.cla.0.bias": torch.zeros(())}), r"module.attention.cla.0.bias is \[\], not \[3\]"),
        (lambda s: s.update({"module.attention.head_weight": torch.zeros(4)}), r"head_weight is \[4\], not \[2\]"),
        (
            lambda s: s.update({"module.effnet._conv_stem.weight": torch.zeros(32, 3, 3, 3)}),
            r"_conv_stem.weight is \[32, 3, 3, 3\], not \[32, 1, 3, 3\]",
        ),
    ],
)
def test_wrong_tensors_are_named(save, small_state, change, message):
    state = dict(small_state)
    change(state)
    with pytest.raises(InputError, match=message) as error:
        load_psla_checkpoint(save(state))
    assert "model.pth, read as a PSLA checkpoint of efficientnet-b0, does not fit" in str(error.value)
    assert len(str(error.value)) < 400  # this tensor and no others


def test_a_model_without_pooling_is_refused(save, small_state):
    with pytest.raises(InputError, match=r"missing module\.attention\.cla\.weight; missing module\.attention\.cla\.bias"):
        load_psla_checkpoint(save({key: value for key, value in small_state.items() if "attention" not in key}))


def test_unknown_padding(save, small_state):
    with pytest.raises(ValueError, match="tensorflow, symmetric"):
        load_psla_checkpoint(save(small_state), padding="same")


# The command line


@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
@pytest.mark.parametrize("n_heads", [4, 1, 0])
def test_command_line_writes_a_tagger(save, labels, tmp_path, capsys, padding, n_heads):
    path = save(state_dict("b0", n_heads, 6))
    argv = [str(path), "--labels", str(labels(6)), "--out", str(tmp_path / "tagger"), "--n-frames", "200"]
    main(argv if padding == "symmetric" else [*argv, "--padding", padding])
    assert f"psla-tag --model {tmp_path / 'tagger'}" in capsys.readouterr().out
    soundfile.write(tmp_path / "clip.wav", clip(1), 16000)
    encoder, pooling = load_psla_checkpoint(path, padding)
    with torch.no_grad():
        expected = pooling(encoder(feats(1, 200)))[0].clamp(0, 1)
    (tmp_path / "tagger").rename(tmp_path / "moved")
    for load in (AudioTagger.from_folder, lambda folder: AudioTagger.from_hparams(source=str(folder))):
        tags = load(tmp_path / "moved").tag_file(tmp_path / "clip.wav", top_k=6, pool="first")
        scores = {tag.mid: tag.score for tag in tags}
        np.testing.assert_allclose([scores[f"/m/{i}"] for i in range(6)], expected, atol=1e-5)
        assert all(tag.label == f"Sound, number {tag.mid[3:]}" for tag in tags)


def test_command_line_errors(save, small_state, labels, tmp_path, capsys):
    path, out = save(small_state), tmp_path / "tagger"
    (tmp_path / "taken").write_text("a file")
    for argv, message in [
        ([tmp_path / "nowhere.pth", "--labels", labels(3), "--out", out], "nowhere.pth: no such checkpoint file"),
        ([path, "--labels", labels(4), "--out", out], "labels_4.csv has 4 classes, but .*model.pth is a model of 3"),
        ([path, "--labels", tmp_path / "none.csv", "--out", out], "none.csv: cannot read this class list"),
        ([path, "--labels", labels(3), "--out", out, "--padding", "same"], "invalid choice: 'same'"),
        ([path, "--labels", labels(3), "--out", out, "--n-frames", "0"], "--n-frames must be 1 or more"),
        ([path, "--labels", labels(3), "--out", tmp_path / "taken"], "taken"),
        ([path, "--labels", labels(3)], "--out"),
    ]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in argv])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "Traceback" not in error
        assert not out.exists()


# Starting a training from a trained tagger


def model(n_classes=3, n_heads=2, variant="b0", padding="symmetric"):
    encoder = EfficientNetEncoder(variant, padding=padding)
    pooling = (
        AttentionPooling(encoder.out_channels, n_classes, n_heads) if n_heads else MeanPooling(encoder.out_channels, n_classes)
    )
    return {"embedding_model": encoder, "classifier": pooling}


def flat(modules):
    return {f"{name}.{key}": value.clone() for name, module in modules.items() for key, value in module.state_dict().items()}


@pytest.fixture(params=["checkpoint", "folder", "snapshot"])
def source(request, save, small_state, labels, tmp_path):
    """The same trained model of 3 classes in each form that training can start from."""
    path = save(small_state)
    if request.param == "folder":
        Published(path, labels(3)).export(tmp_path / "tagger")
        return tmp_path / "tagger"
    if request.param == "snapshot":
        encoder, pooling = load_psla_checkpoint(path)
        save_weights({"embedding_model": encoder, "classifier": pooling}, tmp_path / "snapshots" / "epoch_01.safetensors")
        return tmp_path / "snapshots" / "epoch_01.safetensors"
    return path


def names(state):
    return {key.replace("module.effnet.", "embedding_model.").replace("module.attention.", "classifier.") for key in state}


def test_same_classes_take_everything(source, small_state, caplog):
    modules = model()
    transfer = load_pretrained_tagger(str(source), modules)
    found = flat(modules)
    assert set(transfer.taken) == names(small_state) == set(found)
    assert transfer.not_taken == []
    for key, value in small_state.items():
        assert torch.equal(found[names([key]).pop()], value)
    assert str(transfer) == f"{len(small_state)} tensors taken; 0 not taken"
    assert not caplog.records


@pytest.mark.parametrize("arguments", [{"n_classes": 5}, {"n_heads": 1}, {"n_heads": 0}])
def test_other_classes_take_the_encoder_alone(source, small_state, arguments):
    modules = model(**arguments)
    before = flat(modules)
    transfer = load_pretrained_tagger(source, modules)
    found = flat(modules)
    attention = {key for key in small_state if "attention" in key}
    assert set(transfer.not_taken) == names(attention)
    assert set(transfer.taken) == names(small_state) - names(attention)
    assert "not taken: classifier." in str(transfer)
    for key in small_state.keys() - attention:
        assert torch.equal(found[names([key]).pop()], small_state[key])
    for key, value in before.items():
        if key.startswith("classifier."):
            assert torch.equal(found[key], value)


def test_another_encoder_is_refused(source):
    modules = model(variant="b1")
    before = flat(modules)
    with pytest.raises(InputError, match=r"does not fit the model: .*choose the variant") as error:
        load_pretrained_tagger(source, modules)
    assert str(source) in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in flat(modules).items())


def test_another_padding_warns(source, caplog, tmp_path):
    if source.suffix == ".safetensors":
        load_pretrained_tagger(source, model(padding="tensorflow"))
        assert not caplog.records  # nobody knows
        hparams = "embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder {variant: b0, padding: symmetric}\n"
        (tmp_path / "hyperparams.yaml").write_text(hparams)
    load_pretrained_tagger(source, model(padding="tensorflow"))
    assert "trained with padding 'symmetric', but the model pads 'tensorflow'" in caplog.text
    caplog.clear()
    load_pretrained_tagger(source, model())
    assert not caplog.records


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4"])
def test_padding_of_every_model_is_told(tmp_path, caplog, variant):
    """A YAML file without the key means the default, `tensorflow`."""
    (tmp_path / "hyperparams.yaml").write_text("embedding_model: {variant: any}\n")
    with torch.device("meta"):
        modules = {padding: model(variant=variant, padding=padding) for padding in ("tensorflow", "symmetric")}
    state = {key: torch.zeros(()).expand(value.shape).contiguous() for key, value in flat(modules["symmetric"]).items()}
    (tmp_path / "snapshots").mkdir()
    save_file(state, tmp_path / "snapshots" / "one.safetensors")
    for padding, records in (("tensorflow", 0), ("symmetric", 1)):
        for module in modules[padding].values():
            module.to_empty(device="cpu")
        load_pretrained_tagger(tmp_path / "snapshots" / "one.safetensors", modules[padding])
        assert len(caplog.records) == records


def test_sources_that_are_none(tmp_path, save):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    save_file({"linear.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for source, message in [
        ("nowhere.pth", "no such checkpoint file"),
        ("empty", "no such file of weights"),
        ("broken.safetensors", "not a whole safetensors file"),
        ("other.safetensors", "missing embedding_model._conv_stem.weight"),
    ]:
        with pytest.raises(InputError, match=message):
            load_pretrained_tagger(tmp_path / source, model())


def test_a_tagger_folder_holds_the_checkpoints_weights(save, small_state, labels, tmp_path):
    Published(save(small_state), labels(3), padding="tensorflow", n_frames=3000).export(tmp_path / "tagger")
    assert load_weights(tmp_path / "tagger" / "embedding_model.ckpt").keys() == EfficientNetEncoder("b0").state_dict().keys()
    text = (tmp_path / "tagger" / "hyperparams.yaml").read_text()
    assert "padding: tensorflow" in text
    assert "n_frames: 3000" in text
    modules = model()
    state = {f"classifier.{key}": value for key, value in load_weights(tmp_path / "tagger" / "classifier.ckpt").items()}
    load_into({"classifier": modules["classifier"]}, state)
    assert modules["classifier"].head_weight.tolist() == pytest.approx([0.1, 0.2])
