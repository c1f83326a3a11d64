"""examples/serve.py: sounds that come together share batches, limits hold, and threads do not disturb each other."""

import asyncio
import importlib.util
import io
import threading
import time

import numpy as np
import pytest
import soundfile

from psla_sb.inference.tagger import AudioTagger
from runs import REPOSITORY, free_port


@pytest.fixture(scope="module")
def model(lively_runs):
    return AudioTagger.from_experiment(lively_runs / "a")


@pytest.fixture(scope="module")
def sounds():
    """WAV files of several lengths, in memory."""
    rng, files = np.random.default_rng(0), []
    for seconds in (0.2, 0.5, 0.9, 4.0):
        file = io.BytesIO()
        soundfile.write(
            file, np.linspace(0, 0.5, int(16000 * seconds)) * rng.standard_normal(int(16000 * seconds)), 16000, format="WAV"
        )
        files.append(file.getvalue())
    return files


def serve(lively_runs, monkeypatch, **limits):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("MODEL", str(lively_runs / "a"))
    for name, value in limits.items():
        monkeypatch.setenv(name, str(value))
    spec = importlib.util.spec_from_file_location("serve", REPOSITORY / "examples" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(module, bodies, **parameters):
    """The answers to requests that are all made at once."""
    httpx = pytest.importorskip("httpx")

    async def together():
        transport = httpx.ASGITransport(app=module.app)
        async with (
            module.working(module.app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client,
        ):
            return await asyncio.gather(*(client.post("/tag", content=body, params=parameters) for body in bodies))

    return asyncio.run(together())


def assert_right(answers, bodies, model):
    for answer, body in zip(answers, bodies, strict=True):
        assert answer.status_code == 200, answer.text
        found = {tag["mid"]: tag["score"] for tag in answer.json()["tags"]}
        expected = {tag.mid: tag.score for tag in model.tag_file(io.BytesIO(body), top_k=39)}
        assert found == pytest.approx(expected, abs=1e-4)


def test_requests_share_batches(lively_runs, model, sounds, monkeypatch):
    module, batches = serve(lively_runs, monkeypatch, BATCH=8), []
    answers_of = module.answers_of
    monkeypatch.setattr(module, "answers_of", lambda batch: (batches.append(len(batch)), answers_of(batch))[1])
    bodies = [sounds[i % 4] for i in range(12)]
    assert_right(ask(module, bodies, top_k=39), bodies, model)
    assert sum(batches) == 12
    assert max(batches) > 1


def test_limits_and_broken_sounds(lively_runs, sounds, monkeypatch):
    module = serve(lively_runs, monkeypatch, MAX_MB=0.1, MAX_MINUTES=0.01, WAITING=2)
    broken, long, fine, large = ask(module, [b"no sound", sounds[2], sounds[0], sounds[3]])
    assert (broken.status_code, long.status_code, fine.status_code, large.status_code) == (400, 413, 200, 413)
    assert "cannot be decoded" in broken.json()["detail"]
    assert len(fine.json()["tags"]) == 5
    gate = threading.Event()
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setattr(module, "answers_of", lambda batch: gate.wait(20))
    try:
        statuses = [answer.status_code for answer in ask(module, [sounds[0]] * 8)]
    finally:
        gate.set()
    # one is at work and two wait, all in vain; for others there is no room
    assert sorted(set(statuses)) == [503, 504]


def test_an_error_of_a_batch_is_no_end(lively_runs, sounds, monkeypatch):
    module = serve(lively_runs, monkeypatch)
    monkeypatch.setattr(module, "answers_of", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(module, sounds[:1])
    monkeypatch.undo()
    assert ask(serve(lively_runs, monkeypatch), sounds[:1])[0].status_code == 200


@pytest.mark.slow
def test_sixty_four_clients(lively_runs, model, sounds, monkeypatch):
    uvicorn, httpx = pytest.importorskip("uvicorn"), pytest.importorskip("httpx")
    module, port = serve(lively_runs, monkeypatch), free_port()
    server = uvicorn.Server(uvicorn.Config(module.app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    async def client(first):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as one:
            bodies = [sounds[(first + i) % 4] for i in range(5)]
            return bodies, [await one.post("/tag", content=body, params={"top_k": 39}) for body in bodies]

    async def together():
        return await asyncio.gather(*map(client, range(64)))

    try:
        for bodies, answers in asyncio.run(together()):
            assert_right(answers, bodies, model)
    finally:
        server.should_exit = True
        thread.join()


def test_threads_get_what_one_alone_gets(lively_runs, sounds):
    tagger = AudioTagger.from_experiment(lively_runs / "a")
    expected = [AudioTagger.from_experiment(lively_runs / "a").tag_file(io.BytesIO(body), 39) for body in sounds]
    wrong, start = [], threading.Barrier(8)

    def work(first):
        # all at once, also the first time, when the faster forms are made
        start.wait()
        for i in range(first, first + 8):
            found = {tag.mid: tag.score for tag in tagger.tag_file(io.BytesIO(sounds[i % 4]), 39)}
            if found != pytest.approx({tag.mid: tag.score for tag in expected[i % 4]}, abs=1e-6):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
