"""Models by name: the table, and what becomes of a name, from a local server with the faults of real ones."""

import hashlib
import io
import json
import threading

import pytest
import soundfile
import torch
from published_networks import layout, seeded
from web import web

from psla_sb import fetch as fetching
from psla_sb.checkpoints import models
from psla_sb.checkpoints.models import CLASS_LISTS, MODELS, ClassList, tagger_of
from psla_sb.checkpoints.sources import Published, Snapshot, TaggerFolder, on_disk, open_source
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.cli.import_psla import import_checkpoint
from psla_sb.cli.models import models as command
from psla_sb.cli.tag import tag
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.official_files import OFFICIAL

NAME, FILE, LIST = "efficientat-mn01", "mn01_as_hop_5_mAP_298.pt", "class_labels_indices.csv"
CLASSES = Vocabulary(["/m/bell", "/m/rain", "/m/dog"], ["Bell", "Rain", "Dog"])


@pytest.fixture(scope="session")
def checkpoint():
    """The bytes of a tiny network of three classes in EfficientAT's layout."""
    content = io.BytesIO()
    torch.save(seeded(layout(0.1, 3), "mn01"), content)
    return content.getvalue()


@pytest.fixture
def published(checkpoint, tmp_path, monkeypatch):
    """A server that has the network, of which the table says so, and its class list; the cache is empty."""
    monkeypatch.setenv("PSLA_CACHE", str(tmp_path / "cache"))
    CLASSES.to_csv(tmp_path / "labels.csv")
    with web() as (state, address):
        state.files = {f"/{FILE}": checkpoint, f"/{LIST}": (tmp_path / "labels.csv").read_bytes()}
        model = MODELS[NAME]._replace(url=f"{address}/{FILE}?dl=1", options={"hop": 5})
        monkeypatch.setitem(MODELS, NAME, model)
        classes = ClassList(f"{address}/{LIST}", CLASSES.digest(), hashlib.sha256(state.files[f"/{LIST}"]).hexdigest())
        monkeypatch.setitem(CLASS_LISTS, "AudioSet", classes)
        yield state


def offline(monkeypatch):
    """Nobody listens there."""
    monkeypatch.setitem(MODELS, NAME, MODELS[NAME]._replace(url=f"http://127.0.0.1:9/{FILE}"))
    monkeypatch.setitem(CLASS_LISTS, "AudioSet", CLASS_LISTS["AudioSet"]._replace(url=f"http://127.0.0.1:9/{LIST}"))


def in_cache(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file())


def error_of(run, capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


TAGGER = [
    ".lock",
    "AudioSet/class_labels_indices.csv",
    *(
        f"{NAME}/{file}"
        for file in ("classifier.ckpt", "embedding_model.ckpt", "fetched.json", "hyperparams.yaml", "label_encoder.ckpt")
    ),
]


# The table


def test_the_table():
    assert len(MODELS) == 30
    assert len({model.url for model in MODELS.values()}) == 30
    for name, model in MODELS.items():
        assert name == model.name
        assert model.url.startswith("https://")
        assert 0.2 < model.mAP < 0.6
        assert model.classes in CLASS_LISTS
        assert model.file.endswith((".pt", ".pth"))
        assert model.sha256 is None or len(model.sha256) == 64
    assert MODELS["efficientat-mn10"].file == "mn10_as_mAP_471.pt"
    assert MODELS["efficientat-mn10"].mAP == 0.471
    assert MODELS["efficientat-mn10-hop-5"].options == {"hop": 5, "mels": 128, "strides": (2, 2, 2, 2)}
    assert MODELS["efficientat-mn10-fc-s2211"].options["strides"] == (2, 2, 1, 1)
    assert MODELS["psla-fsd50k"].options == {"padding": "symmetric", "n_frames": 3000}
    # no file was ever fetched, and no checksum is published: who changes one changes the other
    assert not [name for name, model in MODELS.items() if model.fetched != (model.sha256 is not None)]
    assert (CLASS_LISTS["AudioSet"].url, CLASS_LISTS["AudioSet"].sha256) == OFFICIAL[LIST]


def test_the_list_says_what_was_never_fetched(published, capsys):
    command([])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "psla-audioset-average" in line)
    assert row.split() == ["*", "psla-audioset-average", "0.444", "AudioSet", "not", "stated", "no"]
    assert "never fetched" in " ".join(lines)
    tagger_of(NAME)
    command(["--format", "json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == MODELS.keys()
    assert rows[NAME]["folder"] == str(models.tagger_path(NAME))
    assert rows["efficientat-mn10"]["folder"] is None
    assert rows["efficientat-mn10"]["fetched"] is False


def test_wrong_command_lines(capsys):
    assert "give the names" in error_of(command, capsys, "fetch")
    assert "give the names" in error_of(command, capsys, "list", NAME)
    assert "efficientat-mn1: no such model" in error_of(command, capsys, "fetch", "efficientat-mn1")


# From a name to tags


def test_a_name_is_fetched_once_and_tags(published, tmp_path, capsys):
    soundfile.write(tmp_path / "sound.wav", torch.randn(32000).numpy() / 10, 32000)
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            tag(["--model", NAME, str(tmp_path / "sound.wav"), "--format", "json"])
        assert caught.value.code == 0
        assert "Bell" in capsys.readouterr().out
    assert published.asked == [f"/{LIST}", f"/{FILE}"]
    assert in_cache(tmp_path) == TAGGER
    (tmp_path / FILE).write_bytes(published.files[f"/{FILE}"])
    expected = AudioTagger.from_source(Published(tmp_path / FILE, tmp_path / "labels.csv"), run_opts={"device": "cpu"})
    tagger = AudioTagger.from_any(NAME, device="cpu")
    assert tagger.mods.compute_features(torch.zeros(1, 32000)).shape[1] == 200
    wavs = torch.randn(2, 32000)
    torch.testing.assert_close(tagger.score_batch(wavs), expected.score_batch(wavs), rtol=0, atol=0)
    fetched = json.loads((models.tagger_path(NAME) / "fetched.json").read_text())
    assert fetched["sha256"] == hashlib.sha256(published.files[f"/{FILE}"]).hexdigest()


def test_every_way_in_takes_a_name(published, tmp_path, capsys):
    from psla_sb.aggregation.members import find_members

    assert isinstance(open_source(NAME), TaggerFolder)
    assert list(find_members([NAME], "checkpoints").values()) == [models.tagger_path(NAME)]
    tagger = AudioTagger.from_any(NAME, device="cpu")
    assert not load_pretrained_tagger(
        NAME, {name: getattr(tagger.mods, name) for name in ("embedding_model", "classifier")}
    ).not_taken
    import_checkpoint([NAME, "--out", str(tmp_path / "mine")])
    assert AudioTagger.from_folder(tmp_path / "mine").labels == CLASSES.names
    assert "leave --hop out" in error_of(import_checkpoint, capsys, NAME, "--out", tmp_path / "mine", "--hop", 10)


def test_what_is_there_comes_before_a_name(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert on_disk(NAME).resolve() == tmp_path / NAME
    assert published.asked == []
    # nothing that is called alike is taken for a name
    assert isinstance(open_source(f"{NAME}.safetensors"), Snapshot)
    with pytest.raises(InputError, match="a name that psla-models lists"):
        open_source("efficientat-mn1")


def test_the_command_fetches(published, capsys):
    command(["fetch", NAME])
    assert f"psla-tag --model {NAME}" in capsys.readouterr().out
    assert published.asked == [f"/{LIST}", f"/{FILE}"]


def test_processes_that_want_the_same_wait_for_each_other(published, tmp_path):
    threads = [threading.Thread(target=tagger_of, args=(NAME,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert published.asked == [f"/{LIST}", f"/{FILE}"]
    assert in_cache(tmp_path) == TAGGER


# Faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [(404, "HTTP Error 404"), (503, "HTTP Error 503"), ("cut", "the connection ended after"), ("hang", "timed out")],
)
@pytest.mark.parametrize("file", [FILE, LIST])
def test_a_server_that_fails(file, fault, said, published, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    published.faults[f"/{file}"] = fault
    with pytest.raises(InputError) as caught:
        tagger_of(NAME)
    place = tmp_path / "cache" / (FILE if file == FILE else f"AudioSet/{LIST}")
    assert said in str(caught.value)
    assert f"/{file}" in str(caught.value)
    assert f"on a machine that can, and put it at {place}." in str(caught.value)
    assert not [name for name in in_cache(tmp_path) if name.endswith(".pt") or NAME in name or name.startswith("tmp")]
    # the same again, once the server is well
    published.faults.clear()
    tagger_of(NAME)
    assert in_cache(tmp_path) == TAGGER


def test_another_file_than_the_published_one_is_not_kept(published, tmp_path, monkeypatch):
    digest = hashlib.sha256(published.files[f"/{FILE}"]).hexdigest()
    monkeypatch.setitem(MODELS, NAME, MODELS[NAME]._replace(sha256=digest))
    published.files[f"/{FILE}"] += b"0"
    with pytest.raises(InputError, match=f"its SHA-256 is .*, not {digest}. It was not kept"):
        tagger_of(NAME)
    assert in_cache(tmp_path) == TAGGER[:2]
    # nor is one that was put there by hand
    (tmp_path / "cache" / FILE).write_bytes(published.files[f"/{FILE}"])
    with pytest.raises(InputError, match="not the published file: its SHA-256"):
        tagger_of(NAME)
    published.files[f"/{FILE}"] = published.files[f"/{FILE}"][:-1]
    (tmp_path / "cache" / FILE).unlink()
    assert TaggerFolder(tagger_of(NAME)).vocabulary == CLASSES


def other_network():
    content = io.BytesIO()
    torch.save(seeded(layout(0.1, 2), "mn01"), content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: b"<!DOCTYPE html><html>This file is gone</html>", "was not kept.*web page"),
        (other_network, "a model of 2 classes, not of AudioSet's 3"),
    ],
)
def test_a_file_that_is_no_such_checkpoint(content, said, published, tmp_path):
    published.files[f"/{FILE}"] = content()
    with pytest.raises(InputError, match=said) as caught:
        tagger_of(NAME)
    assert f"/{FILE}" in str(caught.value)
    assert in_cache(tmp_path) == TAGGER[:2]


def test_classes_in_another_order(published, tmp_path, monkeypatch):
    Vocabulary(CLASSES.mids[::-1], CLASSES.names[::-1]).to_csv(tmp_path / "other.csv")
    with pytest.raises(InputError, match=r"other\.csv: not AudioSet's classes in the order"):
        open_source(NAME, labels=tmp_path / "other.csv")
    monkeypatch.setitem(CLASS_LISTS, "AudioSet", CLASS_LISTS["AudioSet"]._replace(sha256=None))
    published.files[f"/{LIST}"] = (tmp_path / "other.csv").read_bytes()
    with pytest.raises(InputError, match=r"was not kept: class_labels_indices\.csv: not AudioSet's.*--labels CSV"):
        tagger_of(NAME)
    assert in_cache(tmp_path) == TAGGER[:1]


# Offline


def test_offline_the_error_says_where_to_put_what_and_then_it_works(published, tmp_path, monkeypatch, capsys, checkpoint):
    offline(monkeypatch)
    error = error_of(tag, capsys, "--model", NAME, tmp_path / "sound.wav")
    at = tmp_path / "cache" / "AudioSet" / LIST
    assert f"Get http://127.0.0.1:9/{LIST} on a machine that can, and put it at {at}." in error
    assert f"--labels CSV. The model itself, http://127.0.0.1:9/{FILE}, is looked for at {tmp_path / 'cache' / FILE}" in error
    CLASSES.to_csv(at)
    error = error_of(tag, capsys, "--model", NAME, tmp_path / "sound.wav")
    assert f"Get http://127.0.0.1:9/{FILE} on a machine that can, and put it at {tmp_path / 'cache' / FILE}." in error
    (tmp_path / "cache" / FILE).write_bytes(checkpoint)
    assert AudioTagger.from_any(NAME, device="cpu").labels == CLASSES.names
    # what somebody has put there is not taken away
    assert in_cache(tmp_path) == sorted([*TAGGER, FILE])
    assert published.asked == []


def test_a_class_list_that_is_given_is_not_fetched(published, tmp_path):
    assert TaggerFolder(tagger_of(NAME, tmp_path / "labels.csv")).vocabulary == CLASSES
    assert published.asked == [f"/{FILE}"]


def test_a_cache_that_cannot_be_written(published, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PSLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="choose another folder"):
        tagger_of(NAME)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("PSLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "psla_sb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / ".cache" / "psla_sb"
