"""What the demo page shows of a sound, and what it says of a file that is none; tests/browser drives the page itself."""

import socket
import sys

import numpy as np
import pytest
import soundfile

from psla_sb import demo
from psla_sb.cli.demo import demo as command
from psla_sb.errors import InputError
from psla_sb.inference.timeline import Timeline
from stubs import band_tagger

RATE = 16000


def noise(lowest, highest, seconds):
    """Noise of the frequencies between two, in Hz."""
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=round(seconds * RATE)))
    hertz = np.linspace(0, RATE / 2, len(spectrum))
    signal = np.fft.irfft(spectrum * ((hertz >= lowest) & (hertz < highest)), round(seconds * RATE))
    return 0.1 * signal / signal.std()


LOW, HIGH = (50, 1500), (2500, 8000)


@pytest.fixture(scope="module")
def tagger():
    return band_tagger()


@pytest.fixture
def long_sound(tmp_path):
    """Low for 15 s, then high for 10 s."""
    path = tmp_path / "low & high.wav"
    soundfile.write(path, np.concatenate([noise(*LOW, 15), noise(*HIGH, 10)]), RATE)
    return path


def test_a_clip_is_tagged_as_a_whole(tagger, tmp_path):
    path = tmp_path / "low.wav"
    # as long as a clip that the stub's 998 frames are all of, and a bit
    soundfile.write(path, noise(*LOW, 10.004), RATE)
    heard = demo.listen(tagger, path)
    assert (heard.name, heard.seconds, heard.whole) == ("low.wav", 10.004, True)
    assert heard.tags == tagger.tag_file(path, top_k=2)
    assert [tag.label for tag in heard.tags] == ["Low", "High"]
    assert np.array_equal(heard.timeline.scores, tagger.tag_timeline(path).scores)


def test_a_long_recording_has_its_peaks_as_tags_and_its_events(tagger, long_sound):
    calls = []
    heard = demo.listen(tagger, long_sound, lambda share, desc: calls.append((share, desc)))
    assert not heard.whole
    peaks = heard.timeline.scores.max(axis=0)
    # as everywhere, of windows that overlap by half, the highest score
    assert heard.tags == tagger.tag_file(long_sound)
    assert {tag.label: tag.score for tag in heard.tags} == pytest.approx({"Low": peaks[0], "High": peaks[1]}, abs=0.01)
    # the beginning alone has nothing of the high noise
    assert tagger.tag_file(long_sound, pool="first")[1].score < 0.5 * peaks[1]
    rows, n_events = demo.event_rows(heard, threshold=0.5)
    assert n_events == 2
    (low, *low_times, _), (high, *high_times, score) = rows
    assert (low, high, score) == ("Low", "High", f"{peaks[1]:.2f}")
    assert low_times[0] == "0:00.0"
    assert high_times[1] == "0:25.0"
    change = 10 * float(high_times[0].removeprefix("0:"))
    assert change == pytest.approx(150, abs=7)  # within two steps of 0.32 s
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert calls[-1] == (1.0, "heard 0:25.0 of 0:25.0")
    # 16 windows, 8 at a time, and the last one shorter
    assert len(set(shares)) == len(shares) >= 2


@pytest.mark.parametrize(("content", "says"), [(b"", "cannot be decoded"), (b"RIFF", "cannot be decoded"), (None, "no such file")])
def test_a_file_that_is_no_sound(tagger, tmp_path, content, says):
    path = tmp_path / "broken.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        demo.listen(tagger, path)
    # the next sound's progress is not counted twice
    assert not tagger.mods.compute_features._forward_hooks


def test_loud_and_silent_files(tagger, tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(InputError, match="no samples"):
        demo.listen(tagger, tmp_path / "none.wav")
    soundfile.write(tmp_path / "silent.wav", np.zeros(10), RATE)
    heard = demo.listen(tagger, tmp_path / "silent.wav")
    assert np.asarray(demo.picture(heard, 2)).std() > 0


def test_of_too_many_events_the_best_are_shown_by_time(monkeypatch):
    monkeypatch.setattr(demo, "MAX_EVENTS", 2)
    scores = np.array([0.6, 0.0, 0.9, 0.0, 0.7, 0.0])[:, None]
    heard = demo.Heard("a", 6.0, False, [], Timeline(np.arange(6) + 0.5, scores, ["Bell"], ["/m/1"]), None, None, 0.01)
    rows, found = demo.event_rows(heard, 0.5)
    assert found == 3
    assert rows == [["Bell", "0:02.0", "0:03.0", "0.90"], ["Bell", "0:04.0", "0:05.0", "0.70"]]


def test_clock_carries():
    assert [demo.clock(s) for s in (0, 59.96, 3599.96, 36000)] == ["0:00.0", "1:00.0", "1:00:00.0", "10:00:00.0"]


def test_picture_has_as_many_classes_as_asked(tagger, long_sound):
    heard = demo.listen(tagger, long_sound)
    one, two = (demo.picture(heard, n) for n in (1, 2))
    assert one.width == two.width
    assert one.height < two.height


def test_examples_are_the_first_sounds(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.WAV").touch()
    (tmp_path / "00.txt").touch()
    files = demo.example_files(tmp_path)
    assert [file.name for file in files] == [f"{number:02}.WAV" for number in range(demo.MAX_EXAMPLES)]


def test_without_gradio_the_message_says_how_to_get_it(tagger, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'psla_sb\[demo\]'"):
        demo.build_page(tagger)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model FOLDER"),
        (["--model", "nowhere"], "nowhere: no such file or folder"),
        (["--model", ".", "--device", "none"], "--device none cannot be used"),
        (["--model", ".", "--examples", "nowhere"], "nowhere: no sound files"),
        (["--model", "."], "hyperparams.yaml"),
    ],
)
def test_wrong_command_lines(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


class TestPage:
    """The page's own function, without a browser."""

    @pytest.fixture
    def hear(self, tagger, monkeypatch):
        pytest.importorskip("gradio")
        monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
        page = demo.build_page(tagger, "<b>model</b>")
        assert not page.analytics_enabled
        assert all(function.api_visibility == "private" for function in page.fns.values())
        (function,) = (function.fn for function in page.fns.values() if function.name == "hear")
        return function

    def test_sounds_are_shown(self, hear, tagger, long_sound):
        told, heard, beside, below, tags, image, table = hear(str(long_sound), 1, 0.5)
        assert "low &amp; high.wav" in told
        assert demo.note(heard) in told
        assert beside.visible
        assert below.visible
        assert tags == {heard.tags[0].label: heard.tags[0].score}
        assert image.size == demo.picture(heard, 1).size
        assert table.label == "Events: 2"

    def test_a_broken_file_is_named_without_its_folder_and_as_text(self, hear, tmp_path):
        path = tmp_path / "<img src=x>.wav"
        path.write_text("no sound")
        told, heard, beside, below, *rest = hear(str(path), 1, 0.5)
        assert "&lt;img src=x&gt;.wav: cannot be decoded as sound" in told
        assert str(tmp_path) not in told
        assert heard is None
        assert not beside.visible
        assert not below.visible
        assert rest == [None] * 3

    def test_nothing_is_no_error(self, hear):
        told, heard, *_ = hear(None, 1, 0.5)
        assert (told, heard) == (demo.START, None)

    def test_a_port_in_use(self, tagger, monkeypatch):
        pytest.importorskip("gradio")
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(InputError, match=f"--port {port} at --host 127.0.0.1 is in use"):
                demo.launch(tagger, port=port)
