"""The command lines: argument parsing and printing only, the work is elsewhere."""

import argparse
import csv
import glob
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

NO_MODEL = """give --model FOLDER, the folder of a trained tagger. A training run writes one:
    make demo                    trains a small one in minutes, results/mini/1/tagger
    recipes/AudioSet/README.md   says how to train the real one
    psla-import                  makes one from a checkpoint of the published PSLA code"""
EXAMPLES = """examples:
  psla-tag --model results/psla/1/tagger sound.wav
  psla-tag --model results/psla/1/tagger recordings/ 'more/**/*.flac' --format jsonl > tags.jsonl
  psla-tag --model results/psla/1/tagger hour.mp3 --events --threshold 0.3 --plot hour.png
  curl -s https://example.org/sound.wav | psla-tag --model results/psla/1/tagger -

exit status: 0 if all files were tagged, 1 if some could not be (see stderr), 2 if the command line is wrong"""

PACK_EXAMPLES = """examples:
  psla-pack results/psla/1/train.csv --data-folder /data/audioset --out /data/packs
  psla-pack results/psla/1/eval.csv --data-folder /data/audioset --out /data/packs
  psla-pack --verify /data/packs
  python recipes/AudioSet/train.py hparams/psla.yaml --skip_prep=True --data_folder=/data/packs \\
      --train_annotation=/data/packs/train.csv --valid_annotation=/data/packs/eval.csv --class_list=class_labels_indices.csv

A packing that was interrupted goes on with the same command.

exit status: 0 if all is well, 1 if --verify found damage or packing was interrupted, 2 if the command line or the input is wrong"""


def add_model(parser):
    """Adds the options that say which trained model to load."""
    parser.add_argument("--model", metavar="SOURCE", help="a tagger's folder, a run's folder, a snapshot, a published checkpoint")
    parser.add_argument("--labels", metavar="CSV", help="the class list of a published checkpoint")
    add_trust(parser)


def add_trust(parser):
    """Adds `--trust`."""
    parser.add_argument(
        "--trust",
        metavar="MODULE",
        action="append",
        default=[],
        help="a Python module whose classes the model may be made of, searched in this folder too; repeatable",
    )


def trusted(options):
    """What `--trust` named; modules in the current folder can then be imported, as they can where a script lies."""
    if options.trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return options.trust


def tag(arguments=None):
    """`psla-tag`: prints the tags of sound files.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 0 if all files were tagged, 1 if some could not be, 2 if the command line is wrong.

    Example
    -------
    >>> tag(["sound.wav", "--model", "nowhere"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser(
        "psla-tag",
        description="Tags sound files: what can be heard in them, best first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="WAV, FLAC, MP3 or Ogg, any sample rate; a folder, with all that is in it; a pattern; - for a WAV file on stdin",
    )
    add_model(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tags per file (default: %(default)s)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="the least score of a tag; of an event, by default 0.5")
    parser.add_argument("--format", choices=["table", "json", "jsonl", "csv"], default="table", help="(default: %(default)s)")
    along = parser.add_mutually_exclusive_group()
    along.add_argument("--timeline", action="store_true", help="the scores of the K best classes along a recording of any length")
    along.add_argument("--events", action="store_true", help="when what reaches the threshold begins and ends")
    parser.add_argument("--plot", metavar="PNG", help="draw one recording's waveform, spectrogram and timeline")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if options.threshold is not None and not 0 < options.threshold <= 1:
        parser.error("--threshold must be above 0 and at most 1")
    if options.model is None:
        parser.error(NO_MODEL)
    if options.plot and not options.plot.lower().endswith(".png"):
        parser.error(f"--plot {options.plot}: pictures are PNG files, give a name that ends with .png")
    # imports take seconds, and --help and a wrong command line need none
    from psla_sb.errors import InputError
    from psla_sb.inference import AudioTagger

    _check_device(parser, options.device)
    try:
        tagger = AudioTagger.from_any(options.model, options.labels, trusted(options), run_opts={"device": options.device})
    except InputError as error:
        parser.error(str(error))
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
    sys.exit(1 if failed or missing else 0)


def _files(arguments, stdin):
    """{path: what the user calls it}, and what could not be found."""
    from psla_sb.dataio.audio import AUDIO_SUFFIXES

    files, missing = {}, []
    for argument in arguments:
        if argument == "-":
            with open(stdin, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            found = {str(stdin): "-"}
        elif os.path.isdir(argument):
            found = {str(file): str(file) for file in sorted(Path(argument).rglob("*")) if file.suffix.lower() in AUDIO_SUFFIXES}
        elif glob.has_magic(argument) and not os.path.exists(argument):
            found = {file: file for file in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(file)}
        else:
            found = {argument: argument}
        if not found:
            missing.append(f"{argument}: no sound files ({', '.join(AUDIO_SUFFIXES)}) there")
        files |= found
    return files, missing


def _answers(tagger, files, options):
    """Yields for each file what it is called, its rows as dicts, and its error."""
    from psla_sb.errors import InputError
    from psla_sb.timeline import draw, events, top_classes

    if not (options.timeline or options.events or options.plot):
        for path, tags, error in tagger.tag_files(files, top_k=options.top_k, threshold=options.threshold):
            yield files[path], tags and [one._asdict() for one in tags], error and error.replace(path, files[path])
        return
    for path, name in files.items():
        try:
            timeline = tagger.tag_timeline(path)
            if options.plot:
                draw(path, timeline, tagger.hparams.sample_rate, options.plot, name)
            if options.events:
                found = events(timeline, options.threshold or 0.5)
                rows = [{**event._asdict(), "start": round(event.start, 3), "end": round(event.end, 3)} for event in found]
            elif options.timeline:
                best = [c for c in top_classes(timeline, options.top_k) if timeline.scores[:, c].max() >= (options.threshold or 0)]
                rows = [
                    {"time": round(time, 3), "label": timeline.labels[c], "mid": timeline.mids[c], "score": float(scores[c])}
                    for time, scores in zip(timeline.times.tolist(), timeline.scores, strict=True)
                    for c in best
                ]
            else:
                rows = [one._asdict() for one in tagger.tag_file(path, options.top_k, options.threshold)]
            yield name, rows, None
        except (InputError, OSError) as error:
            yield name, None, str(error).replace(path, name)


def _print(answers, form):
    """Prints the answers as they come, errors on stderr; whether there were any."""
    failed, all_rows, table = False, {}, None
    for name, rows, error in answers:
        if error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
        elif form == "table":
            print(name)
            for row in rows:
                numbers = [f"{value:9.2f} s" for key, value in row.items() if key in ("time", "start", "end")]
                print("  ".join(["", *numbers, f"{row['score']:.3f}", row["label"]]))
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


def export(arguments=None):
    """`psla-export`: makes the folder of a tagger from a run.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2 if the command line or the run is wrong.

    Example
    -------
    >>> export(["nowhere", "--out", "tagger"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser("psla-export", description="Makes a tagger's folder, with a model card, from a training run.")
    parser.add_argument("run", metavar="RUN", help="the run's output folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument(
        "--weights", default="average", metavar="WHICH", help="average, best, last or an epoch's number (default: %(default)s)"
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too: waveform in, probabilities out")
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.weights not in ("average", "best", "last") and not options.weights.isdecimal():
        parser.error(f"--weights must be average, best, last or the number of an epoch, not {options.weights}")
    from psla_sb.errors import InputError
    from psla_sb.model_card import export_run

    try:
        export_run(options.run, options.out, options.weights, options.onnx, trusted(options))
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out} FILE...")


def demo(arguments=None):
    """`psla-demo`: serves a page that tags sounds.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2 if the command line or the model is wrong.

    Example
    -------
    >>> demo(["--model", "nowhere"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser("psla-demo", description="Serves a page: drop or record a sound, see its tags and timeline.")
    add_model(parser)
    parser.add_argument("--examples", metavar="FOLDER", help="sound files that the page offers")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    options = parser.parse_args(arguments)
    if options.model is None:
        parser.error(NO_MODEL)
    if not os.path.exists(options.model):
        parser.error(f"--model {options.model}: no such file or folder")
    _check_device(parser, options.device)
    from psla_sb.demo import example_files, launch
    from psla_sb.errors import InputError
    from psla_sb.inference import AudioTagger

    try:
        examples = example_files(options.examples) if options.examples else ()
        tagger = AudioTagger.from_any(options.model, options.labels, trusted(options), run_opts={"device": options.device})
        launch(tagger, options.model, examples, options.host, options.port, options.open)
    except InputError as error:
        parser.error(str(error))


def _check_device(parser, device):
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} cannot be used: {error}")


def pack(arguments=None):
    """`psla-pack`: puts the clips of an annotation into few large files, or verifies such files.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 1 if damage was found or packing was interrupted, 2 if the command line or the input is wrong.

    Example
    -------
    >>> pack(["nowhere.csv", "--out", "packs"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser(
        "psla-pack",
        description="Puts the clips of an annotation, as they are, into few large tar files, and writes the annotation of these.",
        epilog=PACK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("annotation", nargs="?", metavar="ANNOTATION", help="a CSV file (ID,wav,duration,labels)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="FOLDER", help="where to write the packs and their annotation, of the same name")
    what.add_argument("--verify", metavar="FOLDER", help="read all packed clips there again, and compare their checksums")
    parser.add_argument("--data-folder", metavar="FOLDER", help="what {data_root} in the annotation stands for")
    parser.add_argument("--shard-size", type=float, default=1000, metavar="MB", help="of a pack at most (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="files that are read at a time (default: %(default)s)")
    parser.add_argument("--leave-out", action="store_true", help="leave out, and list, clips whose file is missing")
    options = parser.parse_args(arguments)
    if (options.annotation is None) == (options.out is not None):
        parser.error("give an annotation and --out FOLDER to pack, or --verify FOLDER alone")
    if not 1e-6 <= options.shard_size <= 1e12 or options.workers < 1:
        parser.error("--shard-size must be above 0, --workers 1 or more")
    from psla_sb.dataio import packing, packs
    from psla_sb.errors import InputError

    try:
        if options.out:
            size = round(options.shard_size * 1e6)
            packed = packing.pack(options.annotation, options.out, options.data_folder, size, options.workers, options.leave_out)
            print(f"{packed} is written. Its {{data_root}} is {options.out}. Verify it: psla-pack --verify {options.out}")
            return
        n_clips, damages = packs.verify(options.verify, options.workers)
    except (InputError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
    for annotation, clip, problem in damages:
        print(f"error: {annotation}, clip '{clip}': {problem}" if clip else f"error: {annotation}: {problem}", file=sys.stderr)
    if damages:
        sys.exit(f"{len(damages)} problems with {n_clips} clips. Delete the damaged packs, and pack the annotations again.")
    print(f"{n_clips} clips, all as they were packed.")


def import_checkpoint(arguments=None):
    """`psla-import`: makes the folder of a tagger from a checkpoint of the published code.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2 if the command line or a file is wrong.

    Example
    -------
    >>> import_checkpoint(["model.pth", "--labels", "nowhere.csv", "--out", "tagger"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    from psla_sb.errors import InputError
    from psla_sb.interop import AUDIOSET_FRAMES, PUBLISHED_PADDING
    from psla_sb.lobes.efficientnet import PADDINGS
    from psla_sb.sources import Published

    parser = argparse.ArgumentParser("psla-import", description="Turns a PSLA checkpoint into the folder of a tagger.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file of the published code")
    parser.add_argument("--labels", required=True, metavar="CSV", help="its class list, such as class_labels_indices.csv")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        default=PUBLISHED_PADDING,
        help="symmetric: trained with efficientnet-pytorch 0.7.0, as official models; tensorflow: 0.7.1 (default: %(default)s)",
    )
    parser.add_argument(
        "--n-frames",
        type=int,
        default=AUDIOSET_FRAMES,
        metavar="N",
        help="frames that it was trained on; 3000 for FSD50K (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.n_frames < 1:
        parser.error("--n-frames must be 1 or more")
    try:
        Published(options.checkpoint, options.labels, options.padding, options.n_frames).export(options.out)
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out} FILE...")
