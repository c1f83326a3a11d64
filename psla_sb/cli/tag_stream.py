"""`psla-tag --stream`: prints what is heard in a sound while it comes."""

import os
import queue
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from typing import Any

STREAM = """\
raw samples, little-endian, on stdin, or a microphone. What is heard is printed as it comes: events (a table also says when they
begin, as soon as that is certain), or with --timeline the K best classes at each step. Times are seconds since the first sample;
scores come a window later than what they are of. The sound's end, or Ctrl-C, prints the rest, and the exit status is 0."""
ONLY = ("microphone", "sample_rate", "channels", "encoding", "window", "hop")  # options of a stream alone
DTYPES = {"s16": "<i2", "f32": "<f4"}
FILES = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM")  # how files begin that are no raw samples
MOST_BYTES = 1 << 16  # that are read at a time
BLOCKS_A_SECOND, MOST_SECONDS = 10, 60  # of a microphone: the blocks it gives, and how far the model may be behind
MARKS = {True: "yes", False: "-  ", None: ""}  # of a decision, in a table
BEGINS = "begins".ljust(11)  # where an event's row has its end


def add_stream_options(parser: ArgumentParser) -> None:
    """Adds the options of a stream."""
    group = parser.add_argument_group("streams", STREAM)
    group.add_argument("--stream", action="store_true", help="tag a sound while it comes, in place of files")
    microphone = "hear a microphone (default: the system's; names: python -m sounddevice) in place of stdin"
    group.add_argument("--microphone", nargs="?", const="", metavar="NAME", help=microphone)
    group.add_argument("--sample-rate", type=int, metavar="HZ", help="of stdin; of a microphone (default: its own)")
    group.add_argument("--channels", type=int, metavar="N", help="that alternate on stdin, or of a microphone (default: 1)")
    group.add_argument("--encoding", choices=list(DTYPES), help="of stdin: 16-bit integers or 32-bit floats (default: s16)")
    group.add_argument("--window", type=float, metavar="SECONDS", help="that are heard together, and the delay (default: 10)")
    group.add_argument("--hop", type=float, metavar="SECONDS", help="from a window to the next (default: 1)")


def check_stream_options(parser: ArgumentParser, options: Namespace) -> None:
    """Ends the command if options do not fit together, and files are missing if there is no stream."""
    given = [f"--{name.replace('_', '-')}" for name in ONLY if getattr(options, name) is not None]
    if not options.stream:
        if given:
            parser.error(f"{given[0]} is of a stream; give --stream with it")
        if not options.files and not options.list:
            parser.error("the following arguments are required: FILE (or --list)")
        return
    if options.files not in ([], ["-"]):
        parser.error(f"--stream hears stdin or a microphone, no files such as {options.files[0]}")
    for name in ("plot", "decided", "scores", "embeddings", "out", "out_dir", "list"):
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} is of whole files; with --stream there are events, or --timeline")
    if options.format == "json":
        parser.error("--format json is one document, which a stream does not end; use jsonl, a row a line")
    if options.channels is not None and options.channels < 1:
        parser.error("--channels must be 1 or more")
    if options.microphone is None and options.sample_rate is None:
        parser.error("--stream needs --sample-rate HZ of the samples on stdin, which do not say it, or --microphone")
    if options.microphone is not None and options.encoding is not None:
        parser.error("--encoding is of stdin, not of a microphone")
    if options.microphone is None and sys.stdin.isatty():
        parser.error("--stream hears stdin, which is a terminal: pipe samples into it, or give --microphone")


def tag_stream(parser: ArgumentParser, tagger: Any, options: Namespace) -> int:
    """Prints what a tagger hears in a stream until it ends; returns the exit status."""
    from psla_sb.errors import InputError
    from psla_sb.inference.timeline import EventDetector

    channels = options.channels or 1
    if options.microphone is None:
        name, rate, blocks = "-", options.sample_rate, raw_blocks(channels, options.encoding or "s16")
    else:
        name = options.microphone or "microphone"
        rate, blocks = _microphone(parser, options.microphone, options.sample_rate, channels)
    own = None if tagger.calibration is None else tagger.calibration.threshold
    detector = EventDetector(tagger.labels, options.threshold or (0.5 if own is None else own))
    given = {name: getattr(options, name) for name in ("window", "hop") if getattr(options, name) is not None}
    try:
        stream = tagger.stream(rate, **given)
    except ValueError as error:
        parser.error(str(error))
    rows = _Rows(tagger, name, options.format or "table")

    def show(steps: Any, last: bool = False) -> None:
        if options.timeline:
            rows.show_steps(steps, options.top_k, options.threshold or 0.0)
        else:
            rows.show_events(detector.push(steps.times, steps.scores, last))

    try:
        try:
            for block in until_interrupted(blocks):
                show(stream.push(block))
            show(stream.finish(), last=True)
        except InputError as error:
            # what was heard before it
            rows.show_events([] if options.timeline else detector.finish())
            print(f"error: {error}", file=sys.stderr)
            rows.show_error(str(error))
            return 1
    except BrokenPipeError:
        # whoever read, such as `head`, has had enough; Python must not stumble over it once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def raw_blocks(channels: int, encoding: str) -> Iterator[Any]:
    """Yields the samples on stdin `[samples, channels]`, as soon as there are any."""
    import numpy as np

    from psla_sb.errors import InputError

    dtype = np.dtype(DTYPES[encoding])
    frame, left, begun = channels * dtype.itemsize, b"", False
    stdin: Any = sys.stdin.buffer
    while data := stdin.read1(MOST_BYTES):
        if not begun and data.startswith(FILES):
            convert = "ffmpeg -i FILE -f s16le -ac 1 -ar 16000 - | psla-tag --stream --sample-rate 16000 ..."
            raise InputError(f"stdin has a file ({data[:4]!r}), not raw samples; tag it without --stream, or convert it: {convert}")
        begun, data = True, left + data
        whole = len(data) - len(data) % frame
        left = data[whole:]
        yield np.frombuffer(data[:whole], dtype).reshape(-1, channels)
    if left:
        rest = f"{len(left)} bytes at the end of stdin are no whole sample of {channels} x {encoding} ({frame} bytes)"
        print(f"warning: {rest}; they are left out", file=sys.stderr)


def _microphone(parser: ArgumentParser, name: str, rate: int | None, channels: int) -> tuple[int, Iterator[Any]]:
    """Opens a microphone: its sample rate, and its blocks."""
    try:
        import sounddevice
    except ImportError:
        parser.error("--microphone needs the package sounddevice: pip install sounddevice")
    except OSError as error:
        parser.error(f"--microphone needs PortAudio: apt install libportaudio2, or brew install portaudio ({error})")
    device = int(name) if name.isdigit() else name or None
    blocks: queue.Queue[Any] = queue.Queue(MOST_SECONDS * BLOCKS_A_SECOND)
    lost = []

    def heard(samples: Any, n_samples: int, time: Any, status: Any) -> None:
        if status:
            print(f"warning: the microphone's {status}: samples are missing", file=sys.stderr)
        try:
            blocks.put_nowait(samples.copy())
        except queue.Full:
            lost.append(n_samples)

    try:
        rate = rate or int(sounddevice.query_devices(device, "input")["default_samplerate"])
        microphone = sounddevice.InputStream(rate, rate // BLOCKS_A_SECOND, device, channels, "float32", callback=heard)
    except (ValueError, sounddevice.PortAudioError) as error:
        parser.error(f"--microphone {name}: cannot be opened ({error}); python -m sounddevice lists what there is")
    return rate, _recorded(microphone, blocks, lost)


def _recorded(microphone: Any, blocks: queue.Queue[Any], lost: list[int]) -> Iterator[Any]:
    from psla_sb.errors import InputError

    with microphone:
        while microphone.active or not blocks.empty():
            if lost:
                raise InputError(f"the microphone is {MOST_SECONDS} s ahead of the model; give a longer --hop, or a smaller model")
            try:
                yield blocks.get(timeout=1.0)
            except queue.Empty:
                continue


def until_interrupted(blocks: Iterator[Any]) -> Iterator[Any]:
    """Yields blocks until they end or SIGINT (Ctrl-C) comes, which does not break into the work on a block; a second one does."""
    waiting = stopped = False

    def stop(signum: int, frame: Any) -> None:
        nonlocal stopped
        if waiting or stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        while True:
            waiting = True
            block = None if stopped else next(blocks, None)
            waiting = False
            if block is None:
                return
            yield block
    except KeyboardInterrupt:
        if not waiting:
            raise
    finally:
        signal.signal(signal.SIGINT, before)


def table_line(row: dict[str, Any]) -> str:
    """Writes a row as a line of a table, without its file."""
    times = [f"{row[key]:9.2f} s" for key in ("start", "end") if row[key] is not None]
    mark = [MARKS[row["decision"]]] if "decision" in row else []
    return "  ".join(["", *times, f"{row['score']:.3f}", *mark, row["label"]])


class _Rows:
    """Prints rows, flushed at once."""

    def __init__(self, tagger: Any, name: str, form: str) -> None:
        from psla_sb.inference.rows import Steps, TextRows

        first, second = tagger.step_times(2).tolist()
        self._half, self._labels = (second - first) / 2, tagger.labels
        self._of, self._name = Steps(tagger), name
        self._text = None if form == "table" else TextRows(sys.stdout, form, self._of.schema.names)
        if self._text is not None:
            self._text.__enter__()
            sys.stdout.flush()

    def show_steps(self, steps: Any, top_k: int, threshold: float) -> None:
        for time, scores in zip(steps.times.tolist(), steps.scores, strict=True):
            best = (-scores).argsort(kind="stable")[:top_k].tolist()
            heard = [c for c in best if scores[c] >= threshold]
            self._show(self._of.row(max(0.0, time - self._half), time + self._half, c, scores[c].item()) for c in heard)

    def show_events(self, found: Iterable[Any]) -> None:
        from psla_sb.inference.timeline import Begun

        for one in sorted(found, key=lambda one: one.start if isinstance(one, Begun) else one.end):
            if not isinstance(one, Begun):
                self._show([self._of.row(one.start, one.end, self._labels.index(one.label), one.score)])
            elif self._text is None:
                blank = " " * (5 if self._of.thresholds is None else 10)
                print("  ".join(["", f"{one.start:9.2f} s", BEGINS, blank, one.label]), flush=True)

    def show_error(self, error: str) -> None:
        if self._text is not None:
            self._text.write([self._of.whole(self._name, {}, error)])

    def _show(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            whole = self._of.whole(self._name, row, None)
            if self._text is None:
                print(table_line(whole), flush=True)
            else:
                self._text.write([whole])
