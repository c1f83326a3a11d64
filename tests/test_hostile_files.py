"""Files from others that try to run code, to hang the reader or to exhaust it. Checkpoints of the published code are in
test_interop.py, the YAML files of taggers in test_inference.py, cut and broken files beside what reads them."""

import ast
import json
import os
import pickle
import signal
import struct

import numpy as np
import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from audioset_prepare import find_clips, write_clips
from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints.checkpointer import AtomicCheckpointer
from psla_sb.checkpoints.run_folder import read_results
from psla_sb.checkpoints.weights import load_module, load_weights
from psla_sb.dataio.audio import AudioError, read_audio, read_blocks
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.teacher_scores import open_scores, read_scores, stamp
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from runs import REPOSITORY


class MakesAFolder:
    """A pickle that makes a folder if it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trace(tmp_path):
    """What a file that runs code would leave behind."""
    yield tmp_path / "code_was_run"
    assert not (tmp_path / "code_was_run").exists()


# code


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_code_in_a_checkpoint_is_not_run_whatever_the_environment_says(name, trace, tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1)
    parts = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    checkpoint = AtomicCheckpointer(tmp_path / "save", parts).save_checkpoint()
    torch.save({"weight": torch.ones(1, 1), "bias": MakesAFolder(trace)}, checkpoint.path / f"{name}.ckpt")
    # a variable with which PyTorch runs what its caller has not forbidden
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match=r"CKPT.*: cannot be loaded \(UnpicklingError.*remove this folder"):
        AtomicCheckpointer(tmp_path / "save", parts).recover_if_possible()
    assert not trace.exists()
    # SpeechBrain's own runs it
    with pytest.raises((RuntimeError, KeyError, AttributeError)):
        Checkpointer(tmp_path / "save", parts).recover_if_possible()
    trace.rmdir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.mkdir [{trace}]", "is not YAML"),
        ("a: [", "is not YAML"),
        ("[1, 2]", "not written by a training run"),
        ("", "not written by a training run"),
    ],
)
def test_a_checkpoint_is_not_described_by_code(text, message, trace, tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path / "save", {"model": torch.nn.Linear(1, 1)})
    (checkpointer.save_checkpoint().path / "CKPT.yaml").write_text(text.replace("{trace}", str(trace)))
    with pytest.raises(InputError, match=message):
        checkpointer.recover_if_possible()


def test_code_in_pretrained_weights_is_not_run(trace, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"_fc.weight": MakesAFolder(trace)}, tmp_path / "imagenet.pth")
    with pytest.raises(InputError, match=r"imagenet\.pth"):
        EfficientNetEncoder("b0", pretrained=str(tmp_path / "imagenet.pth"))
    for name in ("a.pth", "a.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(MakesAFolder(trace)))
        with pytest.raises(InputError, match="not a whole safetensors file"):
            load_module(torch.nn.Linear(1, 1), tmp_path / name)


def test_code_in_scores_is_not_run(trace, tmp_path):
    manifest, vocabulary = Manifest.from_columns(["a"], ["a.wav"], [1.0], [""]), Vocabulary(["/m/1"], ["Bell"])
    path = tmp_path / "scores.npy"
    (tmp_path / "ids.csv").write_text("ID\na\n")
    path.with_suffix(".json").write_text(json.dumps(stamp(manifest, vocabulary)))
    array = np.empty((1, 1), object)
    array[0, 0] = MakesAFolder(trace)
    np.save(path, array, allow_pickle=True)
    bare = pickle.dumps(MakesAFolder(trace))
    for content in (path.read_bytes(), bare):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"scores\.npy"):
            open_scores(path, manifest, vocabulary)
        with pytest.raises(InputError, match=r"scores\.npy"):
            read_scores(tmp_path)
    assert not trace.exists()


def test_nothing_here_can_unpickle_or_unpack():
    """No module of the toolkit, and no recipe, uses what runs code in data, or what unpacks archives.

    Packs are tar files: one module writes and one lists them, and neither makes a file of a member.
    """
    forbidden = {"pickle", "dill", "joblib", "shelve", "marshal", "zipfile", "tarfile", "unpack_archive", "eval", "exec"}
    for file in [*(REPOSITORY / "psla_sb").rglob("*.py"), *(REPOSITORY / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                allowed = {"tarfile"} if file.name in ("pack_index.py", "packing.py") else set()
                # where a subclass of its Unpickler reads an index, and finds no class and no function
                allowed |= {"pickle"} if file.name == "teacher_import.py" else set()
                assert not names & (forbidden - allowed), (file, node.lineno)
            elif isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert ast.unparse(node.func) not in forbidden, (file, node.lineno)
                assert not ast.unparse(node.func).endswith((".extract", ".extractall", ".extractfile")), (file, node.lineno)
                assert "allow_pickle" not in keywords, (file, node.lineno)
                if ast.unparse(node.func).endswith(("torch.load", "load_state_dict_from_url", "load_url")):
                    assert keywords.get("weights_only") == "True", (file, node.lineno)


# headers that lie


def safetensors(header, data=b"\0" * 16):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"classifier.weight": tensor([4], 0, 1 << 40)}),
        safetensors({"classifier.weight": tensor([1 << 40], 0, 16)}),
        safetensors({"classifier.weight": tensor([1 << 62, 1 << 62], 0, 16)}),
        safetensors({"classifier.weight": tensor([4], 16, 0)}),
        safetensors({"classifier.weight": tensor([4], -16, 0)}),
        safetensors({"classifier.weight": tensor([2], 8, 16)}),
        safetensors({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}),
        safetensors({"a": tensor([3], 0, 12), "b": tensor([2], 8, 16)}),
        safetensors({"a": tensor([4], 0, 16, "O")}),
        safetensors({"a": tensor([2], 0, 8)}),
        safetensors(b"[" * 100_000),
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}",
    ],
)
def test_safetensors_headers_that_lie(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors: not a whole safetensors file"):
        load_weights(path)
    path.write_bytes(safetensors({"a": tensor([4], 0, 16)}))
    assert load_weights(path)["a"].shape == (4,)


def test_scores_whose_header_lies(tmp_path):
    manifest, vocabulary = Manifest.from_columns(["a"], ["a.wav"], [1.0], [""]), Vocabulary(["/m/1"], ["Bell"])
    path = tmp_path / "scores.npy"
    path.with_suffix(".json").write_text(json.dumps(stamp(manifest, vocabulary)))
    np.save(path, np.zeros((1, 1), np.float32))
    header = path.read_bytes()
    path.write_bytes(header.replace(b"(1, 1), }" + b" " * 14, b"(1, 99999999999999), }" + b" "))
    assert len(path.read_bytes()) == len(header)
    assert b"99999" in path.read_bytes()
    with pytest.raises(InputError, match=r"scores\.npy"):
        open_scores(path, manifest, vocabulary)
    np.savez(tmp_path / "archive", np.zeros((1, 1)))
    (tmp_path / "archive.npz").rename(path)
    with pytest.raises(InputError, match=r"scores\.npy"):
        open_scores(path, manifest, vocabulary)


# files that never end

HUGE = "x" * 10_000_000


@pytest.fixture
def no_hang():
    """What waits for a pipe is interrupted."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 20, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_only_regular_files_are_opened_as_sound(no_hang, tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    for name, message in [("pipe.wav", "a pipe"), ("zero.wav", "a device"), ("loop.wav", "no such file")]:
        for read in (read_audio, lambda path: list(read_blocks(path))):
            with pytest.raises(AudioError, match=f"{name}: .*{message}"):
                read(tmp_path / name)
    for path, message in [("/dev/zero", "a device"), (str(tmp_path), "a folder"), ("a\0b", "no such"), (HUGE, "no such")]:
        with pytest.raises(AudioError, match=message) as caught:
            read_audio(path)
        assert len(str(caught.value)) < 3000


def test_pipes_among_the_clips_are_left_out(no_hang, tmp_path):
    (tmp_path / "a.csv").write_text('# a\n# b\n# c\n--4gqARaEJE, 0.000, 10.000, "/m/068hy"\n')
    os.mkfifo(tmp_path / "--4gqARaEJE.wav")
    with pytest.raises(InputError, match="1 that cannot be read"):
        write_clips(tmp_path / "out.csv", [tmp_path / "a.csv"], tmp_path, tmp_path, *find_clips(tmp_path), 1, (), "")


# too much of something


@pytest.mark.parametrize("row", [f"{HUGE},a.wav,1,/m/1", f"a,{HUGE},1,/m/1", f"a,a.wav,{HUGE},/m/1", f"a,a.wav,1,{HUGE}"])
def test_annotation_with_a_field_of_10_megabytes(row, tmp_path):
    path, vocabulary = tmp_path / "a.csv", Vocabulary(["/m/1"], ["Bell"])
    path.write_text(f"ID,wav,duration,labels\nb,b.wav,1,/m/1\n{row}\n")
    try:
        manifest = Manifest.from_csv(path)
        labels = manifest.label_sets(vocabulary)
        assert labels[1].tolist() == [0]
        assert HUGE in (manifest[1]["id"], manifest[1]["wav"])
    except InputError as error:
        assert str(error).startswith(f"{path}")  # noqa: PT017
        assert len(str(error)) < 3000  # noqa: PT017
        assert HUGE not in (row.split(",")[0], row.split(",")[1])


def test_class_list_with_a_field_of_10_megabytes(tmp_path):
    (tmp_path / "a.csv").write_text(f'index,mid,display_name\n0,/m/1,"{HUGE}"\n')
    with pytest.raises(InputError, match=r"a\.csv: not a UTF-8 CSV file \(field larger than field limit"):
        Vocabulary.from_csv(tmp_path / "a.csv")


def test_a_clip_with_10_000_labels(tmp_path):
    mids = [f"/m/{i}" for i in range(10_000)]
    vocabulary = Vocabulary(mids, [f"Class {i}" for i in range(10_000)])
    manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], [";".join(mids), ";".join(["/m/7"] * 10_000)])
    labels = manifest.label_sets(vocabulary)
    assert len(labels[0]) == 10_000
    assert labels[1].tolist() == [7]
    with pytest.raises(InputError, match=r"clip 'a': the label '/m/1' is not in the class list \(19999 such labels in all\)"):
        manifest.label_sets(Vocabulary(["/m/0"], ["Bell"]))


# what is not JSON


def test_json_that_is_too_deep(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" * 100_000)
    for read in (Manifest.from_psla_json, Ontology.from_json):
        with pytest.raises(InputError, match=r"a\.json: not "):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'"epochs"', b'{"epochs": 3}', b"[" * 100_000])
def test_results_that_are_none(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=r"results\.json: not "):
        read_results(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"3", b"[" * 100_000])
def test_scores_with_a_stamp_that_is_none(content, tiny_run, mini_data, tmp_path):
    folder = tiny_run[0]
    manifest = Manifest.from_csv(folder / "eval.csv", data_root=mini_data)
    vocabulary = Vocabulary.from_csv(folder / "class_labels_indices.csv")
    np.save(tmp_path / "a.npy", np.zeros((20, 39), np.float32))
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npy"):
        open_scores(tmp_path / "a.npy", manifest, vocabulary)
    # what scores are of is not known: they are computed
    scores = score({"a": folder / "snapshots" / "epoch_02.safetensors"}, manifest, vocabulary, tmp_path)["a"]
    assert scores.any()
