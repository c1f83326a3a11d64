"""Serves a tagger over HTTP: `MODEL=results/mini/1/tagger uvicorn --app-dir examples serve:app`, and then
`curl --data-binary @sound.wav localhost:8000/tag?top_k=3`. Sounds that come together are tagged together.

Needs `pip install fastapi uvicorn`. Limits are in the environment: see below.
"""

import asyncio
import contextlib
import io
import os

from fastapi import FastAPI, HTTPException, Request

from psla_sb.dataio.audio import duration
from psla_sb.errors import InputError
from psla_sb.inference import AudioTagger

LIMITS = {"MAX_MB": 50.0, "MAX_MINUTES": 60.0, "TIMEOUT": 60.0, "BATCH": 16, "WAITING": 256}  # of a sound; seconds; sounds
MAX_MB, MAX_MINUTES, TIMEOUT, BATCH, WAITING = (type(value)(os.environ.get(key, value)) for key, value in LIMITS.items())
tagger = AudioTagger.from_any(os.environ["MODEL"], device=os.environ.get("DEVICE", "cpu"))


@contextlib.asynccontextmanager
async def working(app):
    app.state.waiting = asyncio.Queue(WAITING)
    worker = asyncio.create_task(work(app.state.waiting))
    yield
    worker.cancel()


async def work(waiting):
    while True:
        batch = [await waiting.get()]
        while len(batch) < BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        # whoever has given up is not waited for
        batch = [(sound, answer) for sound, answer in batch if not answer.done()]
        try:
            found = await asyncio.to_thread(answers_of, [sound for sound, _ in batch])
        except Exception as error:
            found = [error] * len(batch)
        for (_, answer), one in zip(batch, found, strict=True):
            if not answer.done():
                answer.set_exception(one) if isinstance(one, Exception) else answer.set_result(one)


def answers_of(sounds):
    return list(tagger.tag_files(sounds, batch_size=BATCH, top_k=len(tagger.labels), progress=False))


app = FastAPI(title="Audio tagger", lifespan=working)


@app.post("/tag")
async def tag(request: Request, top_k: int = 5):
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_MB * 2**20:
            raise HTTPException(413, f"a sound may have {MAX_MB:g} MB")
    answer = asyncio.get_running_loop().create_future()
    try:
        if await asyncio.wait_for(asyncio.to_thread(duration, io.BytesIO(body)), TIMEOUT) > 60 * MAX_MINUTES:
            raise HTTPException(413, f"a sound may last {MAX_MINUTES:g} minutes")
        app.state.waiting.put_nowait((io.BytesIO(body), answer))
        found = await asyncio.wait_for(answer, TIMEOUT)
    except InputError as error:
        raise HTTPException(400, str(error)) from None
    except asyncio.QueueFull:
        raise HTTPException(503, "too many sounds are waiting", {"Retry-After": "5"}) from None
    except asyncio.TimeoutError:
        raise HTTPException(504, f"not done within {TIMEOUT:g} s") from None
    if found.error:
        raise HTTPException(400, found.error)
    return {"tags": [one._asdict() for one in found.tags[: max(1, top_k)]]}
