"""Recordings of any length: events are where they were put, blocks and windows leave no seams, memory does not grow."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.dataio.audio import AudioError, read_audio, read_blocks
from psla_sb.dataio.windows import overlapped, windows
from psla_sb.errors import InputError
from psla_sb.inference.timeline import Timeline, events
from psla_sb.plots.recording import overview
from stubs import band_tagger

RATE = 44100
EVENTS = [("Low", 1.3), ("High", 7.9), ("Low", 11.11), ("High", 19.85), ("High", 33.6), ("Low", 41.0)]


@pytest.fixture(scope="module")
def tagger():
    return band_tagger()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """45.3 s in stereo at 44.1 kHz: tones of a second at known times, in the left channel."""
    wave = np.random.default_rng(0).normal(0, 1e-3, (int(45.3 * RATE), 2))
    t = np.arange(RATE) / RATE
    fade = np.minimum(1, 50 * np.minimum(t, 1 - t))
    for label, start in EVENTS:
        tones = sum(np.sin(2 * np.pi * f * t) for f in ((200, 400, 700, 1100) if label == "Low" else (2500, 3500, 5000, 7000)))
        wave[int(start * RATE) : int(start * RATE) + RATE, 0] += fade * tones / 8
    path = tmp_path_factory.mktemp("recording") / "long.flac"
    soundfile.write(path, wave, RATE)
    return path


@pytest.mark.parametrize(("window", "hop"), [(10.0, 1.0), (3.0, 3.0), (100.0, 5.0), (0.5, 0.1)])
def test_events_are_found_where_they_are(tagger, recording, window, hop):
    timeline = tagger.tag_timeline(recording, window, hop)
    assert timeline.labels == ["Low", "High"]
    assert timeline.mids == ["/m/low", "/m/high"]
    assert timeline.scores.shape == (len(timeline.times), 2)
    assert timeline.scores.dtype == np.float32
    np.testing.assert_allclose(np.diff(timeline.times), 0.32)
    assert timeline.times[-1] == pytest.approx(45.3, abs=0.32)
    found = tagger.events(timeline, 0.5)
    assert [event.label for event in found] == [label for label, _ in EVENTS]
    assert np.abs([event.start - start for event, (_, start) in zip(found, EVENTS, strict=True)]).max() < 0.3
    assert np.abs([event.end - start - 1 for event, (_, start) in zip(found, EVENTS, strict=True)]).max() < 0.3


def test_blocks_resampled_one_by_one_have_no_seams(tagger, recording, tmp_path):
    whole = read_audio(recording, 16000)
    for seconds in (0.01, 0.7, 10.0, 1000.0):
        blocks = list(read_blocks(recording, 16000, seconds))
        torch.testing.assert_close(torch.cat(blocks), whole, atol=2e-6, rtol=0)
    soundfile.write(tmp_path / "16k.wav", whole.numpy(), 16000, subtype="FLOAT")
    one, other = (tagger.tag_timeline(path).scores for path in (recording, tmp_path / "16k.wav"))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44101, 48000, 96000])
def test_blocks_of_other_rates(rate, tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.random.default_rng(rate).uniform(-0.5, 0.5, 2 * rate + 17), rate)
    blocks = torch.cat(list(read_blocks(path, 16000, 0.3)))
    torch.testing.assert_close(blocks, read_audio(path, 16000), atol=2e-6, rtol=0)


def test_windows_are_scored_as_clips(tagger, recording):
    """One window gives what the classifier gives for the clip."""
    wave = read_audio(recording, 16000)[: 16000 * 9]
    timeline = tagger.tag_timeline(recording, window=9.0, hop=9.0)
    with torch.inference_mode():
        scores = tagger.mods.classifier.segment_scores(tagger.encode_batch(wave))
    # 9 s are 28 steps and an eighth
    np.testing.assert_allclose(timeline.scores[:27], scores[0].T[:27], atol=1e-5)


def test_a_window_is_no_longer_than_what_the_model_was_trained_on(recording):
    short, long = (band_tagger(n_frames).tag_timeline(recording, window=10.0, hop=10.0) for n_frames in (198, 998))
    assert short.scores.shape == long.scores.shape
    np.testing.assert_allclose(short.scores, long.scores, atol=0.2)
    assert [e.label for e in events(short)] == [e.label for e in events(long)] == [label for label, _ in EVENTS]


@pytest.mark.parametrize("n_samples", [1, 300, 5000, 16000, 159_999, 160_000, 160_001, 176_000])
def test_recordings_of_every_length(tagger, n_samples, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(n_samples, 0.1), 16000)
    timeline = tagger.tag_timeline(tmp_path / "a.wav")
    assert len(timeline.times) == max(1, round((n_samples - 400 + 160) / 160 / 32))
    assert np.isfinite(timeline.scores).all()


def test_what_cannot_be_read_or_is_out_of_range(tagger, recording, tmp_path):
    with pytest.raises(AudioError, match="no such file"):
        tagger.tag_timeline("nowhere.wav")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded"):
        tagger.tag_timeline(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="has no samples"):
        tagger.tag_timeline(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "loud.wav", np.full(99_000, 1e30), 16000, subtype="DOUBLE")
    wave = np.random.default_rng(0).uniform(-1e25, 1e25, 99_000)
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"loud\.wav: samples that are not finite"):
        tagger.tag_timeline(tmp_path / "loud.wav")
    for options in ({"window": 0}, {"hop": -1.0}, {"hop": float("nan")}, {"window": float("inf")}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            tagger.tag_timeline(recording, **options)


def test_events_of_every_class_begin_end_and_peak():
    scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.7], [0.6, 0.8]])
    found = events(Timeline(np.array([0.5, 1.5, 2.5, 3.5]), scores, ["a", "b"], ["/a", "/b"]), 0.5)
    assert [(event.label, event.score) for event in found] == [("a", 0.9), ("b", 0.8), ("a", 0.6)]
    # what is there in the first and the last step begins and ends with the recording
    assert [event.start for event in found] == pytest.approx([0.0, 2.1, 3.0])
    assert found[0].start == 0.0
    assert [event.end for event in found] == pytest.approx([1.5, 4.0, 4.0])
    assert events(Timeline(np.array([0.5]), np.array([[0.2]]), ["a"], ["/a"]), 0.5) == []
    assert events(Timeline(np.array([0.5]), np.array([[0.5]]), ["a"], ["/a"]), 0.5) == [("a", 0.0, 1.0, 0.5)]


def edges(scores, threshold):
    """Start and end of the events of a class in steps of a second."""
    timeline = Timeline(np.arange(len(scores)) + 0.5, np.array(scores, np.float32)[:, None], ["a"], ["/a"])
    return [(pytest.approx(event.start), pytest.approx(event.end)) for event in events(timeline, threshold)]


def test_a_blurred_event_begins_at_half_of_its_first_peak_and_ends_at_half_of_its_last():
    # over the threshold from step 1 to 7; half of the first peak, 0.4, is passed between steps 1 and 2, half of the last in 6 to 7
    assert edges([0.0, 0.2, 0.6, 0.8, 0.3, 1.0, 0.6, 0.2, 0.0], 0.1) == [(2.0, 6.75)]
    # the threshold counts where it is above the half
    assert edges([0.0, 0.2, 0.6, 0.8, 0.5, 1.0, 0.6, 0.2, 0.0], 0.5) == [(2.25, 6.75)]
    # a louder end does not move the start, nor does a ripple that is no peak
    assert edges([0.0, 0.4, 0.15, 0.15, 0.9, 0.0], 0.1) == [(1.0, 5.0)]
    for ripple in (0.29, 0.3, 0.31):
        assert edges([0.0, 0.3, ripple, 0.4, 0.8, 0.6, 0.0], 0.1) == [(3.5, 5.8333333)]
    # nor what is not a number
    assert edges([np.nan, 0.8, 0.8, np.nan], 0.5) == [(1.125, 2.875)]
    assert edges([0.0, 0.45, 0.9, 0.45, 0.0], 0.5) == [(1.6111111, 3.3888889)]
    # no event is shorter than a step
    assert edges([0.0, 0.7, 0.0, 0.7, 0.0], 0.7) == [(1.0, 2.0), (3.0, 4.0)]
    assert edges([0.7, 0.0, 0.7], 0.7) == [(0.0, 1.0), (2.0, 3.0)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=30), st.integers(1, 10))
def test_events_are_where_the_scores_reach_the_threshold(tenths, threshold):
    timeline = Timeline(np.arange(len(tenths)) + 0.5, np.array(tenths, np.float32)[:, None] / 10, ["a"], ["/a"])
    found = events(timeline, threshold / 10)
    loud = np.array([False, *(tenth >= threshold for tenth in tenths), False])
    starts, ends = np.flatnonzero(loud[1:] & ~loud[:-1]), np.flatnonzero(loud[:-1] & ~loud[1:])
    assert len(found) == len(starts)
    for event, first, after in zip(found, starts, ends, strict=True):
        loudest = first + np.argmax(tenths[first:after])
        assert max(0, first - 0.5) <= event.start <= loudest + 0.5 <= event.end <= min(len(tenths), after + 0.5)
        assert event.end - event.start > 1 - 1e-6
        assert event.score == pytest.approx(tenths[loudest] / 10)


@pytest.mark.parametrize("threshold", [0, 1.1, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold"):
        events(Timeline(np.array([0.5]), np.array([[0.2]]), ["a"], ["/a"]), threshold)


def test_windows_cover_all_and_overlap():
    signal = torch.arange(100)
    for length, hop, size in ((10, 3, 7), (10, 10, 25), (200, 50, 30), (7, 1, 100)):
        found = list(windows(signal.split(size), length, hop))
        for k, window in enumerate(found):
            assert window.tolist() == signal[k * hop : k * hop + length].tolist()
        assert found[-1][-1] == 99
        assert len(found) == 1 or found[-2][-1] < 99


def test_the_overlap_of_equal_values_is_these_values():
    values = torch.randn(50, 3)
    parts = [values[start : start + 9] for start in range(0, 45, 4)]
    torch.testing.assert_close(torch.cat(list(overlapped(parts, 4))), values)


def test_overview_keeps_peaks_and_length():
    wave = torch.zeros(16000 * 60)
    wave[500_000] = 0.9
    wave[600_000] = -0.7
    extremes, energies, column = overview(wave.split(10_000), 16000, 60.0, n_columns=300)
    assert column == pytest.approx(0.2)
    assert len(extremes) == len(energies) == 300
    assert extremes.max() == pytest.approx(0.9)
    assert extremes.min() == pytest.approx(-0.7)
    assert extremes[:, 1].argmax() == int(500_000 / 16000 / 0.2)
    assert energies.sum(1).argmax() == int(500_000 / 16000 / 0.2)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    """Peak memory of two and of forty minutes, each in a process of its own."""
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from stubs import band_tagger
print(len(band_tagger().tag_timeline(sys.argv[2], hop=10.0).times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for minutes in (2, 40):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.zeros(minutes * 60 * 16000, np.int16), 16000)
        done = subprocess.run([sys.executable, "-c", code, __file__.rpartition("/")[0], path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        n_steps, peak = map(int, done.stdout.split())
        assert n_steps == pytest.approx(minutes * 60 / 0.32, abs=1)
        peaks.append(peak)
    # 38 minutes of float32 would be 146 MB
    assert peaks[1] - peaks[0] < 40_000
