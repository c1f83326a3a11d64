"""Copies of clips: the samples of `read_audio`, whole files or none, and broken clips that stop nothing."""

import fcntl
import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import soundfile
import torch

from psla_sb.dataio.audio import read_audio
from psla_sb.errors import InputError
from psla_sb.files import one_process
from psla_sb.prepare.copies import resample_clip, resample_clips
from runs import SERVER


def noise(path, seconds=0.3, rate=44100, channels=1, peak=0.9):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    soundfile.write(path, rng.uniform(-peak, peak, (round(seconds * rate), channels)), rate, subtype="FLOAT", format="WAV")
    return str(path)


@pytest.mark.parametrize(("rate", "channels"), [(44100, 1), (44100, 2), (22050, 1), (16000, 1), (8000, 1), (96000, 3)])
def test_a_copy_has_the_samples_of_the_source(rate, channels, tmp_path):
    source, target = noise(tmp_path / "a.wav", rate=rate, channels=channels), tmp_path / "deep" / "er" / "a.flac"
    seconds = resample_clip(source, str(target))
    info = soundfile.info(target)
    assert (info.samplerate, info.channels, info.format, info.subtype) == (16000, 1, "FLAC", "PCM_16")
    expected = read_audio(source)
    copy = read_audio(target)
    assert len(copy) == len(expected) == round(seconds * 16000)
    assert (copy - expected.clamp(-1, 1)).abs().max() <= 1 / 2**15
    assert os.listdir(target.parent) == ["a.flac"]


@pytest.mark.parametrize("ending", ["flac", "wav"])
def test_samples_of_16_bits_at_the_rate_are_kept_to_the_last_bit(ending, tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 16000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    target = tmp_path / "copies" / f"a.{ending}"
    resample_clip(str(tmp_path / "a.wav"), str(target))
    assert soundfile.info(target).format == ending.upper()
    np.testing.assert_array_equal(soundfile.read(target, dtype="int16")[0], samples)


def test_what_resampling_makes_louder_than_full_scale_is_clipped_and_not_wrapped(tmp_path):
    square = np.sign(np.sin(2 * np.pi * 700 * np.arange(44100) / 44100))
    soundfile.write(tmp_path / "a.wav", square, 44100, subtype="FLOAT")
    resample_clip(str(tmp_path / "a.wav"), str(tmp_path / "a.flac"))
    expected = read_audio(tmp_path / "a.wav")
    assert (expected.abs() > 1.05).sum() > 100
    assert (read_audio(tmp_path / "a.flac") - expected.clamp(-1, 1)).abs().max() <= 1 / 2**15


def test_clips_in_parallel_with_broken_ones_among_them(tmp_path):
    sources = [noise(tmp_path / f"{i}.wav", seconds=0.1 + i / 50) for i in range(20)]
    (tmp_path / "3.wav").write_text("no sound")
    soundfile.write(tmp_path / "7.wav", [], 44100)
    os.unlink(tmp_path / "11.wav")
    targets = [f"{i % 3}/{i}.flac" for i in range(20)]
    durations, errors = resample_clips(sources, targets, tmp_path / "out", n_workers=2)
    assert list(errors) == [3, 7, 11]
    for row, text in zip(errors, ("cannot be decoded as sound", "has no samples", "no such file"), strict=True):
        assert errors[row].startswith(f"{sources[row]}: {text}")
    assert np.flatnonzero(np.isnan(durations)).tolist() == [3, 7, 11]
    for row in set(range(20)) - set(errors):
        assert durations[row] == soundfile.info(tmp_path / "out" / targets[row]).duration == pytest.approx(0.1 + row / 50, abs=1e-3)
    assert len(list((tmp_path / "out").rglob("*.flac"))) == 17


def test_copies_do_not_depend_on_the_number_of_workers_nor_training_on_them(tmp_path):
    sources = [noise(tmp_path / f"{i}.wav", channels=2) for i in range(6)]
    state = torch.get_rng_state()
    for n_workers in (1, 2):
        resample_clips(sources, [f"{i}.flac" for i in range(6)], tmp_path / str(n_workers), n_workers=n_workers)
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(6):
        assert (tmp_path / "1" / f"{i}.flac").read_bytes() == (tmp_path / "2" / f"{i}.flac").read_bytes()


def test_what_is_there_is_kept_unless_it_is_older_or_of_another_rate(tmp_path):
    source, target = noise(tmp_path / "a.wav"), tmp_path / "out" / "a.flac"

    def copy(sample_rate=16000):
        durations, errors = resample_clips([source], ["a.flac"], target.parent, sample_rate, n_workers=1)
        assert errors == {}
        assert durations[0] == pytest.approx(0.3, abs=1e-3)
        return target.stat().st_ino

    first = copy()
    assert copy() == first
    assert copy(8000) != first
    assert soundfile.info(target).samplerate == 8000
    first = copy()
    assert soundfile.info(target).samplerate == 16000
    os.utime(source, (time.time() + 10,) * 2)
    assert copy() != first
    os.utime(source, (0, 0))
    first = copy()
    target.write_bytes(target.read_bytes()[:20])
    assert copy() != first
    # the copies are enough
    os.unlink(source)
    first = target.stat().st_ino
    assert copy() == first


def _on_a_full_disk(source, folder, pipe):
    import resource

    multiprocessing.set_start_method("fork", force=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        resample_clips([source] * 3, ["a.flac", "b.flac", "c.flac"], folder, n_workers=2)
    except InputError as error:
        pipe.send(str(error))


def test_full_disk_is_an_error_and_not_a_broken_clip(tmp_path):
    receiver, sender = SERVER.Pipe()
    process = SERVER.Process(target=_on_a_full_disk, args=(noise(tmp_path / "a.wav"), tmp_path / "out", sender))
    process.start()
    assert receiver.poll(60)
    assert "a.flac: cannot be written (File too large; " in receiver.recv()
    process.join()
    assert os.listdir(tmp_path / "out") == [".lock"]


def _resample(sources, targets, folder):
    multiprocessing.set_start_method("fork", force=True)
    # ignored where the tests were started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resample_clips(sources, targets, folder, n_workers=2)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_ends_it_and_its_workers(signum, tmp_path):
    """Enough clips that it is not done before the signal."""
    source = noise(tmp_path / "long.wav", seconds=20)
    out = tmp_path / "out"
    process = SERVER.Process(target=_resample, args=([source] * 2000, [f"{i}.flac" for i in range(2000)], out))
    process.start()
    while len(list(out.glob("*.flac"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode not in (None, 0)
    # a worker holds the lock as long as it lives
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    for path in out.glob("*.flac"):
        assert path.name.startswith("tmp+") or soundfile.read(path)[0].size == 320000


def test_a_second_process_waits_for_the_first(tmp_path, caplog):
    assert not (tmp_path / "out").exists()
    with one_process(tmp_path / "out"):
        other = SERVER.Process(target=_resample, args=([noise(tmp_path / "a.wav")], ["a.flac"], tmp_path / "out"))
        other.start()
        other.join(3)
        assert other.is_alive()
        assert os.listdir(tmp_path / "out") == [".lock"]
    other.join()
    assert other.exitcode == 0
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "a.flac"]
    with caplog.at_level(logging.INFO), one_process(tmp_path / "out"):
        pass
    assert caplog.text == ""


def test_nothing_to_do_and_wrong_arguments(tmp_path):
    durations, errors = resample_clips([], [], tmp_path / "out")
    assert (durations.shape, errors) == ((0,), {})
    with pytest.raises(ValueError, match=r"targets must end in one of \.flac, \.wav"):
        resample_clips(["a.wav"], ["a.FLAC"], tmp_path)
    with pytest.raises(ValueError, match="1 sources but 2 targets"):
        resample_clips(["a"], ["b", "c"], tmp_path)
    with pytest.raises(ValueError, match="n_workers must be 1 or more, not 0"):
        resample_clips(["a"], ["b.wav"], tmp_path, n_workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: cannot be written to"):
        resample_clips(["a"], ["b.wav"], tmp_path / "file" / "out")


def test_copies_of_another_resampler_are_made_anew_if_their_sources_are_there(tmp_path, caplog):
    sources = [noise(tmp_path / f"{i}.wav") for i in range(3)]
    targets, out = ["0.flac", "1.flac", "2.flac"], tmp_path / "out"
    resample_clips(sources, targets, out, n_workers=1)
    assert "are made anew" not in caplog.text
    expected = [(out / name).read_bytes() for name in targets]

    def times():
        return [(out / name).stat().st_mtime_ns for name in targets]

    made = times()
    resample_clips(sources, targets, out, n_workers=1)
    assert times() == made
    # as another version left them: other samples, and no word of the resampler
    for name in targets:
        soundfile.write(out / name, np.zeros(4800), 16000)
    old = (out / targets[2]).read_bytes()
    (out / ".lock").write_text("")
    os.unlink(sources[2])
    resample_clips(sources, targets, out, n_workers=1)
    assert [(out / name).read_bytes() for name in targets] == [*expected[:2], old]
    assert caplog.text.count("copies that another resampler made are made anew, if their sources are there") == 1
    made = times()
    resample_clips(sources, targets, out, n_workers=1)
    assert times() == made
