"""Time, peak memory and onsets of `AudioTagger.tag_timeline` on generated recordings whose events are known.

Events of the embedded data set's classes, 2 s each, in faint noise; each recording is tagged in a process of its own. Needs a
tagger that knows these classes, as `make demo` trains: `python benchmarks/timeline.py results/mini/1/tagger`. An ensemble of
several seeds is more exact; `recipes/AudioSet/aggregate.py` writes one with `--members=average --export=True`.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from psla_sb.prepare.mini_sounds import synthesise

RATE, EVERY, LENGTH = 16000, 10.0, 2.0


def write_recording(path, minutes, names, seed=0):
    """Writes a recording piece by piece; returns its events as (label, start)."""
    rng, known = np.random.default_rng(seed), []
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for piece in range(int(minutes * 60 / EVERY)):
            wave = rng.normal(0, 0.003, int(EVERY * RATE))
            start = int(rng.uniform(1, EVERY - LENGTH - 1) * RATE)
            name = names[piece % len(names)]
            wave[start : start + int(LENGTH * RATE)] += 0.5 * synthesise(name, rng, int(LENGTH * RATE), RATE)
            file.write(wave)
            known.append((name, piece * EVERY + start / RATE))
    return known


def measure(model, path, known, hop, threshold, queue):
    """Puts seconds, peak memory in MB, and the errors of the onsets in seconds, infinite for events that were not found."""
    from psla_sb.inference.tagger import AudioTagger

    tagger = AudioTagger.from_folder(model, run_opts={"device": "cpu"})
    begin = time.perf_counter()
    timeline = tagger.tag_timeline(path, hop=hop)
    took = time.perf_counter() - begin
    found = tagger.events(timeline, threshold)
    errors = []
    for label, start in known:
        near = [abs(event.start - start) for event in found if event.label == label and abs(event.start - start) < LENGTH]
        errors.append(min(near, default=float("inf")))
    queue.put((took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, errors))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a tagger")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 60], help="lengths of the recordings (default: 1 60)")
    parser.add_argument("--hop", type=float, default=1.0, help="seconds from a window to the next (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, help="of an event (default: %(default)s)")
    parser.add_argument(
        "--classes", nargs="+", default=["Drum", "Church bell", "Dial tone", "Chirp, tweet"], help="whose events are put in"
    )
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for minutes in options.minutes:
            path, queue = Path(folder) / "recording.wav", context.Queue()
            known = write_recording(path, minutes, options.classes)
            process = context.Process(target=measure, args=(options.model, path, known, options.hop, options.threshold, queue))
            process.start()
            took, peak, errors = queue.get()
            process.join()
            found, within = np.isfinite(errors).mean(), np.mean(np.array(errors) <= 0.5)
            print(f"{minutes:g} min: {took:.1f} s, peak {peak:.0f} MB, {len(known)} events, {found:.0%} of them found")
            print(f"onsets within 0.5 s: {within:.0%}")
            by_class = {
                name: round(float(np.mean([e <= 0.5 for (label, _), e in zip(known, errors, strict=True) if label == name])), 2)
                for name in dict.fromkeys(label for label, _ in known)
            }
            print(json.dumps(by_class))


if __name__ == "__main__":
    main()
