"""Streams: what comes of blocks of any size is what comes of the file; events begin and end once; memory does not grow."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psla_sb.cli.tag import tag
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.inference.timeline import Begun, Event, EventDetector, Timeline, events
from psla_sb.labels.ontology import Ontology
from runs import REPOSITORY
from stubs import band_tagger

RATES = [8000, 16000, 22050, 44100, 44101, 48000]


@pytest.fixture(scope="module")
def tagger():
    return band_tagger(n_frames=198)


def loud_and_quiet(n_samples, rate, n_channels=1):
    """Noise and tones that come and go: int16 `[samples, channels]`."""
    rng, t = np.random.default_rng(n_samples), np.arange(n_samples)[:, None] / rate
    wave = rng.normal(0, 0.1, (n_samples, n_channels)) * np.sin(0.9 * t) ** 2 + 0.3 * np.sin(2000 * t * 2 * np.pi) * (t % 3 < 1)
    return (20_000 * wave.clip(-1, 1)).astype(np.int16)


def streamed(tagger, blocks, rate, **options):
    """The timeline of a stream of blocks."""
    stream = tagger.stream(rate, **options)
    found = [*map(stream.push, blocks), stream.finish()]
    times, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Timeline(times, scores, tagger.labels, list(tagger.hparams.mids))


def assert_same(found, expected):
    np.testing.assert_array_equal(found.times, expected.times)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5, rtol=0)
    assert found.scores.dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(RATES),
    st.one_of(st.integers(1, 50), st.integers(1, 250_000)),
    st.integers(1, 3),
    st.lists(st.one_of(st.integers(0, 40), st.integers(400, 40_000)), min_size=1, max_size=6).filter(
        lambda sizes: sum(sizes) > 400
    ),
    st.sampled_from([(10.0, 1.0), (1.0, 1.0), (0.7, 0.1)]),
)
@example(16000, 1, 1, [441], (10.0, 1.0))
@example(44100, 250_000, 2, [44_100], (10.0, 1.0))
def test_blocks_of_any_size_are_scored_as_the_file(tagger, tmp_path_factory, rate, n_samples, n_channels, sizes, window):
    window, hop = window
    path, samples = tmp_path_factory.getbasetemp() / "stream.wav", loud_and_quiet(n_samples, rate, n_channels)
    soundfile.write(path, samples, rate)
    ends = np.cumsum(np.resize(sizes, len(sizes) * (n_samples // sum(sizes) + 1)))
    assert_same(streamed(tagger, np.split(samples, ends), rate, window=window, hop=hop), tagger.tag_timeline(path, window, hop))


def test_blocks_of_a_sample_and_of_every_type(tagger):
    samples = loud_and_quiet(33_000, 16000)[:, 0]
    expected = tagger.tag_timeline(samples, sample_rate=16000)
    assert_same(streamed(tagger, samples[:, None], 16000), expected)
    for given_as in (np.float32(samples / 2**15), torch.tensor(samples / 2**15), samples.astype(np.int32) << 16):
        assert_same(streamed(tagger, [given_as[:20_001], given_as[20_001:]], 16000), expected)


def test_a_block_may_be_filled_anew(tagger):
    samples, buffer = np.float32(loud_and_quiet(64_000, 16000)[:, 0] / 2**15), np.empty(1600, np.float32)

    def blocks():
        for start in range(0, 64_000, 1600):
            buffer[:] = samples[start : start + 1600]
            yield buffer

    assert_same(streamed(tagger, blocks(), 16000), tagger.tag_timeline(samples, sample_rate=16000))


def test_the_hierarchy_holds_for_streams():
    tagger, samples = band_tagger(198), loud_and_quiet(64_000, 16000)
    plain = streamed(tagger, [samples], 16000)
    entries = [{"id": "/m/low", "name": "Low", "child_ids": ["/m/high"]}, {"id": "/m/high", "name": "High", "child_ids": []}]
    tagger.use_hierarchy(Ontology(entries))
    found = streamed(tagger, samples.reshape(-1, 1600), 16000)
    assert_same(found, tagger.tag_timeline(samples, sample_rate=16000))
    assert (found.scores[:, 0] > plain.scores[:, 0] + 0.01).any()


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("window", [10.0, 1.0])
def test_a_step_is_given_within_the_delay(tagger, rate, window):
    samples = loud_and_quiet(9 * rate, rate)
    begins = tagger.tag_timeline(samples, window, sample_rate=rate).times - 0.16
    stream, n_steps = tagger.stream(rate, window), 0
    assert min(window, 1.9) < stream.delay < min(window, 2.0) + 0.1
    for start in range(0, len(samples), rate // 50):
        n_steps += len(stream.push(samples[start : start + rate // 50]).times)
        heard = min(len(samples), start + rate // 50) / rate
        assert n_steps >= np.sum(begins <= heard - stream.delay - 1e-9)
    assert n_steps > 10


def kept(stream):
    """Bytes of the tensors that a stream keeps, and their number."""
    values = [value for part in (stream._resampling, stream._windows, stream._overlap) for value in vars(part).values()]
    tensors = [t for value in values for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors), len(tensors)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_what_a_stream_keeps_does_not_grow(tagger, rate):
    # so many blocks that windows and blocks come round together
    block, stream, sizes = loud_and_quiet(rate // 25, rate), tagger.stream(rate), []
    n_steps = 0
    for i in range(32 * 2 * 101):
        n_steps += len(stream.push(block).times)
        if i in (32 * 2 * 1, 32 * 2 * 100):
            sizes.append(kept(stream))
    assert n_steps > 100 * 3
    assert sizes[0] == sizes[1]
    assert sizes[0][0] < 4 * 16000 * 10


def test_what_cannot_be_streamed(tagger):
    for options in ({"window": 0}, {"hop": float("nan")}, {"batch_size": 0}, {"sample_rate": 5}):
        with pytest.raises(ValueError, match="must be"):
            tagger.stream(**{"sample_rate": 16000, **options})
    stream = tagger.stream(16000)
    with pytest.raises(InputError, match="the stream: has no samples"):
        stream.finish()
    for block, wrong in (
        (np.zeros((2, 1600)), "wrong way round"),
        ([float("nan")], "not finite"),
        (np.full(9, 1e4), "far outside"),
        (np.zeros((2, 2, 2)), "an array of sound is"),
    ):
        with pytest.raises(InputError, match=wrong):
            stream.push(block)
    assert len(stream.push(np.zeros((0, 2), np.float32)).times) == 0
    samples = loud_and_quiet(50_000, 16000, 2)
    found = [stream.push(samples[:30_000])]
    with pytest.raises(InputError, match=r"began with 2 channels, but a block is \[100\]"):
        stream.push(np.zeros(100))
    # what was refused has left no trace
    found += [stream.push(samples[30_000:]), stream.finish()]
    expected = tagger.tag_timeline(samples, sample_rate=16000)
    np.testing.assert_allclose(np.concatenate([scores for _, scores in found]), expected.scores, atol=1e-5)
    for again in (stream.finish, lambda: stream.push(samples)):
        with pytest.raises(ValueError, match="has been finished"):
            again()


def test_a_model_without_scores_along_the_time_has_no_stream(tagger):
    parts = {**tagger.mods, "classifier": torch.nn.Flatten()}
    hparams = {name: getattr(tagger.hparams, name) for name in ("sample_rate", "mids", "label_encoder")}
    with pytest.raises(InputError, match=r"classifier \(Flatten\) has no segment_scores"):
        AudioTagger(parts, hparams, run_opts={"device": "cpu"}).stream(16000)


curves = st.lists(
    st.lists(st.one_of(st.integers(0, 10), st.integers(0, 1000).map(lambda x: x / 100)), min_size=2, max_size=2), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(
    curves,
    st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.8, 1.0, (0.2, float("inf")), (0.0, 0.45)]),
    st.lists(st.integers(0, 9), min_size=1),
)
@example([[10, 10], [9, 6], [5, 4.4], [9, 4.6], [4.4, 3], [9.9, 5], [0, 0]], 0.1, [1])
def test_events_of_pieces_are_those_of_the_whole(tenths, threshold, sizes):
    scores = np.array(tenths, np.float32).reshape(-1, 2) / 10
    threshold = np.array(threshold) if isinstance(threshold, tuple) else threshold
    timeline = Timeline(0.32 * np.arange(len(scores)) + 0.1, scores, ["a", "b"], ["/a", "/b"])
    ends = np.cumsum(np.resize(sizes, len(sizes) * (len(scores) // max(1, sum(sizes)) + 1)))
    detector = EventDetector(timeline.labels, threshold)
    pieces = zip(np.split(timeline.times, ends), np.split(scores, ends), strict=True)
    found = [one for piece in pieces for one in detector.push(*piece)] + detector.finish()
    assert sorted(one for one in found if isinstance(one, Event)) == sorted(events(timeline, threshold))
    # each event has begun once, before it ended, where it then was
    begun = {}
    for one in found:
        if isinstance(one, Begun):
            assert begun.setdefault(one.label, one.start) == one.start
        else:
            assert begun.pop(one.label) == one.start
    assert begun == {}


def test_a_beginning_is_known_when_its_first_peak_is_over():
    def known_after(scores, threshold):
        detector = EventDetector(["a"], threshold)
        for step, score in enumerate(scores):
            if found := detector.push(np.array([step + 0.5]), np.array([[score]])):
                return step, found
        return None

    assert known_after([0.0, 0.2, 0.6, 0.8, 0.7, 0.41, 0.39, 0.9], 0.1) == (6, [Begun("a", 2.0)])
    # a threshold that no half of a peak reaches is the level itself; a single step would be heard all through
    assert known_after([0.0, 0.5, 0.6, 0.8], 0.5) == (2, [Begun("a", 1.5)])
    assert known_after([0.0, 0.7, 0.0], 0.7) == (2, [Begun("a", 1.0), Event("a", 1.0, 2.0, 0.7)])
    assert known_after([0.4] * 50, 0.3) is None


def test_an_event_of_hours_keeps_little():
    """Noise around a level, and falling and rising slowly, of which a piece of the same kind is the end."""
    rng, n = np.random.default_rng(0), 20_000
    drift = np.linspace(0, 1, n)[:, None] * [0.0, -0.45, 0.45]
    scores = np.float32(np.array([0.5, 0.9, 0.3]) + drift + rng.normal(0, 0.02, (n, 3))).clip(0.11, 1)
    timeline = Timeline(np.arange(n) + 0.5, scores, ["a", "b", "c"], ["/a", "/b", "/c"])
    detector = EventDetector(timeline.labels, 0.1)
    found, most = [], 0
    for start in range(0, n, 10):
        found += detector.push(timeline.times[start : start + 10], scores[start : start + 10])
        most = max(most, max(len(stretch.steps) for stretch in detector._open.values()))
    assert most < n / 40
    assert sorted(one for one in [*found, *detector.finish()] if isinstance(one, Event)) == sorted(events(timeline, 0.1))


def test_a_detector_refuses_what_does_not_fit():
    detector = EventDetector(["a", "b"])
    with pytest.raises(ValueError, match=r"scores must be \[1 steps, 2 classes\], not \[1, 3\]"):
        detector.push(np.zeros(1), np.zeros((1, 3)))
    detector.finish()
    with pytest.raises(ValueError, match="has been finished"):
        detector.push(np.zeros(1), np.zeros((1, 2)))


def test_the_example_of_the_readme(tagger, capsys):
    example = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("from psla_sb.inference.timeline import EventDetector")[2]
    )
    samples = np.repeat(loud_and_quiet(9 * 44100, 44100), 2, axis=1)
    exec(
        example.partition("```")[0],
        {"tagger": tagger, "blocks": np.split(samples, range(1000, len(samples), 10_000)), "EventDetector": EventDetector},
    )
    lines = capsys.readouterr().out
    expected = events(tagger.tag_timeline(samples, sample_rate=44100), 0.3)
    assert lines.count("Event(") == lines.count("Begun(") == len(expected) > 1


# psla-tag --stream


@pytest.fixture(scope="module")
def model(tiny_run):
    return str(tiny_run[0] / "tagger")


@pytest.fixture(scope="module")
def sound():
    return loud_and_quiet(8 * 16000, 16000)


class Stdin(io.BytesIO):
    """Gives bytes in pieces that are no whole samples, as a pipe may."""

    def read1(self, size):
        return super().read1(min(size, 997))


def said(monkeypatch, capsys, data, *arguments):
    """Runs psla-tag with bytes on stdin: its exit status, stdout and stderr."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Stdin(data), isatty=lambda: False))
    with pytest.raises(SystemExit) as caught:
        tag(["--stream", *map(str, arguments)])
    return caught.value.code, *capsys.readouterr()


@pytest.mark.parametrize("encoding", ["s16", "f32"])
def test_events_of_a_stream_are_rows(model, sound, encoding, monkeypatch, capsys):
    both = np.repeat(sound, 2, axis=1)
    data = (both.astype("<i2") if encoding == "s16" else np.float32(both / 2**15).astype("<f4")).tobytes()
    arguments = ("--model", model, "--sample-rate", 16000, "--channels", 2, "--encoding", encoding, "--format", "jsonl")
    status, out, err = said(monkeypatch, capsys, data + b"xyz", *arguments)
    assert status == 0
    assert "3 bytes at the end of stdin are no whole sample" in err
    tagger, rows = AudioTagger.from_folder(model), [json.loads(line) for line in out.splitlines()]
    expected = events(tagger.tag_timeline(sound, sample_rate=16000), tagger.calibration.threshold)
    assert len(rows) == len(expected) > 0
    key = ["file", "start", "end", "label", "mid", "score", "probability", "decision", "error"]
    assert all(list(row) == key and row["file"] == "-" and row["decision"] and row["error"] is None for row in rows)
    mids = dict(zip(tagger.labels, tagger.hparams.mids, strict=True))
    assert sorted((row["label"], row["mid"], row["start"], row["end"]) for row in rows) == sorted(
        (event.label, mids[event.label], pytest.approx(event.start, abs=1e-3), pytest.approx(event.end, abs=1e-3))
        for event in expected
    )


def test_steps_of_a_stream_are_rows(model, sound, monkeypatch, capsys):
    arguments = ("--model", model, "--sample-rate", 16000, "--timeline", "--top-k", 2)
    status, out, _ = said(monkeypatch, capsys, sound.tobytes(), *arguments, "--format", "csv")
    assert status == 0
    timeline, rows = AudioTagger.from_folder(model).tag_timeline(sound, sample_rate=16000), list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2 * len(timeline.times)
    assert [row["label"] for row in rows[::2]] == [timeline.labels[c] for c in timeline.scores.argmax(1)]
    assert [float(row["score"]) for row in rows[::2]] == pytest.approx(timeline.scores.max(1).tolist(), abs=1e-5)
    assert (rows[2]["start"], rows[2]["end"], rows[2]["error"]) == ("0.32", "0.64", "")
    status, out, _ = said(monkeypatch, capsys, sound.tobytes(), *arguments)
    assert len(out.splitlines()) == len(rows)
    assert out.splitlines()[2].startswith("       0.32 s       0.64 s  ")


def test_a_table_says_when_events_begin(model, sound, monkeypatch, capsys):
    status, out, _ = said(monkeypatch, capsys, sound.tobytes(), "--model", model, "--sample-rate", 16000)
    begun, ended = ([line for line in out.splitlines() if ("begins" in line) == wanted] for wanted in (True, False))
    assert status == 0
    assert len(begun) == len(ended) > 0
    assert sorted(line[:13] for line in begun) == sorted(line[:13] for line in ended)


@pytest.mark.parametrize(
    ("data", "arguments", "wrong"),
    [
        (b"", ("--sample-rate", 16000), "the stream: has no samples"),
        (b"RIFF" + bytes(100), ("--sample-rate", 16000), "stdin has a file (b'RIFF'), not raw samples; tag it without --stream"),
        (np.full(9, np.nan, "<f4").tobytes(), ("--sample-rate", 16000, "--encoding", "f32"), "samples that are not finite"),
    ],
)
def test_streams_that_fail(data, arguments, wrong, model, monkeypatch, capsys):
    status, out, err = said(monkeypatch, capsys, data, "--model", model, *arguments, "--format", "jsonl")
    assert status == 1
    assert wrong in err
    row = json.loads(out)
    assert wrong in row.pop("error")
    assert row.pop("file") == "-"
    assert set(row.values()) == {None}


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((), "--stream needs --sample-rate HZ"),
        (("a.wav", "--sample-rate", 16000), "no files such as a.wav"),
        (("--sample-rate", 16000, "--format", "json"), "use jsonl"),
        (("--sample-rate", 16000, "--plot", "a.png"), "--plot is of whole files"),
        (("--sample-rate", 16000, "--channels", 0), "--channels must be 1 or more"),
        (("--sample-rate", 16000, "--window", 0), "window and hop must be positive"),
        (("--sample-rate", 5), "sample_rate must be from 1000"),
        (("--microphone", "--encoding", "s16"), "--encoding is of stdin"),
    ],
)
def test_command_lines_that_are_wrong(arguments, wrong, model, monkeypatch, capsys):
    status, _, err = said(monkeypatch, capsys, b"", "--model", model, *arguments)
    assert status == 2
    assert wrong in err
    for alone, wrong in ((["--window", "3"], "give --stream with it"), ([], "required: FILE")):
        with pytest.raises(SystemExit, match="2"):
            tag(["--model", model, *alone])
        assert wrong in capsys.readouterr().err


class Microphone:
    """What a test's sounddevice calls a stream: it gives a sound in blocks when it starts."""

    samples = np.zeros((0, 1), np.float32)

    def __init__(self, rate, n_samples, device, channels, dtype, callback):
        assert (rate, channels, dtype) == (16000, 1, "float32")
        if device == "broken":
            raise ValueError("No input device matching 'broken'")
        self.n_samples, self.callback, self.active = n_samples, callback, False

    def __enter__(self):
        buffer = np.empty((self.n_samples, 1), np.float32)
        for start in range(0, len(self.samples), self.n_samples):
            buffer[:] = self.samples[start : start + self.n_samples]
            self.callback(buffer, len(buffer), None, "input overflow" if start == 0 else "")

    def __exit__(self, *error):
        pass


@pytest.fixture
def sounddevice(monkeypatch):
    module = SimpleNamespace(
        InputStream=Microphone, PortAudioError=OSError, query_devices=lambda device, kind: {"default_samplerate": 16000.0}
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


def test_a_microphone(model, sound, sounddevice, monkeypatch, capsys):
    monkeypatch.setattr(Microphone, "samples", np.float32(sound / 2**15))
    arguments = ("--model", model, "--format", "jsonl")
    status, heard, err = said(monkeypatch, capsys, b"", *arguments, "--microphone")
    assert status == 0
    assert "warning: the microphone's input overflow" in err
    _, expected, _ = said(monkeypatch, capsys, sound.tobytes(), *arguments, "--sample-rate", 16000)
    assert heard == expected.replace('"file": "-"', '"file": "microphone"') != ""
    status, _, err = said(monkeypatch, capsys, b"", *arguments, "--microphone", "broken")
    assert status == 2
    assert "--microphone broken: cannot be opened" in err
    # more than a minute that nobody took
    monkeypatch.setattr(Microphone, "samples", np.zeros((62 * 16000, 1), np.float32))
    monkeypatch.setattr(Microphone, "active", True, raising=False)
    status, _, err = said(monkeypatch, capsys, b"", *arguments, "--microphone")
    assert status == 1
    assert "the microphone is 60 s ahead of the model" in err


def test_a_microphone_without_sounddevice(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    status, _, err = said(monkeypatch, capsys, b"", "--model", model, "--microphone")
    assert status == 2
    assert "pip install sounddevice" in err


def command(model, *arguments):
    code = "from psla_sb.cli.tag import tag; tag()"
    arguments = [sys.executable, "-c", code, "--model", model, "--stream", "--sample-rate", "16000", "--timeline", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_ctrl_c_prints_the_rest(model, sound):
    with command(model, "--top-k", "1", "--format", "jsonl") as process:
        process.stdin.write(sound.tobytes())
        process.stdin.flush()
        # rows come while the sound does
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    rows = [json.loads(line) for line in (first + rest).splitlines()]
    assert len(rows) > 3
    assert [row["start"] for row in rows] == [round(0.32 * step, 3) for step in range(len(rows))]
    assert rows[-1]["end"] <= 8.0


def test_a_reader_who_has_had_enough(model, sound):
    with command(model) as process:
        process.stdin.write(sound.tobytes())
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""
