"""What one pass over the sound files gains: many members scored together against the same members scored one after another.

Synthetic clips are written first, as FLAC at 44.1 kHz, so that they have to be decoded and resampled as real ones. The members have
random weights, which cost what trained ones do. Run it on an otherwise idle machine; on a busy one, look at the CPU seconds, which
are those of this process without its workers. On a CPU, glibc now and then gives the memory of every batch back to the system and
fetches it again, which takes up to a third of the time and hides the gain: MALLOC_TRIM_THRESHOLD_=4000000000
MALLOC_MMAP_THRESHOLD_=4000000000 in the environment keep it.

    python benchmarks/aggregation.py --variant b0 --clips 64
    python benchmarks/aggregation.py --variant b2 --clips 2000 --device cuda --workers 16 --batch-size 100
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import ruamel.yaml
import soundfile
import torch

from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints.tagger_folder import write_tagger
from psla_sb.dataio.manifest import Manifest
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import n_frames_of
from psla_sb.lobes.pooling import AttentionPooling

TAGGER = """
sample_rate: 16000
compute_features: !new:psla_sb.lobes.features.KaldiFbank {{n_frames: {n_frames}}}
mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder {{variant: {variant}}}
classifier: !new:psla_sb.lobes.pooling.AttentionPooling {{in_channels: {channels}, n_classes: {n_classes}}}
"""


def write_members(folder, options, vocabulary):
    """Members by name."""
    members = {f"member_{i + 1}": folder / f"member_{i + 1}" for i in range(options.members)}
    for path in members.values():
        encoder = EfficientNetEncoder(options.variant)
        modules = {"embedding_model": encoder, "classifier": AttentionPooling(encoder.out_channels, len(vocabulary))}
        n_frames = n_frames_of(round(options.seconds * 16000))
        text = TAGGER.format(n_frames=n_frames, variant=options.variant, channels=encoder.out_channels, n_classes=len(vocabulary))
        write_tagger(path, ruamel.yaml.YAML().load(text), modules, vocabulary)
    return members


def write_clips(folder, options):
    """Clips of noise that swells and fades."""
    rng, n_samples = np.random.default_rng(0), round(options.seconds * 44100)
    paths = [folder / f"{i}.flac" for i in range(options.clips)]
    for path in paths:
        swell = np.sin(np.linspace(0, rng.uniform(3, 30), n_samples))
        soundfile.write(path, 0.3 * swell * rng.uniform(-1, 1, n_samples), 44100)
    names = [path.stem for path in paths]
    return Manifest.from_columns(names, list(map(str, paths)), [options.seconds] * len(paths), [""] * len(paths))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--variant", default="b2", help="b0 to b7 (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=527, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    options = parser.parse_args()
    vocabulary = Vocabulary(*([f"{prefix}{i}" for i in range(options.classes)] for prefix in ("/m/", "class ")))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        members, manifest = write_members(folder, options, vocabulary), write_clips(folder, options)

        def seconds(what, into):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for group in what:
                run_opts = {"device": options.device}
                score(group, manifest, vocabulary, folder / into, options.batch_size, options.workers, run_opts)
            return time.perf_counter() - begin, time.process_time() - begin_cpu

        # what is slow only the first time: GPU kernels, the file cache
        seconds([{"member_1": members["member_1"]}], "warm")
        together = seconds([members], "together")
        alone = seconds([{name: path} for name, path in members.items()], "alone")
        for name in members:
            np.testing.assert_allclose(*(np.load(folder / into / f"{name}.npy") for into in ("together", "alone")), atol=1e-5)

    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    clips = f"{options.clips} clips of {options.seconds:g} s"
    print(f"{options.members} x {options.variant}, {clips}, {options.workers} workers, {device}")
    for name, (took, cpu) in (("one pass", together), ("one after another", alone)):
        print(f"{name:18} {took:8.1f} s, {cpu:8.1f} CPU s, {options.clips / took:8.2f} clips a second by all members")
    print(f"{alone[0] / together[0]:.2f} times faster in one pass, {alone[1] / together[1]:.2f} by CPU seconds")


if __name__ == "__main__":
    main()
