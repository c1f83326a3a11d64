"""`psla-tag`: prints the tags of sound files."""

import csv
import glob
import io
import json
import os
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from psla_sb.cli.options import NO_MODEL, add_model, load_tagger
from psla_sb.cli.tag_stream import add_stream_options, check_stream_options, tag_stream

FILES = "sounds of any format, sample rate and length; a folder, with all sounds in it; a pattern; - for a sound on stdin"
EXAMPLES = """examples:
  psla-tag --model results/psla/1/tagger sound.wav
  psla-tag --model results/psla/1/tagger recordings/ 'more/**/*.flac' --format jsonl > tags.jsonl
  psla-tag --model results/psla/1/tagger hour.mp3 --events --threshold 0.3 --plot hour.png
  curl -s https://example.org/sound.wav | psla-tag --model results/psla/1/tagger -
  ffmpeg -i URL -f s16le -ac 1 -ar 16000 - | psla-tag --model results/psla/1/tagger --stream --sample-rate 16000
  psla-tag --model results/psla/1/tagger --stream --microphone --threshold 0.3

Of a model with thresholds (calibration.json in its folder), "yes" stands beside a score that reaches its class's threshold.

A sound that is longer than what the model hears at a time is heard in windows that overlap by half; see --pool. With "max", "yes"
then says that the class is in one window at least, and is said more often the longer the sound is: thresholds were chosen for
single clips.

exit status: 0 if all files were tagged, 1 if some could not be (see stderr), 2 if the command line is wrong"""

MARKS = {True: "yes", False: "-  "}  # of a decision, in a table
HIERARCHY = "max: the score of a class that is the only parent of others is the highest of its own and theirs, and so on upward"
ONTOLOGY = "AudioSet's ontology.json, for --hierarchy (default: the one in the model's folder)"
LEAST = "the least score of a tag; of an event, by default its class's own threshold, or 0.5 where the model has none"
Answer = tuple[str, list[dict], str | None]  # what a file is called, its rows, its error


def tag(arguments: list[str] | None = None) -> None:
    """Runs `psla-tag`, by default with the arguments of this process; it always ends with `SystemExit`."""
    description = "Tags sound files: what can be heard in them, best first."
    parser = ArgumentParser("psla-tag", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=FILES)
    add_model(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tags per file (default: %(default)s)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=LEAST)
    pool = "of a sound in several windows, a class's score is the windows' max, mean, or the first one's (default: %(default)s)"
    parser.add_argument("--pool", choices=["max", "mean", "first"], default="max", help=pool)
    parser.add_argument("--hierarchy", choices=["max"], help=HIERARCHY)
    parser.add_argument("--ontology", metavar="FILE", help=ONTOLOGY)
    parser.add_argument("--format", choices=["table", "json", "jsonl", "csv"], default="table", help="(default: %(default)s)")
    along = parser.add_mutually_exclusive_group()
    along.add_argument("--timeline", action="store_true", help="the scores of the K best classes along a recording of any length")
    along.add_argument("--events", action="store_true", help="when what reaches the threshold begins and ends")
    along.add_argument("--decided", action="store_true", help="of the K best, only tags that reach their class's own threshold")
    parser.add_argument("--plot", metavar="PNG", help="draw one recording's waveform, spectrogram and timeline")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    add_stream_options(parser)
    # what names a file is one, whatever it begins with
    given = [_as_file(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    options = parser.parse_args(given)
    check_stream_options(parser, options)
    # names need not be UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if options.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if options.threshold is not None and not 0 < options.threshold <= 1:
        parser.error("--threshold must be above 0 and at most 1")
    if options.model is None:
        parser.error(NO_MODEL)
    if options.plot and not options.plot.lower().endswith(".png"):
        parser.error(f"--plot {options.plot}: pictures are PNG files, give a name that ends with .png")
    if options.ontology and not options.hierarchy:
        parser.error("--ontology says what is whose parent; give --hierarchy=max with it")
    tagger = load_tagger(parser, options)
    if options.hierarchy:
        _use_hierarchy(parser, tagger, options)
    if options.stream:
        sys.exit(tag_stream(parser, tagger, options))
    if options.decided and tagger.calibration is None:
        parser.error(f"--decided: {options.model} has no thresholds (calibration.json); give --threshold SCORE instead")
    with tempfile.TemporaryDirectory() as folder:
        files, missing = _files(options.files, Path(folder) / "stdin.wav")
        if options.plot and len(files) != 1:
            parser.error(f"--plot draws one recording, not {len(files)}")
        for text in missing:
            print(f"error: {text}", file=sys.stderr)
        try:
            failed = _print(_answers(tagger, files, options), options.format)
            sys.stdout.flush()
        except BrokenPipeError:
            # whoever read, such as `head`, has had enough; Python must not stumble over it once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            failed = True
    if len(files) > 1 and failed:
        print(f"{failed} of {len(files)} files could not be tagged", file=sys.stderr)
    sys.exit(1 if failed or missing else 0)


def _use_hierarchy(parser: ArgumentParser, tagger: Any, options: Namespace) -> None:
    from psla_sb.errors import InputError
    from psla_sb.labels.ontology import ADDRESS

    file = options.ontology or os.path.join(options.model, "ontology.json")
    if not os.path.isfile(file):
        need = f"give --ontology FILE, or put ontology.json into the folder {options.model}"
        parser.error(f"--hierarchy=max: there is no {file}; {need}; AudioSet's is at {ADDRESS}")
    try:
        tagger.use_hierarchy(file)
    except InputError as error:
        parser.error(f"--hierarchy=max: {error}" if file in str(error) else f"--hierarchy=max: {file}: {error}")


def _as_file(argument: str) -> str:
    return os.path.join(".", argument) if argument.startswith("-") and argument != "-" and os.path.exists(argument) else argument


def _files(arguments: list[str], stdin: Path) -> tuple[dict[str, str], list[str]]:
    """{path: what the user calls it}, and what could not be found."""
    from psla_sb.dataio.containers import sounds_in

    files: dict[str, str] = {}
    missing = []
    for argument in arguments:
        found = {argument: argument.removeprefix("./") if argument.startswith("./-") else argument}
        if argument == "-":
            with open(stdin, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            found = {str(stdin): "-"}
        elif os.path.isdir(argument):
            found = {file: file for file in sounds_in(argument)}
        elif glob.has_magic(argument) and not os.path.exists(argument):
            found = {file: file for file in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(file)}
        if not found:
            missing.append(f"{argument}: no sound files there")
        files |= found
    return files, missing


def _answers(tagger: Any, files: dict[str, str], options: Namespace) -> Iterator[Answer]:
    """Yields for each file what it is called, its rows as dicts, and its error."""
    from psla_sb.errors import InputError
    from psla_sb.inference.timeline import events, top_classes
    from psla_sb.plots.recording import draw

    if not (options.timeline or options.events or options.plot):
        for path, tags, error in tagger.tag_files(files, top_k=options.top_k, threshold=options.threshold, pool=options.pool):
            yield files[path], _rows(tags or (), options.decided), error and error.replace(path, files[path])
        return
    own = None if tagger.calibration is None else tagger.calibration.threshold
    for path, name in files.items():
        try:
            timeline = tagger.tag_timeline(path)
            if options.plot:
                draw(path, timeline, tagger.hparams.sample_rate, options.plot, name)
            if options.events:
                found = events(timeline, options.threshold or (0.5 if own is None else own))
                rows = [one._replace(start=round(one.start, 3), end=round(one.end, 3))._asdict() for one in found]
            elif options.timeline:
                best = [c for c in top_classes(timeline, options.top_k) if timeline.scores[:, c].max() >= (options.threshold or 0)]
                rows = [
                    {"time": round(time, 3), "label": timeline.labels[c], "mid": timeline.mids[c], "score": float(scores[c])}
                    | ({} if own is None else {"decision": bool(scores[c] >= own[c])})
                    for time, scores in zip(timeline.times.tolist(), timeline.scores, strict=True)
                    for c in best
                ]
            else:
                rows = _rows(tagger.tag_file(path, options.top_k, options.threshold, options.pool), options.decided)
            yield name, rows, None
        except (InputError, OSError) as error:
            yield name, [], str(error).replace(path, name)


def _rows(tags: Iterable[Any], decided: bool) -> list[dict]:
    """Tags as rows; what a model without thresholds does not know is not in them."""
    rows = ({key: value for key, value in one._asdict().items() if value is not None} for one in tags)
    return [row for row in rows if not decided or row["decision"]]


def _print(answers: Iterable[Answer], form: str) -> int:
    """Prints the answers as they come, errors on stderr; how many there were."""
    failed, all_rows, table = 0, {}, None
    for name, rows, error in answers:
        if error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
        elif form == "table":
            print(name)
            for row in rows:
                numbers = [f"{value:9.2f} s" for key, value in row.items() if key in ("time", "start", "end")]
                mark = [MARKS[row["decision"]]] if "decision" in row else []
                print("  ".join(["", *numbers, f"{row['score']:.3f}", *mark, row["label"]]))
        elif form == "json":
            all_rows[name] = rows
        elif form == "jsonl":
            print(json.dumps({"file": name, "rows": rows}), flush=True)
        elif rows:
            if table is None:
                table = csv.DictWriter(sys.stdout, ["file", *rows[0]], lineterminator="\n")
                table.writeheader()
            table.writerows({"file": name, **row} for row in rows)
    if form == "json":
        print(json.dumps(all_rows, indent=1))
    return failed
