"""What the demo page shows of a sound, and what it says of a file that is none; tests/browser drives the page itself."""

import contextlib
import json
import socket
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from psla_sb import demo
from psla_sb.cli.demo import demo as command
from psla_sb.errors import InputError
from psla_sb.inference.rows import Events, Tags
from psla_sb.inference.timeline import Timeline
from runs import free_port
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
    # in blocks of 10 s, for the timeline, the tags and the picture
    assert [desc.split()[0] for _, desc in calls] == ["heard"] * 3 + ["tagged"] * 3 + ["looked"] * 3
    assert calls[0] == (pytest.approx(0.8 * 10 / 25), "heard 0:10.0 of 0:25.0")
    assert calls[-1] == (1.0, "looked at 0:25.0 of 0:25.0")


@pytest.mark.parametrize(("content", "says"), [(b"", "cannot be decoded"), (b"RIFF", "cannot be decoded"), (None, "no such file")])
def test_a_file_that_is_no_sound(tagger, tmp_path, content, says):
    path = tmp_path / "broken.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        demo.listen(tagger, path)


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


def test_sounds_at_the_same_time_have_their_own_answers_progress_and_pictures(tagger, long_sound, tmp_path):
    paths = [long_sound, tmp_path / "high.wav"]
    soundfile.write(paths[1], noise(*HIGH, 42), RATE)
    alone = [demo.listen(tagger, path) for path in paths]
    pictures = [demo.picture(heard, 2) for heard in alone]
    begun = threading.Barrier(4)

    def work(i):
        calls = []

        def progress(share, desc):
            # each waits in the middle of its sound until all are there
            if not calls:
                begun.wait(60)
            calls.append((share, desc))

        heard = demo.listen(tagger, paths[i], progress)
        begun.wait(60)
        return heard, demo.picture(heard, 2), calls

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(work, [0, 1, 0, 1]))
    for i, (heard, picture, calls) in enumerate(answers):
        assert (heard.name, heard.seconds) == (alone[i % 2].name, alone[i % 2].seconds)
        assert [tag.label for tag in heard.tags] == [tag.label for tag in alone[i % 2].tags]
        np.testing.assert_allclose(heard.timeline.scores, alone[i % 2].timeline.scores, atol=1e-6)
        assert np.array_equal(picture, pictures[i % 2])
        shares, descs = zip(*calls, strict=True)
        assert list(shares) == sorted(shares)
        assert all(desc.endswith(["of 0:25.0", "of 0:42.0"][i % 2]) for desc in descs)


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
        (["--model", ".", "--at-once", "0"], "--at-once must be 1 or more"),
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
    def page(self, tagger, monkeypatch):
        pytest.importorskip("gradio")
        monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
        page = demo.build_page(tagger, "<b>model</b>", at_once=2)
        assert not page.analytics_enabled
        assert {f.api_name for f in page.fns.values() if f.api_visibility != "private"} == {"tags", "events"}
        return SimpleNamespace(**{function.name: function.fn for function in page.fns.values() if function.name})

    @pytest.fixture
    def hear(self, page):
        def hear(path, *given, who="a", **kwargs):
            request = SimpleNamespace(session_hash=who)
            page.begin(path, request)
            return page.hear(path, *given, request, **kwargs)

        return hear

    def test_sounds_are_shown(self, hear, tagger, long_sound):
        told, heard, beside, below, tags, image, table, cancel = hear(str(long_sound), 1, 0.5)
        assert "low &amp; high.wav" in told
        assert demo.note(heard) in told
        assert beside.visible
        assert below.visible
        assert not cancel.visible
        assert tags == {heard.tags[0].label: heard.tags[0].score}
        assert image.size == demo.picture(heard, 1).size
        assert table.label == "Events: 2"

    def test_a_broken_file_is_named_without_its_folder_and_as_text(self, hear, tmp_path):
        path = tmp_path / "<img src=x>.wav"
        path.write_text("no sound")
        told, heard, beside, below, *rest, cancel = hear(str(path), 1, 0.5)
        assert "&lt;img src=x&gt;.wav: cannot be decoded as sound" in told
        assert str(tmp_path) not in told
        assert heard is None
        assert not beside.visible
        assert not below.visible
        assert not cancel.visible
        assert rest == [None] * 3

    def test_nothing_is_no_error(self, page):
        told, found, *_, cancel = page.begin(None, SimpleNamespace(session_hash="a"))
        assert (told, found, cancel.visible) == (demo.START, None, False)

    @pytest.mark.parametrize("ends", ["cancel", "end", "begin"])
    def test_what_is_cancelled_left_or_replaced_ends_in_the_middle(self, page, hear, tmp_path, ends):
        soundfile.write(tmp_path / "long.wav", noise(*LOW, 300), RATE)
        request, calls = SimpleNamespace(session_hash="a"), []

        def progress(share, desc):
            calls.append(desc)
            if len(calls) == 2:
                # by another page: nothing
                page.cancel(SimpleNamespace(session_hash="b"))
            if len(calls) == 3:
                getattr(page, ends)(*["other.wav"] * (ends == "begin"), request)

        answer = hear(str(tmp_path / "long.wav"), 1, 0.5, progress=progress)
        assert calls == [f"heard 0:{10 * i}.0 of 5:00.0" for i in (1, 2, 3)]
        # what is on the page by now stays
        assert answer == (pytest.importorskip("gradio").skip(),) * 8

    def test_what_is_cancelled_while_it_waits_is_not_begun(self, page, hear, long_sound, monkeypatch):
        skipped, request = (pytest.importorskip("gradio").skip(),) * 8, SimpleNamespace(session_hash="a")
        monkeypatch.setattr(demo, "listen", lambda *_: 1 / 0)
        for then in (page.end, page.cancel, lambda request: page.begin("other.wav", request)):
            page.begin(str(long_sound), request)
            then(request)
            assert page.hear(str(long_sound), 1, 0.5, request) == skipped

    def test_a_port_in_use(self, tagger, monkeypatch):
        pytest.importorskip("gradio")
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(InputError, match=f"--port {port} at --host 127.0.0.1 is in use"):
                demo.launch(tagger, port=port)


class TestApi:
    """What programs call."""

    @pytest.fixture(scope="class")
    def address(self, tagger, tmp_path_factory):
        pytest.importorskip("gradio")
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
            page = demo.build_page(tagger, at_once=2)
            stack.callback(page.close)
            page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
            yield page.local_url

    @pytest.fixture
    def ask(self, address):
        from gradio_client import Client, handle_file

        def ask(path, name="/tags", **parameters):
            return Client(address, verbose=False).predict(handle_file(str(path)), api_name=name, **parameters)

        return ask

    def test_rows_are_those_of_files(self, ask, tagger, long_sound, tmp_path):
        for name, parameters, rows in (
            ("/tags", {}, Tags(tagger)),
            ("/tags", {"top_k": 1}, Tags(tagger, 1)),
            ("/tags", {"threshold": 1}, Tags(tagger, threshold=1.0)),
            ("/events", {"threshold": 0.4}, Events(tagger, 0.4)),
        ):
            (expected,) = rows.of_files([str(long_sound)], names=[long_sound.name])
            assert ask(long_sound, name, **parameters) == {"schema": 1, "rows": expected}
        (tmp_path / "broken.wav").write_text("no sound")
        (row,) = ask(tmp_path / "broken.wav")["rows"]
        assert row["error"].startswith("broken.wav: cannot be decoded as sound")

    def test_two_sounds_are_in_work_at_a_time(self, ask, long_sound, tmp_path, monkeypatch):
        soundfile.write(tmp_path / "high.wav", noise(*HIGH, 1), RATE)
        both, answers_of = threading.Barrier(2), Tags._answers

        def answers(*args):
            both.wait(60)
            yield from answers_of(*args)

        monkeypatch.setattr(Tags, "_answers", answers)
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(ask, [long_sound, tmp_path / "high.wav"]))
        assert [one["rows"][0]["file"] for one in found] == [long_sound.name, "high.wav"]
        assert found[1]["rows"][0]["label"] == "High"

    def test_files_that_were_not_uploaded_are_refused(self, address, long_sound):
        file = {"path": str(long_sound), "meta": {"_type": "gradio.FileData"}}
        for one in (file, {**file, "url": f"{address}config"}):
            body = json.dumps({"data": [one, 5, None]}).encode()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            call = urllib.request.Request(f"{address}gradio_api/call/tags", body, {"Content-Type": "application/json"})
            event = json.load(opener.open(call))["event_id"]
            said = opener.open(f"{address}gradio_api/call/tags/{event}").read().decode()
            assert said.startswith("event: error")
            assert "Low" not in said
