"""Two processes on the CPU train together, and score as one process does."""

import json
import sys

import numpy as np

from psla_sb.checkpoints import load_weights
from runs import TRAIN, command, run


def test_two_gloo_ranks_train_and_score_like_one_process(mini_data, tmp_path):
    folder = tmp_path / "two"
    # 20 evaluation clips in batches of 6: four batches, the last one short
    settings = {"data_folder": mini_data, "valid_batch_size": 6}
    argv = command(TRAIN, "hparams/mini.yaml", "--distributed_backend=gloo", **settings, output_folder=folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533"]
    run([*launcher, *argv[1:]])
    results = json.loads((folder / "results.json").read_text())
    assert len(results["epochs"]) == 2
    assert np.isfinite(results["epochs"][1]["train_loss"])
    weights = load_weights(folder / "snapshots" / "epoch_02.safetensors")
    assert (
        weights["embedding_model._bn0.num_batches_tracked"] == 2 * 2
    )  # 40 clips: 5 batches of 8, of which each rank trains on 2 an epoch
    two = np.load(folder / "predictions" / "valid_weight_average.npy")
    run(command(TRAIN, "hparams/mini.yaml", "--test_only", **settings, output_folder=folder))
    one = np.load(folder / "predictions" / "valid_weight_average.npy")
    assert one.tobytes() == two.tobytes()
    assert json.loads((folder / "results.json").read_text()) == results
