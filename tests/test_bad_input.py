"""Bad input of many kinds ends in a clear error or the right answer: never a crash, never a score that is no number."""

import io
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger


@pytest.fixture(scope="module")
def tagger(tiny_run):
    return AudioTagger.from_folder(tiny_run[0] / "tagger")


def wav(rate=16000, channels=1, bits=16, code=1, data=b"\0\1" * 8000, data_size=None, riff=b"RIFF", fmt_size=16, align=None):
    """The bytes of a WAV file, every field as wanted."""
    align = channels * bits // 8 if align is None else align
    header = struct.pack("<HHIIHH", code, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    size = len(data) if data_size is None else data_size
    return (
        riff
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<I", fmt_size)
        + header
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def flac_of_many():
    """The bytes of a FLAC file of half a second whose header has the highest number of samples."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000), 16000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21:26] = bytes([content[21] | 15]) + b"\xff" * 4
    return bytes(content)


FLOATS = np.zeros(8000, "<f4")
HEADERS = {
    "nothing": b"",
    "one byte": b"R",
    "text": b"no sound at all",
    "zeros": bytes(5000),
    "header alone": wav()[:44],
    "half a header": wav()[:20],
    "no data chunk": wav()[:36],
    "empty data": wav(data=b""),
    "one byte of data": wav(data=b"\0"),
    "one sample": wav(data=b"\0\1"),
    "data size too large": wav(data_size=2**31),
    "data size of four GB": wav(data_size=2**32 - 1),
    "data size zero": wav(data_size=0),
    "odd data": wav(data=b"\0\1" * 4000 + b"\0"),
    "rate 0": wav(rate=0),
    "rate 1": wav(rate=1),
    "rate 999": wav(rate=999),
    "rate 1000": wav(rate=1000),
    "rate 44101": wav(rate=44101),
    "rate of a prime": wav(rate=15991),
    "rate of a million": wav(rate=1_000_000),
    "rate of 2 GHz": wav(rate=2**31 - 1),
    "rate of 4 GHz": wav(rate=2**32 - 1),
    "no channels": wav(channels=0, align=0),
    "200 channels": wav(channels=200),
    "65535 channels": wav(channels=65535, align=2),
    "0 bits": wav(bits=0, align=0),
    "7 bits": wav(bits=7, align=1),
    "8 bits": wav(bits=8),
    "24 bits": wav(bits=24, data=b"\0\0\1" * 5000),
    "64 bits of integers": wav(bits=64),
    "unknown codec": wav(code=0x1234),
    "float samples": wav(code=3, bits=32, data=FLOATS.tobytes()),
    "NaN samples": wav(code=3, bits=32, data=np.full(8000, np.nan, "<f4").tobytes()),
    "one NaN after what the model hears": wav(
        code=3, bits=32, data=np.append(np.zeros(50_000, "<f4"), np.float32("nan")).tobytes()
    ),
    "infinite samples": wav(code=3, bits=32, data=np.full(8000, np.inf, "<f4").tobytes()),
    "samples of 1e38": wav(code=3, bits=32, data=np.tile(np.array([1e38, -1e38], "<f4"), 4000).tobytes()),
    "samples of 1e-40": wav(code=3, bits=32, data=np.tile(np.array([1e-40, -1e-40], "<f4"), 4000).tobytes()),
    "doubles of 1e300": wav(code=3, bits=64, data=np.tile(np.array([1e300, -1e300], "<f8"), 4000).tobytes()),
    "RIFX": wav(riff=b"RIFX"),
    "RF64": wav(riff=b"RF64"),
    "fmt chunk too long": wav(fmt_size=60_000),
    "fmt chunk too short": wav(fmt_size=2),
    "a FLAC that begins only": b"fLaC" + bytes(100),
    "a FLAC of 2^36 samples by its header": flac_of_many(),
    "an Ogg that begins only": b"OggS" + bytes(100),
    "an MP3 that begins only": b"\xff\xfb\x90\x64" + bytes(100),
    "an ID3 tag alone": b"ID3\x04\0\0\0\0\0\0",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def scores_or_refusal(answer):
    """Scores, which are in [0, 1], or None and the message of the error; any other exception is a failure."""
    try:
        scores = answer()
    except InputError as error:
        return None, str(error)
    assert all(0 <= score <= 1 for score in scores)
    return scores, None


def assert_answered_or_refused(tagger, path):
    """Every entry point gives scores in [0, 1], or an error that names the file; they agree on which."""
    outcomes = []
    for answer in (
        lambda: [tag.score for tag in tagger.tag_file(path, top_k=39)],
        lambda: tagger.classify_file(path)[0].flatten().tolist(),
        lambda: tagger.tag_timeline(path).scores.ravel().tolist(),
    ):
        scores, refusal = scores_or_refusal(answer)
        assert refusal.startswith(f"{path}: ") if scores is None else scores
        outcomes.append(scores is not None)
    (found,) = tagger.tag_files([path])
    assert (found.tags is not None) == (found.error is None) == outcomes[0]
    assert len(set(outcomes)) == 1, outcomes


@pytest.mark.parametrize("name", HEADERS)
def test_headers_lengths_and_samples(tagger, name, tmp_path):
    path = tmp_path / "bad.wav"
    path.write_bytes(HEADERS[name])
    assert_answered_or_refused(tagger, path)


@pytest.mark.parametrize("name", ["float samples", "rate 1000", "rate 44101", "200 channels", "8 bits", "24 bits", "one sample"])
def test_what_is_only_unusual_is_tagged(tagger, name, tmp_path):
    path = tmp_path / "unusual.wav"
    path.write_bytes(HEADERS[name])
    assert len(tagger.tag_file(path)) == 5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files(tagger, data):
    """Whole files of three kinds, with some bytes changed or the end cut off."""
    kind, subtype = data.draw(st.sampled_from([("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS")]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"damaged.{kind}"
        soundfile.write(path, np.sin(np.arange(4000) / 5), 16000, subtype=subtype)
        content = bytearray(path.read_bytes())
        for position, value in data.draw(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6)):
            content[position % len(content)] = value
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        scores, refusal = scores_or_refusal(lambda: [tag.score for tag in tagger.tag_file(path)])
        assert refusal.startswith(f"{path}: ") if scores is None else len(scores) == 5


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wavs", "wav_lens"),
    [
        (torch.zeros(0), None),
        (torch.zeros(2, 0), None),
        (torch.zeros(1, 1, 8000), None),
        (torch.zeros(()), None),
        (torch.zeros(1, 8000, dtype=torch.int16), None),
        (torch.zeros(1, 8000, dtype=torch.int64), None),
        (torch.zeros(1, 8000, dtype=torch.bool), None),
        (torch.zeros(1, 8000, dtype=torch.complex64), None),
        (torch.full((1, 8000), NAN), None),
        (torch.cat([torch.zeros(1, 50_000), torch.full((1, 1), NAN)], 1), None),
        (torch.full((1, 8000), INF), None),
        (1e30 * torch.randn(1, 8000), None),
        (torch.zeros(2, 8000), torch.ones(3)),
        (torch.zeros(2, 8000), torch.ones(2, 1)),
        (torch.zeros(2, 8000), torch.tensor([1.0, 0.0])),
        (torch.zeros(2, 8000), torch.tensor([1.0, -0.5])),
        (torch.zeros(2, 8000), torch.tensor([1.0, 1.5])),
        (torch.zeros(2, 8000), torch.tensor([1.0, NAN])),
        (torch.zeros(2, 8000), torch.tensor([8000, 4000])),
    ],
)
def test_tensors_that_are_refused(tagger, wavs, wav_lens):
    for method in (tagger.score_batch, tagger.classify_batch, tagger.encode_batch, tagger.scene_embeddings):
        with pytest.raises(ValueError, match=r"waveforms|wav_lens"):
            method(wavs, wav_lens)


@pytest.mark.parametrize(
    "wavs",
    [
        torch.zeros(8000),
        torch.zeros(1, 1),
        torch.zeros(1, 399),
        torch.ones(3, 8000),
        torch.zeros(1, 500_000),
        torch.randn(1, 8000, dtype=torch.float64),
        torch.randn(1, 8000).half(),
        torch.randn(1, 8000).bfloat16(),
        torch.randn(8000, 2).T,
        torch.randn(1, 16000)[:, ::2],
        torch.randn(1, 8000, requires_grad=True),
        np.zeros((2, 8000), np.float32),
        1e-40 * torch.randn(1, 8000),
        100 * torch.randn(1, 8000),
    ],
    ids=lambda wavs: f"{wavs.dtype} {list(wavs.shape)}",
)
def test_tensors_that_are_tagged(tagger, wavs):
    scores = tagger.score_batch(wavs)
    assert scores.shape == (1 if wavs.ndim == 1 else len(wavs), 39)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert torch.isfinite(tagger.scene_embeddings(wavs)).all()
    assert torch.isfinite(tagger.timestamp_embeddings(wavs)[0]).all()
