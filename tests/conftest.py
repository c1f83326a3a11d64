"""Fixtures that several test files share."""

import json
import shutil
import subprocess
import sys

import pytest

from runs import REPOSITORY, TINY, TRAIN, command, run


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory):
    """The folder of the tiny embedded data set; runs that are given it find it written."""
    from psla_sb.prepare.mini_audioset import write_mini_audioset

    folder = tmp_path_factory.mktemp("mini")
    write_mini_audioset(folder, n_train=TINY["n_train"], n_eval=TINY["n_eval"], seconds=TINY["seconds"])
    return folder


@pytest.fixture(scope="session")
def tiny_run(mini_data, tmp_path_factory):
    """The output folder of a finished tiny run, of `results.json` as a dict under the attribute `results`, and its output."""
    folder = tmp_path_factory.mktemp("run")
    done = run(
        command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder, device=None), cwd=folder, fresh=True
    )
    return folder, json.loads((folder / "results.json").read_text()), done


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """A copy of examples/plugin, and where it is installed: where only tests look that ask for it."""
    pytest.importorskip("setuptools")
    source = shutil.copytree(REPOSITORY / "examples" / "plugin", tmp_path_factory.mktemp("plugin") / "source")
    target = source.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    return source, target


@pytest.fixture(scope="session")
def lively_runs(tiny_run, mini_data, tmp_path_factory):
    """Two runs like the tiny one, `a` and `b`, whose models tell clips apart, as after a real training; and `c` with fewer mels."""
    import torch
    import yaml

    from psla_sb.aggregation.averaging import update_batch_norm
    from psla_sb.checkpoints.run_folder import snapshot_path, write_results
    from psla_sb.checkpoints.weights import save_weights, trained_modules
    from psla_sb.dataio.dataset import clip_loader
    from psla_sb.dataio.manifest import Manifest
    from psla_sb.inference.tagger import AudioTagger

    tiny, root = tiny_run[0], tmp_path_factory.mktemp("lively")
    clips = Manifest.from_csv(tiny / "train.csv", mini_data)
    for seed, name in enumerate("abc"):
        run_folder = root / name
        run_folder.mkdir()
        for file in ("class_labels_indices.csv", "train.csv", "eval.csv"):
            (run_folder / file).write_bytes((tiny / file).read_bytes())
        text = (tiny / "hyperparams.yaml").read_text().replace(str(tiny), str(run_folder))
        assert yaml.compose(text) is not None
        (run_folder / "hyperparams.yaml").write_text(text.replace("n_mels: 32", "n_mels: 24") if name == "c" else text)
        (run_folder / "snapshots").mkdir()
        (run_folder / "snapshots" / "epoch_01.safetensors").write_bytes(snapshot_path(tiny, 1).read_bytes())
        tagger = AudioTagger.from_snapshot(run_folder / "snapshots" / "epoch_01.safetensors", run_opts={"device": "cpu"})
        for epoch in (1, 2):
            torch.manual_seed(10 * seed + epoch)
            for parameter in tagger.mods.parameters():
                parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
            batches = [range(start, start + 8) for start in range(0, len(clips), 8)]
            update_batch_norm(tagger.mods, clip_loader(clips, 16000, None, batches))
            save_weights(trained_modules(tagger.mods), snapshot_path(run_folder, epoch))
        save_weights(trained_modules(tagger.mods), run_folder / "snapshots" / "average.safetensors")
        write_results(run_folder, {"epochs": [{"epoch": 1, "mAP": 0.2}, {"epoch": 2, "mAP": 0.1}]})
    return root
