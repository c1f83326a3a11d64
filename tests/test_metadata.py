"""Official files are taken from the folder, or downloaded and checked; a local server stands for the official one."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from audioset_prepare import prepare_audioset
from psla_sb.errors import InputError
from psla_sb.prepare import official_files as metadata
from psla_sb.prepare.official_files import OFFICIAL, fetch_metadata

CONTENT = b"index,mid,display_name\n0,/m/09x0r,Speech\n"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder whose files are what the official addresses give; their SHA-256 is that of `CONTENT`."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for name in OFFICIAL:
            monkeypatch.setitem(metadata.OFFICIAL, name, (f"{address}/{name}", hashlib.sha256(CONTENT).hexdigest()))
        yield folder
        server.shutdown()


@pytest.mark.parametrize("name", OFFICIAL)
def test_download(name, served, tmp_path):
    (served / name).write_bytes(CONTENT)
    fetch_metadata([tmp_path / name])
    assert (tmp_path / name).read_bytes() == CONTENT


def test_what_is_there_is_used_as_it_is(served, tmp_path):
    (served / "ontology.json").write_bytes(CONTENT)
    (tmp_path / "ontology.json").write_text("the user's own")
    fetch_metadata([tmp_path / "ontology.json"])
    assert (tmp_path / "ontology.json").read_text() == "the user's own"


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("content", [CONTENT + b"0", CONTENT[:10], b""])
def test_another_file_is_not_kept(name, content, served, tmp_path):
    (served / name).write_bytes(content)
    said = rf"not the official {name}: its SHA-256 is .* It was not kept\. Get http.* put it at {tmp_path}"
    with pytest.raises(InputError, match=said):
        fetch_metadata([tmp_path / name])
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_an_address_without_the_file(served, tmp_path):
    with pytest.raises(InputError, match=r"ontology\.json cannot be downloaded: HTTP Error 404.* put it at"):
        fetch_metadata([tmp_path / "ontology.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_offline(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/ontology.json"
    monkeypatch.setitem(metadata.OFFICIAL, "ontology.json", (url, "0"))
    with pytest.raises(InputError) as caught:
        fetch_metadata([tmp_path / "ontology.json"])
    said = str(caught.value)
    assert "Connection refused" in said
    assert said.endswith(f"Get {url} on a machine that can, and put it at {tmp_path / 'ontology.json'}.")


def test_paths_that_cannot_be_fetched(tmp_path):
    with pytest.raises(InputError, match=r"classes\.csv: no such file, and it is none of AudioSet's official ones"):
        fetch_metadata([tmp_path / "classes.csv"])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        fetch_metadata([tmp_path / "nowhere" / "ontology.json"])


def test_official_addresses_and_sums():
    assert all(url.endswith(f"/{name}") for name, (url, _) in OFFICIAL.items())
    assert [len(expected) for _, expected in OFFICIAL.values()] == [64] * 5


def test_preparation_fetches_segment_lists(served, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (served / "eval_segments.csv").write_bytes(CONTENT)
    (served / "balanced_train_segments.csv").write_bytes(CONTENT)
    with pytest.raises(InputError, match="not AudioSet's segment list as published"):
        prepare_audioset(data, tmp_path / "t.csv", ["balanced_train_segments.csv"], tmp_path / "e.csv", ["eval_segments.csv"])
    assert sorted(path.name for path in data.iterdir()) == ["balanced_train_segments.csv", "eval_segments.csv"]
