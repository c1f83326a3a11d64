"""Checkpoints and weights appear whole or not at all."""

import os

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from psla_sb.checkpoints.checkpointer import AtomicCheckpointer
from psla_sb.checkpoints.weights import load_into, load_module, load_weights, save_weights
from psla_sb.errors import InputError
from psla_sb.files import atomic_write


class Recoverable:
    """A part of the training state, which can fail to be saved."""

    def __init__(self, value):
        self.value = value

    @staticmethod
    def save(self, path):
        path.write_text("half of it")
        if self.value is None:
            raise OSError("disk full")
        path.write_text(str(self.value))

    @staticmethod
    def load(self, path, end_of_epoch):
        self.value = int(path.read_text())


def checkpointer_of(folder, recoverable):
    hooks = {"custom_save_hooks": {"state": Recoverable.save}, "custom_load_hooks": {"state": Recoverable.load}}
    recoverables = {"aa": torch.nn.Linear(1, 1), "state": recoverable}
    return AtomicCheckpointer(folder, recoverables, **hooks, allow_partial_load=False)


def test_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    state = Recoverable(1)
    checkpointer = checkpointer_of(tmp_path, state)
    checkpointer.save_checkpoint()
    state.value = None
    with pytest.raises(InputError, match=r"cannot be written \(disk full; \d+ MiB are free there\)\. .*make room"):
        checkpointer.save_checkpoint()
    # SpeechBrain's own would take the half for the newest checkpoint
    assert [path.name[:4] for path in sorted(tmp_path.iterdir())] == ["CKPT", "tmp+"]
    (leftover,) = tmp_path.glob("tmp+*")
    assert (leftover / "CKPT.yaml").exists()
    assert len(checkpointer.list_checkpoints()) == 1
    restarted = Recoverable(0)
    checkpointer = checkpointer_of(tmp_path, restarted)
    assert leftover.exists(), "another run may be writing it"
    assert checkpointer.recover_if_possible() is not None
    assert not leftover.exists()
    assert restarted.value == 1
    restarted.value = 2
    checkpoint = checkpointer.save_checkpoint()
    assert checkpoint.path.name.startswith("CKPT")
    assert checkpoint.paramfiles["state"].read_text() == "2"
    assert Checkpointer(tmp_path).find_checkpoint().path == checkpoint.path


def test_what_is_left_of_a_deleted_checkpoint_is_removed(tmp_path):
    for name in ("CKPT+2026-01-01+00-00-00+00", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "aa.ckpt").touch()
    (tmp_path / "CKPT.txt").touch()
    checkpointer_of(tmp_path, Recoverable(1)).recover_if_possible()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CKPT.txt", "mine"]


def test_files_are_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{f}"))), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    checkpointer_of(tmp_path, Recoverable(1)).save_checkpoint()
    assert sorted(events[:3]) == ["CKPT.yaml", "aa.ckpt", "state.ckpt"]
    assert events[3:] == ["replace", tmp_path.name]


def test_keeps_the_last_and_the_best(tmp_path):
    state = Recoverable(0)
    checkpointer = checkpointer_of(tmp_path, state)
    for state.value, score in enumerate([0.1, 0.7, 0.3, 0.5]):
        checkpointer.save_and_keep_only(meta={"mAP": score}, max_keys=["mAP"])
    assert sorted(checkpoint.meta["mAP"] for checkpoint in checkpointer.list_checkpoints()) == [0.5, 0.7]
    checkpointer.recover_if_possible(max_key="mAP")
    assert state.value == 1
    checkpointer.recover_if_possible()
    assert state.value == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_importance_keys_do_not_pile_up(tmp_path):
    checkpointer = checkpointer_of(tmp_path, Recoverable(0))
    mine = []
    for _ in range(3):
        checkpointer.save_and_keep_only(importance_keys=mine)
    assert mine == []
    checkpointer.save_and_keep_only()
    assert Checkpointer.save_and_keep_only.__defaults__[5] == []


def test_a_name_is_refused(tmp_path):
    checkpointer = checkpointer_of(tmp_path, Recoverable(0))
    with pytest.raises(ValueError, match="overwritten in place"):
        checkpointer.save_checkpoint(name="best")
    with pytest.raises(ValueError, match="overwritten in place"):
        checkpointer.save_and_keep_only(name="best")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    for text in ("old", "new"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".json"
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def modules(n_out=2):
    return {"embedding_model": torch.nn.Linear(3, 4), "classifier": torch.nn.Linear(4, n_out)}


def test_weights_round_trip(tmp_path):
    source, target = modules(), modules()
    save_weights(source, tmp_path / "a.safetensors")
    state = load_weights(tmp_path / "a.safetensors")
    assert set(state) == {f"{name}.{key}" for name in source for key in ("weight", "bias")}
    load_into(target, state)
    for name in source:
        for key, value in source[name].state_dict().items():
            assert torch.equal(value, target[name].state_dict()[key])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"classifier.weight": (2, 4)}, "missing embedding_model.weight; missing embedding_model.bias; missing classifier.bias$"),
        ({"decoder.bias": (1,)}, "unexpected decoder.bias"),
        ({"classifier.weight": (9, 4)}, r"classifier.weight is \[9, 4\], not \[2, 4\]"),
        ({f"x.{i}": (1,) for i in range(7)}, r"unexpected x.3 and 3 more$"),
    ],
)
def test_weights_that_do_not_fit(state, message):
    target = modules()
    before = {key: value.clone() for key, value in target["classifier"].state_dict().items()}
    with pytest.raises(InputError, match=rf"^w\.safetensors does not fit the model: .*{message}"):
        load_into(target, {key: torch.ones(shape) for key, shape in state.items()}, "w.safetensors")
    assert all(torch.equal(before[key], value) for key, value in target["classifier"].state_dict().items())


@pytest.mark.parametrize("kept", [0, 4, 20, 0.5, -1])
def test_cut_weights_are_refused(kept, tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights({"classifier": torch.nn.Linear(50, 50)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else kept])
    for load in (load_weights, lambda path: load_module(torch.nn.Linear(50, 50), path)):
        with pytest.raises(InputError, match=r"a\.safetensors: not a whole safetensors file"):
            load(path)


def test_pickles_and_folders_are_refused(tmp_path):
    torch.save({"classifier.weight": torch.ones(1)}, tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(InputError, match="not a whole safetensors file"):
            load_weights(path)
    with pytest.raises(InputError, match="no such file"):
        load_weights(tmp_path / "none")
