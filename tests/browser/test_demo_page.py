"""The demo page in a real browser, headless Chromium: `make test-browser` installs what this needs and runs it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.manifest import Manifest
from psla_sb.demo import COLUMNS, N_CLASSES, THRESHOLD, event_rows, listen, note
from psla_sb.inference.tagger import AudioTagger

pytestmark = pytest.mark.browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # a microphone that beeps, and nobody who has to allow it
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def model(lively_runs):
    return lively_runs / "a"


@pytest.fixture(scope="module")
def tagger(model):
    return AudioTagger.from_any(model, run_opts={"device": "cpu"})


@pytest.fixture(scope="module")
def sounds(tiny_run, mini_data, tmp_path_factory):
    """A folder with a clip, another one, two minutes and an hour of clips, and two files that are no sound."""
    folder = tmp_path_factory.mktemp("sounds")
    manifest = Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)
    clips = [read_audio(manifest[row]["wav"]).numpy() for row in range(len(manifest))]
    soundfile.write(folder / "clip.wav", clips[0], 16000)
    soundfile.write(folder / "other clip.flac", clips[1], 16000)
    soundfile.write(folder / "long.flac", np.resize(np.concatenate(clips), 120 * 16000), 16000)
    hour = np.round(np.resize(np.concatenate(clips), 3600 * 16000) * 2**15).astype(np.int16)
    soundfile.write(folder / "hour.flac", hour, 16000)
    (folder / "broken.wav").write_bytes(b"RIFF and no sound")
    (folder / "empty.wav").touch()
    return folder


@pytest.fixture(scope="module")
def address(model, sounds, tmp_path_factory):
    """Of the page, served as a user would."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tmp").mkdir()
    (folder / "examples").mkdir()
    shutil.copy(sounds / "other clip.flac", folder / "examples")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("psla-demo")
    argv = [program, "--model", model, "--port", str(port), "--examples", folder / "examples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    with open(folder / "log.txt", "w") as log, subprocess.Popen(argv, stdout=log, stderr=log, env=environment) as server:
        try:
            address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
            while True:
                try:
                    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address).close()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "log.txt").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait(PATIENCE)
    text = (folder / "log.txt").read_text()
    assert f"The page is at {address}" in text
    assert "Traceback" not in text
    assert server.returncode == 0
    assert not list((folder / "tmp").iterdir()), "uploaded sounds are left"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "there is no Chromium: make test-browser installs it"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield running
        running.close()


@contextmanager
def opened(browser, address):
    """The page, opened; at the end nothing but its server has been asked for anything, and no script has failed."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, requests, errors = context.new_page(), [], []
    page.set_default_timeout(1000 * PATIENCE)
    context.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    page.wait_for_selector("#sound input[type=file]", state="attached")
    yield page
    context.close()
    others = {url for url in requests if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(address)}
    assert requests
    assert not others
    assert not errors


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def give(page, path, says):
    """Puts a file in place of what is there, and waits until the page says something about it."""
    if page.locator("#sound audio").is_visible():
        page.locator("#sound button[aria-label=Clear]").click()
    page.locator("#sound input[type=file]").set_input_files(path)
    page.locator("#told", has_text=says).wait_for()
    return page.locator("#told").inner_text()


def shown_tags(page):
    names = [entry.split("\n")[0] for entry in page.locator("#tags .confidence-set").all_inner_texts()]
    return names, [float(meter.get_attribute("value")) for meter in page.locator("#tags meter").all()]


def shown_events(page):
    cells = [text.strip() for text in page.locator("#events").inner_text().split("\n") if text.strip()]
    start = cells.index(COLUMNS[0])
    return [cells[at : at + 4] for at in range(start, len(cells) - 3, 4)]


def check_against(page, tagger, path, told):
    """The tags, the picture and the events are those of a sound."""
    heard = listen(tagger, path)
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 1000")
    names, values = shown_tags(page)
    assert names == [tag.label for tag in heard.tags[:N_CLASSES]]
    np.testing.assert_allclose(values, [tag.score for tag in heard.tags[:N_CLASSES]], atol=1e-4)
    assert told.endswith(note(heard))
    rows, found = event_rows(heard, THRESHOLD)
    page.get_by_text(re.compile(rf"^Events: (the best-scored {len(rows)} of )?{found}$")).wait_for()
    page.locator("#events", has_text=rows[0][0]).wait_for()
    # as many as fit
    assert shown_events(page)[:6] == [COLUMNS, *rows[:5]]
    return heard


def test_a_clip_is_uploaded_tagged_drawn_and_heard(page, tagger, sounds, tmp_path):
    page.screenshot(path=tmp_path / "start.png", full_page=True)
    assert not page.locator("#tags").is_visible()
    told = give(page, sounds / "clip.wav", "clip.wav")
    heard = check_against(page, tagger, sounds / "clip.wav", told)
    assert heard.whole
    assert shown_tags(page)[0][0] == tagger.tag_file(sounds / "clip.wav", top_k=1)[0].label
    assert len({tag.score for tag in heard.tags}) > 10, "a model that scores everything alike proves nothing"
    page.screenshot(path=tmp_path / "clip.png", full_page=True)
    # what is played is what was uploaded
    played = page.evaluate("fetch(document.querySelector('#sound audio').src).then(r => r.bytes()).then(b => [...b])")
    assert bytes(played) == (sounds / "clip.wav").read_bytes()
    page.evaluate("document.querySelector('#sound audio').muted = true")
    page.evaluate("document.querySelector('#sound audio').play()")
    page.wait_for_function("document.querySelector('#sound audio').currentTime > 0.1")


def test_sliders_and_examples(page, tagger, sounds):
    page.get_by_text("other clip.flac").click()
    page.locator("#told", has_text="other clip.flac").wait_for()
    heard = check_against(page, tagger, sounds / "other clip.flac", page.locator("#told").inner_text())
    picture = page.locator("#picture img").get_attribute("src")
    classes, threshold = page.locator("input[type=range]").all()
    classes.press("ArrowLeft")
    page.wait_for_function("n => document.querySelectorAll('#tags meter').length == n", arg=N_CLASSES - 1)
    page.wait_for_function("src => document.querySelector('#picture img').src != src", arg=picture)
    assert shown_tags(page)[0] == [tag.label for tag in heard.tags[: N_CLASSES - 1]]
    found = {share: event_rows(heard, share)[1] for share in (0.05, THRESHOLD)}
    assert found[0.05] != found[THRESHOLD]
    threshold.press("Home")
    page.get_by_text(f"Events: {found[0.05]}", exact=True).wait_for()


def test_files_that_are_no_sound_are_named_and_the_page_goes_on(page, tagger, sounds, tmp_path):
    give(page, sounds / "clip.wav", "clip.wav")
    for name in ("broken.wav", "empty.wav"):
        told = give(page, sounds / name, name)
        assert told.startswith(f"{name}: cannot be decoded as sound")
        assert page.get_by_role("alert").get_by_text(told).is_visible()
        # nothing of the sound before is left to be taken for this one's
        page.locator("#tags").wait_for(state="hidden")
        assert not page.locator("#picture").is_visible()
        assert "Traceback" not in page.content()
    page.screenshot(path=tmp_path / "broken.png", full_page=True)
    told = give(page, sounds / "other clip.flac", "other clip.flac")
    check_against(page, tagger, sounds / "other clip.flac", told)


def test_two_minutes(page, tagger, sounds, tmp_path):
    page.locator("#sound input[type=file]").set_input_files(sounds / "long.flac")
    # how far it has come
    page.locator("#told", has_text="of 2:00.0").wait_for()
    page.locator("#told", has_text="long.flac").wait_for()
    heard = check_against(page, tagger, sounds / "long.flac", page.locator("#told").inner_text())
    assert not heard.whole
    page.screenshot(path=tmp_path / "long.png", full_page=True)
    page.wait_for_function("Math.abs(document.querySelector('#sound audio').duration - 120) < 0.1")


def test_two_pages_at_a_time_and_an_hour_that_is_cancelled(page, browser, address, tagger, sounds, tmp_path):
    cancel = page.get_by_role("button", name="Cancel")
    assert not cancel.is_visible()
    page.locator("#sound input[type=file]").set_input_files(sounds / "hour.flac")
    page.locator("#told", has_text="of 1:00:00.0").wait_for()
    with opened(browser, address) as other:
        told = give(other, sounds / "clip.wav", "clip.wav")
        check_against(other, tagger, sounds / "clip.wav", told)
        assert not other.get_by_role("button", name="Cancel").is_visible()
    page.screenshot(path=tmp_path / "working.png", full_page=True)
    assert "of 1:00:00.0" in page.locator("#told").inner_text()
    cancel.click()
    page.locator("#told", has_text="Cancelled").wait_for()
    cancel.wait_for(state="hidden")
    assert not page.locator("#tags").is_visible()
    told = give(page, sounds / "other clip.flac", "other clip.flac")
    check_against(page, tagger, sounds / "other clip.flac", told)
    # nor does another sound wait for the one in whose place it comes
    page.locator("#sound button[aria-label=Clear]").click()
    page.locator("#tags").wait_for(state="hidden")
    page.locator("#sound input[type=file]").set_input_files(sounds / "hour.flac")
    page.locator("#told", has_text="of 1:00:00.0").wait_for()
    told = give(page, sounds / "clip.wav", "clip.wav")
    check_against(page, tagger, sounds / "clip.wav", told)


def test_a_recording_from_the_microphone(page):
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("#told", has_text="audio.wav").wait_for()
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 1000")
    assert len(shown_tags(page)[0]) == N_CLASSES


def test_on_a_phone_nothing_but_the_picture_is_wider_than_the_screen(page, sounds, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    give(page, sounds / "clip.wav", "clip.wav")
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 1000")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#sound", "#told", "#tags", "#events table"):
        assert page.locator(name).bounding_box()["width"] <= 390
    frame, image = page.locator("#picture").bounding_box(), page.locator("#picture img").bounding_box()
    assert frame["width"] < 390 < image["width"]
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
