"""Anybody's part goes the whole way: encoders, poolings and front ends from a file, from SpeechBrain, from a package."""

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.inference.classifiers import EncoderClassifier

from psla_sb.aggregation.members import why_no_average
from psla_sb.checkpoints.sources import open_source
from psla_sb.cli.demo import demo
from psla_sb.cli.export import export
from psla_sb.cli.tag import tag
from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.demo import listen
from psla_sb.errors import InputError
from psla_sb.inference.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings, load_model
from psla_sb.inference.tagger import AudioTagger
from runs import REPOSITORY, TRAIN, command, differences, finish, rows_by_file, run

AGGREGATE, ENHANCE = (TRAIN.with_name(name) for name in ("aggregate.py", "enhance_labels.py"))
PARTS = "other_parts"
TRUST = (PARTS, "speechbrain", "torch.nn")
FBANK = """compute_features: !new:speechbrain.lobes.features.Fbank
    sample_rate: !ref <sample_rate>
    n_mels: !ref <n_mels>"""
# which blocks of mini.yaml are replaced, and by what
BLOCKS = {
    "encoder": {"embedding_model": "embedding_model: !new:other_parts.TinyEncoder {pretrained: here}"},
    "speechbrain": {
        "compute_features": FBANK,
        "mean_var_norm": "mean_var_norm: !new:speechbrain.processing.features.InputNormalization",
        "embedding_model": "embedding_model: !new:other_parts.EcapaEncoder\n"
        "    n_mels: !ref <n_mels>\n    activation: !name:torch.nn.GELU",
    },
    "everything": {
        "compute_features": "compute_features: !new:other_parts.LearntFrontEnd {n_mels: !ref <n_mels>}",
        "mean_var_norm": "mean_var_norm: !new:other_parts.LearntNorm {num_features: !ref <n_mels>}",
        "embedding_model": "embedding_model: !new:other_parts.LazyEncoder",
        "classifier": "classifier: !new:other_parts.MaxPooling\n"
        "    in_channels: !ref <embedding_model.out_channels>\n    n_classes: !ref <n_classes>",
    },
}


def write_yaml(folder, blocks, more=""):
    """mini.yaml with other blocks, in a folder with the file of the parts; both as a user has them, not in the repository."""
    folder.mkdir(exist_ok=True)
    text = (TRAIN.parent / "hparams" / "mini.yaml").read_text(encoding="utf-8")
    for key, block in blocks.items():
        text, found = re.subn(rf"(?m)^{key}:.*\n(?:[ #].*\n)*", lambda match, block=block: f"{block}\n", text)
        assert found == 1, key
    (folder / "mine.yaml").write_text(text + more, encoding="utf-8")
    shutil.copy(REPOSITORY / "tests" / "recipes" / f"{PARTS}.py", folder)
    return folder / "mine.yaml"


@pytest.fixture(scope="module", params=BLOCKS)
def trained(request, mini_data, tmp_path_factory):
    """The output folder of a run with other parts, and its output."""
    folder = tmp_path_factory.mktemp(request.param)
    file = write_yaml(folder / "mine", BLOCKS[request.param])
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=folder / "run"), cwd=elsewhere)
    return folder / "run", done


@pytest.fixture
def parts_here(trained, monkeypatch):
    """The current folder is the one that has the file of the parts, as for somebody who trained there."""
    before = list(sys.path)
    monkeypatch.chdir(trained[0].parent / "mine")
    yield
    sys.path[:] = before


def clips_of(run_folder, mini_data):
    manifest = Manifest.from_csv(run_folder / "eval.csv", data_root=mini_data)
    return [manifest[i]["wav"] for i in range(len(manifest))]


def scores_of(tagger, clips):
    return np.array([[{t.mid: t.score for t in tagger.tag_file(clip, 39)}[mid] for mid in tagger.hparams.mids] for clip in clips])


def test_a_run_ends_with_its_table_its_pictures_and_its_tagger(trained):
    folder, done = trained
    assert "average of the last epochs' weights" in done.stdout
    assert {path.name for path in (folder / "plots").iterdir()} == {"class_ap.png", "examples.png", "training_curves.png"}
    assert (folder / "tagger" / "hyperparams.yaml").is_file()
    assert "here" not in (folder / "tagger" / "hyperparams.yaml").read_text()  # nothing pretrained is fetched again
    evaluation = json.loads((folder / "results.json").read_text())["evaluation"]
    scores = np.load(folder / "predictions" / "valid_weight_average.npy")
    assert scores.min() >= 0
    assert np.isfinite(scores).all()
    assert evaluation["weight_average"]["mAP"] > 0


def test_every_source_and_way_gives_the_same_scores(trained, parts_here, mini_data, tmp_path, capsys):
    folder, _ = trained
    clips = clips_of(folder, mini_data)[:6]
    expected = np.load(folder / "predictions" / "valid_weight_average.npy")[:6]
    last = np.load(folder / "predictions" / "valid_epoch_02.npy")[:6]
    sys.path.append(os.getcwd())
    taggers = {
        "folder": AudioTagger.from_folder(folder / "tagger", trust=TRUST),
        "run": AudioTagger.from_any(folder, trust=TRUST),
        "snapshot": AudioTagger.from_snapshot(folder / "snapshots" / "average.safetensors", trust=TRUST),
        "from_hparams": AudioTagger.from_hparams(folder / "tagger", savedir=tmp_path / "saved"),
    }
    for name, tagger in taggers.items():
        np.testing.assert_allclose(scores_of(tagger, clips), expected, atol=1e-5, err_msg=name)
        files = [{tag.mid: tag.score for tag in one.tags} for one in tagger.tag_files(clips, batch_size=4, top_k=39)]
        np.testing.assert_allclose([[found[mid] for mid in tagger.hparams.mids] for found in files], expected, atol=1e-5)
    checkpoint = AudioTagger.from_any(next((folder / "save").iterdir()), trust=TRUST)
    np.testing.assert_allclose(scores_of(checkpoint, clips), last, atol=1e-5)
    theirs = EncoderClassifier.from_hparams(source=str(folder / "tagger"), savedir=str(tmp_path / "theirs"))
    if "compute_features: !new:psla_sb" in (folder / "tagger" / "hyperparams.yaml").read_text():
        # other front ends hear the 80 samples beyond what the model was trained on
        found = theirs.classify_batch(torch.stack([read_clip(clip) for clip in clips]))[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for source in (folder, folder / "tagger"):
        with pytest.raises(SystemExit) as caught:
            tag(["--model", str(source), "--top-k", "39", "--format", "json", *clips, *(f"--trust={name}" for name in TRUST)])
        assert caught.value.code == 0
        answers = rows_by_file(capsys.readouterr().out)
        rows = [{row["mid"]: row["score"] for row in answers[clip]} for clip in clips]
        np.testing.assert_allclose([[row[mid] for mid in tagger.hparams.mids] for row in rows], expected, atol=1e-5)


def test_without_trust_everything_refuses_and_says_what_to_do(trained, mini_data, tmp_path, capsys):
    folder, _ = trained
    for source in (folder, folder / "tagger", folder / "snapshots" / "average.safetensors", next((folder / "save").iterdir())):
        with pytest.raises(InputError, match=rf"not a part of psla_sb.* --trust {PARTS}|not a part of psla_sb.*: --trust {PARTS}"):
            AudioTagger.from_any(source)
        with pytest.raises(InputError, match="not a part of psla_sb"):
            load_model(str(source))
        for program, arguments in ((tag, ["x.wav"]), (demo, [])):
            with pytest.raises(SystemExit) as caught:
                program([*arguments, "--model", str(source)])
            assert caught.value.code == 2
            assert f"--trust {PARTS}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export([str(folder), "--out", str(tmp_path / "out")])
    assert f"--trust {PARTS}" in capsys.readouterr().err
    assert PARTS not in sys.modules or sys.modules[PARTS].__file__  # what is not trusted was not imported for it
    done = run(
        [sys.executable, AGGREGATE, "hparams/aggregate.yaml", f"--runs=[{folder}]", f"--output_folder={tmp_path / 'a'}"],
        check=False,
    )
    assert done.returncode == 2
    assert f"--trust {PARTS}" in done.stderr


def test_ensembles_with_members_of_ours_and_checkpoints_of_one_run(trained, parts_here, tiny_run, mini_data, tmp_path):
    folder, _ = trained
    trust = [word for name in TRUST for word in ("--trust", name)]
    here = trained[0].parent / "mine"
    mixed = [sys.executable, AGGREGATE, "hparams/aggregate.yaml", f"--runs=[{folder}, {tiny_run[0]}]", "--members=average"]
    run([*mixed, f"--output_folder={tmp_path / 'mixed'}", f"--data_folder={mini_data}", "--num_workers=0", *trust], cwd=here)
    report = json.loads((tmp_path / "mixed" / "ensemble.json").read_text())
    assert len(report["members"]) == 2
    scores = np.load(tmp_path / "mixed" / "scores" / f"{next(iter(report['members']))}.npy")
    np.testing.assert_allclose(scores, np.load(folder / "predictions" / "valid_weight_average.npy"), atol=1e-5)
    # a front end or normalisation that learns is another one in every epoch
    one_front_end = folder.parent.name.startswith("encoder")
    one = [sys.executable, AGGREGATE, "hparams/aggregate.yaml", f"--runs={folder}", f"--output_folder={tmp_path / 'one'}"]
    run(
        [*one, f"--data_folder={mini_data}", "--num_workers=0", f"--trust=[{', '.join(TRUST)}]", f"--export={one_front_end}"],
        cwd=here,
    )
    report = json.loads((tmp_path / "one" / "ensemble.json").read_text())
    expected = json.loads((folder / "results.json").read_text())["evaluation"]
    assert report["ensemble"]["mAP"] == pytest.approx(expected["ensemble"]["mAP"], abs=1e-3)
    if one_front_end:
        sys.path.append(os.getcwd())
        tagger = AudioTagger.from_folder(tmp_path / "one" / "tagger", trust=TRUST)
        scores = scores_of(tagger, clips_of(folder, mini_data)[:4])
        np.testing.assert_allclose(scores, np.load(tmp_path / "one" / "ensemble.npy")[:4], atol=1e-5)
    assert report["weight_average"]["mAP"] == pytest.approx(expected["weight_average"]["mAP"], abs=1e-3)


def test_teacher_of_label_enhancement_and_start_of_a_training(trained, mini_data, tmp_path):
    folder, _ = trained
    trust, here = [word for name in TRUST for word in ("--trust", name)], folder.parent / "mine"
    run(
        command(ENHANCE, "hparams/mini.yaml", "--teacher", str(folder), *trust, data_folder=mini_data, output_folder=tmp_path),
        cwd=here,
    )
    assert np.load(tmp_path / "enhanced_labels" / "scores.npy").shape == (40, 39)
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "tuned", "pretrained_tagger": folder, "number_of_epochs": 1}
    done = run(command(TRAIN, "mine.yaml", **settings), cwd=here)
    assert "; 0 tensors not taken" in done.stdout + done.stderr or " 0 not taken" in done.stdout + done.stderr


def test_export_with_onnx_and_the_page(trained, parts_here, mini_data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _ = trained
    export([str(folder), "--out", str(tmp_path / "out"), "--onnx", *(f"--trust={name}" for name in TRUST)])
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    clips = clips_of(folder, mini_data)[:3]
    (answers,) = session.run(None, {"waveform": np.stack([read_clip(clip).numpy() for clip in clips])})
    np.testing.assert_allclose(answers, np.load(folder / "predictions" / "valid_weight_average.npy")[:3], atol=1e-4)
    tagger = AudioTagger.from_folder(tmp_path / "out", trust=TRUST)
    if hasattr(tagger.mods.classifier, "segment_scores"):
        heard = listen(tagger, clips[0])
        assert heard.timeline.scores.shape == (len(heard.timeline.times), 39)
        assert heard.timeline.times[-1] < 0.6
    else:
        with pytest.raises(InputError, match=r"MaxPooling\) has no segment_scores"):
            tagger.tag_timeline(clips[0])
        heard = listen(tagger, clips[0])
        assert heard.timeline is None
    assert [tag.score for tag in heard.tags] == pytest.approx([tag.score for tag in tagger.tag_file(clips[0], 39)])
    model = HearModel(tagger)
    wavs = torch.stack([read_clip(clip) for clip in clips])
    vectors, times = get_timestamp_embeddings(wavs, model)
    assert vectors.shape == (3, times.shape[1], model.timestamp_embedding_size)
    assert get_scene_embeddings(wavs, model).shape == (3, model.scene_embedding_size)


@pytest.mark.parametrize("name", BLOCKS)
def test_killed_and_resumed_it_ends_as_if_left_alone(name, mini_data, tmp_path):
    file = write_yaml(tmp_path / "mine", BLOCKS[name])
    for folder in ("whole", "killed"):
        argv = command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / folder)
        if folder == "killed":
            assert (
                finish(argv, tmp_path / "log", at=(signal.SIGKILL, "psla_sb.experiment.brain:TaggingBrain.on_fit_batch_start", 7))
                != 0
            )
        assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"classifier": "classifier: !new:other_parts.Logits {in_channels: 640, n_classes: 39}"},
            "if these are logits, add a sigmoid",
        ),
        (
            {"classifier": "classifier: !new:other_parts.MaxPooling {in_channels: 640, n_classes: 7}"},
            "gives 7 classes, but n_classes is 39",
        ),
        (
            {"classifier": "classifier: !new:other_parts.MaxPooling {in_channels: 3, n_classes: 39}"},
            "classifier (MaxPooling) cannot take",
        ),
        (
            {"embedding_model": "embedding_model: !new:torch.nn.Flatten", "classifier": "classifier: !new:torch.nn.Sigmoid"},
            "(Flatten) gives",
        ),
        ({"compute_features": "compute_features: !new:torch.nn.Identity"}, "compute_features (Identity) gives [2, 7920]"),
    ],
)
def test_a_part_that_breaks_the_contract_is_refused_before_the_training(blocks, message, mini_data, tmp_path):
    file = write_yaml(tmp_path / "mine", blocks)
    done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run"), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert message in last
    assert not (tmp_path / "run" / "snapshots").exists()


def test_an_installed_plugin_is_trusted_everywhere(plugin, mini_data, tmp_path, monkeypatch):
    source, target = plugin
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))}
    argv = command(TRAIN, str(source / "convnext.yaml"), data_folder=mini_data, output_folder=tmp_path / "run")
    run(argv, env=environment, cwd=tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(target))
    clip = clips_of(tmp_path / "run", mini_data)[0]
    for path in (tmp_path / "run", tmp_path / "run" / "tagger"):
        tags = open_source(path).hparams()
        assert type(tags["embedding_model"]).__name__ == "TinyConvNeXt"
    model = load_model(str(tmp_path / "run" / "tagger"))
    assert get_scene_embeddings(read_clip(clip)[None], model).shape == (1, model.scene_embedding_size)
    done = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_tiny_tagger.py"], env=environment, cwd=source
    )
    assert "1 passed" in done.stdout


def test_other_augmentations_losses_brains_and_loggers(mini_data, tmp_path):
    more = """
louder: !new:other_parts.Louder {gain: 0.5}
"""
    blocks = {
        "waveform_augment": "waveform_augment: [!ref <louder>, !ref <mixup>, !new:torch.nn.Identity {}]",
        "spec_augment": "spec_augment: !new:torch.nn.Sequential\n"
        "    - !new:psla_sb.lobes.augment.SpecAugment {freq_mask: 4, time_mask: 4}\n    - !new:torch.nn.Dropout {p: 0.1}",
        "loss": "loss: !name:other_parts.squared_error",
        "brain_class": "brain_class: !name:other_brain.CountingBrain",
        "train_logger": "train_logger:\n    - !new:speechbrain.utils.train_logger.FileTrainLogger\n"
        "        save_file: !ref <output_folder>/train_log.txt\n"
        "    - !new:speechbrain.utils.train_logger.FileTrainLogger\n        save_file: !ref <output_folder>/second_log.txt",
    }
    file = write_yaml(tmp_path / "mine", blocks)
    text = file.read_text().replace("waveform_augment:", f"{more.strip()}\nwaveform_augment:")
    file.write_text(text)
    (file.parent / "other_brain.py").write_text(
        "from psla_sb.experiment.brain import TaggingBrain\n\n\n"
        "class CountingBrain(TaggingBrain):\n"
        "    def on_stage_end(self, stage, stage_loss, epoch=None):\n"
        "        print('counted', stage.name, epoch)\n"
        "        super().on_stage_end(stage, stage_loss, epoch)\n"
    )
    done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run"))
    assert "counted VALID 2" in done.stdout
    logs = [(tmp_path / "run" / name).read_text() for name in ("train_log.txt", "second_log.txt")]
    assert logs[0] == logs[1]
    epochs = json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]
    # the mean squared error of 39 classes, of which a tenth is on: cross-entropy would be three times as large
    assert all(0.05 < epoch["train_loss"] < 0.3 for epoch in epochs)
    assert all(0.05 < epoch["valid_loss"] < 0.3 for epoch in epochs)


def test_keys_may_be_null_or_hold_one_value_without_a_list(mini_data, tmp_path):
    blocks = {
        "mixup": "mixup: null",
        "waveform_augment": "waveform_augment: !new:other_parts.Louder {gain: 0.5}",
        "spec_augment": "spec_augment: null",
        "loss": "loss: null",
        "brain_class": "brain_class: null",
        "train_logger": "train_logger: null",
    }
    file = write_yaml(tmp_path / "mine", blocks)
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "mixup_rate": 0, "number_of_epochs": 1}
    run(command(TRAIN, str(file), **settings))
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]) == 1


@pytest.mark.parametrize("key", ["loss", "brain_class"])
def test_a_loss_or_a_brain_that_cannot_be_called_is_an_error(key, mini_data, tmp_path):
    file = write_yaml(tmp_path / "mine", {key: f"{key}: bce"})
    done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert f"'{key}' must name a class or a function (!name:...), not 'bce'" in done.stderr


def test_a_constructor_that_fails_and_a_module_that_has_moved_are_errors(mini_data, tmp_path):
    for block, message in (
        ("embedding_model: !new:other_parts.Fails {}", "RuntimeError: not today"),
        ("embedding_model: !new:psla_sb.lobes.old_place.Encoder {}", "Modules have moved: CHANGELOG.md says where to"),
    ):
        file = write_yaml(tmp_path / "mine", {"embedding_model": block})
        done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run"), check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.strip().splitlines()[-1]


def test_members_that_compute_differently_have_no_average_of_weights(trained, mini_data, tmp_path, parts_here):
    folder, _ = trained
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("save", "plots"))
    file = other / "hyperparams.yaml"
    text = file.read_text()
    changed = re.sub(r"torch\.nn\.GELU", "torch.nn.Tanh", text)
    sources = [open_source(path, trust=TRUST) for path in (folder, other)]
    assert why_no_average(sources) is None
    if changed != text:
        file.write_text(changed)
        sources[1] = open_source(other, trust=TRUST)
        assert why_no_average(sources) == "members are of different architectures"


@pytest.mark.parametrize("weights", ["newest", "1.5", "-1", ""])
def test_weights_that_a_run_has_not_are_named(weights, trained):
    with pytest.raises(InputError, match="average, best, last or the number of an epoch"):
        open_source(trained[0], weights=weights)


def test_a_clip_too_short_for_somebodys_part_is_an_error_of_that_clip(trained, parts_here, mini_data, tmp_path, capsys):
    folder, _ = trained
    soundfile.write(tmp_path / "short.wav", np.full(40, 0.1, np.float32), 16000)
    clip = clips_of(folder, mini_data)[0]
    with pytest.raises(SystemExit) as caught:
        tag(["--model", str(folder), str(tmp_path / "short.wav"), clip, *(f"--trust={name}" for name in TRUST)])
    assert caught.value.code in (0, 1)
    assert clip in capsys.readouterr().out


def test_mixup_that_nothing_does_is_an_error(mini_data, tmp_path):
    file = write_yaml(tmp_path / "mine", {"waveform_augment": "waveform_augment: []"})
    done = run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert "mixup_rate is 0.5, but nothing in waveform_augment mixes" in done.stderr
    run(command(TRAIN, str(file), data_folder=mini_data, output_folder=tmp_path / "run", mixup_rate=0))
