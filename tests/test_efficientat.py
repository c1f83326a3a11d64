"""EfficientAT's published files: recognised, imported, and taggers like any other, with the figures of the published code."""

import logging
import re

import numpy as np
import pytest
import torch
from published_networks import EMBEDDINGS, LOGITS, layout, seeded, waveform

from psla_sb import hear
from psla_sb.checkpoints.efficientat import as_strides, load_efficientat_checkpoint, untold_of
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.cli.import_psla import import_checkpoint
from psla_sb.errors import InputError
from psla_sb.inference.onnx_export import export_onnx
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.chain import MODULES
from psla_sb.lobes.features import CentredFbank
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pooling import ConvPooling, MLPPooling
from runs import TRAIN, command, run


def labels(folder, n_classes=527):
    Vocabulary([f"/m/{i}" for i in range(n_classes)], [f"Class {i}" for i in range(n_classes)]).to_csv(folder / "labels.csv")
    return str(folder / "labels.csv")


def save(path, width=0.1, n_classes=3, is_conv=False, **changes):
    state = seeded(layout(width, n_classes, is_conv), "mn01") | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return str(path)


def imported(folder, path, n_classes, *options):
    import_checkpoint([path, "--labels", labels(folder, n_classes), "--out", str(folder / "tagger"), *options])
    return AudioTagger.from_folder(folder / "tagger")


def refused(folder, path, capsys, *options, n_classes=3):
    with pytest.raises(SystemExit) as caught:
        imported(folder, path, n_classes, *options)
    assert caught.value.code == 2
    assert not (folder / "tagger").exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def mn04(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mn04")
    torch.save(seeded(layout(0.4), "mn04"), folder / "mn04_as_mAP_432.pt")
    return imported(folder, str(folder / "mn04_as_mAP_432.pt"), 527)


@pytest.fixture(scope="module", params=["mlp", "fully convolutional"])
def small(request, tmp_path_factory):
    """A small network with each of the heads."""
    folder = tmp_path_factory.mktemp("small")
    return imported(folder, save(folder / "mn01.pt", is_conv=request.param != "mlp"), 3)


# Figures


@pytest.mark.parametrize("i", [0, 1])
def test_logits_and_embeddings_are_those_of_the_published_code(mn04, i):
    wavs = waveform(i)[None]
    scores, embedding = mn04.score_batch(wavs)[0], mn04.scene_embeddings(wavs)[0]
    assert scores.shape == (527,)
    assert embedding.shape == (384,)
    np.testing.assert_allclose(torch.logit(scores.double())[::31], LOGITS[i], atol=1e-4, rtol=0)
    np.testing.assert_allclose(embedding[::24], EMBEDDINGS[i], rtol=1e-4)
    model = hear.HearModel(mn04)
    np.testing.assert_allclose(hear.get_scene_embeddings(wavs, model)[0, ::24], EMBEDDINGS[i], rtol=1e-4)


def test_a_clips_scores_do_not_depend_on_its_batch(mn04):
    one, other = waveform(0), waveform(1)
    wavs = torch.stack([one, torch.nn.functional.pad(other, (0, len(one) - len(other)))])
    scores = mn04.score_batch(wavs, torch.tensor([1.0, len(other) / len(one)]))
    np.testing.assert_allclose(torch.logit(scores.double())[:, ::31], LOGITS, atol=1e-4, rtol=0)


# A tagger like any other


def test_any_length_is_tagged(small):
    assert small.n_samples is None
    assert small.window == 320000
    for n_samples in (1, 300, 20000, 321000):
        (tags,) = small.tag_batch(0.1 * torch.randn(1, n_samples), top_k=3)
        assert {tag.label for tag in tags} == {"Class 0", "Class 1", "Class 2"}


def test_a_long_recording_is_heard_in_windows_of_10_s(small):
    wav = 0.1 * torch.randn(480000, generator=torch.Generator().manual_seed(0))
    halves = [wav[:320000], wav[160000:]]
    expected = torch.stack([small.score_batch(half - half.mean())[0] for half in halves]).max(0).values
    tags = small.tag_file(wav.numpy(), 3, sample_rate=32000)
    np.testing.assert_allclose([tag.score for tag in sorted(tags, key=lambda tag: tag.mid)], expected, atol=1e-5)


def test_the_timeline_has_the_times_of_its_steps(small):
    assert small.has_timeline
    wav = np.zeros(12 * 32000, np.float32)
    wav[192000 : 192000 + 32000] = 0.5 * np.random.default_rng(0).standard_normal(32000)
    timeline = small.tag_timeline(wav, sample_rate=32000, window=3.0)
    np.testing.assert_allclose(timeline.times, 0.32 * np.arange(len(timeline.times)), atol=1e-9)
    assert len(timeline.times) == 38
    # what is heard from 6 to 7 s changes the scores there most
    change = np.abs(timeline.scores - np.median(timeline.scores, axis=0)).max(1)
    assert 5.8 < timeline.times[change.argmax()] < 7.2


def test_a_step_that_is_alone_is_an_event_with_a_length(small):
    timeline = small.tag_timeline(np.full(3200, 0.1, np.float32), sample_rate=32000)
    events = small.events(timeline, threshold=float(timeline.scores.max()) / 2)
    assert len(timeline.times) == 1
    assert events
    assert all(event.end > event.start for event in events)


def test_hear_takes_it(small):
    model = hear.HearModel(small)
    assert model.sample_rate == 32000
    audio = torch.rand(2, 70000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vectors, times = hear.get_timestamp_embeddings(audio, model)
    assert vectors.shape == (2, 7, model.timestamp_embedding_size)
    assert times[0].tolist() == pytest.approx([320 * k for k in range(7)])
    expected = small.encode_batch(audio).mean((2, 3))
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), expected, rtol=1e-4, atol=1e-5)


def test_onnx_computes_the_same(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(small, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for n_clips, n_samples in ((1, 1), (1, 2), (2, 400), (1, 402), (3, 33333), (1, 400001)):
        wavs = 0.3 * torch.randn(n_clips, n_samples, generator=torch.Generator().manual_seed(n_samples))
        (scores,) = session.run(None, {"waveform": wavs.numpy()})
        np.testing.assert_allclose(scores, small.tag_features(*small.features_and_lens(wavs)), atol=1e-4)


def test_onnx_cuts_where_the_model_does(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    modules = {name: small.mods[name] for name in MODULES} | {"compute_features": CentredFbank(n_frames=60)}
    tagger = AudioTagger(modules, vars(small.hparams))
    assert tagger.n_samples == 59 * 320 + 800
    export_onnx(tagger, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for n_samples in (5000, 19679, 19680, 50000):
        wavs = 0.3 * torch.randn(1, n_samples, generator=torch.Generator().manual_seed(n_samples))
        (scores,) = session.run(None, {"waveform": wavs.numpy()})
        np.testing.assert_allclose(scores, tagger.tag_features(*tagger.features_and_lens(wavs)), atol=1e-4)


# What a file is


@pytest.mark.parametrize(
    ("name", "hop_length", "n_mels", "strides"),
    [
        ("mn01_as_mAP_298.pt", 320, 128, [2, 2, 2, 2]),
        ("mn10_as_hop_5_mAP_475.pt", 160, 128, [2, 2, 2, 2]),
        ("mn10_as_hop_25_mAP_447.pt", 800, 128, [2, 2, 2, 2]),
        ("mn10_as_mels_40_mAP_453.pt", 320, 40, [2, 2, 2, 2]),
        ("mn10_as_fc_s2221_mAP_466.pt", 320, 128, [2, 2, 2, 1]),
        ("mn40_as_mAP_483(2).pt", 320, 128, [2, 2, 2, 2]),
        ("strides2221_shop_5.pt", 320, 128, [2, 2, 2, 2]),
    ],
)
def test_names_tell_what_tensors_do_not(name, hop_length, n_mels, strides, tmp_path):
    source = open_source(save(tmp_path / name))
    assert source.definitions["sample_rate"] == 32000
    assert source.definitions["n_frames"] is None
    assert source.definitions["compute_features"]["hop_length"] == hop_length
    assert source.definitions["compute_features"]["n_mels"] == n_mels
    assert source.definitions["embedding_model"]["strides"] == strides


def test_options_count_more_than_the_name_and_what_was_assumed_is_printed(tmp_path, capsys):
    path = save(tmp_path / "mn01_hop_5_s2211.pt", is_conv=True)
    tagger = imported(tmp_path, path, 3, "--hop", "20", "--strides", "s2221")
    printed = capsys.readouterr().out
    assert "of width 0.1, head fully convolutional, 3 classes;" in printed
    assert "; hop 20 ms (given), 128 mels (assumed), strides s2221 (given)." in printed
    assert "psla-tag --model" in printed
    assert tagger.mods.compute_features.frame_shift == 640
    assert tagger.mods.embedding_model.strides == (2, 2, 2, 1)
    assert untold_of(path)[1] == "hop 5 ms (by the name), 128 mels (assumed), strides s2211 (by the name)"


def test_the_network_is_loaded_by_itself(tmp_path):
    path = save(tmp_path / "mn01_s2221.pt")
    encoder, pooling = load_efficientat_checkpoint(path)
    assert encoder.strides == (2, 2, 2, 1)
    assert isinstance(pooling, MLPPooling)
    assert not encoder.training
    assert not pooling.training
    assert load_efficientat_checkpoint(path, strides=(2, 2, 2, 2))[0].strides == (2, 2, 2, 2)


def test_files_without_counters_are_read(tmp_path):
    state = torch.load(save(tmp_path / "mn01.pt", is_conv=True), weights_only=True)
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pt")
    expected, old = (load_efficientat_checkpoint(tmp_path / name) for name in ("mn01.pt", "old.pt"))
    feats = torch.randn(1, 100, 128)
    assert torch.equal(old[1](old[0](feats)), expected[1](expected[0](feats)))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv1.weight": (64, 3, 7, 7)}, r"PSLA's EfficientNets .* EfficientAT's .* mn01 to mn40.*with conv1\.weight"),
        ({"in_c.0.weight": (16, 1, 3, 3), "layers.0.depth_conv.0.weight": (16, 1, 3, 3)}, "of no family that is known"),
        ({}, "is empty"),
        # VGG, and MobileNetV3 of torchvision
        ({"features.0.weight": (64, 3, 3, 3), "classifier.0.weight": (4096, 25088)}, "of no family that is known"),
        ({"features.0.0.weight": (16, 3, 3, 3), "classifier.0.weight": (1280, 960)}, "no MobileNetV3 of a width"),
    ],
)
def test_foreign_files_are_refused(state, message, tmp_path, capsys):
    torch.save({key: torch.zeros(shape) for key, shape in state.items()}, tmp_path / "foreign.pt")
    error = " ".join(refused(tmp_path, str(tmp_path / "foreign.pt"), capsys).split())
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features.4.block.0.1.bias": None}, "width 0.1, does not fit the model: missing features.4.block.0.1.bias"),
        ({"features.17.0.weight": torch.zeros(1)}, "unexpected features.17.0.weight"),
        ({"classifier.7.weight": torch.zeros(1)}, "unexpected classifier.7.weight"),
        ({"classifier.5.bias": torch.zeros(4)}, "classifier.output.bias is [4], not [3]"),
        ({"classifier.5.weight": None, "classifier.2.weight": None}, "not a head of EfficientAT's that is known"),
    ],
)
def test_broken_files_are_refused(changes, message, tmp_path, capsys):
    assert message in refused(tmp_path, save(tmp_path / "mn01.pt", **changes), capsys)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"features.0.0.weight": Evil()}, tmp_path / "mn10.pt")
    assert "without running code" in refused(tmp_path, str(tmp_path / "mn10.pt"), capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--padding", "symmetric"], "EfficientAT's family, to which padding does not apply; its options are hop, mels, strides"),
        (["--n-frames", "3000"], "n_frames does not apply"),
        (["--strides", "2223"], "strides are four numbers"),
        (["--hop", "0"], "--hop must be 1 or more"),
        (["--mels", "3"], "--mels must be 4 or more"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys):
    assert message in " ".join(refused(tmp_path, save(tmp_path / "mn01.pt"), capsys, *options).split())


def test_psla_files_have_options_of_their_own(tmp_path, capsys):
    torch.save({"module.effnet._conv_stem.weight": torch.zeros(32, 1, 3, 3)}, tmp_path / "psla.pth")
    assert "PSLA's family, to which hop does not apply" in refused(tmp_path, str(tmp_path / "psla.pth"), capsys, "--hop", "5")


def test_classes_must_fit_and_imagenets_are_recognised(tmp_path, capsys):
    assert "has 4 classes, but" in refused(tmp_path, save(tmp_path / "mn01.pt"), capsys, n_classes=4)
    error = refused(tmp_path, save(tmp_path / "mn01_im.pt", n_classes=1000), capsys)
    assert "model of 1000 (ImageNet's, it seems: such a file is for pretrained=" in error


def test_strides_are_four_digits():
    assert as_strides("s2221") == (2, 2, 2, 1)
    for text in ("222", "s22222", "x2222", "2220"):
        with pytest.raises(InputError, match="four numbers"):
            as_strides(text)


# To train from


def model(n_classes=3, width=0.1, **options):
    encoder = MobileNetV3Encoder(width, **options)
    return {"embedding_model": encoder, "classifier": MLPPooling(encoder.out_channels, n_classes, hidden=128)}


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_training_starts_from_a_published_tagger(is_folder, tmp_path, caplog):
    path = save(tmp_path / "mn01_as_s2221.pt")
    source = path
    if is_folder:
        imported(tmp_path, path, 3)
        source = tmp_path / "tagger"
    state, modules = torch.load(path, weights_only=True), model(strides=(2, 2, 2, 1))
    with caplog.at_level(logging.WARNING):
        assert load_pretrained_tagger(source, modules).not_taken == []
    assert "strides" not in caplog.text
    assert torch.equal(modules["embedding_model"].features[16][0].weight, state["features.16.0.weight"])
    assert torch.equal(modules["classifier"].output.weight, state["classifier.5.weight"])
    with caplog.at_level(logging.WARNING):
        transfer = load_pretrained_tagger(source, model(n_classes=7))
    assert "trained with strides (2, 2, 2, 1), but the model has (2, 2, 2, 2)" in caplog.text
    assert {*transfer.not_taken} == {f"classifier.{layer}.{kind}" for layer in ("hidden", "output") for kind in ("weight", "bias")}
    with pytest.raises(InputError, match="encoders differ"):
        load_pretrained_tagger(source, model(width=0.4))


def test_the_heads_fit_other_encoders(tiny_run, tmp_path):
    tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    channels = tagger.mods.embedding_model.out_channels
    for head in (MLPPooling(channels, 39), ConvPooling(channels, 39)):
        tagger.mods["classifier"] = head.eval()
        assert tagger.score_batch(torch.randn(2, 8000)).shape == (2, 39)
        assert tagger.has_timeline


def test_a_network_is_trained_as_the_readme_says(mini_data, tmp_path):
    readme = (TRAIN.parent / "README.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "MobileNetV3Encoder" in block]
    hparams = (TRAIN.parent / "hparams" / "mini.yaml").read_text(encoding="utf-8")
    for part in re.findall(r"(?m)^\w+:.*\n(?: .*\n)*", block):
        hparams, n_found = re.subn(rf"(?m)^{part.partition(':')[0]}:.*\n(?: .*\n)*", lambda _, part=part: part, hparams)
        assert n_found == 1, part
    (tmp_path / "mobilenet.yaml").write_text(hparams, encoding="utf-8")
    torch.save(seeded(layout(0.1, n_classes=1000), "mn01_im"), tmp_path / "mn01_im.pt")
    options = {"width": 0.1, "pretrained": tmp_path / "mn01_im.pt", "output_folder": tmp_path / "run"}
    run(command(TRAIN, "mobilenet.yaml", data_folder=mini_data, **options), cwd=tmp_path)
    (tmp_path / "mn01_im.pt").unlink()
    tagger = AudioTagger.from_folder(tmp_path / "run" / "tagger")
    assert tagger.hparams.sample_rate == 32000
    clip = next((mini_data / "audio" / "eval").iterdir())
    assert len(tagger.tag_file(clip, 39)) == 39
    assert tagger.tag_timeline(clip).scores.shape == (2, 39)
