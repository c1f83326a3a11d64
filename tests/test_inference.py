"""Loading taggers: what can be loaded, and what is refused."""

import shutil

import numpy as np
import pytest
import ruamel.yaml
import soundfile
import torch
from safetensors.torch import save_file
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.utils.fetching import FetchConfig

from psla_sb.checkpoints.weights import load_weights
from psla_sb.cli.export import export
from psla_sb.cli.tag import tag
from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.demo import listen
from psla_sb.errors import InputError
from psla_sb.inference.encoder import step_vectors
from psla_sb.inference.tagger import AudioTagger
from runs import rows_by_file


@pytest.fixture
def tagger_folder(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0] / "tagger", tmp_path / "tagger")


@pytest.mark.parametrize("file", ["embedding_model.ckpt", "classifier.ckpt", "label_encoder.ckpt", "hyperparams.yaml"])
@pytest.mark.parametrize("content", [None, "", "x: 1\n"])
def test_a_folder_that_is_not_whole_is_refused(file, content, tagger_folder):
    (tagger_folder / file).unlink()
    if content is not None:
        (tagger_folder / file).write_text(content)
    with pytest.raises(InputError, match=r"tagger"):
        AudioTagger.from_folder(tagger_folder)


def test_a_folder_that_constructs_other_things_is_refused_and_not_run(tagger_folder, tmp_path):
    file = tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text() + f"evil: !apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(InputError, match=r"!apply:os\.mkdir"):
        AudioTagger.from_folder(tagger_folder)
    assert not (tmp_path / "ran").exists()
    AudioTagger.from_hparams(source=str(tagger_folder))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["torch.ctypes.CDLL", "torch.nn.Identity", "Path", "KaldiFbankX"])
def test_what_a_known_part_has_imported_is_not_a_known_part(name, tagger_folder):
    file = tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text() + f"evil: !new:psla_sb.lobes.efficientnet.{name} []\n")
    with pytest.raises(InputError, match="not a part of psla_sb"):
        AudioTagger.from_folder(tagger_folder)


@pytest.mark.parametrize(
    "value",
    [
        "(!!python/object/apply:os.mkdir ['{ran}'])",
        "'(!!python/object/apply:os.mkdir [''{ran}''])'",
        "!tuple \"(!!python/object/apply:os.mkdir ['{ran}'])\"",
        "!ref (<sample_rate>, !!python/object/apply:os.mkdir ['{ran}'])",
        "!applyref:os.mkdir ['{ran}']",
        "!<!apply:os.mkdir> ['{ran}']",
        "!!python/object/apply:os.mkdir ['{ran}']",
        "!include:{evil}",
        "!module:antigravity",
    ],
)
@pytest.mark.parametrize("where", ["mean: -4.6476", "sample_rate: 16000"])
@pytest.mark.parametrize("of", ["tagger", "run"])
def test_no_kind_of_value_runs_code(value, where, of, tiny_run, tmp_path):
    ran, evil, folder = tmp_path / "ran", tmp_path / "evil.yaml", tmp_path / "copy"
    evil.write_text(f"!!python/object/apply:os.mkdir ['{ran}']\n")
    source = tiny_run[0] / "tagger" if of == "tagger" else tiny_run[0]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("save", "plots", "predictions"))
    file, key = folder / "hyperparams.yaml", where.partition(":")[0]
    text = file.read_text()
    assert where in text
    file.write_text(text.replace(where, f"{key}: {value.format(ran=ran, evil=evil)}", 1))
    with pytest.raises(InputError, match="copy"):
        AudioTagger.from_any(folder)
    assert not ran.exists()


@pytest.mark.parametrize("attribute", ["__class__", "forward", "filters"])
def test_a_reference_gives_numbers_and_texts_alone(attribute, tagger_folder):
    file = tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text().replace("mean: -4.6476", f"mean: !ref <compute_features.{attribute}>", 1))
    with pytest.raises(InputError, match="no number or text"):
        AudioTagger.from_folder(tagger_folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("embedding_model", "classifier", "compute_features") for value in ("null", "5", "{}", "[a]")]
    + [("sample_rate", value) for value in ("null", "abc", "16000.5", "-1", "[1]", "true")],
)
def test_what_is_no_tagger_is_refused(key, value, tagger_folder):
    yaml = ruamel.yaml.YAML()
    settings = yaml.load(tagger_folder / "hyperparams.yaml")
    settings[key] = yaml.load(value)
    yaml.dump(settings, tagger_folder / "hyperparams.yaml")
    with pytest.raises(InputError, match=key):
        AudioTagger.from_folder(tagger_folder)


def test_packages_announce_themselves_only_if_installed(tagger_folder, tmp_path, monkeypatch):
    here, information = tmp_path / "here", tmp_path / "here" / "evil-1.0.dist-info"
    information.mkdir(parents=True)
    (here / "evil_lobes.py").write_text("class Evil:\n    pass\n\n\nopen('ran', 'w').close()\n")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[psla_sb.lobes]\nevil = evil_lobes\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    file = tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text().replace("mean: -4.6476", "mean: !new:evil_lobes.Evil {}", 1))
    with pytest.raises(InputError, match="--trust evil_lobes"):
        AudioTagger.from_folder(tagger_folder)
    assert not (here / "ran").exists()
    monkeypatch.setenv("PYTHONPATH", str(here))
    AudioTagger.from_folder(tagger_folder)
    assert (here / "ran").exists()


@pytest.mark.parametrize("text", ["def (:\n", "undefined\n", "import no_such_module\n"])
def test_a_trusted_module_that_does_not_import_is_an_error(text, tagger_folder, tmp_path, monkeypatch):
    (tmp_path / f"broken_{abs(hash(text))}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    name, file = f"broken_{abs(hash(text))}", tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text().replace("mean: -4.6476", f"mean: !new:{name}.X {{}}", 1))
    with pytest.raises(InputError, match=f"the trusted module '{name}' cannot be imported"):
        AudioTagger.from_folder(tagger_folder, trust=[name])


def test_run_snapshot_and_folder_are_the_same_tagger(tiny_run, mini_data):
    folder = tiny_run[0]
    clip = Manifest.from_csv(folder / "eval.csv", data_root=mini_data)[3]["wav"]
    expected = AudioTagger.from_folder(folder / "tagger").tag_file(clip, top_k=39)
    for source in (folder, folder / "snapshots" / "average.safetensors"):
        assert AudioTagger.from_any(source).tag_file(clip, top_k=39) == expected
    last = AudioTagger.from_experiment(folder, weights="last").tag_file(clip, top_k=39)
    scores = np.load(folder / "predictions" / "valid_epoch_02.npy")[3]
    np.testing.assert_allclose([tag.score for tag in last], sorted(scores, reverse=True), atol=1e-5)
    scores = np.load(folder / "predictions" / "valid_weight_average.npy")[3]
    np.testing.assert_allclose([tag.score for tag in expected], sorted(scores, reverse=True), atol=1e-5)


@pytest.fixture
def loud_run(lively_runs, tmp_path):
    """A run whose classifier's heads together weigh more than 1, as training may leave them, so that some classes saturate."""
    run = shutil.copytree(lively_runs / "a", tmp_path / "run")
    weights = run / "snapshots" / "average.safetensors"
    state = load_weights(weights)
    state["classifier.head_weight"] *= 1.2
    for head in range(len(state["classifier.head_weight"])):
        state[f"classifier.cla.{head}.bias"][:10] += 9
    weights.unlink()
    save_file(state, weights)
    return run


def test_every_entry_point_tags_alike(loud_run, mini_data, tmp_path, capsys):
    """Done-when: a run's tagger gives its evaluation files equal scores whichever way it is loaded and asked."""
    manifest = Manifest.from_csv(loud_run / "eval.csv", data_root=mini_data)
    clips = [manifest[i]["wav"] for i in range(len(manifest))]
    folder, average = tmp_path / "tagger", loud_run / "snapshots" / "average.safetensors"
    export([str(loud_run), "--out", str(folder)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tag(["--model", str(folder), "--top-k", "39", "--format", "json", *clips])
    assert caught.value.code == 0
    answers = rows_by_file(capsys.readouterr().out)
    tagger = AudioTagger.from_folder(folder)
    loaded = {
        "from_hparams": AudioTagger.from_hparams(source=str(folder), savedir=tmp_path / "saved"),
        "from_experiment": AudioTagger.from_experiment(loud_run, "average"),
        "from_snapshot": AudioTagger.from_snapshot(average),
        "from_any, folder": AudioTagger.from_any(folder),
        "from_any, run": AudioTagger.from_any(loud_run),
        "from_any, snapshot": AudioTagger.from_any(average),
    }
    ways = {way: [scores_of(tagger, other.tag_file(clip, 39)) for clip in clips] for way, other in loaded.items()}
    ways["listen"] = [scores_of(tagger, listen(tagger, clip).tags) for clip in clips]
    ways["psla-tag"] = [[{row["mid"]: row["score"] for row in answers[clip]}[mid] for mid in tagger.hparams.mids] for clip in clips]
    theirs = EncoderClassifier.from_hparams(source=str(folder), savedir=tmp_path / "theirs")
    ways["EncoderClassifier"] = theirs.classify_batch(torch.stack([read_clip(clip) for clip in clips]))[0]
    expected = np.array([scores_of(tagger, tagger.tag_file(clip, 39)) for clip in clips])
    for way, scores in ways.items():
        # these weights are noise, to which rounding matters more than to trained ones: there it is 2e-6
        np.testing.assert_allclose(np.asarray(scores), expected, atol=3e-5, err_msg=way)
    assert expected.max() == 1
    assert expected.std(0).max() > 1e-3


def test_a_repository_is_loaded_at_the_revision_that_is_asked_for(tiny_run, tmp_path):
    """From Hugging Face's own cache, without a network: two revisions of somebody's tagger."""
    revisions = {digit: digit * 40 for digit in "ab"}
    for digit, revision in revisions.items():
        folder = tmp_path / "models--somebody--tagger" / "snapshots" / revision
        shutil.copytree(tiny_run[0] / "tagger", folder)
        state = load_weights(folder / "classifier.ckpt")
        state["cla.0.bias"] += ord(digit)
        (folder / "classifier.ckpt").unlink()
        save_file(state, folder / "classifier.ckpt")
    for digit, revision in revisions.items():
        for savedir in (None, tmp_path / digit):
            config = FetchConfig(revision=revision, huggingface_cache_dir=str(tmp_path), allow_network=False)
            tagger = AudioTagger.from_hparams("somebody/tagger", savedir=savedir, fetch_config=config)
            bias = load_weights(tmp_path / "models--somebody--tagger" / "snapshots" / revision / "classifier.ckpt")["cla.0.bias"]
            torch.testing.assert_close(tagger.mods.classifier.cla[0].bias, bias, rtol=0, atol=0)
            assert len(tagger.score_batch(torch.zeros(8000))[0]) == 39
    with pytest.raises(Exception, match=r"cannot find|Cannot find"):
        AudioTagger.from_hparams(
            "somebody/tagger", fetch_config=FetchConfig(revision="c" * 40, huggingface_cache_dir=str(tmp_path), allow_network=False)
        )


def test_what_is_no_tagger(tmp_path):
    for source, message in [
        (tmp_path, "no hyperparams.yaml"),
        (tmp_path / "a.safetensors", "no such"),
        (tmp_path / "a.pth", "--labels"),
    ]:
        with pytest.raises(InputError, match=message):
            AudioTagger.from_any(source)
    with pytest.raises(InputError, match="not the output folder"):
        AudioTagger.from_experiment(tmp_path)


@pytest.fixture(scope="module")
def tagger(lively_runs):
    return AudioTagger.from_experiment(lively_runs / "a")


@pytest.fixture(scope="module")
def clips(tiny_run, mini_data):
    manifest = Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)
    return [manifest[i]["wav"] for i in range(7)]


def scores_of(tagger, tags):
    """Scores in the order of the classes."""
    by_mid = {tag.mid: tag.score for tag in tags}
    return [by_mid[mid] for mid in tagger.hparams.mids]


def test_every_way_to_a_score_gives_the_same(tagger, clips, tmp_path):
    expected = np.array([scores_of(tagger, tagger.tag_file(clip, top_k=39)) for clip in clips])
    waves = [read_clip(clip) for clip in clips]
    waves[0] = waves[0][:5000]
    soundfile.write(tmp_path / "short.wav", waves[0].numpy(), 16000, subtype="FLOAT")
    clips = [tmp_path / "short.wav", *clips[1:]]
    expected[0] = scores_of(tagger, tagger.tag_file(clips[0], top_k=39))
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=0.5)
    ways = {
        "batch": tagger.score_batch(padded, lengths / lengths.max()),
        "classify_batch": tagger.classify_batch(padded, lengths / lengths.max())[0],
        "classify_file": torch.cat([tagger.classify_file(clip)[0] for clip in clips]),
        "encode": tagger.mods.classifier(tagger.encode_batch(padded, lengths / lengths.max())),
        "encode_file": tagger.mods.classifier(torch.cat([tagger.encode_file(clip) for clip in clips])),
        "forward": tagger(padded, lengths / lengths.max()),
        "single": torch.cat([tagger.score_batch(wave) for wave in waves]),
        "files": [scores_of(tagger, found.tags) for found in tagger.tag_files(clips, batch_size=3, top_k=39)],
        "workers": [scores_of(tagger, found.tags) for found in tagger.tag_files(clips, batch_size=2, num_workers=1, top_k=39)],
    }
    for way, scores in ways.items():
        np.testing.assert_allclose(np.asarray(scores), expected, atol=1e-5, err_msg=way)


def test_speechbrains_names_return_what_speechbrain_returns(tagger, clips):
    scores, best, index, labels = tagger.classify_file(clips[0])
    assert scores.shape == (1, 39)
    assert best.shape == index.shape == (1,)
    tags = tagger.tag_file(clips[0], top_k=1)
    assert labels == [tags[0].label]
    assert best.item() == pytest.approx(tags[0].score)
    assert tagger.hparams.mids[index.item()] == tags[0].mid
    assert tagger.encode_batch(torch.zeros(2, 8000)).shape[:2] == (2, tagger.mods.embedding_model.out_channels)
    with pytest.raises(ValueError, match="normalize"):
        tagger.encode_batch(torch.zeros(2, 8000), normalize=True)


def test_top_k_and_threshold(tagger, clips):
    every = tagger.tag_file(clips[0], top_k=1000)
    assert len(every) == 39
    assert [tag.score for tag in every] == sorted((tag.score for tag in every), reverse=True)
    assert tagger.tag_file(clips[0], top_k=3) == every[:3]
    threshold = every[1].score
    assert tagger.tag_file(clips[0], threshold=threshold) == [tag for tag in every if tag.score >= threshold][:5]
    assert tagger.tag_file(clips[0], threshold=1.0) == [tag for tag in every if tag.score == 1.0]
    with pytest.raises(ValueError, match="top_k"):
        tagger.tag_file(clips[0], top_k=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_files_among_many(tagger, clips, tmp_path, num_workers):
    (tmp_path / "text.wav").write_text("no sound")
    loud = np.random.default_rng(0).uniform(-1e25, 1e25, 8000)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    paths = [clips[0], "nowhere.wav", tmp_path / "text.wav", clips[1], tmp_path / "loud.wav", clips[2], tmp_path]
    found = list(tagger.tag_files(paths, batch_size=4, num_workers=num_workers))
    assert [one.path for one in found] == [str(path) for path in paths]
    for i in (0, 3, 5):
        assert found[i].error is None
        alone = tagger.tag_file(paths[i])
        assert [tag.label for tag in found[i].tags] == [tag.label for tag in alone]
        np.testing.assert_allclose([tag.score for tag in found[i].tags], [tag.score for tag in alone], atol=1e-5)
    for i in (1, 2, 4, 6):
        assert found[i].tags is None
        assert found[i].error.startswith(f"{paths[i]}: ")
    assert list(tagger.tag_files([])) == []
    with pytest.raises(ValueError, match="1 or more"):
        next(tagger.tag_files(clips, batch_size=0))


def test_results_come_while_later_files_are_not_read_yet(tagger, clips):
    results = tagger.tag_files([*clips, "nowhere.wav"], batch_size=2)
    assert next(results).path == clips[0]
    assert len(list(results)) == 7


def test_folded_norms_give_the_same_and_follow_the_weights(tiny_run, clips):
    tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    feats = tagger.features(torch.stack([read_clip(clip)[:8000] for clip in clips[:3]]))

    def plain():
        with torch.inference_mode():
            return tagger.mods.classifier(tagger.mods.embedding_model(feats))

    first = tagger.tag_features(feats)
    torch.testing.assert_close(first, plain(), atol=1e-5, rtol=0)
    state = {key: value.clone() for key, value in tagger.state_dict().items()}
    assert any("running_mean" in key for key in state)
    for key in state:
        if key.endswith("_bn0.bias"):
            state[key] += 0.5
    tagger.load_state_dict(state)
    second = tagger.tag_features(feats)
    torch.testing.assert_close(second, plain(), atol=1e-5, rtol=0)
    assert (first - second).abs().max() > 1e-3


def test_embeddings_along_the_time(tagger, clips):
    wave = torch.cat([read_clip(clip) for clip in clips])
    vectors, times = tagger.timestamp_embeddings(wave)
    assert vectors.shape == (1, len(times), tagger.mods.embedding_model.out_channels)
    np.testing.assert_allclose(times, 160 + 320 * np.arange(len(times)), rtol=1e-6)
    # the model's 0.5 s have one step, so that every vector is that of a window
    window, hop, hop_steps = tagger.window_and_hop(10.0, 1.0)
    assert hop_steps == 1
    alone = step_vectors(tagger.encode_batch(wave[hop : hop + window]))
    assert alone.shape[1] == 1
    torch.testing.assert_close(vectors[:, 1], alone[:, 0], atol=1e-5, rtol=1e-4)
