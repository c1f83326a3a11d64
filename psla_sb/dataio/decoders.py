"""Sound files of every format -> blocks of their own samples, the same ones for whoever asks, in one piece or in many.

libsndfile decodes what it counts rightly, FFmpeg's libraries (PyAV) all else. What a file is, its content says, not its name.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch

from psla_sb.dataio.containers import (
    BOXES,
    TAGS,
    AudioError,
    Pcm,
    Window,
    check_end,
    is_mpeg,
    ogg_links,
    pcm_of,
    repaired,
    undecoded,
    untagged,
    warn,
)
from psla_sb.dataio.flac import flac_duration, read_flac

# what soundfile raises for one broken file or another; MemoryError for headers that promise too much
AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, MemoryError)
SOUNDFILE_ERRORS = (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError)
# Demuxers of sound and of films: not those that follow what a file refers to (playlists), nor those that take any text for sound.
DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nut,ogg,"
    "rm,sln,tak,tta,voc,w64,wav,wv,xwma"
)
# whose last packet may be cut: they are recorded and sent as they come
OPEN_ENDED = {"mp3", "aac", "ac3", "eac3", "dts", "amr", "amrnb", "amrwb", "flv", "mpeg", "mpegts", "wav", "caf", "gsm"}
# whose headers say exactly how long they are
EXACT = {"flac", "wv", "tta", "ape", "tak"}


def decoded(path: Any, source: str | io.BytesIO, seconds: float = 10.0) -> Iterator[tuple[int, torch.Tensor]]:
    """Decodes a file, or the bytes of one, in pieces of about so many seconds: sample rates, and `[samples, channels]`.

    They are int16, or float32 whose full scale is 1. An `AudioError` says what is wrong, in the middle of the file as well.
    """
    try:
        flac = read_flac(source)
    except MemoryError as error:
        raise undecoded(path, error) from None
    if flac is not None:
        for block in flac[0].split(max(1, round(seconds * flac[1]))):
            yield flac[1], block
        return
    with _opened(path, source) as (file, _):
        if not isinstance(file, Pcm | soundfile.SoundFile):
            yield from _joined(_frames(path, file), seconds)
            return
        # libsndfile makes the same floats of 16 bits as `as_floats`, in more time
        is_16_bit = isinstance(file, Pcm) or (file.format in ("WAV", "WAVEX", "RF64", "AIFF", "AU") and file.subtype == "PCM_16")
        options = {} if isinstance(file, Pcm) else {"dtype": "int16" if is_16_bit else "float32", "always_2d": True}
        try:
            while len(block := file.read(max(1, round(seconds * file.samplerate)), **options)):
                yield file.samplerate, torch.from_numpy(block)
        except SOUNDFILE_ERRORS as error:
            raise undecoded(path, error) from None


def decoded_segment(
    path: Any, source: str | io.BytesIO, start: float, seconds: float = math.inf
) -> Iterator[tuple[int, torch.Tensor]]:
    """Decodes as `decoded` does, but only what is from `start` on, for so many seconds, or less if the file ends before.

    Of formats that cannot be sought in exactly (MP3, Ogg, AAC and others of FFmpeg's), what is before is decoded, and dropped.
    """
    with _opened(path, source, to_seek=True) as (file, _):
        if isinstance(file, Pcm) or (isinstance(file, soundfile.SoundFile) and file.seekable()):
            first = min(round(start * file.samplerate), file.frames)
            last = file.frames if math.isinf(seconds) else min(round((start + seconds) * file.samplerate), file.frames)
            try:
                file.seek(first)
                of_16_bits = isinstance(file, Pcm) or file.subtype == "PCM_16"
                options = {} if isinstance(file, Pcm) else {"dtype": "int16" if of_16_bits else "float32", "always_2d": True}
                block = file.read(last - first, **options)
            except SOUNDFILE_ERRORS as error:
                raise undecoded(path, error) from None
            yield file.samplerate, torch.from_numpy(block)
            return
    begin = 0.0
    for rate, piece in decoded(path, source):
        first, last = (max(0, round(min(time - begin, len(piece) / rate) * rate)) for time in (start, start + seconds))
        yield rate, piece[first:last]
        begin += len(piece) / rate
        if begin >= start + seconds:
            return


def known_duration(path: Any, source: str | io.BytesIO) -> float | None:
    """The seconds that a header says, None if it would be only an estimate."""
    seconds = flac_duration(source)
    if seconds is None:
        with _opened(path, source) as (_, seconds):
            pass
    return seconds


def duration(path: Any, source: str | io.BytesIO) -> float:
    """Finds out how many seconds of sound a file has; what a header only estimates is counted, by decoding."""
    known = known_duration(path, source)
    return sum(len(block) / rate for rate, block in decoded(path, source)) if known is None else known


@contextlib.contextmanager
def _opened(path: Any, source: str | io.BytesIO, to_seek: bool = False) -> Iterator[tuple[Any, float | None]]:
    """Gives a `Pcm`, the `SoundFile` of what libsndfile counts rightly, or `av` containers, and the seconds if they are known.

    A FLAC file is a `SoundFile` only if it is opened `to_seek` in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = source if isinstance(source, io.BytesIO) else stack.enter_context(open(source, "rb", buffering=0))
            opened = _open(path, file, stack, to_seek)
        except OSError as error:
            raise AudioError(f"{path}: cannot be read ({error.strerror})") from None
        yield opened


def _open(path: Any, file: Any, stack: contextlib.ExitStack, to_seek: bool) -> tuple[Any, float | None]:
    n_bytes, _ = file.seek(0, os.SEEK_END), file.seek(0)
    head = file.read(4096)
    if pcm := pcm_of(path, file, head, n_bytes):
        return pcm, pcm.frames / pcm.samplerate
    begin, end = untagged(file, n_bytes)
    if begin:
        file.seek(begin)
        head = file.read(4096)
    patches, trusted = () if begin else repaired(path, file, head, n_bytes), True
    windows = [Window(file, begin, end, patches)]
    if head[:4] == b"OggS":
        windows = [Window(file, *link) for link in ogg_links(path, file)]
    elif head[4:8] in BOXES or head[:4] == b"\x1aE\xdf\xa3":
        check_end(path, file, head, end)
    elif head[:4] == b"fLaC":
        # `read_flac` has refused it: it is of more bits, longer than it says, or damaged
        sound, refused = _sound_file(windows[0], stack) if to_seek else (None, None)
        if sound is not None:
            return sound, None
    elif not (is_mpeg(head) or head[:4] == b"riff" or any(not any(new) for _, new in patches)):
        sound, refused = _sound_file(windows[0], stack)
        # of GSM's last block it does not know how many samples there are, and of MPEG it estimates how many
        if sound is not None and sound.subtype != "GSM610" and sound.format not in ("RAW", "MP3") and "MPEG" not in sound.subtype:
            return sound, sound.frames / sound.samplerate if sound.seekable() and sound.samplerate else None
    else:
        trusted = False
    try:
        return _containers(windows), None
    except AV_ERRORS as error:
        sound, refused = _sound_file(windows[0], stack)
        if sound is not None and sound.format != "RAW":
            return sound, None
        unknown = not hasattr(refused, "error_string") or not trusted
        raise undecoded(path, getattr(error, "strerror", None) or error if unknown else refused) from None


def _containers(windows: list[Window]) -> Iterator[Any]:
    """Opens what FFmpeg reads, the first one at once."""

    def opened(window: Window) -> Any:
        window.seek(0)
        return av.open(window, container_options={"format_whitelist": DEMUXERS}, metadata_errors="replace")

    return itertools.chain([opened(windows[0])], map(opened, windows[1:]))


def _sound_file(window: Window, stack: contextlib.ExitStack) -> tuple[Any, Exception | None]:
    """What libsndfile opens, or why it does not."""
    try:
        window.seek(0)
        # not by its name, since libsndfile goes by some endings
        return stack.enter_context(soundfile.SoundFile(window)), None
    except SOUNDFILE_ERRORS as error:
        return None, error


def _frames(path: str | Path, containers: Iterator[Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the decoded frames of containers: sample rates, and float32 `[samples, channels]`."""
    try:
        for container in containers:
            with container:
                yield from _frames_of(path, container)
    except AV_ERRORS as error:
        raise error if isinstance(error, AudioError) else undecoded(path, getattr(error, "strerror", None) or error) from None


def _frames_of(path: str | Path, container: Any) -> Iterator[tuple[int, np.ndarray]]:
    stream, name, seconds, clock = container.streams.best("audio"), container.format.name, 0.0, 0.0
    if stream is None or stream.codec_context is None:
        raise AudioError(f"{path}: has no sound in it" + ("" if stream is None else " that can be decoded: its codec is not known"))
    declared = float(stream.duration * stream.time_base) if name in EXACT and stream.duration else 0.0
    if name != "mp3":
        # old encoders wrote wrong checksums, which nobody looked at
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    packets, in_tag = container.demux(stream), False
    failed: Any = None
    while True:
        try:
            packet = next(packets, None)
        except AV_ERRORS as error:
            if declared and seconds >= declared - 0.1:
                # something else behind the sound
                break
            raise _damaged(path, seconds, error) from None
        if packet is None:
            break
        try:
            frames = packet.decode()
        except AV_ERRORS as error:
            in_tag = in_tag or any(tag in bytes(packet) for tag in TAGS[:4])
            failed = None if in_tag else error
            continue
        if failed is not None and frames:
            # what failed was not at the end
            raise _damaged(path, seconds, failed)
        in_tag = in_tag and not frames
        if packet.is_corrupt and name not in ("mpegts", "mpeg"):
            failed = "a packet is cut off"
        for frame in frames:
            samples = _floats(frame)
            if not frame.sample_rate:
                raise _damaged(path, seconds, "a sample rate of 0")
            if name == "flac" and frame.time is not None:
                if frame.time > clock + 0.01:
                    raise _damaged(path, seconds, f"{frame.time - clock:.2f} s are missing")
                clock = frame.time
            seconds, clock = seconds + len(samples) / frame.sample_rate, clock + len(samples) / frame.sample_rate
            yield frame.sample_rate, samples
    if failed is not None:
        if name not in OPEN_ENDED:
            raise _damaged(path, seconds, failed)
        warn(f"{path}: what is behind its first {seconds:.2f} s cannot be decoded ({failed}), and is not heard")
    if seconds < declared - 0.1:
        raise undecoded(path, f"damaged, or ends early: {seconds:.2f} of {declared:.2f} s are there")


def _damaged(path: str | Path, seconds: float, error: Any) -> AudioError:
    return undecoded(path, f"damaged {seconds:.2f} s after its start: {getattr(error, 'strerror', None) or error}")


def _floats(frame: Any) -> np.ndarray:
    if frame.format.name.startswith("s64"):
        (frame,) = av.AudioResampler("dbl").resample(frame)
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / 2.0 ** (8 * samples.itemsize - 1)).astype(np.float32)
    return samples.astype(np.float32, copy=False)


def _joined(frames: Iterator[tuple[int, np.ndarray]], seconds: float) -> Iterator[tuple[int, torch.Tensor]]:
    """Joins frames of one kind to pieces of so many seconds at least; of a container of several streams, the kind may change."""
    kind, waiting, n_samples = None, list[np.ndarray](), 0
    for rate, samples in frames:
        if kind is not None and (kind != (rate, samples.shape[1]) or n_samples >= seconds * rate):
            yield kind[0], torch.from_numpy(np.concatenate(waiting))
            waiting, n_samples = [], 0
        kind = rate, samples.shape[1]
        waiting.append(samples)
        n_samples += len(samples)
    if kind is not None:
        yield kind[0], torch.from_numpy(np.concatenate(waiting))
