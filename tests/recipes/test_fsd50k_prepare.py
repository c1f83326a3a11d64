"""FSD50K's files, as they are unpacked, made into copies at 16 kHz, annotations and a class list."""

import contextlib
import csv
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile

from fsd50k_prepare import prepare_fsd50k, read_ground_truth, read_vocabulary
from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.mini_fsd50k import write_mini_fsd50k
from runs import SERVER, _happen

SETS = ("train", "valid", "eval")
SIZE = {"n_train": 12, "n_valid": 5, "n_eval": 8, "seconds": 0.6, "seed": 7}
# rows as published
VOCABULARY = (
    "0,Accelerating_and_revving_and_vroom,/m/07q2z82\n"
    "1,Animal,/m/0jbk\n"
    "2,Livestock_and_farm_animals_and_working_animals,/m/0ch8v\n"
    "3,Motor_vehicle_(road),/m/012f08\n"
    "4,Hi-hat,/m/03qtq\n"
)
DEV = (
    "fname,labels,mids,split\n"
    '57791,"Livestock_and_farm_animals_and_working_animals,Animal","/m/0ch8v,/m/0jbk",train\n'
    "64760,Hi-hat,/m/03qtq,train\n"
    '362959,"Livestock_and_farm_animals_and_working_animals,Animal","/m/0ch8v,/m/0jbk",val\n'
    '00123,"Accelerating_and_revving_and_vroom,Motor_vehicle_(road)","/m/07q2z82,/m/012f08",train\n'
)
EVAL = 'fname,labels,mids\n37199,Animal,/m/0jbk\n1e5,"Hi-hat,Animal","/m/03qtq,/m/0jbk"\n'


def prepare(data, output, resampled=None, **kwargs):
    """The annotations, by set."""
    annotations = [output / f"{name}.csv" for name in SETS]
    settings = {"resampled_folder": resampled or data / "audio_16k", "n_workers": 2, **kwargs}
    prepare_fsd50k(data, *annotations, output / "class_labels_indices.csv", **settings)
    return {name: Manifest.from_csv(path, data) for name, path in zip(SETS, annotations, strict=True)}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return write_mini_fsd50k(tmp_path_factory.mktemp("fsd50k"), **SIZE)


@pytest.fixture
def published(tmp_path):
    """A data folder with the rows above and their clips."""
    data = tmp_path / "data"
    for part, text in (("dev", DEV), ("eval", EVAL)):
        (data / f"FSD50K.{part}_audio").mkdir(parents=True)
        for line in text.splitlines()[1:]:
            soundfile.write(data / f"FSD50K.{part}_audio" / f"{line.partition(',')[0]}.wav", np.zeros(11025), 44100)
    (data / "FSD50K.ground_truth").mkdir()
    for name, text in (("vocabulary", VOCABULARY), ("dev", DEV), ("eval", EVAL)):
        (data / "FSD50K.ground_truth" / f"{name}.csv").write_text(text)
    return data


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_generated_set_has_the_true_layout(generated):
    truth = generated / "FSD50K.ground_truth"
    vocabulary = Vocabulary.from_csv(truth / "vocabulary.csv")
    assert vocabulary.names == sorted(vocabulary.names)
    assert "Bird_vocalization_and_bird_call_and_bird_song" in vocabulary.names
    assert len((truth / "vocabulary.csv").read_text().splitlines()) == len(vocabulary) == 39
    unquoted = 0
    for part, n_clips, header in (("dev", 17, ["fname", "labels", "mids", "split"]), ("eval", 8, ["fname", "labels", "mids"])):
        lines = (truth / f"{part}.csv").read_text().splitlines()
        rows = list(csv.reader(lines))
        assert rows[0] == header
        assert len(rows) == n_clips + 1
        for line, (fname, labels, mids, *_) in zip(lines[1:], rows[1:], strict=True):
            assert fname.isdigit()
            assert line.count('"') == (4 if "," in labels else 0)
            assert [vocabulary.names[vocabulary.index(mid)] for mid in mids.split(",")] == labels.split(",")
            info = soundfile.info(generated / f"FSD50K.{part}_audio" / f"{fname}.wav")
            assert (info.samplerate, info.channels, info.subtype) == (44100, 1, "PCM_16")
            assert 0.3 <= round(info.duration, 3) <= 0.6
        assert len(list((generated / f"FSD50K.{part}_audio").iterdir())) == n_clips
        unquoted += sum('"' not in line for line in lines[1:])
    assert unquoted
    splits = [row["split"] for row in csv.DictReader((truth / "dev.csv").read_text().splitlines())]
    assert (splits.count("train"), splits.count("val")) == (12, 5)


def test_generated_set_is_written_once_and_never_over_somebodys(generated, tmp_path):
    assert files(write_mini_fsd50k(tmp_path / "same", **SIZE)) == files(generated)
    dev = tmp_path / "same" / "FSD50K.ground_truth" / "dev.csv"
    dev.write_text("touched")
    write_mini_fsd50k(tmp_path / "same", **SIZE)
    assert dev.read_text() == "touched"
    assert files(write_mini_fsd50k(tmp_path / "same", **{**SIZE, "seed": 1})).keys() != files(generated).keys()
    (tmp_path / "real" / "FSD50K.dev_audio").mkdir(parents=True)
    with pytest.raises(InputError, match=r"FSD50K\.dev_audio exists and was not written by"):
        write_mini_fsd50k(tmp_path / "real")
    for wrong in ({"n_valid": 0}, {"seconds": 0.2}, {"sample_rate": 8000}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            write_mini_fsd50k(tmp_path / "new", **wrong)


@pytest.mark.parametrize("ending", ["flac", "wav"])
def test_annotations_are_those_of_a_slow_obvious_reading(ending, generated, tmp_path):
    found = prepare(generated, tmp_path, tmp_path / "copies", resampled_format=ending)
    for name in SETS:
        part = "eval" if name == "eval" else "dev"
        with open(generated / "FSD50K.ground_truth" / f"{part}.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("split") in (None, {"valid": "val"}.get(name, name))]
        assert len(found[name]) == len(rows) == SIZE[f"n_{name}"]
        for clip, row in zip(found[name], rows, strict=True):
            source = read_audio(generated / f"FSD50K.{part}_audio" / f"{row['fname']}.wav")
            assert clip["id"] == row["fname"]
            assert clip["labels"] == row["mids"].split(",")
            assert clip["wav"] == str(tmp_path / "copies" / part / f"{row['fname']}.{ending}")
            assert clip["duration"] == pytest.approx(len(source) / 16000, abs=6e-4)
            assert (read_audio(clip["wav"]) - source.clamp(-1, 1)).abs().max() <= 1 / 2**15
        assert (tmp_path / f"{name}_left_out.csv").read_text() == "ID,reason,file\n"


def test_rows_as_published(published, tmp_path):
    found = prepare(published, tmp_path)
    labels = {name: {clip["id"]: clip["labels"] for clip in found[name]} for name in SETS}
    assert labels["train"] == {"57791": ["/m/0ch8v", "/m/0jbk"], "64760": ["/m/03qtq"], "00123": ["/m/07q2z82", "/m/012f08"]}
    assert labels["valid"] == {"362959": ["/m/0ch8v", "/m/0jbk"]}
    assert labels["eval"] == {"37199": ["/m/0jbk"], "1e5": ["/m/03qtq", "/m/0jbk"]}
    assert Manifest.from_csv(tmp_path / "valid.csv")[0]["wav"] == "{data_root}/audio_16k/dev/362959.flac"
    assert found["train"][2]["duration"] == 0.25
    assert Vocabulary.from_csv(tmp_path / "class_labels_indices.csv").names == [
        "Accelerating, revving, vroom",
        "Animal",
        "Livestock, farm animals, working animals",
        "Motor vehicle (road)",
        "Hi-hat",
    ]


@pytest.mark.parametrize("order", ["index,label,mid", "index,mid,display_name"])
def test_vocabulary_with_a_header(order, tmp_path):
    (tmp_path / "plain.csv").write_text(VOCABULARY)
    rows = [line.split(",") for line in VOCABULARY.splitlines()]
    rows = rows if order == "index,label,mid" else [[index, mid, label] for index, label, mid in rows]
    (tmp_path / "header.csv").write_text("\n".join([order, *map(",".join, rows)]))
    assert read_vocabulary(tmp_path / "header.csv") == read_vocabulary(tmp_path / "plain.csv")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (DEV.replace("mids", "mid"), "dev.csv: no column mids; its header should have fname, mids, split"),
        (DEV.replace(",split", ",part"), "dev.csv: no column split"),
        (DEV.replace('"', ""), r"dev.csv: not FSD50K's ground truth as published: .*Row #2: Expected 4 columns, got 6"),
        (DEV.replace(",val\n", ",test\n"), "clip 3: the column 'split' is 'test', not one of train, val"),
        (DEV.replace("64760", ""), "clip 2: the column 'fname' is '', not the name of a file"),
        (DEV.replace("64760", "../../64760"), "clip 2: the column 'fname' is '../../64760'"),
        (DEV.replace("/m/03qtq", ""), "clip 2: the column 'mids' is '', not mids joined by commas"),
        (DEV.replace("/m/03qtq", "/m/xyz"), "dev.csv, clip '64760': the label '/m/xyz' is not in the class list"),
        (DEV.replace("64760", "57791"), "dev.csv: 1 IDs occur more than once, the first is '57791'"),
        (DEV.replace(",val\n", ",train\n"), "dev.csv: has no clips whose split is 'val'"),
        ("", "dev.csv: not FSD50K's ground truth as published: Empty CSV file"),
        ("fname,labels,mids,split\n", "dev.csv: no clips in it"),
    ],
)
def test_ground_truth_that_is_not_as_published_is_refused_before_anything_is_made(changed, message, published, tmp_path):
    (published / "FSD50K.ground_truth" / "dev.csv").write_text(changed)
    with pytest.raises(InputError, match=message):
        prepare(published, tmp_path)
    assert not (published / "audio_16k").exists()


def test_ground_truth_without_clips_is_no_table(tmp_path):
    (tmp_path / "eval.csv").write_bytes(b"\x00\xff\xfe\n\x01")
    with pytest.raises(InputError, match=r"eval\.csv: no"):
        read_ground_truth(tmp_path / "eval.csv", Vocabulary(["/m/1"], ["Bell"]))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("FSD50K.ground_truth/vocabulary.csv", r"vocabulary\.csv: no such file; data_folder must hold .*zenodo"),
        ("FSD50K.ground_truth", r"vocabulary\.csv: no such file"),
        ("FSD50K.ground_truth/eval.csv", r"eval\.csv: no such file"),
        ("FSD50K.eval_audio", r"FSD50K\.eval_audio: no such folder; unpack it from .*zenodo"),
        ("FSD50K.dev_audio", r"FSD50K\.dev_audio: no such folder"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_made(missing, message, published, tmp_path):
    path = published / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        prepare(published, tmp_path)
    assert not (published / "audio_16k").exists()


def test_broken_clips_are_left_out_and_counted(published, tmp_path, caplog):
    dev = published / "FSD50K.dev_audio"
    (dev / "57791.wav").write_text("no sound")
    (dev / "00123.wav").unlink()
    with caplog.at_level(logging.INFO):
        found = prepare(published, tmp_path, expected_clips={"train": 4, "valid": 1, "eval": 10231})
    assert [clip["id"] for clip in found["train"]] == ["64760"]
    with open(tmp_path / "train_left_out.csv", newline="", encoding="utf-8") as file:
        (undecoded, absent) = csv.DictReader(file)
    assert (undecoded["ID"], undecoded["file"]) == ("57791", str(dev / "57791.wav"))
    assert undecoded["reason"].startswith("cannot be decoded as sound")
    assert absent == {"ID": "00123", "reason": "no such file", "file": str(dev / "00123.wav")}
    said = {record.levelname: record.getMessage() for record in caplog.records if record.name == "fsd50k_prepare"}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert (
        f"train: 3 clips, 1 usable; those left out are listed in {tmp_path / 'train_left_out.csv'}. That is 3 fewer" in warnings[0]
    )
    assert "eval: 2 clips, 2 usable. That is 10229 fewer than FSD50K has: get the official files from https://zenodo" in warnings[1]
    assert f"delete {tmp_path / 'eval.csv'}" in warnings[1]
    assert "valid: 1 clips, 1 usable" in said["INFO"]


def test_counts_as_expected_are_no_warning_and_wrong_keys_an_error(published, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        prepare(published, tmp_path, expected_clips={"train": 3, "valid": 1, "eval": 2})
    assert "WARNING" not in {record.levelname for record in caplog.records}
    for wrong in ({"val": 1}, 5):
        with pytest.raises(InputError, match=r"expected_clips: should be like \{train: 36796, valid: 4170, eval: 10231\}, or null"):
            prepare(published, tmp_path, expected_clips=wrong)


def test_set_without_a_clip(published, tmp_path):
    (published / "FSD50K.dev_audio" / "362959.wav").unlink()
    with pytest.raises(
        InputError, match=r"dev\.csv, valid: 1 clips, 0 usable; the first: .*FSD50K\.dev_audio/362959\.wav: no such file"
    ):
        prepare(published, tmp_path)


def test_second_time_nothing_is_done_until_the_annotations_are_deleted(published, tmp_path, caplog):
    prepare(published, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.glob("*.csv"), *published.rglob("*.flac")]}
    (tmp_path / "class_labels_indices.csv").write_text("cut o")
    (published / "FSD50K.dev_audio" / "64760.wav").unlink()
    with caplog.at_level(logging.INFO):
        prepare(published, tmp_path)
    assert "are there already" in caplog.text
    before.pop(tmp_path / "class_labels_indices.csv")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(Vocabulary.from_csv(tmp_path / "class_labels_indices.csv")) == 5
    (tmp_path / "train.csv").unlink()
    # the copy is enough
    assert len(prepare(published, tmp_path)["train"]) == 3
    shutil.rmtree(published / "FSD50K.eval_audio")
    (tmp_path / "eval.csv").unlink()
    assert len(prepare(published, tmp_path)["eval"]) == 2


def test_changed_ground_truth_or_rate_is_prepared_again(published, tmp_path):
    assert len(prepare(published, tmp_path)["train"]) == 3
    with open(published / "FSD50K.ground_truth" / "dev.csv", "a") as file:
        file.write("9,Animal,/m/0jbk,train\n")
    shutil.copy(published / "FSD50K.dev_audio" / "64760.wav", published / "FSD50K.dev_audio" / "9.wav")
    assert len(prepare(published, tmp_path)["train"]) == 4
    wav = prepare(published, tmp_path, sample_rate=8000)["train"][3]["wav"]
    assert soundfile.info(wav).samplerate == 8000


def _prepare(data, output, flushes):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)
    if flushes is not None:
        _happen(signal.SIGKILL, "psla_sb.files:flush", flushes)
    prepare(data, output, output / "copies", expected_clips={"train": 40, "valid": 5, "eval": 15})


def start(data, output, flushes=None):
    """In a process of its own, which is killed with its workers when it, or one of them, has written so many files."""
    process = SERVER.Process(target=_prepare, args=(data, output, flushes))
    process.start()
    return process


def finish(*args):
    process = start(*args)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The data, and a preparation of it that was left alone: the output folder and its files."""
    data, output = write_mini_fsd50k(tmp_path_factory.mktemp("data"), 40, 5, 15, seconds=3.0), tmp_path_factory.mktemp("out")
    assert finish(data, output) == 0
    return data, output, files(output)


def check_copies(output, expected):
    """What is there under its own name is whole."""
    for name, content in files(output).items():
        if not os.path.basename(name).startswith("tmp+"):
            assert content == expected[name], name


def test_killed_at_random_moments_and_run_again_ends_in_the_same_files(whole):
    data, output, expected = whole
    shutil.rmtree(output)
    draw, killed = random.Random(1), 0
    for n_copies in (1, 4, 15, 30, 45):
        process = start(data, output)
        while process.is_alive() and len(list(output.glob("copies/*/[0-9]*.flac"))) < n_copies:
            time.sleep(0.002)
        process.join(draw.uniform(0, 0.2))
        # alone, or with its workers
        with contextlib.suppress(ProcessLookupError):
            (os.kill if n_copies % 2 else os.killpg)(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        check_copies(output, expected)
    assert killed >= 3
    assert finish(data, output) == 0
    assert files(output) == expected


def test_killed_before_a_file_gets_its_name_and_run_again_ends_in_the_same_files(whole):
    data, output, expected = whole
    shutil.rmtree(output)
    for flushes in (3, 12):
        assert finish(data, output, flushes) == -signal.SIGKILL
        assert list(output.rglob("tmp+*"))
        check_copies(output, expected)
    assert finish(data, output) == 0
    assert files(output) == expected
    for path in output.glob("*.*"):
        path.unlink()
    # the class list is written first, then three files for each set
    for flushes in (1, 3, 6, 10):
        assert finish(data, output, flushes) == -signal.SIGKILL
        check_copies(output, expected)
    assert finish(data, output) == 0
    assert files(output) == expected
