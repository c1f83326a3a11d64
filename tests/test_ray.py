"""Rows by batches, as Ray Data asks for them; and examples/ray_tagging.py on a cluster, a machine of which goes down."""

import importlib.util
import os
import pickle
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from psla_sb.errors import InputError
from psla_sb.inference.map_batches import ROWS, TagBatches
from psla_sb.inference.rows import name_in_rows
from psla_sb.inference.tagger import AudioTagger
from runs import REPOSITORY

N_FILES = 24


@pytest.fixture(scope="module")
def model(tiny_run):
    return str(tiny_run[0] / "tagger")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Short sounds, a long one, and one that is none."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for i in range(N_FILES):
        seconds = 4 if i == 7 else 0.2 + 0.5 * rng.random()
        soundfile.write(folder / f"ä {i}.wav", 0.1 * rng.standard_normal(round(16000 * seconds)), 16000)
    (folder / "broken.wav").write_text("no sound")
    return sorted(map(str, folder.iterdir()))


def alike(rows, expected):
    """Other batches change numbers in their last digits, and nothing else."""
    assert len(rows) == len(expected)
    for one, other in zip(rows, expected, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            if key in ("scores", "embedding", "score", "probability") and value is not None:
                np.testing.assert_allclose(value, other[key], atol=1e-3 if key == "probability" else 1e-5)
            else:
                assert value == other[key]


@pytest.mark.parametrize("what", ROWS)
def test_batches_of_paths_and_of_bytes_have_the_rows_of_files(model, files, what):
    expected = [row for rows in ROWS[what](AudioTagger.from_folder(model)).of_files(files) for row in rows]
    assert len({row["file"] for row in expected}) == N_FILES + 1
    assert sum(row["error"] is not None for row in expected) == 1
    # what a worker is sent
    made, arguments = pickle.loads(pickle.dumps((TagBatches, {"source": model, "what": what, "batch_size": 5})))
    tell = made(**arguments)
    contents = np.empty(len(files), object)
    contents[:] = [Path(file).read_bytes() for file in files]
    for batch in ({"path": np.array(files)}, {"bytes": contents, "path": np.array(files, object)}):
        table = tell(batch)
        assert table.schema.equals(tell.rows.schema, check_metadata=True)
        alike(table.to_pylist(), expected)
    assert tell({"path": np.array([], object)}).schema.equals(tell.rows.schema)


def test_options_names_of_any_bytes_and_processes_that_decode(model, files, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xe9.wav")
    with open(name, "wb") as copy:
        copy.write(Path(files[1]).read_bytes())
    rows = TagBatches(model, top_k=2, num_workers=2)({"path": [name, files[2]]}).to_pylist()
    assert [row["file"] for row in rows] == [name_in_rows(os.fsdecode(name))] * 2 + [files[2]] * 2


def test_batches_without_sounds_and_rows_that_there_are_not_are_refused(model):
    with pytest.raises(InputError, match="has a column path, and may have bytes; this one has: item, id"):
        TagBatches(model)({"item": [], "id": []})
    with pytest.raises(ValueError, match="what must be one of tags, timeline, events, scores, embeddings, not 'tag'"):
        TagBatches(model, "tag")


def pipeline():
    pytest.importorskip("ray")
    spec = importlib.util.spec_from_file_location("ray_tagging", REPOSITORY / "examples" / "ray_tagging.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_in(folder):
    """Of each file, in the files' order; of one file they follow each other in one table."""
    rows = [row for table in folder.glob("*.parquet") for row in pq.read_table(table).to_pylist()]
    return sorted(rows, key=lambda row: row["file"])


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two machines, which are processes here."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # workers import what this process does, and compute alike
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # by default they run when nothing else does
    monkeypatch.setenv("RAY_worker_niceness", "0")
    machine = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=machine)
    cluster.other = cluster.add_node(**machine)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_machine_of_the_cluster_goes_down(model, files, cluster, tmp_path, monkeypatch):
    import ray

    example, notes = pipeline(), tmp_path / "notes"
    notes.mkdir()
    other = cluster.other.node_id

    class Noted(TagBatches):
        """Notes which machine has a batch in work, and waits in the second one of the other machine until that is killed."""

        def __call__(self, batch):
            here = ray.get_runtime_context().get_node_id()
            (notes / f"{here} {time.time_ns()}").touch()
            # until both are at work
            for _ in range(1200):
                if here == other or list(notes.glob(f"{other} *")):
                    break
                time.sleep(0.1)
            if len(list(notes.glob(f"{other} *"))) > 1 and here == other:
                (notes / "kill").touch()
                time.sleep(600)
            return super().__call__(batch)

    def kill():
        while not (notes / "kill").exists():
            time.sleep(0.05)
        cluster.remove_node(cluster.other, allow_graceful=False)

    monkeypatch.setattr(example, "TagBatches", Noted)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    out = tmp_path / "tags"
    settings = {"what": "tags", "concurrency": 2, "batch_size": 4, "block": 2, "gpus": 0, "address": cluster.address}
    example.tag_all(Namespace(sounds=str(Path(files[0]).parent), model=model, out=str(out), **settings))
    assert (notes / "kill").exists()
    killer.join()
    assert len(ray.nodes()) == 2
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    by = [note.name.split()[0] for note in notes.glob("* *")]
    # of 13 batches, the other machine had begun two, of which one at least was begun anew
    assert by.count(other) == 2
    assert len(by) > 13
    expected = [row for rows in ROWS["tags"](AudioTagger.from_folder(model)).of_files(files) for row in rows]
    alike(rows_in(out), expected)
