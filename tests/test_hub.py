"""psla-export --push and hf://: to a hub on this machine and back, and what a hub refuses."""

import shutil

import huggingface_hub.constants
import pytest
import torch
import yaml
from hub import hub
from safetensors import safe_open
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.utils.fetching import FetchConfig

from psla_sb.aggregation.members import find_members
from psla_sb.checkpoints.hub import Address, download, push
from psla_sb.checkpoints.sources import TaggerFolder, open_source
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.cli.export import export
from psla_sb.cli.tag import tag
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.metrics import FIGURES

NAME = "somebody/tagger"
PUSHED = [
    "README.md",
    "calibration.json",
    "class_labels_indices.csv",
    "hyperparams.yaml",
    "label_encoder.ckpt",
    "model.safetensors",
]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The hub, with an empty cache, and a token that may write."""
    with hub() as (state, address):
        constants = {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", state.token)
        yield state


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run[0]


def pushed(run, *options):
    export([str(run), "--push", NAME, *map(str, options)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        export([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def head(state):
    found = state.repositories[NAME]
    return found.commits[found.refs["main"]]


# There and back


def test_what_is_pushed_tags_as_the_run_wherever_it_is_loaded(served, run, tiny_run, mini_data, tmp_path, capsys):
    pushed(run, "--licence", "cc-by-4.0", "--dataset", "somebody/sounds")
    said = capsys.readouterr().out
    oid = served.repositories[NAME].refs["main"]
    assert f"psla-tag --model hf://{NAME}@{oid} FILE" in said
    assert sorted(head(served)) == PUSHED
    expected, wavs = AudioTagger.from_experiment(run), torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    scores = expected.score_batch(wavs)
    assert expected.calibration is not None
    taggers = [
        AudioTagger.from_any(f"hf://{NAME}"),
        AudioTagger.from_any(f"hf://{NAME}@{oid}"),
        AudioTagger.from_hparams(source=NAME),
        AudioTagger.from_hparams(source=NAME, savedir=tmp_path / "saved"),
        AudioTagger.from_folder(shutil.copytree(download(f"hf://{NAME}"), tmp_path / "moved")),
        AudioTagger.from_hparams(source=tmp_path / "moved"),
    ]
    for tagger in taggers:
        torch.testing.assert_close(tagger.score_batch(wavs), scores, rtol=0, atol=0)
        assert tagger.labels == expected.labels
        assert (tagger.calibration.threshold == expected.calibration.threshold).all()
    theirs = EncoderClassifier.from_hparams(source=NAME, savedir=tmp_path / "theirs")
    torch.testing.assert_close(theirs.classify_batch(wavs)[0].squeeze(1), scores, rtol=0, atol=1e-6)
    clip = Manifest.from_csv(run / "eval.csv", data_root=mini_data)[0]["wav"]
    with pytest.raises(SystemExit) as caught:
        tag(["--model", f"hf://{NAME}", clip])
    assert caught.value.code == 0


def test_weights_are_uploaded_once(served, run, tmp_path):
    pushed(run, "--out", tmp_path / "tagger")
    (tmp_path / "m.safetensors").write_bytes(head(served)["model.safetensors"])
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"embedding_model", "classifier"}  # noqa: SIM118
    assert served.uploaded == [len(head(served)["model.safetensors"])]
    # the folder is what was uploaded
    assert {file.name: file.read_bytes() for file in (tmp_path / "tagger").iterdir()} == head(served)
    export([str(tmp_path / "tagger"), "--out", str(tmp_path / "again")])
    before, after = (TaggerFolder(tmp_path / name).weights() for name in ("tagger", "again"))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    assert not (tmp_path / "again" / "model.safetensors").exists()
    # a folder is of one kind: written over, nothing of the other stays, which would be of other weights
    export([str(run), "--push", NAME, "--out", str(tmp_path / "again")])
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == PUSHED


def test_the_card_says_what_the_hub_reads(served, run, tiny_run):
    pushed(run, "--licence", "cc-by-4.0", "--dataset", "somebody/sounds")
    text = head(served)["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert {key: metadata[key] for key in ("library_name", "license", "pipeline_tag", "datasets")} == {
        "library_name": "speechbrain",
        "license": "cc-by-4.0",
        "pipeline_tag": "audio-classification",
        "datasets": ["somebody/sounds"],
    }
    assert metadata["metrics"] == list(FIGURES)
    figures = tiny_run[1]["evaluation"]["weight_average"]
    (result,) = metadata["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]} == {name: round(figures[name], 4) for name in FIGURES}
    assert f"psla-tag --model hf://{NAME} sound.wav" in body
    assert f'from_any("hf://{NAME}")' in body
    assert f'from_hparams(source="{NAME}")' in body
    assert str(run) not in text


def test_a_card_without_figures_and_licence_claims_none(served, run, tmp_path):
    export([str(run / "tagger"), "--push", NAME])
    metadata = yaml.safe_load(head(served)["README.md"].decode().split("---\n", 2)[1])
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}


def test_every_way_in_takes_an_address(served, run, tmp_path):
    pushed(run)
    source = open_source(f"hf://{NAME}")
    assert isinstance(source, TaggerFolder)
    assert list(find_members([f"hf://{NAME}"], "checkpoints").values()) == [source.path]
    modules = AudioTagger.from_source(source).mods
    assert not load_pretrained_tagger(f"hf://{NAME}", dict(modules.items())).not_taken
    export([f"hf://{NAME}", "--out", str(tmp_path / "mine")])
    assert AudioTagger.from_folder(tmp_path / "mine").calibration is not None


def test_a_revision_stays_what_it_was(served, run, tmp_path):
    pushed(run, "--out", tmp_path / "tagger")
    first = Address(NAME, served.repositories[NAME].refs["main"])
    (tmp_path / "tagger" / "calibration.json").unlink()
    (tmp_path / "tagger" / "diary.txt").write_text("mine")
    second = push(tmp_path / "tagger", NAME)
    served.repositories[NAME].refs["v1"] = first.revision
    # thresholds that are gone are gone there too, and what is no part of a tagger is not uploaded
    assert sorted(head(served)) == [file for file in PUSHED if file != "calibration.json"]
    assert AudioTagger.from_any(f"hf://{NAME}@v1").calibration is not None
    assert AudioTagger.from_any(str(first)).calibration is not None
    assert AudioTagger.from_any(str(second)).calibration is None
    config = FetchConfig(revision=first.revision)
    assert AudioTagger.from_hparams(source=NAME, fetch_config=config).calibration is not None
    assert AudioTagger.from_hparams(source=NAME).calibration is None


def test_loading_an_address_runs_no_code(served, run, tmp_path):
    pushed(run)
    files = dict(head(served))
    text = files["hyperparams.yaml"].decode()
    files["hyperparams.yaml"] = f"{text}\nx: !apply:os.mkdir ['{tmp_path / 'ran'}']\n".encode()
    files["evil.py"] = b"open('ran', 'w')"
    served.repositories[NAME].commit(files, "evil")
    with pytest.raises(InputError, match=r"!apply:os\.mkdir"):
        AudioTagger.from_any(f"hf://{NAME}")
    assert not (tmp_path / "ran").exists()
    assert "evil.py" not in [file.name for file in download(f"hf://{NAME}").iterdir()]


def test_what_is_in_the_cache_is_used_offline(served, run, monkeypatch):
    pushed(run)
    folder = download(f"hf://{NAME}")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download(f"hf://{NAME}") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not in the cache as a whole"):
        download(f"hf://{NAME}")


# Refusals


def test_addresses():
    assert Address.of("hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    for wrong in ("hf://a", "hf://a/b/c", "hf://a/b@", "hf:///b", "hf://"):
        with pytest.raises(InputError, match="hf://owner/name"):
            open_source(wrong)


def test_what_the_hub_refuses(served, run, monkeypatch):
    pushed(run)
    with pytest.raises(InputError, match=r"hf://somebody/nothing: there is no such repository .* or not for you.*hf auth login"):
        open_source("hf://somebody/nothing")
    with pytest.raises(InputError, match=r"hf://somebody/tagger@v9: the repository has no such revision"):
        open_source(f"hf://{NAME}@v9")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    served.gated.add(NAME)
    with pytest.raises(InputError, match=r"accept their terms at http.*/somebody/tagger, and log in with `hf auth login`"):
        open_source(f"hf://{NAME}")


def test_a_repository_without_a_tagger(served, run):
    pushed(run)
    served.repositories[NAME].commit({"README.md": b"nothing"}, "nothing")
    with pytest.raises(InputError, match=r"not a tagger's repository, it has no hyperparams\.yaml"):
        open_source(f"hf://{NAME}")


def test_offline(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    said = r"127\.0\.0\.1:9 cannot be reached.*`hf download somebody/tagger --revision v1 --local-dir FOLDER`"
    with pytest.raises(InputError, match=said):
        open_source(f"hf://{NAME}@v1")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 cannot be reached"):
        push(".", NAME)


def test_pushing_without_a_token_or_with_a_wrong_one(served, run, monkeypatch, capsys):
    assert "refused" in refused(capsys, run, "--push", "others/tagger")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "log in with a token that may do this: `hf auth login`" in refused(capsys, run, "--push", NAME)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token to write with: log in with `hf auth login`, or set HF_TOKEN" in refused(capsys, run, "--push", NAME)
    assert served.repositories == {}


def test_private(served, run, monkeypatch, capsys):
    pushed(run, "--private")
    assert served.repositories[NAME].private
    assert AudioTagger.from_any(f"hf://{NAME}").labels
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="or not for you"):
        open_source(f"hf://{NAME}@v1")
    # what others see already does not become private by saying so
    monkeypatch.setenv("HF_TOKEN", served.token)
    served.repositories[NAME].private = False
    before = len(served.repositories[NAME].commits)
    assert "is there already, and public" in refused(capsys, run, "--push", NAME, "--private")
    assert len(served.repositories[NAME].commits) == before


def test_wrong_command_lines(run, tmp_path, capsys):
    assert "give --out FOLDER, or --push OWNER/NAME" in refused(capsys, run)
    assert "--private is of --push" in refused(capsys, run, "--out", tmp_path, "--private")
    assert "repositories are OWNER/NAME" in refused(capsys, run, "--push", "tagger")
