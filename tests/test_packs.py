"""Packs: the same clips, read from few files; packing that is killed; damage that is found."""

import errno
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.cli.pack import pack
from psla_sb.cli.tag import tag
from psla_sb.dataio import packs
from psla_sb.dataio.audio import AudioError, read_audio, read_blocks
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.prepare import pack_index, packing
from runs import SERVER, TRAIN, command, differences, finish

RATE = 16000
ODD_NAMES = [
    "a b",
    "100%",
    "a#b",
    "R&B",
    "%2F",
    "AC/DC",
    "../up",
    "/abs",
    ".hid",
    "ümläut",
    "音",
    "x" * 150,
    "-n",
    "a+b",
    "'q'",
    "a.b.c",
]


def annotate(folder, sounds, name="train.csv"):
    """An annotation of (ID, path) pairs."""
    ids, paths = zip(*sounds, strict=True)
    durations, labels = np.arange(len(ids)) / 4, [f"/m/{row};/t/x" for row in range(len(ids))]
    Manifest.from_columns(ids, [str(path) for path in paths], durations, labels).to_csv(folder / name)
    return folder / name


def write_files(folder, n_files, seed=0):
    """An annotation of files of random bytes, some of them empty or of whole blocks."""
    rng = np.random.default_rng(seed)
    (folder / "files").mkdir(parents=True)
    for number in range(n_files):
        size = [0, 512, 1024, *rng.integers(1, 5000, 9)][number % 12]
        (folder / "files" / f"{number}.wav").write_bytes(rng.bytes(size))
    return annotate(folder, [(f"clip {number}", folder / "files" / f"{number}.wav") for number in range(n_files)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def paths_in(packed):
    manifest = Manifest.from_csv(packed, packed.parent)
    return [manifest[row]["wav"] for row in range(len(manifest))]


def status_of(*arguments):
    try:
        pack([str(argument) for argument in arguments])
    except SystemExit as end:
        return 0 if end.code is None else end.code
    return 0


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Noise in every format that this libsndfile writes, mono and stereo, at several rates; as {name: path}."""
    folder, noise = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0).uniform(-0.5, 0.5, (20000, 2))
    kinds = [("wav", "PCM_16"), ("wav", "FLOAT"), ("wav", "PCM_24"), ("flac", "PCM_16"), ("flac", "PCM_24"), ("ogg", "VORBIS")]
    kinds += [("ogg", "OPUS")] if "OPUS" in soundfile.available_subtypes("OGG") else []
    kinds += [("mp3", "MPEG_LAYER_III")] if "MP3" in soundfile.available_formats() else []
    files = {}
    for ending, subtype in kinds:
        for rate, channels in ((16000, 1), (48000, 2)):
            path = folder / f"{subtype}_{rate}.{ending}"
            soundfile.write(path, noise[:, :channels], rate, subtype=subtype)
            files[path.name] = path
    for name in [name for name in files if "16000" in name]:
        data = files[name].read_bytes()
        files[f"cut_{name}"] = folder / f"cut_{name}"
        files[f"cut_{name}"].write_bytes(data[: len(data) // 2])
    return files


@pytest.fixture(scope="module")
def packed_sounds(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return packing.pack(annotate(folder, sounds.items()), folder / "packs", shard_size=100_000)


def outcome(read, path):
    try:
        return read(path)
    except AudioError as error:
        return str(error).replace(str(path), "")


def test_same_samples_from_packs(sounds, packed_sounds):
    assert len(list(packed_sounds.parent.glob("*.tar"))) > 3
    n_read = 0
    for (name, path), place in zip(sounds.items(), paths_in(packed_sounds), strict=True):
        for read in (read_audio, lambda path: torch.cat(list(read_blocks(path, seconds=0.1)))):
            expected, found = outcome(read, path), outcome(read, place)
            assert type(found) is type(expected), (name, found, expected)
            if isinstance(expected, str):
                assert found == expected, name
            else:
                n_read += 1
                assert torch.equal(found, expected), name
    assert n_read >= 2 * 12


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8, unique=True), st.integers(1, 9000), st.randoms())
@settings(max_examples=40, deadline=None)
def test_any_ids_names_and_sizes(tmp_path_factory, ids, shard_size, rng):
    folder = tmp_path_factory.mktemp("any")
    # IDs are as in an annotation: one line each, and UTF-8
    ids = sorted({"".join(c for c in clip if c not in "\r\n\0" and not 0xD800 <= ord(c) < 0xE000) or "x" for clip in ids})
    data = [rng.randbytes(rng.randrange(3000)) for _ in ids]
    files = [folder / f"{number}{rng.choice(['.wav', '.flac', '', '.é %#&'])}" for number in range(len(ids))]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    packed = packing.pack(annotate(folder, zip(ids, files, strict=True)), folder / "packs", shard_size=shard_size)
    manifest, before = Manifest.from_csv(packed), Manifest.from_csv(folder / "train.csv")
    for column in ("ID", "duration", "labels"):
        assert manifest.table[column].equals(before.table[column])
    assert [packs.read(packs.locate(path)) for path in paths_in(packed)] == data
    members = {}
    for shard in sorted((folder / "packs").glob("*.tar")):
        largest = max(shard_size, 512 + packing.padded(max(map(len, data))))
        assert shard.stat().st_size <= largest + 5 * 1024 + 10240 + 1024 * len(ids)
        with tarfile.open(shard, "r:") as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members.values()) == data
    assert pack_index.verify(folder / "packs") == (len(ids), [])


def test_odd_names_survive_tar(tmp_path):
    root = tmp_path / "R&B #1 100% é"
    (root / "new packs").mkdir(parents=True)
    files = [(name, root / f"{row} #%&é.flac") for row, name in enumerate(ODD_NAMES)]
    for row, (_, path) in enumerate(files):
        soundfile.write(path, np.full(100, row / 64), RATE)
    packed = packing.pack(annotate(root, files, "train #1&é.csv"), root / "new packs", shard_size=5000)
    shards = sorted((root / "new packs").glob("*.tar"))
    assert len(shards) > 2
    out = tmp_path / "extracted"
    out.mkdir()
    for shard in shards:
        if shutil.which("tar"):
            subprocess.run(["tar", "-xf", str(shard), "-C", str(out)], check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
        else:
            with tarfile.open(shard) as tar:
                tar.extractall(out)
    for row, ((name, path), place) in enumerate(zip(files, paths_in(packed), strict=True)):
        assert torch.equal(read_audio(place), torch.full((100,), row / 64))
        assert (out / packing.member_name(name, path)).read_bytes() == path.read_bytes()
    assert len(list(out.iterdir())) == len(files)


def test_a_file_of_such_a_name_is_a_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(100, 0.25), RATE)
    for folder in ("b.tar", "c.tar#offset=512"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "a.wav", tmp_path / folder / "512+100")
        assert torch.equal(read_audio(tmp_path / folder / "512+100"), torch.full((100,), 0.25))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.tar/512+10", "no such file"),
        ("p.tar/512+999999999", "cannot be read from its pack .the pack ends at byte 10240"),
        ("p.tar/999999999999999999+1", "cannot be read from its pack"),
        ("p.tar/0+0", "cannot be decoded"),
        ("p.tar/512+3", "cannot be decoded"),
        ("p.tar/512", "no such file; if .*p.tar is a pack, a clip in it is called .*p.tar/<offset>.<size>"),
        ("p.tar/-1+5", "no such file; if"),
        ("p.tar/512+0x10", "no such file; if"),
        (f"p.tar/{'9' * 5000}+1", "no such file"),
    ],
)
def test_places_that_are_none(place, message, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"abc")
    packing.pack(annotate(tmp_path, [("a", tmp_path / "a.wav")]), tmp_path / "packs")
    (tmp_path / "packs" / "train-00000.tar").rename(tmp_path / "p.tar")
    for read in (read_audio, lambda path: list(read_blocks(path))):
        with pytest.raises(AudioError, match=message) as caught:
            read(tmp_path / place)
        assert str(caught.value).startswith(f"{tmp_path / place}"[:900])


def test_killed_at_random_moments(tmp_path):
    annotation, rng = write_files(tmp_path, 300), random.Random(0)
    packing.pack(annotation, tmp_path / "whole", shard_size=10_000, n_workers=2)
    whole = contents(tmp_path / "whole")
    n_packs = sum(name.endswith(".tar") for name in whole)
    assert n_packs > 50
    out, statuses, kept = tmp_path / "killed", [], {}
    for n_before in sorted(rng.sample(range(n_packs - 10), 8)):
        process = SERVER.Process(target=packing.pack, args=(annotation, out), kwargs={"shard_size": 10_000, "n_workers": 2})
        process.start()
        while process.is_alive() and len(list(out.glob("*.tar"))) < n_before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join()
        statuses.append(process.exitcode)
        now = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
        # what is whole is not written again
        assert kept.items() <= now.items()
        kept = now
        for path in kept:
            assert path.read_bytes() == whole[path.name]
    assert -signal.SIGKILL in statuses
    (out / "tmp+train-00001.tar").write_bytes(b"half")
    packing.pack(annotation, out, shard_size=10_000, n_workers=2)
    assert contents(out) == whole
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()


def test_what_is_not_whole_is_written_again(tmp_path):
    annotation = write_files(tmp_path, 30)
    out = packing.pack(annotation, tmp_path / "packs", shard_size=10_000).parent
    whole = contents(out)
    assert len(whole) >= 2 * 4 + 1

    def check(changed):
        for shard in out.glob("*.tar"):
            os.utime(shard, (1, 1))
        packing.pack(annotation, out, shard_size=10_000)
        assert {path.name for path in out.glob("*.tar") if path.stat().st_mtime != 1} == changed

    check(set())
    os.truncate(out / "train-00001.tar", 1000)
    check({"train-00001.tar"})
    (out / "train-00002.tar").unlink()
    (out / "train-00000.index.csv").write_text("ID,member\n")
    check({"train-00000.tar", "train-00002.tar"})
    assert contents(out) == whole
    # the same size, other bytes
    file, index = tmp_path / "files" / "3.wav", pack_index.index_of(out / "train-00000.tar")
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(0, index.stat().st_mtime_ns + 1))
    packing.pack(annotation, out, shard_size=10_000)
    assert packs.read(packs.locate(paths_in(out / "train.csv")[3])) == file.read_bytes()
    # fewer packs: those beyond go
    packing.pack(annotation, out, shard_size=20_000)
    packing.pack(annotation, tmp_path / "again", shard_size=20_000)
    assert contents(out) == contents(tmp_path / "again")


def test_full_disk(tmp_path):
    annotation = write_files(tmp_path, 60)
    packing.pack(annotation, tmp_path / "whole", shard_size=30_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"\.tar: cannot be written \({os.strerror(errno.EFBIG)}.*make room"):
            packing.pack(annotation, tmp_path / "packs", shard_size=30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "packs").glob("*.tar"))
    assert not (tmp_path / "packs" / "train.csv").exists()
    packing.pack(annotation, tmp_path / "packs", shard_size=30_000)
    assert contents(tmp_path / "packs") == contents(tmp_path / "whole")


def test_an_error_or_an_interrupt_stops_all_threads(tmp_path, monkeypatch):
    annotation, read, calls = write_files(tmp_path, 60), packing._bytes_of, []
    packing.pack(annotation, tmp_path / "whole", shard_size=10_000)

    def fail(error):
        def bytes_of(clip, path, size):
            calls.append(clip)
            if len(calls) == 10:
                raise error
            return read(clip, path, size)

        calls.clear()
        monkeypatch.setattr(packing, "_bytes_of", bytes_of)

    for error, status in ((KeyboardInterrupt(), "Stopped. The same command goes on from here."), (InputError("broken"), 2)):
        fail(error)
        assert status_of(annotation, "--out", tmp_path / "packs", "--shard-size", "0.01", "--workers", 2) == status
        assert not (tmp_path / "packs" / "train.csv").exists()
        assert not list((tmp_path / "packs").glob("tmp+*"))
        assert len(calls) < 40
    packing.pack(annotation, tmp_path / "packs", shard_size=10_000)
    assert contents(tmp_path / "packs") == contents(tmp_path / "whole")


def test_labels_may_change(tmp_path):
    annotation = write_files(tmp_path, 5)
    packed = packing.pack(annotation, tmp_path / "packs")
    annotation.write_text(annotation.read_text().replace("/t/x", "/t/y"))
    packing.pack(annotation, tmp_path / "packs")
    assert Manifest.from_csv(packed)[2]["labels"] == ["/m/2", "/t/y"]


def test_refusals(tmp_path, capsys):
    annotation = write_files(tmp_path, 12)
    files, out = tmp_path / "files", tmp_path / "packs"
    (files / "4.wav").unlink()
    (files / "7.wav").unlink()
    os.mkfifo(files / "7.wav")
    assert status_of(annotation, "--out", out) == 2
    error = capsys.readouterr().err
    assert f"{annotation}: 2 of the 12 clips cannot be packed, first 'clip 4': {files / '4.wav'}: no such file" in error
    assert list(out.iterdir()) == [out / ".lock"]
    assert status_of(annotation, "--out", out, "--leave-out") == 0
    assert (out / "train_left_out.csv").read_text().splitlines() == [
        "ID,reason,file",
        f"clip 4,no such file,{files / '4.wav'}",
        f'clip 7,"not a regular file, or must not be read",{files / "7.wav"}',
    ]
    assert Manifest.from_csv(out / "train.csv").table["ID"].to_pylist() == [f"clip {n}" for n in range(12) if n not in (4, 7)]
    whole = contents(out)
    # packs of packs, other clips, files of somebody else, the annotation itself
    assert status_of(out / "train.csv", "--out", tmp_path / "again", "--data-folder", out) == 2
    assert "its clips are in packs already" in capsys.readouterr().err
    assert status_of(out / "train.csv", "--out", tmp_path / "again") == 2
    assert "begin with {data_root}: say which folder that is (--data-folder)" in capsys.readouterr().err
    other = annotate(tmp_path, [("other", files / "0.wav")])
    for argv, message in [
        ([other, "--out", out], "train.csv: is there already, and is of other clips"),
        ([other, "--out", tmp_path], "would take its place"),
        ([tmp_path / "none.csv", "--out", out], "none.csv: no such annotation file"),
        ([other, "--out", files / "0.wav"], "0.wav: cannot be written"),
        ([other], "required"),
        (["--out", out], "give an annotation and --out"),
        ([other, "--verify", out], "give an annotation and --out"),
        ([other, "--out", out, "--shard-size", "0"], "--shard-size must be above 0"),
        (["--verify", files], "no annotation of packed clips there"),
    ]:
        assert status_of(*argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-00000.tar").write_bytes(b"precious")
    assert status_of(other, "--out", tmp_path / "foreign") == 2
    assert "is there already, without its index" in capsys.readouterr().err
    assert contents(tmp_path / "foreign") == {"train-00000.tar": b"precious"}
    shutil.copy(other, tmp_path / "foreign" / "copy.csv")
    shutil.copy(other, tmp_path / "copy.csv")
    assert status_of(tmp_path / "copy.csv", "--out", tmp_path / "foreign") == 2
    assert "copy.csv: is there already" in capsys.readouterr().err
    assert contents(out) == whole


def damages(out, capsys):
    status = status_of("--verify", out)
    captured = capsys.readouterr()
    found = re.findall(r"^error: (.*?): (.*)$", captured.err, re.MULTILINE)
    assert "Traceback" not in captured.err
    if not found:
        assert status == 0
        assert re.fullmatch(r"[0-9]+ clips, all as they were packed\.\n", captured.out)
    else:
        assert re.match(f"{len(found)} problems with", status)
    return found


def test_verify_finds_damage(tmp_path, capsys):
    annotation = write_files(tmp_path, 40)
    assert status_of(annotation, "--out", tmp_path / "packs", "--shard-size", "0.02", "--workers", 3) == 0
    assert "is written" in capsys.readouterr().out
    other = write_files(tmp_path / "more", 20, seed=1).rename(tmp_path / "eval.csv")
    packing.pack(other, tmp_path / "packs")
    (tmp_path / "packs" / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/1,Bell\n")
    assert damages(tmp_path / "packs", capsys) == []
    table = Manifest.from_csv(tmp_path / "packs" / "train.csv", tmp_path / "packs").table
    places = [packs.locate(path) for path in paths_in(tmp_path / "packs" / "train.csv")]
    first = [row for row, place in enumerate(places) if place.pack.endswith("00000.tar")]
    second = [row for row, place in enumerate(places) if place.pack.endswith("00001.tar")]
    assert 5 < len(first) < 35
    names = [f"train.csv, clip '{clip}'" for clip in table["ID"].to_pylist()]

    def broken(change):
        out = tmp_path / "broken"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "packs", out)
        change(out)
        return damages(out, capsys)

    def flip(position):
        def change(out):
            with open(out / "train-00000.tar", "r+b") as file:
                file.seek(position)
                byte = file.read(1)
                file.seek(position)
                file.write(bytes([byte[0] ^ 1]))

        return change

    # the first and the last byte of clips, and a header in between
    for row in (4, first[-1]):
        for position in (places[row].offset, places[row].offset + places[row].size - 1):
            ((name, problem),) = broken(flip(position))
            assert name == names[row]
            assert "bytes are not those that were packed" in problem
    ((name, problem),) = broken(flip(places[4].offset - 500))
    assert name == "train.csv"
    assert "other programs cannot list it" in problem
    found = broken(lambda out: os.truncate(out / "train-00000.tar", places[5].offset + 1))
    assert [name for name, _ in found] == [names[row] for row in first[5:]] + ["train.csv"]
    assert all("cut off" in problem for _, problem in found[:-1])
    for gone in ("train-00001.tar", "train-00001.index.csv"):
        found = broken(lambda out, gone=gone: (out / gone).unlink())
        assert [name for name, _ in found] == [names[row] for row in second]
        assert gone in found[0][1]
    (found,) = broken(lambda out: (out / "eval.csv").unlink())
    assert found[0] == "eval-00000.tar"
    assert "belongs to no annotation" in found[1]

    def swap(out):
        index = pack_index.index_of(out / "train-00001.tar")
        digest = hashlib.sha256((tmp_path / "files" / f"{second[3]}.wav").read_bytes()).hexdigest()
        assert index.read_text().count(digest) == 1
        index.write_text(index.read_text().replace(digest, "0" * 64))

    assert [name for name, _ in broken(swap)] == [names[second[3]]]


def test_a_clip_that_changes_while_it_is_packed(tmp_path, monkeypatch):
    annotation = write_files(tmp_path, 12)
    look = packing._look

    def grow(paths, n_workers):
        found = look(paths, n_workers)
        with open(tmp_path / "files" / "5.wav", "ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(packing, "_look", grow)
    with pytest.raises(InputError, match=r"5\.wav: the file of the clip 'clip 5' was changed while it was packed"):
        packing.pack(annotation, tmp_path / "packs")
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [".lock"]


def test_two_million_clips_are_shared_out_by_whole_arrays():
    sizes = np.random.default_rng(0).integers(200_000, 400_000, 2_000_000)
    bounds = packing.shard_bounds(sizes, 10**9)
    totals = np.add.reduceat(512 + packing.padded(sizes), bounds[:-1])
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    assert totals.max() <= 10**9
    assert totals[:-1].min() > 10**9 - 401_000


@pytest.fixture(scope="module")
def packed_run(tiny_run, mini_data, tmp_path_factory):
    """Packs of the tiny run's clips."""
    out = tmp_path_factory.mktemp("mini_packs")
    for name in ("train.csv", "eval.csv"):
        packing.pack(tiny_run[0] / name, out, mini_data, shard_size=100_000)
    assert len(list(out.glob("train-*.tar"))) > 2
    return out


def test_training_from_packs_is_bit_exact(tiny_run, mini_data, packed_run, tmp_path):
    # its clips must be read from packs alone
    argv = command(
        TRAIN,
        "hparams/mini.yaml",
        data_folder=packed_run,
        train_annotation=packed_run / "train.csv",
        valid_annotation=packed_run / "eval.csv",
        class_list=mini_data / "class_labels_indices.csv",
        skip_prep=True,
        output_folder=tmp_path / "run",
        num_workers=2,
    )
    log = tmp_path / "log"
    assert finish(argv, log) == 0, log.read_text()
    assert differences(tiny_run[0], tmp_path / "run") == []
    losses = [re.findall(r"loss: \S+", (folder / "train_log.txt").read_text()) for folder in (tiny_run[0], tmp_path / "run")]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 2


def test_packs_work_where_files_do(tiny_run, mini_data, packed_run, tmp_path, capsys):
    clips, packed = (
        Manifest.from_csv(path, root)
        for path, root in ((tiny_run[0] / "eval.csv", mini_data), (packed_run / "eval.csv", packed_run))
    )
    rows = [range(start, start + 5) for start in range(0, 20, 5)]
    batches = zip(clip_loader(clips, RATE, None, rows), clip_loader(packed, RATE, None, rows, num_workers=2), strict=True)
    for batch, other in batches:
        assert batch.error == other.error == [None] * 5
        assert torch.equal(batch.sig.data, other.sig.data)
    tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    file, place = clips[0]["wav"], packed[0]["wav"]
    assert packs.locate(place) is not None
    assert tagger.tag_file(place) == tagger.tag_file(file)
    assert [answer.tags for answer in tagger.tag_files([place])] == [answer.tags for answer in tagger.tag_files([file])]
    assert np.array_equal(tagger.tag_timeline(place).scores, tagger.tag_timeline(file).scores)
    answers = []
    for path in (file, place):
        picture = tmp_path / "a.png"
        with pytest.raises(SystemExit) as end:
            tag([path, "--model", str(tiny_run[0] / "tagger"), "--timeline", "--plot", str(picture), "--format", "csv"])
        assert end.value.code == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        answers.append(capsys.readouterr().out.replace(path, ""))
    assert answers[0] == answers[1]
    Manifest.from_columns(["a"], [place], [1.0], ["x"]).to_psla_json(tmp_path / "train.json")
    assert Manifest.from_psla_json(tmp_path / "train.json")[0]["wav"] == place
