"""`psla-tag`: prints the tags of sound files, or writes those of very many into a table."""

import contextlib
import glob
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from psla_sb import add_version
from psla_sb.cli.options import NO_MODEL, add_model, load_tagger
from psla_sb.cli.tag_stream import add_stream_options, check_stream_options, table_line, tag_stream

FILES = "sounds of any format, sample rate and length; a folder, with all sounds in it; a pattern; - for a sound on stdin"
EXAMPLES = """examples:
  psla-tag --model results/psla/1/tagger sound.wav
  psla-tag --model results/psla/1/tagger recordings/ 'more/**/*.flac' --format jsonl > tags.jsonl
  psla-tag --model results/psla/1/tagger hour.mp3 --events --threshold 0.3 --plot hour.png
  psla-tag --model results/psla/1/tagger archive/ --out tags.parquet --workers 8 --device cuda
  torchrun --nproc-per-node=4 --no-python psla-tag --model results/psla/1/tagger archive/ --out tags.parquet --device cuda
  curl -s https://example.org/sound.wav | psla-tag --model results/psla/1/tagger -
  ffmpeg -i URL -f s16le -ac 1 -ar 16000 - | psla-tag --model results/psla/1/tagger --stream --sample-rate 16000
  psla-tag --model results/psla/1/tagger --stream --microphone --threshold 0.3

A row is a tag, a step (--timeline), an event (--events), a sound's scores or its embedding. JSON, JSON lines, CSV and Parquet
have the same fields: file, start, end (seconds; empty where the row is about the whole sound), label, mid, score, error; of a
model with thresholds also probability and decision. A sound without any tag has one row, and so has one that cannot be tagged,
with its error.

--out writes one table: in parts while it runs (tags.parquet.parts/), which any number of processes write, also on several machines
that share the folder, and the same command goes on where it was stopped or killed. What has rows already is not tagged again.

Of a model with thresholds (calibration.json in its folder), "yes" stands beside a score that reaches its class's threshold.

A sound that is longer than what the model hears at a time is heard in windows that overlap by half; see --pool. With "max", "yes"
then says that the class is in one window at least, and is said more often the longer the sound is: thresholds were chosen for
single clips.

exit status: 0 if all files were tagged, 1 if some could not be (see stderr, or the rows with an error), 2 if the command line is
wrong, 75 if it was stopped (the same command with --out goes on)"""

HIERARCHY = "max: the score of a class that is the only parent of others is the highest of its own and theirs, and so on upward"
ONTOLOGY = "AudioSet's ontology.json, for --hierarchy (default: the one in the model's folder)"
LEAST = "the least score of a tag; of an event, by default its class's own threshold, or 0.5 where the model has none"
LIST = "further sounds: a text file with a path a line (- for stdin), or an annotation (.csv: ID,wav,duration,labels)"
OUT = "write one table, .parquet, .csv or .jsonl, of all files, and go on with it if it is there"
APPLIES = {
    "top_k": ("tags", "timeline"),
    "threshold": ("tags", "timeline", "events"),
    "pool": ("tags", "scores"),
    "hierarchy": ("tags", "timeline", "events", "scores"),
}
WORKERS = "processes that decode (default: up to 8, by the number of files and cores)"
EXIT_STOPPED = 75


def tag(arguments: list[str] | None = None) -> None:
    """Runs `psla-tag`, by default with the arguments of this process; it always ends with `SystemExit`."""
    description = "Tags sound files: what can be heard in them, best first."
    parser = ArgumentParser("psla-tag", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("files", nargs="*", metavar="FILE", help=FILES)
    parser.add_argument("--list", metavar="FILE", help=LIST)
    parser.add_argument("--data-folder", metavar="FOLDER", help="what {data_root} in an annotation stands for")
    add_model(parser)
    parser.add_argument("--top-k", type=int, metavar="K", help="tags per file (default: 5)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=LEAST)
    pool = "of a sound in several windows, a class's score is the windows' max, mean, or the first one's (default: max)"
    parser.add_argument("--pool", choices=["max", "mean", "first"], help=pool)
    parser.add_argument("--hierarchy", choices=["max"], help=HIERARCHY)
    parser.add_argument("--ontology", metavar="FILE", help=ONTOLOGY)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--timeline", action="store_true", help="the scores of the K best classes along a recording of any length")
    what.add_argument("--events", action="store_true", help="when what reaches the threshold begins and ends")
    what.add_argument("--decided", action="store_true", help="of the K best, only tags that reach their class's own threshold")
    what.add_argument("--scores", choices=["float32", "float16"], help="all classes' scores, as numbers of this type")
    what.add_argument("--embeddings", action="store_true", help="the mean of the encoder's features, in place of classes")
    parser.add_argument("--format", choices=["table", "json", "jsonl", "csv"], help="of what is printed (default: table)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="TABLE", help=OUT)
    where.add_argument("--out-dir", metavar="FOLDER", help="write one file for each sound, .json, or as --format says")
    parser.add_argument("--retry", action="store_true", help="with --out: try files again that have an error there")
    parser.add_argument("--plot", metavar="PNG", help="draw one recording's waveform, spectrogram and timeline")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows on the device at a time (default: 16)")
    parser.add_argument("--workers", type=int, metavar="N", help=WORKERS)
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    add_stream_options(parser)
    # what names a file is one, whatever it begins with
    given = [_as_file(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    options = parser.parse_args(given)
    check_stream_options(parser, options)
    # names need not be UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    _check(parser, options)
    if _process()[1] > 1 and not options.out:
        parser.error("several processes (torchrun) write one table: give --out")
    if options.device == "cuda" and "LOCAL_RANK" in os.environ:
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    tagger = load_tagger(parser, options)
    if options.hierarchy:
        _use_hierarchy(parser, tagger, options)
    if options.stream:
        sys.exit(tag_stream(parser, tagger, options))
    if options.decided and tagger.calibration is None:
        parser.error(f"--decided: {options.model} has no thresholds (calibration.json); give --threshold SCORE instead")
    from psla_sb.errors import InputError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            told = _told(tagger, _sounds(options, Path(folder) / "stdin.wav", missing), options)
            sys.stdout.flush()
        except BrokenPipeError:
            # whoever read, such as `head`, has had enough; Python must not stumble over it once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except InputError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"{error.filename or 'what is printed'}: cannot be read or written ({error.strerror})")
        except KeyboardInterrupt:
            print("Stopped." + (" The same command goes on from here." if options.out or options.out_dir else ""), file=sys.stderr)
            sys.exit(EXIT_STOPPED)
    for text in missing:
        print(f"error: {text}", file=sys.stderr)
    if told.n_left:
        left = f"{told.n_left} of {told.n_files} files have no rows yet"
        print(f"{left}: other processes have them. If none is at work any more, the same command goes on", file=sys.stderr)
        sys.exit(0)
    if told.n_failed and told.n_files > 1:
        print(f"{told.n_failed} of {told.n_files} files could not be tagged", file=sys.stderr)
    if told.n_files and (written := options.out or options.out_dir):
        others = f", and of {told.n_others} that were not named now" if told.n_others else ""
        print(f"{written} has the rows of {told.n_files} files{others}", file=sys.stderr)
    sys.exit(1 if told.n_failed or missing else 0)


def _process() -> tuple[int, int]:
    """This process's rank, and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _check(parser: ArgumentParser, options: Namespace) -> None:
    check_stream_options(parser, options)
    _refuse_what_does_not_apply(parser, options)
    options.top_k, options.pool = 5 if options.top_k is None else options.top_k, options.pool or "max"
    if options.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if options.threshold is not None and not 0 < options.threshold <= 1:
        parser.error("--threshold must be above 0 and at most 1")
    if options.batch_size < 1 or (options.workers or 0) < 0:
        parser.error("--batch-size must be 1 or more, --workers 0 or more")
    if options.model is None:
        parser.error(NO_MODEL)
    if options.plot and not options.plot.lower().endswith(".png"):
        parser.error(f"--plot {options.plot}: pictures are PNG files, give a name that ends with .png")
    if options.ontology and not options.hierarchy:
        parser.error("--ontology says what is whose parent; give --hierarchy=max with it")
    if options.out and "-" in options.files:
        parser.error("--out: the sound on stdin has no name to stand in a table; print its rows")
    if options.out and options.format:
        parser.error("the name that --out gives says which format; leave --format out")
    if options.out_dir and options.format == "table":
        parser.error("--out-dir writes json, jsonl or csv")
    if options.retry and not options.out:
        parser.error("--retry is of --out; what has an error is tried again anyway")
    if options.plot and (options.out or options.out_dir or options.scores or options.embeddings):
        parser.error("--plot draws what is printed of one recording; leave --out, --out-dir, --scores and --embeddings out")
    printed = options.format in ("json", "jsonl") or (options.out_dir and options.format is None)
    if (options.scores or options.embeddings) and not (options.out or printed):
        parser.error("--scores and --embeddings are lists of numbers: give --out NAME.parquet, or --format jsonl")


def _refuse_what_does_not_apply(parser: ArgumentParser, options: Namespace) -> None:
    """Refuses options that would change nothing of what is asked for."""
    kinds = ("timeline", "events", "scores", "embeddings")
    kind = next((kind for kind in kinds if getattr(options, kind)), "events" if options.stream else "tags")
    for name, applies in APPLIES.items():
        if getattr(options, name) is not None and kind not in applies:
            parser.error(f"--{name.replace('_', '-')} changes nothing of {kind}; it is of {', '.join(applies)}")
    if options.data_folder and not options.list:
        parser.error("--data-folder is of the annotation that --list names")


def _use_hierarchy(parser: ArgumentParser, tagger: Any, options: Namespace) -> None:
    from psla_sb.errors import InputError
    from psla_sb.labels.ontology import ADDRESS

    options.ontology = file = options.ontology or os.path.join(options.source.path, "ontology.json")
    if not os.path.isfile(file):
        need = f"give --ontology FILE, or put ontology.json into the folder {options.source.path}"
        parser.error(f"--hierarchy=max: there is no {file}; {need}; AudioSet's is at {ADDRESS}")
    try:
        tagger.use_hierarchy(file)
    except InputError as error:
        parser.error(f"--hierarchy=max: {error}" if file in str(error) else f"--hierarchy=max: {file}: {error}")


def _as_file(argument: str) -> str:
    return os.path.join(".", argument) if argument.startswith("-") and argument != "-" and os.path.exists(argument) else argument


class Sound(NamedTuple):
    """A file: its path, what the user calls it, and its place below the folder that the user named."""

    path: str
    name: str
    place: str


def _sounds(options: Namespace, stdin: Path, missing: list[str]) -> Iterator[Sound]:
    """Finds the files that the options name; what could not be found is added to `missing`."""
    from psla_sb.dataio.containers import sounds_in
    from psla_sb.dataio.packs import locate
    from psla_sb.inference.bulk import listed

    for line in listed(options.list, options.data_folder) if options.list else ():
        for file in sounds_in(line) if os.path.isdir(line) else (line,):
            yield Sound(file, file, os.path.relpath(file, line) if os.path.isdir(line) else os.path.basename(file))
    for argument in options.files:
        if argument == "-":
            with open(stdin, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            yield Sound(str(stdin), "-", "stdin")
        elif os.path.isdir(argument) or (glob.has_magic(argument) and not os.path.exists(argument)):
            is_folder = os.path.isdir(argument)
            found = sounds_in(argument) if is_folder else filter(os.path.isfile, sorted(glob.glob(argument, recursive=True)))
            if not (found := list(found)):
                missing.append(f"{argument}: no sound files there")
            for file in found:
                yield Sound(file, file, os.path.relpath(file, argument) if is_folder else os.path.basename(file))
        elif options.out and not os.path.exists(argument) and not locate(argument):
            # a slip of the pen has no place in a table
            missing.append(f"{argument}: no such file or folder")
        else:
            name = argument.removeprefix("./") if argument.startswith("./-") else argument
            yield Sound(argument, name, os.path.basename(argument))


def _told(tagger: Any, sounds: Iterator[Sound], options: Namespace) -> Any:
    """Prints or writes the rows of sounds; what became of them, as `psla_sb.inference.bulk.Written`."""
    from psla_sb.errors import InputError
    from psla_sb.inference.bulk import BulkRows, PathList, Written, write_each
    from psla_sb.inference.many_files import workers_for
    from psla_sb.plots.recording import draw

    rows = _rows(tagger, options)
    if options.out:
        table, files = BulkRows(rows, options.out), PathList(sound.path for sound in sounds)
        workers = workers_for(len(files)) if options.workers is None else options.workers
        if not len(files):
            return Written(0, 0, 0, 0)
        return table.write(files, options.batch_size, workers, *_process(), retry=options.retry)
    # each once
    found = list({sound.path: sound for sound in sounds}.values())
    workers = workers_for(len(found)) if options.workers is None else options.workers
    if options.out_dir:
        places = {sound.path: sound.place for sound in found}
        failed = write_each(rows, places, options.out_dir, options.format or "json", options.batch_size, workers)
        return Written(len(found), failed, 0, 0)
    if options.plot and len(found) != 1:
        raise InputError(f"--plot draws one recording, not {len(found)}")
    if options.plot:
        draw(found[0].path, tagger.tag_timeline(found[0].path), tagger.hparams.sample_rate, options.plot, found[0].name)
    told = rows.of_files([sound.path for sound in found], options.batch_size, workers, [sound.name for sound in found])
    return Written(len(found), _print(told, options.format or "table", rows.schema.names), 0, 0)


def _rows(tagger: Any, options: Namespace) -> Any:
    from psla_sb.inference import rows

    hierarchy = hashlib.sha256(Path(options.ontology).read_bytes()).hexdigest() if options.hierarchy else None
    same = {"model": options.source.digest(), "hierarchy": hierarchy}
    if options.timeline:
        return rows.Steps(tagger, options.top_k, options.threshold, **same)
    if options.events:
        return rows.Events(tagger, options.threshold, **same)
    if options.scores:
        return rows.Scores(tagger, options.scores, options.pool, **same)
    if options.embeddings:
        return rows.Embeddings(tagger, **same)
    return rows.Tags(tagger, options.top_k, options.threshold, options.pool, options.decided, **same)


def _print(told: Iterable[list[dict]], form: str, fields: list[str]) -> int:
    """Prints the rows as they come, errors on stderr as well; how many there were."""
    from psla_sb.inference.rows import TextRows

    failed = 0
    with contextlib.ExitStack() as stack:
        text = None if form == "table" else stack.enter_context(TextRows(sys.stdout, form, fields))
        for rows in told:
            if error := rows[0]["error"]:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
            if text is not None:
                text.write(rows)
            elif not error:
                _show(rows)
    return failed


def _show(rows: list[dict]) -> None:
    print(rows[0]["file"])
    for row in rows:
        if row["label"] is not None:
            print(table_line(row))
