"""How fast everything is on a GPU: training steps, the recipe, inference and ensembles, with peers in the same run.

Each line goes to a file as soon as it is measured. Needs no network and takes about five minutes, of which two or three are the
compiler's. Peers: `efficientnet_pytorch`, which the published code trains, and timm, if it is installed.

    python benchmarks/gpu.py --out gpu.md
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from aggregation import write_clips, write_members
from efficientnet_pytorch import EfficientNet
from torch import nn

from psla_sb.aggregation.scoring import score
from psla_sb.dataio.dataset import shared_memory
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment import train
from psla_sb.experiment.brain import TaggingBrain, binary_cross_entropy
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.compiled import Compiled
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling

N_CLASSES, N_FRAMES, RATE = 527, 1056, 16000
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "AudioSet" / "train.py"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Ours(nn.Module):
    """Features `[batch, frames, mels]` -> probabilities."""

    def __init__(self, variant, compiled_for=None):
        super().__init__()
        self.encoder = EfficientNetEncoder(variant)
        self.pooling = AttentionPooling(self.encoder.out_channels, N_CLASSES)
        if compiled_for:
            self.encoder = Compiled(self.encoder, compiled_for, dynamic=False)

    def forward(self, feats):
        return self.pooling(self.encoder(feats))


class Package(nn.Module):
    """What the published code trains: `efficientnet_pytorch` and the same pooling."""

    def __init__(self, variant):
        super().__init__()
        self.network = EfficientNet.from_name(f"efficientnet-{variant}", in_channels=1, include_top=False)
        self.pooling = AttentionPooling(EfficientNetEncoder(variant).out_channels, N_CLASSES)

    def forward(self, feats):
        return self.pooling(self.network.extract_features(feats.transpose(1, 2)[:, None].contiguous()))


class Timm(nn.Module):
    """timm's network with its own classifier."""

    def __init__(self, variant):
        super().__init__()
        import timm

        self.network = timm.create_model(f"efficientnet_{variant}", in_chans=1, num_classes=N_CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, feats):
        x = feats.transpose(1, 2)[:, None].contiguous(memory_format=torch.channels_last)
        return self.network(x).float().sigmoid()


class Table:
    """Prints each line, and appends it to a file."""

    def __init__(self, file):
        self.file = file
        Path(file).write_text("")

    def __call__(self, *cells):
        line = " | ".join(["", *map(str, cells), ""]).strip()
        print(line, flush=True)
        with open(self.file, "a") as stream:
            stream.write(f"{line}\n")


def milliseconds(function, repeats):
    """The median of some calls, each waited for; and the mean of as many that are not."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(times), 1e3 * (time.perf_counter() - begun) / repeats


def training_step(model, precision, batch_size):
    """A step of forward, backward and Adam on fixed features."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=5e-7, fused=True)
    scaler = torch.amp.GradScaler(enabled=precision == "fp16")
    feats = torch.randn(batch_size, N_FRAMES, 128, device="cuda")
    targets = (torch.rand(batch_size, N_CLASSES, device="cuda") < 0.005).float()

    def step():
        with torch.autocast("cuda", DTYPES[precision], enabled=precision != "fp32"):
            probabilities = model(feats)
        loss = binary_cross_entropy(probabilities.float().clamp(1e-7, 1 - 1e-7), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_training(table, options):
    """Bare training steps; returns clips a second of the recipe's own, by whether it is compiled."""
    table("training step", "ms, each waited for", "ms, back to back", "clips/s", "peak GiB")
    models = {
        "ours, bf16": lambda: Ours(options.variant),
        "ours, fp16": lambda: Ours(options.variant),
        "ours, fp32 with TF32": lambda: Ours(options.variant),
        "timm, bf16": lambda: Timm(options.variant),
        "efficientnet_pytorch, fp32 with TF32": lambda: Package(options.variant),
        "ours, bf16, compiled": lambda: Ours(options.variant, options.batch_size),
    }
    rates = {}
    for name, make in models.items():
        if "compiled" in name and not options.compile:
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(ImportError):
            model = make().cuda().train()
            step = training_step(model, name.split(", ")[1][:4], options.batch_size)
            begun = time.perf_counter()
            step()
            torch.cuda.synchronize()
            first = time.perf_counter() - begun
            waited, free = milliseconds(step, options.repeats)
            rates[name] = options.batch_size / min(waited, free) * 1e3
            peak = torch.cuda.max_memory_allocated() / 2**30
            table(name, f"{waited:.1f}", f"{free:.1f}", f"{rates[name]:.0f}", f"{peak:.1f}", f"first {first:.0f} s")
            if options.profile and name in options.profile:
                profile(step, table)
            del model, step
    if "timm, bf16" in rates:
        for name in ("ours, bf16", "ours, bf16, compiled"):
            if name in rates:
                table(f"{name}, times timm's", f"{rates[name] / rates['timm, bf16']:.2f}")
    return rates


def profile(step, table):
    """The kernels that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = recorded.key_averages()
    table("", f"{sum(one.self_device_time_total for one in events) / 1e3:.1f} ms of kernels")
    for event in sorted(events, key=lambda one: -one.self_device_time_total)[:40]:
        table("", f"{event.self_device_time_total / 1e3:.3f} ms", f"{event.count} x", event.key[:150])


def _write_flac(path, seed):
    rng = np.random.default_rng(seed)
    swell = np.sin(np.linspace(0, rng.uniform(3, 30), 10 * RATE))
    soundfile.write(path, 0.3 * swell * rng.uniform(-1, 1, 10 * RATE), RATE)


def write_data(folder, n_clips):
    """Clips of 10 s, FLAC, with random labels, and their annotations."""
    vocabulary = Vocabulary(*([f"{prefix}{i}" for i in range(N_CLASSES)] for prefix in ("/m/", "class ")))
    vocabulary.to_csv(folder / "classes.csv")
    paths = [str(folder / f"{i}.flac") for i in range(n_clips)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_flac, paths, range(n_clips), chunksize=16))
    rng = np.random.default_rng(0)
    labels = [";".join(vocabulary.mids[i] for i in rng.integers(N_CLASSES, size=2)) for _ in paths]
    clips = Manifest.from_columns([Path(path).stem for path in paths], paths, [10.0] * n_clips, labels)
    clips.to_csv(folder / "train.csv")
    Manifest(clips.table.slice(0, 50), clips.data_root, clips.source).to_csv(folder / "eval.csv")


def bench_recipe(table, options, rates, folder):
    """Steps of `train.py hparams/psla.yaml`, by the times at which they begin."""
    table("recipe, bf16", "median ms a step", "mean ms a step", "clips/s by the mean", "of the bare step's rate")
    write_data(folder, options.clips)
    fit_batch = TaggingBrain.fit_batch
    for compiled in (False, True) if options.compile else (False,):
        begun = []

        def timed(brain, batch, begun=begun):
            begun.append(time.perf_counter())
            return fit_batch(brain, batch)

        TaggingBrain.fit_batch = timed
        files = {"train_annotation": "train.csv", "valid_annotation": "eval.csv", "class_list": "classes.csv"}
        arguments = [f"--{key}={folder / name}" for key, name in files.items()]
        arguments += [f"--data_folder={folder}", f"--output_folder={folder / f'run_{compiled}'}", "--skip_prep=True"]
        arguments += ["--pretrained=null", f"--variant={options.variant}", f"--num_workers={options.workers}"]
        arguments += [f"--batch_size={options.batch_size}", f"--compile_model={compiled}", "--precision=bf16"]
        steps = options.steps
        arguments += [f"--draws_per_epoch={steps * options.batch_size}", "--number_of_epochs=1", "--device=cuda"]
        sys.path.insert(0, str(RECIPE.parent))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                train.main(str(RECIPE), ["hparams/psla.yaml", *arguments])
        except SystemExit:
            table("the recipe stopped", said.getvalue()[-300:])
        finally:
            TaggingBrain.fit_batch = fit_batch
        # without what the first steps choose and compile, and the workers' start
        times = np.diff(begun)[steps // 3 :] * 1e3
        rate = options.batch_size / times.mean() * 1e3
        bare = rates.get("ours, bf16, compiled" if compiled else "ours, bf16")
        by_median = options.batch_size / np.median(times) * 1e3
        of_bare = f"{rate / bare:.2f} by the mean, {by_median / bare:.2f} by the median" if bare else ""
        table("compiled" if compiled else "eager", f"{np.median(times):.1f}", f"{times.mean():.1f}", f"{rate:.0f}", of_bare)


def tagger(variant, precision):
    """A tagger of random weights."""
    encoder = EfficientNetEncoder(variant)
    parts = KaldiFbank(n_frames=N_FRAMES), GlobalNorm(), encoder, AttentionPooling(encoder.out_channels, N_CLASSES)
    hparams = {"sample_rate": RATE, "mids": [], "label_encoder": None}
    run_opts = {"device": "cuda", "precision": precision}
    return AudioTagger(dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True)), hparams, run_opts=run_opts)


@torch.inference_mode()
def bench_inference(table, options):
    """Feature maps and probabilities of features on the device, and single clips from their waveform."""
    table("inference", "ms a batch", "clips/s")
    feats = torch.randn(options.batch_size, N_FRAMES, 128, device="cuda")
    package = Package(options.variant).cuda().eval()
    for precision in ("bf16", "fp16", "fp32"):
        ours = tagger(options.variant, precision)
        ways = {f"ours, {precision}": lambda ours=ours: ours.tag_features(feats)}
        if precision == "bf16":

            def plain(model=package):
                with torch.autocast("cuda", torch.bfloat16):
                    return model(feats)

            ways["efficientnet_pytorch, bf16"] = plain
            with contextlib.suppress(ImportError):
                peer = Timm(options.variant).cuda().eval()
                ways["timm, bf16"] = lambda peer=peer, plain=plain: plain(peer)
        for name, way in ways.items():
            free = min(milliseconds(way, options.repeats))
            table(name, f"{free:.1f}", f"{options.batch_size / free * 1e3:.0f}")
        small = feats[:16]
        free = min(milliseconds(lambda ours=ours, small=small: ours.tag_features(small), options.repeats))
        table(f"ours, {precision}, batches of 16", f"{free:.2f}", f"{16 / free * 1e3:.0f}")
        wave = torch.randn(1, 10 * RATE) / 10
        waited, _ = milliseconds(lambda ours=ours, wave=wave: ours.score_batch(wave).cpu(), 3 * options.repeats)
        table(f"ours, {precision}, one clip, from its waveform to its scores", f"{waited:.2f}")


def bench_ensemble(table, options, folder):
    """Eight members in one pass over FLAC files, and one after the other."""
    options.classes, options.members, options.seconds = N_CLASSES, 8, 10.0
    options.clips = options.ensemble_clips
    vocabulary = Vocabulary(*([f"{prefix}{i}" for i in range(N_CLASSES)] for prefix in ("/m/", "class ")))
    members, clips = write_members(folder, options, vocabulary), write_clips(folder, options)
    run_opts = {"device": "cuda", "precision": "bf16"}

    def seconds(groups, into):
        begun = time.perf_counter()
        for group in groups:
            score(group, clips, vocabulary, folder / into, 64, options.workers, run_opts)
        return time.perf_counter() - begun

    seconds([{"member_1": members["member_1"]}], "warm")
    together, alone = seconds([members], "together"), seconds([{name: path} for name, path in members.items()], "alone")
    table(f"8 members, {options.clips} clips of 44.1 kHz FLAC: one pass", f"{together:.1f} s")
    table("one after another", f"{alone:.1f} s", f"{alone / together:.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("training", "recipe", "inference", "ensemble")
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--out", default="gpu.md", help="file that gets each line (default: %(default)s)")
    parser.add_argument("--variant", default="b2", help="b0 to b7 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, help="clips a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="calls that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of the recipe (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=1000, help="that the recipe reads (default: %(default)s)")
    parser.add_argument("--ensemble-clips", type=int, default=512, help="that ensembles score (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that read (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled models as well")
    parser.add_argument("--profile", nargs="*", default=[], help="rows of the training table whose kernels are listed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here")
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no such part: {', '.join(unknown)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    table = Table(options.out)
    table(torch.cuda.get_device_name(), f"torch {torch.__version__}", f"{options.variant}, batches of {options.batch_size}")
    rates = {}
    with tempfile.TemporaryDirectory() as temporary, shared_memory():
        folder = Path(temporary)
        for part in options.parts:
            begun = time.perf_counter()
            if part == "training":
                rates = bench_training(table, options)
            elif part == "recipe":
                bench_recipe(table, options, rates, folder)
            elif part == "inference":
                bench_inference(table, options)
            else:
                bench_ensemble(table, options, folder)
            table(f"({part}: {time.perf_counter() - begun:.0f} s)")


if __name__ == "__main__":
    main()
