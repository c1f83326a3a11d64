"""The demo page: drop or record a sound, see its tags, its timeline and its events, and listen to it.

`psla-demo --model FOLDER` serves it. It needs Gradio (`pip install 'psla_sb[demo]'`), and no network.
"""

import html
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psla_sb.dataio.audio import AudioError, duration, read_blocks
from psla_sb.dataio.containers import sounds_in
from psla_sb.errors import InputError
from psla_sb.inference.rows import SCHEMA, Events, Tags
from psla_sb.inference.tagger import AudioTagger, Tag
from psla_sb.inference.timeline import Timeline, events
from psla_sb.plots.recording import overview

WINDOW, HOP = 10.0, 1.0  # in seconds, of the timeline
N_CLASSES, THRESHOLD = 8, 0.5  # what the page begins with
COLUMNS, WIDTHS = ["class", "from", "to", "score"], ["37%", "21%", "21%", "21%"]
MAX_EVENTS, MAX_EXAMPLES = 1000, 12
MAX_FILE_SIZE = "1gb"  # an hour in stereo at 44.1 kHz is a WAV file of 635 MB
START = "<p>A sound of any format, up to 1 GB: an hour is not too long.</p>"
CANCELLED = "<p>Cancelled. Drop another sound, or record one.</p>"
WHOLE = "The tags are of the clip as a whole"
WINDOWS = (
    "That is longer than what the model hears at a time: the tags are each class's highest score in windows that overlap by half"
)
MOMENTS = "; the timeline hears a moment at a time, so its scores may differ."
NO_TIMES = ". The model does not say when: there is no timeline."
TICK = "\N{CHECK MARK} "
DECIDED = f" A class with {TICK}reaches its own threshold."
OWN = "Events by each class's own threshold, not by the slider"
KEPT = 4 * 3600  # seconds that a sound is kept for a page that is left open
NO_GRADIO = """the demo page needs Gradio:
    pip install 'psla_sb[demo]'     or, in the repository, pip install -e '.[demo]'"""
CSS = """
main {max-width: 1100px !important; width: 100% !important}
footer {display: none !important}
code {overflow-wrap: anywhere}
#told {min-height: 5.5em}
#told .pending {opacity: 0 !important}
#stop {max-width: 8em}
#told .error {color: var(--error-text-color); font-weight: 600}
#tags meter {height: 10px; appearance: none}
#tags meter::-webkit-meter-bar {opacity: 0}
#tags meter::-moz-meter-bar {opacity: 0}
@media (max-width: 640px) {
  /* on a phone the picture keeps a size that can be read, and is moved sideways */
  #picture .image-container {overflow-x: auto}
  #picture img {width: 860px !important; max-width: none !important; height: auto !important}
}
"""

Paths = Sequence[str | Path]


class Work(NamedTuple):
    """A sound that a page waits for."""

    path: str
    stop: threading.Event


class Heard(NamedTuple):
    """Holds what there is to show of a sound."""

    name: str
    seconds: float
    whole: bool  # whether it is no longer than what the model hears at a time
    tags: list[Tag]  # all classes, best first, as `AudioTagger.tag_file` gives them
    timeline: Timeline | None  # None for a model that says no times
    extremes: np.ndarray  # this and the next two: see `plots.recording.overview`
    energies: np.ndarray
    column: float


class Stopped(Exception):
    """Ends the work on a sound that nobody waits for any more."""


def listen(tagger: AudioTagger, path: str | Path, progress: Callable[[float, str], Any] = lambda share, desc: None) -> Heard:
    """Tags a sound of any length; `progress` is called with the share that is done, in [0, 1], and with words for it.

    What `progress` raises ends the work.
    """
    rate, seconds, timeline = tagger.hparams.sample_rate, _seconds(path), None

    def part(begin: float, end: float, done: str) -> Callable[[float], Any]:
        def report(at: float) -> None:
            # what a header says may be a little less than there is
            total = max(seconds, at)
            progress(begin + (end - begin) * at / total, f"{done} {clock(at)} of {clock(total)}")

        return report

    if tagger.has_timeline:
        timeline = tagger.tag_timeline(path, WINDOW, HOP, on_progress=part(0.0, 0.8, "heard"))
    whole = round(seconds * rate) <= tagger.longest
    tags = tagger.tag_file(path, top_k=len(tagger.labels), on_progress=part(0.8 if timeline else 0.0, 0.95, "tagged"))
    extremes, energies, column = overview(read_blocks(path, rate, on_progress=part(0.95, 1.0, "looked at")), rate, seconds)
    return Heard(Path(path).name, seconds, whole, tags, timeline, extremes.numpy(), energies.numpy(), column)


def _seconds(path: str | Path) -> float:
    try:
        return duration(path)
    except AudioError:
        # whoever reads the file says what is wrong
        return 0.0


def clock(seconds: float) -> str:
    """Writes a time as people read it.

    Example
    -------
    >>> clock(7.04), clock(3661.5)
    ('0:07.0', '1:01:01.5')
    """
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def event_rows(heard: Heard, threshold: float | np.ndarray) -> tuple[list[list[str]], int]:
    """Makes the table of events (class, start, end, highest score); too many are cut to the best-scored; and counts them all."""
    found = [] if heard.timeline is None else events(heard.timeline, threshold)
    shown = sorted(sorted(found, key=lambda event: -event.score)[:MAX_EVENTS], key=lambda event: event.start)
    # a clip's last step may reach beyond its end
    rows = [[e.label, clock(e.start), clock(min(e.end, heard.seconds)), f"{e.score:.2f}"] for e in shown]
    return rows, len(found)


def note(heard: Heard) -> str:
    """Says on the page where the tags come from."""
    return (WHOLE if heard.whole else WINDOWS) + (NO_TIMES if heard.timeline is None else MOMENTS)


def picture(heard: Heard, n_classes: int) -> Any:
    """Draws waveform, spectrogram and timeline on one time axis, see `psla_sb.plots.recording.recording`: a `PIL.Image.Image`."""
    from PIL import Image  # comes with matplotlib, which is imported only to draw

    from psla_sb.plots.recording import recording

    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "recording.png"
        recording(heard.extremes, heard.energies, heard.column, heard.timeline, drawn, heard.name, n_classes)
        with Image.open(drawn) as image:
            return image.convert("RGB")


def _gradio() -> Any:
    # it must not say to its makers that it is used, and it reads this when it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise InputError(NO_GRADIO) from None
    return gradio


def build_page(tagger: AudioTagger, source: str = "", examples: Paths = (), at_once: int = 4) -> Any:
    """Builds the page, a `gradio.Blocks`, on which `at_once` sounds are in work at a time, each with its own progress.

    `source` is what the model is called there, `examples` are sound files on offer. Programs call `/tags` and `/events` of its
    API, see the README.
    """
    gr, model, calibration = _gradio(), tagger.hparams, tagger.calibration
    from gradio import Request  # handlers that are annotated with it are told whose page it is

    length = f"{tagger.n_samples / model.sample_rate:.3g} s at a time" if tagger.n_samples else "clips of any length"
    nothing = (None, gr.Column(visible=False), gr.Column(visible=False), None, None, None)
    working: dict[str | None, Work] = {}  # by page

    def end(request: Request) -> None:
        if work := working.pop(request.session_hash, None):
            work.stop.set()

    def begin(path: str | None, request: Request) -> tuple:
        end(request)
        if path is not None:
            working[request.session_hash] = Work(path, threading.Event())
        return ("" if path else START), *nothing, gr.Button(visible=path is not None)

    def cancel(request: Request) -> tuple:
        end(request)
        return CANCELLED, gr.Button(visible=False)

    def hear(
        path: str | None,
        k: int,
        threshold: float,
        request: Request,
        own: bool = False,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple:
        work, unchanged = working.get(request.session_hash), (gr.skip(),) * len(outputs)
        # while it waited, it was cancelled, or another sound took its place
        if work is None or work.path != path:
            return unchanged

        def report(share: float, words: str) -> None:
            if work.stop.is_set():
                raise Stopped
            progress(share, words)

        answer: tuple
        try:
            heard = listen(tagger, path, report)
            report(1.0, "drawing")
            told = f"<p><b>{html.escape(heard.name)}</b>, {clock(heard.seconds)}. {note(heard)}{DECIDED if calibration else ''}</p>"
            shown = gr.Column(visible=True)
            answer = told, heard, shown, shown, *show_classes(heard, k), show_events(heard, threshold, own)
        except InputError as error:
            text = html.escape(str(error).replace(path, Path(path).name))
            answer = f'<p class="error" role="alert">{text}</p>', *nothing
        except Stopped:
            return unchanged
        return unchanged if work.stop.is_set() else (*answer, gr.Button(visible=False))

    def show_classes(heard, k):
        return {f"{TICK * bool(tag.decision)}{tag.label}": tag.score for tag in heard.tags[:k]}, picture(heard, k)

    def show_events(heard, threshold, own=False):
        rows, found = event_rows(heard, calibration.threshold if own else threshold)
        shown = f"the best-scored {len(rows)} of {found}" if found > len(rows) else str(found)
        return gr.Dataframe(rows, label=f"Events: {shown}")

    def rows_of(rows, sound):
        """Gives what `psla-tag --format json` prints."""
        try:
            (told,) = rows.of_files([sound], names=[Path(sound).name])
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {"schema": SCHEMA, "rows": told}

    def api_tags(sound, top_k=5, threshold=None):
        """Tags a sound: its best classes, as rows of psla-tag's schema."""
        return rows_of(Tags(tagger, top_k, threshold), sound)

    def api_events(sound, threshold=None):
        """Finds when what reaches the threshold begins and ends, as rows of psla-tag's schema."""
        return rows_of(Events(tagger, threshold), sound)

    with gr.Blocks(title="What can be heard?", analytics_enabled=False, delete_cache=(600, KEPT)) as page:
        found = gr.State()
        gr.HTML(
            "<h1>What can be heard?</h1><p>Drop a sound or record one, and see what is in it, and when.</p>"
            f"<p>Model <code>{html.escape(str(source))}</code>: {len(model.mids)} classes, hears {length}</p>"
        )
        with gr.Row():
            with gr.Column():
                # the browser's own player need not decode an hour of sound before it plays
                player = {"editable": False, "waveform_options": gr.WaveformOptions(show_recording_waveform=False)}
                ways = {"sources": ["upload", "microphone"], "type": "filepath", "buttons": ["download"]}
                sound = gr.Audio(label="Sound", elem_id="sound", **ways, **player)
                told = gr.HTML(START, elem_id="told")
                stop = gr.Button("Cancel", size="sm", visible=False, elem_id="stop")
                if examples:
                    names = [Path(example).name for example in examples]
                    gr.Examples([[str(example)] for example in examples], sound, label="Examples", example_labels=names)
            with gr.Column(visible=False) as beside:
                tags = gr.Label(label="Tags", show_heading=False, elem_id="tags")
                most = min(20, len(model.mids))
                k = gr.Slider(1, most, min(N_CLASSES, most), step=1, label="Classes shown", buttons=[])
        with gr.Column(visible=False) as below:
            whole = {"format": "png", "buttons": ["download", "fullscreen"], "interactive": False}
            drawn = gr.Image(label="Timeline", elem_id="picture", **whole)
            threshold = gr.Slider(0.05, 0.95, THRESHOLD, step=0.05, label="Least score of an event", buttons=[])
            # of each class's own threshold, if the model has some
            choices = [threshold, *([gr.Checkbox(True, label=OWN, elem_id="own")] if calibration else [])]
            table = gr.Dataframe(headers=COLUMNS, column_widths=WIDTHS, wrap=True, interactive=False, buttons=[], elem_id="events")
        outputs = [told, found, beside, below, tags, drawn, table, stop]
        private: dict[str, Any] = {"api_visibility": "private"}
        hearing: dict[str, Any] = {"concurrency_id": "hearing", "concurrency_limit": at_once}
        at_first = sound.change(begin, sound, outputs, queue=False, show_progress="hidden", **private)
        at_last = at_first.then(hear, [sound, k, *choices], outputs, show_progress_on=told, **hearing, **private)
        stop.click(cancel, None, [told, stop], queue=False, show_progress="hidden", cancels=at_last, **private)
        page.unload(end)
        changed = {"show_progress": "hidden", "concurrency_limit": at_once, **private}
        k.change(show_classes, [found, k], [tags, drawn], **changed)
        for choice in choices:
            choice.change(show_events, [found, *choices], table, **changed)
        # parts of the page check what they are sent, which `gradio.api` does not: that a file is one that was uploaded
        given, answer = gr.Audio(type="filepath", visible=False, label="sound"), gr.JSON(visible=False)
        least, most_tags = gr.Number(None, minimum=0, maximum=1, visible=False), gr.Number(5, minimum=1, precision=0, visible=False)
        called = gr.Button(visible=False)
        called.click(api_tags, [given, most_tags, least], answer, api_name="tags", **hearing)
        called.click(api_events, [given, least], answer, api_name="events", **hearing)
    return page


def launch(
    tagger: AudioTagger,
    source: str = "",
    examples: Paths = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    browser: bool = False,
    at_once: int = 4,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM; uploaded sounds are deleted then, and after some hours.

    A `host` of "0.0.0.0" lets other machines in; `browser` opens the page in this machine's. An InputError is raised if the
    port is in use.
    """
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        gr = _gradio()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            page = build_page(tagger, source, examples, at_once)
            fonts = ["system-ui", "sans-serif"]  # none from the network
            look = {"theme": gr.themes.Default(primary_hue="blue", font=fonts, font_mono=fonts), "css": CSS, "footer_links": []}
            limits = {"max_file_size": MAX_FILE_SIZE, "state_session_capacity": 100}
            switches = dict.fromkeys(("share", "ssr_mode", "run_history", "enable_monitoring"), False)
            address = {"server_name": host, "server_port": port, "inbrowser": browser}
            page.launch(**address, **look, **limits, **switches, quiet=True, prevent_thread_lock=True)
        except OSError:
            raise InputError(f"--port {port} at --host {host} is in use, or may not be used: choose another") from None
        print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def example_files(folder: str | Path) -> list[Path]:
    """Lists the first sound files of a folder, by name; if there are none, an InputError is raised."""
    files = [file for file in map(Path, sounds_in(folder)) if file.parent == Path(folder)]
    if not files:
        raise InputError(f"{folder}: no sound files there")
    return files[:MAX_EXAMPLES]
