"""Fixtures that several test files share."""

import json

import pytest

from runs import TINY, TRAIN, command, run


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory):
    """The folder of the tiny embedded data set; runs that are given it find it written."""
    from psla_sb.dataio.mini import write_mini_audioset

    folder = tmp_path_factory.mktemp("mini")
    write_mini_audioset(folder, n_train=TINY["n_train"], n_eval=TINY["n_eval"], seconds=TINY["seconds"])
    return folder


@pytest.fixture(scope="session")
def tiny_run(mini_data, tmp_path_factory):
    """The output folder of a finished tiny run, of `results.json` as a dict under the attribute `results`, and its output."""
    folder = tmp_path_factory.mktemp("run")
    done = run(command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder), cwd=folder)
    return folder, json.loads((folder / "results.json").read_text()), done
