"""The parts of an experiment that need no run."""

import logging
import platform
import subprocess
import sys

import numpy as np
import pytest

from psla_sb.experiment.train import check_weight_file, train_batches
from psla_sb.labels.label_sets import LabelSets

WEIGHTS = np.array([145.43105297320756, 101.1179013620293, 315.81146550357835])


@pytest.fixture
def write(tmp_path):
    """Writes the weight file of the annotation that it returns."""

    def write_weights(text):
        (tmp_path / "train_weight.csv").write_text(text)
        return tmp_path / "train.json"

    return write_weights


def lines(weights):
    return "".join(f"{weight:.18e}\n" for weight in weights)


@pytest.mark.parametrize("scale", [1.0, 1 + 0.9e-6, 1 - 0.9e-6])
def test_published_weights_that_agree_pass_in_silence(write, caplog, scale):
    check_weight_file(write(lines(WEIGHTS * scale)), WEIGHTS)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(WEIGHTS * [1, 1 + 1.2e-6, 1]), "differs in 1 of 3 weights"),
        (lines(WEIGHTS * 2), "differs in 3 of 3 weights"),
        ("145.43105297320756\nnan\n315.81146550357835\n", "differs in 1 of 3 weights"),
        (lines(WEIGHTS[:2]), "has 2 weights for 3 clips"),
        (lines(WEIGHTS[:1]), "has 1 weights for 3 clips"),
        ("weight\n1\n2\n", "is not one number a line"),
    ],
)
def test_published_weights_that_differ_warn(write, caplog, text, message):
    check_weight_file(str(write(text)), WEIGHTS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"train_weight.csv {message}" in caplog.text
    assert "not used: training draws with the weights computed from the labels" in caplog.text


def test_weights_beside_another_annotation_do_not_matter(write, caplog, tmp_path):
    write("nonsense")
    check_weight_file(tmp_path / "train.csv", WEIGHTS)
    check_weight_file(tmp_path / "other.json", WEIGHTS)
    assert not caplog.records


@pytest.mark.parametrize("balanced", [True, False])
def test_balanced_training_checks_the_file_and_draws_with_its_own_weights(write, caplog, balanced):
    labels = LabelSets.from_lists([[0], [1]])
    hparams = {
        "balanced_sampling": balanced,
        "train_annotation": str(write("1\n0\n")),
        "n_classes": 2,
        "class_weight_offset": 0.01,
        "draws_per_epoch": 100,
        "replacement": True,
        "seed": 1,
        "batch_size": 100,
        "mixup_rate": 0,
    }
    if not balanced:
        hparams["draws_per_epoch"] = None
    batch = next(iter(train_batches(hparams, labels)))
    assert ("differs in 2 of 2 weights" in caplog.text) == balanced
    assert len({draw[0] if isinstance(draw, tuple) else draw for draw in batch}) == 2


FAULTS = """
import resource, sys
import torch
from psla_sb.experiment import launch

def job(file, run_opts, overrides):
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # a small block may have taken a piece of what was freed: then the next large one needs more, once
    print(min(faults[1:]))

launch.main(sys.argv[1], job, [sys.argv[1]])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_on_a_cpu_memory_that_is_freed_is_kept(tmp_path):
    """It would come from the system again in 16,384 pages of 4 kB."""
    (tmp_path / "a.yaml").write_text("")
    done = subprocess.run([sys.executable, "-c", FAULTS, str(tmp_path / "a.yaml")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
