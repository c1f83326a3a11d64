"""A folder belongs to one run: what would make its figures those of something else is refused, and nothing in it changes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import ruamel.yaml
import soundfile

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import IDENTITY
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment.identity import changes, flat
from psla_sb.labels.teacher_scores import stamp
from psla_sb.labels.vocabulary import Vocabulary
from runs import TRAIN, command, differences, finish


@pytest.fixture
def used(tiny_run, tmp_path):
    """A finished run's folder, which may be changed."""
    return shutil.copytree(tiny_run[0], tmp_path / "used")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(tmp_path, *arguments, **overrides):
    """The last line that `train.py` prints, which ends with status 2."""
    log = tmp_path / "refused.log"
    log.unlink(missing_ok=True)
    assert finish(command(TRAIN, "hparams/mini.yaml", *arguments, **overrides), log) == 2, log.read_text()
    assert "Traceback" not in log.read_text()
    line = log.read_text().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mixup_rate", 0, "mixup_rate was 0.5, is 0"),
        ("balanced_sampling", False, "balanced_sampling was True, is False"),
        ("lr", "1e-5", "lr was 0.002, is 1e-05"),
        ("seed", 2, "seed was 1, is 2"),
        ("batch_size", 4, "batch_size was 8, is 4"),
        ("n_frames", 40, "n_frames was 48, is 40"),
        ("n_mels", 24, "n_mels was 32, is 24"),
        ("n_heads", 2, "n_heads was 4, is 2"),
        ("freq_mask", 0, "freq_mask was 16, is 0"),
        ("draws_per_epoch", 16, "draws_per_epoch was null, is 16"),
        ("class_weight_offset", 100, "class_weight_offset was 0.01, is 100"),
        ("eval_crop", "centre", "eval_crop was first, is centre"),
        ("train_crop", "random", "train_crop was first, is random"),
        ("decay_start", 1, "decay_start was 24, is 1"),
        ("drop_connect", 0.2, "drop_connect was 0, is 0.2"),
        ("width", "null", "width was 0.5, is null"),
        ("variant", "b1", "variant was b0, is b1"),
        ("sample_rate", 8000, "sample_rate was 16000, is 8000"),
        ("seconds", 1.0, "seconds was 0.5, is 1.0"),
        ("n_train", 20, "n_train was 40, is 20"),
        ("pretrained_tagger", "x", "pretrained_tagger was null, is x"),
        (
            "loss",
            "!name:torch.nn.functional.mse_loss",
            "loss was !name:psla_sb.experiment.brain.binary_cross_entropy, is !name:torch",
        ),
        ("optimizer", "{weight_decay: 0.1}", "optimizer.weight_decay was 5e-07, is 0.1"),
        ("waveform_augment", "[]", "waveform_augment was a list of 1, is a list of 0"),
        ("max_grad_norm", 5, "max_grad_norm was .inf, is 5.0"),
        ("grad_accumulation_factor", 2, "grad_accumulation_factor was 1, is 2"),
    ],
)
def test_another_setting_is_refused(used, mini_data, tmp_path, key, value, said):
    before = contents(used)
    line = refusal(tmp_path, data_folder=mini_data, output_folder=used, **{key: value})
    assert said in line
    assert f"--output_folder={used}-" in line
    assert line.count(" was ") == 1
    assert contents(used) == before


def test_several_settings_are_all_named(used, mini_data, tmp_path):
    line = refusal(tmp_path, "--debug", data_folder=mini_data, output_folder=used, mixup_rate=0, lr=1e-3)
    for said in ("mixup_rate was 0.5, is 0", "lr was 0.002, is 0.001", "debug was False, is True"):
        assert said in line


def test_what_may_change_and_a_folder_that_was_moved(used, tiny_run, mini_data, tmp_path):
    moved, data = used.rename(tmp_path / "moved"), shutil.copytree(mini_data, tmp_path / "data")
    settings = {"num_workers": 1, "valid_batch_size": 3, "on_bad_audio": "skip", "trust": "[]", "ckpt_interval_minutes": 5}
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=data, output_folder=moved, published="{last: 0.9}", **settings)
    assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "Published figures are not beside these: " in (tmp_path / "log").read_text()
    ours = json.loads((moved / "results.json").read_text())["epochs"]
    assert ours == tiny_run[1]["epochs"]
    assert read_yaml(moved / "hyperparams.yaml")["data_folder"] == str(data)


def test_more_epochs_go_on_and_fewer_are_refused(used, mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=used, number_of_epochs=3)
    assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("Going into epoch") == 1
    whole = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "whole", number_of_epochs=3)
    assert finish(whole, tmp_path / "log") == 0
    assert differences(tmp_path / "whole", used) == []
    assert "number_of_epochs was 3, is 2" in refusal(tmp_path, data_folder=mini_data, output_folder=used)


def reverse_rows(text):
    head, *rows = text.splitlines(keepends=True)
    return "".join([head, *reversed(rows)])


def swap_classes(text):
    head, first, second, *rows = text.splitlines(keepends=True)
    return "".join([head, first[:2] + second[2:], second[:2] + first[2:], *rows])


def other_label(text):
    """The first clip with the labels of another."""
    head, first, *rows = text.splitlines(keepends=True)
    labels = next(labels for row in rows if (labels := row.rpartition(",")[2]) != first.rpartition(",")[2])
    return "".join([head, f"{first.rpartition(',')[0]},{labels}", *rows])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("eval.csv", lambda text: text.rpartition('\n"')[0] + "\n", "valid_annotation had 20 clips, and has 19"),
        ("train.csv", lambda text: text.rpartition('\n"')[0] + "\n", "train_annotation had 40 clips, and has 39"),
        ("train.csv", reverse_rows, "train_annotation has other clips, or in another order"),
        ("eval.csv", other_label, "the clips of valid_annotation have other labels"),
        ("train.csv", other_label, "the clips of train_annotation have other labels"),
        ("classes.csv", swap_classes, "the class list has other classes or names, or in another order"),
    ],
)
def test_other_clips_labels_and_classes_are_refused(used, mini_data, tmp_path, file, change, said):
    changed = tmp_path / file
    source = used / ("class_labels_indices.csv" if file == "classes.csv" else file)
    changed.write_text(change(source.read_text()))
    key = {"eval.csv": "valid_annotation", "train.csv": "train_annotation", "classes.csv": "class_list"}[file]
    files = {"valid_annotation": used / "eval.csv", "train_annotation": used / "train.csv", key: changed}
    before = contents(used)
    assert said in refusal(tmp_path, data_folder=mini_data, output_folder=used, skip_prep=True, **files)
    after = contents(used)
    # what each start says of itself
    assert {str(path) for path in after if after[path] != before.get(path)} <= {"env.log", "log.txt"}


def test_a_folder_of_before_is_compared_by_its_files(used, mini_data, tmp_path):
    (used / IDENTITY).unlink()
    settings = used / "hyperparams.yaml"
    # a key that there was not yet
    settings.write_text("\n".join(line for line in settings.read_text().splitlines() if "loss:" not in line) + "\n")
    assert "mixup_rate was 0.5, is 0" in refusal(tmp_path, data_folder=mini_data, output_folder=used, mixup_rate=0)
    for name, change, key, said in [
        ("eval.csv", lambda text: text.rpartition('\n"')[0] + "\n", "valid_annotation", "had 20 clips, and has 19"),
        ("class_labels_indices.csv", swap_classes, "class_list", "the class list has other classes"),
    ]:
        (tmp_path / name).write_text(change((used / name).read_text()))
        files = {"valid_annotation": used / "eval.csv", "train_annotation": used / "train.csv", key: tmp_path / name}
        assert said in refusal(tmp_path, data_folder=mini_data, output_folder=used, skip_prep=True, **files)
    assert not (used / IDENTITY).exists()
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=used)
    assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert json.loads((used / IDENTITY).read_text())["settings"]["mixup_rate"] == 0.5


def test_a_run_that_has_trained_nothing_can_be_changed(mini_data, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder, lr=1)
    assert finish(argv, log, at=(9, "psla_sb.experiment.brain:TaggingBrain.fit_batch", 2)) == -9
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder)
    assert finish(argv, log) == 0, log.read_text()
    assert json.loads((folder / IDENTITY).read_text())["settings"]["lr"] == 0.002


def yaml(text):
    return ruamel.yaml.YAML().load(text)


def test_only_what_others_follow_from_is_named():
    text = "a: 1\nb: !new:m.B {size: !ref <a>, rate: 2}\nc: !ref <b>\ndata_folder: x\npath: !ref <data_folder>/file\n"
    then = flat(yaml("a: 1\nb: &b !new:m.B {size: 1, rate: 2}\nc: *b\ndata_folder: x\npath: x/file\n"))

    def named(resolved, written=text):
        return changes(then, flat(yaml(resolved)), flat(yaml(written)))

    assert named("a: 1\nb: &b !new:m.B {size: 1, rate: 2}\nc: *b\ndata_folder: y\npath: y/file\n") == {}
    assert named("a: 3\nb: &b !new:m.B {size: 3, rate: 2}\nc: *b\ndata_folder: x\npath: x/file\n") == {"a": (1, 3)}
    assert named("a: 1\nb: &b !new:m.C {size: 1, rate: 2}\nc: *b\ndata_folder: x\npath: x/file\n", text.replace("m.B", "m.C")) == {
        "b": ("!new:m.B", "!new:m.C")
    }
    assert named(
        "a: 1\nb: &b !new:m.B {size: 1, rate: 2.5}\nc: *b\ndata_folder: x\npath: x/file\n", text.replace("rate: 2", "rate: 2.5")
    ) == {"b.rate": (2, 2.5)}
    # a key that may change, but that others follow from
    epochs = "number_of_epochs: {}\nschedule: {{steps: {}}}\n"
    assert changes(
        flat(yaml(epochs.format(1, 1))), flat(yaml(epochs.format(2, 2))), flat(yaml(epochs.format(2, "!ref <number_of_epochs>")))
    ) == {"number_of_epochs": (1, 2)}
    # the same values, but another part
    assert "c" in changes(flat(yaml("a: &a {x: 1}\nb: &b {x: 1}\nc: *a")), flat(yaml("a: {x: 1}\nb: &b {x: 1}\nc: *b")), {})


def mine(tmp_path, **blocks):
    """The recipe's YAML file with other lines for some keys."""
    text = (TRAIN.parent / "hparams" / "mini.yaml").read_text()
    for old, new in blocks.values():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


def ended(tmp_path, file, **overrides):
    """Exit status and last line of a run of a YAML file."""
    log = tmp_path / "ended.log"
    log.unlink(missing_ok=True)
    status = finish(command(TRAIN, str(file), **overrides), log)
    return status, log.read_text().splitlines()[-1]


def test_checkpoints_in_another_folder(mini_data, tmp_path):
    where = ("checkpoints_dir: !ref <output_folder>/save", f"checkpoints_dir: {tmp_path}/elsewhere/a")
    file, folder = mine(tmp_path, where=where), tmp_path / "run"
    settings = {"data_folder": mini_data, "output_folder": folder, "ckpt_interval_steps": 1}
    argv = command(TRAIN, str(file), **settings)
    assert finish(argv, tmp_path / "log", at=(15, "psla_sb.experiment.brain:TaggingBrain.fit_batch", 3)) == 75
    assert not json.loads((folder / IDENTITY).read_text()).get("epochs")
    status, line = ended(tmp_path, file, **settings, lr=1e-5)
    assert (status, "lr was 0.002, is 1e-05" in line) == (2, True)
    # of another run
    status, line = ended(tmp_path, file, **{**settings, "output_folder": tmp_path / "other"})
    assert status == 2
    assert f"elsewhere/a has the checkpoints of a run, but not of {tmp_path / 'other'}" in line
    assert finish(argv, tmp_path / "log") == 0


def test_without_a_checkpoint_weights_to_start_from_are_needed(used, mini_data, tmp_path):
    """A folder of checkpoints that was renamed is none to go on from."""
    identity = json.loads((used / IDENTITY).read_text())
    identity["settings"] |= {"pretrained": "/nowhere.pth", "embedding_model.pretrained": "/nowhere.pth"}
    (used / IDENTITY).write_text(json.dumps(identity))
    (used / "save").rename(used / "save_old")
    status, line = ended(tmp_path, "hparams/mini.yaml", data_folder=mini_data, output_folder=used, pretrained="/nowhere.pth")
    assert (status, "/nowhere.pth: cannot be read" in line) == (2, True)


def test_a_changed_place_hides_no_other_change(tiny_run, mini_data, tmp_path):
    folder = tmp_path / "run"
    old = "freq_mask: 16 # in mel bins; 0: none"
    file = mine(tmp_path, note=(old, f"{old}\nnote: !ref <data_folder>/a"))
    settings = {"data_folder": mini_data, "output_folder": folder}
    assert ended(tmp_path, file, **settings)[0] == 0
    moved = shutil.copytree(mini_data, tmp_path / "data")
    assert ended(tmp_path, file, **{**settings, "data_folder": moved})[0] == 0
    file.write_text(file.read_text().replace("<data_folder>/a", "<data_folder>/b"))
    status, line = ended(tmp_path, file, **{**settings, "data_folder": moved})
    assert (status, "note was DATA_FOLDER/a, is DATA_FOLDER/b" in line) == (2, True)


def test_a_key_that_was_not_there_had_a_meaning(used, mini_data, tmp_path):
    (used / IDENTITY).unlink()
    settings = used / "hyperparams.yaml"
    settings.write_text("\n".join(line for line in settings.read_text().splitlines() if not line.startswith("eval_crop")) + "\n")
    line = refusal(tmp_path, data_folder=mini_data, output_folder=used, eval_crop="centre")
    assert "eval_crop was first, is centre" in line


def test_a_teachers_scores_are_known_by_what_they_say(mini_data, tiny_run, tmp_path):
    clips = Manifest.from_csv(tiny_run[0] / "train.csv", mini_data)
    vocabulary = Vocabulary.from_csv(tiny_run[0] / "class_labels_indices.csv")
    scores = 0.25 + clips.targets(vocabulary) / 4

    def teacher(name, values):
        np.save(tmp_path / f"{name}.npy", values)
        (tmp_path / f"{name}.json").write_text(json.dumps(stamp(clips, vocabulary)))
        return tmp_path / f"{name}.npy"

    files = {"train_annotation": tiny_run[0] / "train.csv", "valid_annotation": tiny_run[0] / "eval.csv", "skip_prep": True}
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", **files}
    run = {**settings, "number_of_epochs": 1, "teacher_scores": teacher("one", scores)}
    assert ended(tmp_path, "hparams/mini.yaml", **run)[0] == 0
    assert ended(tmp_path, "hparams/mini.yaml", **{**run, "teacher_scores": teacher("moved", scores)})[0] == 0
    for changed in (teacher("one", scores + 0.25), "null"):
        status, line = ended(tmp_path, "hparams/mini.yaml", **{**run, "teacher_scores": changed, "number_of_epochs": 2})
        assert (status, "teacher_scores has other scores" in line) == (2, True)


def test_blocks_may_change_their_places():
    first = "modules: {a: &x !new:m.A {n: 1}}\na: *x\nb: !new:m.B {of: *x}\n"
    last = "a: &x !new:m.A {n: 1}\nb: !new:m.B {of: *x}\nmodules: {a: *x}\n"
    assert flat(yaml(first)) == flat(yaml(last))


def test_the_folder_one_is_in(used, mini_data, monkeypatch, tmp_path):
    monkeypatch.chdir(used)
    line = refusal(tmp_path, data_folder=mini_data, output_folder=".", mixup_rate=0)
    assert f"{used} has a run of its own: mixup_rate was 0.5, is 0" in line


def test_other_training_sounds_are_refused_where_training_goes_on(used, mini_data, tmp_path):
    data, log = shutil.copytree(mini_data, tmp_path / "data"), tmp_path / "log"
    clips = sorted((data / "audio").rglob("*.flac"))
    contents_of_clips = [clip.read_bytes() for clip in clips]
    for clip, content in zip(clips, contents_of_clips[7:] + contents_of_clips[:7], strict=True):
        clip.write_bytes(content)
    settings = {"data_folder": data, "output_folder": used}
    line = refusal(tmp_path, **settings, number_of_epochs=3)
    clip, was, now = re.search(r"training clip '(.+)' was (\S+), and (\S+) is another sound", line).groups()
    assert Path(was).is_relative_to(mini_data)
    assert Path(now).is_relative_to(data)
    assert clip in Path(now).name
    # what was trained is evaluated, whatever the training clips are by now
    assert finish(command(TRAIN, "hparams/mini.yaml", **settings), log) == 0, log.read_text()
    # on purpose, as the message says
    assert "take train_sounds out of identity.json" in line
    identity = json.loads((used / IDENTITY).read_text())
    del identity["contents"]["train_sounds"]
    (used / IDENTITY).write_text(json.dumps(identity))
    assert finish(command(TRAIN, "hparams/mini.yaml", **settings, number_of_epochs=3), log) == 0, log.read_text()
    line = refusal(tmp_path, data_folder=mini_data, output_folder=used, number_of_epochs=4)
    assert f"training clip '{clip}' was {now}, and {was} is another sound" in line


def test_the_same_sounds_in_other_formats_go_on(used, mini_data, tmp_path):
    data, log = shutil.copytree(mini_data, tmp_path / "data"), tmp_path / "log"
    for clip in (data / "audio").rglob("*.flac"):
        samples, rate = soundfile.read(clip)
        soundfile.write(clip.with_suffix(".ogg" if "eval" not in clip.parts else ".wav"), samples, rate)
        clip.unlink()
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=data, output_folder=used, number_of_epochs=3)
    assert finish(argv, log) == 0, log.read_text()
    assert ".ogg" in (used / "train.csv").read_text()


def test_display_names_are_part_of_the_classes(used, mini_data, tmp_path):
    head, first, second, *rows = (used / "class_labels_indices.csv").read_text().splitlines(keepends=True)
    (index, mid, name), (other, other_mid, other_name) = (row.split(",", 2) for row in (first, second))
    swapped = [head, f"{index},{mid},{other_name}", f"{other},{other_mid},{name}", *rows]
    (tmp_path / "classes.csv").write_text("".join(swapped))
    settings = {"data_folder": mini_data, "output_folder": used, "class_list": tmp_path / "classes.csv"}
    status, line = ended(tmp_path, "hparams/mini.yaml", **settings)
    assert (status, "other classes or names" in line) == (2, True)
