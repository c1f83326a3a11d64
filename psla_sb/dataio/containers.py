"""What the containers of sound files say of themselves: which files are sound, which end early, which headers say too little."""

import functools
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from speechbrain.utils.logger import get_logger

from psla_sb.errors import InputError

logger = get_logger(__name__)

TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"Xing", b"Info")
# of W64's IDs
GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
# ID -> where chunks begin, the size of their IDs, the layout of their lengths, the chunk with the samples, the chunks' alignment
CHUNKED = {
    b"RIFF": (12, 4, "<I", b"data", 2),
    b"RIFX": (12, 4, ">I", b"data", 2),
    b"RF64": (12, 4, "<I", b"data", 2),
    b"BW64": (12, 4, "<I", b"data", 2),
    b"FORM": (12, 4, ">I", b"SSND", 2),
    b"caff": (8, 4, ">q", b"data", 1),
    b"riff": (40, 16, "<q", b"data" + GUID, 8),
}
# chunks that are found behind the samples, whatever length they claim
KNOWN_CHUNKS = {
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"bext", b"fact", b"cue ", b"smpl", b"iXML", b"JUNK", b"junk", b"PAD ", b"inst", b"acid"),
    *(b"axml", b"chna", b"PEAK", b"afsp", b"DISP", b"plst", b"labl", b"SAUR", b"minf", b"elm1", b"regn", b"umid", b"FLLR", b"levl"),
    *(b"MARK", b"COMT", b"NAME", b"AUTH", b"ANNO", b"INST", b"APPL", b"CHAN", b"info", b"pakt", b"free", b"uuid", b"strg", b"mark"),
}
ZEROS = bytes(2**20)
FIRST_CHUNKS = (b"RIFF", b"RIFX", b"FORM", b"riff", b"caff", b".snd")
BOXES = (
    *(b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"sidx", b"styp", b"mfra", b"udta", b"meta", b"uuid", b"pnot"),
)
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
SOUNDS = (
    *(b"fLaC", b"OggS", b"ID3", b".snd", b"caff", b"riff", b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"wvpk", b"TTA1", b"MAC "),
    *(b"#!AMR", b"\x0bw", b"FLV\x01", b"tBaK", b"MPCK", b"MP+", b"Creative Voice File", b".RMF", b"DSD ", b"nut/multimedia"),
    b"\0\0\x01\xba",
)
ENDINGS = {
    *(".wav", ".wave", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".ogv", ".opus", ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac"),
    *(".webm", ".mka", ".mkv", ".wma", ".wmv", ".avi", ".ts", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
    *(".wv", ".tta", ".ape", ".amr", ".3gp", ".ac3", ".voc", ".dsf"),
}
IMAGES = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")


class AudioError(InputError):
    """Says which sound file cannot be used, and why."""


def is_sound(path: str | Path) -> bool:
    """Tells by its first bytes whether a file is sound, or a film, which may have some; it may still be damaged.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "notes"
    >>> soundfile.write(path, [0.0], 16000, format="AU")
    >>> is_sound(path)
    True
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM"):
        return head[8:12] in (b"WAVE", b"AIFF", b"AIFC", b"8SVX", b"AVI ")
    if head[4:8] in BOXES:
        return head[4:8] != b"ftyp" or head[8:12] not in IMAGES
    is_transport_stream = head[:1] == b"G" and head[188:189] == b"G"
    return is_transport_stream or is_mpeg(head) or head.startswith(SOUNDS)


def is_mpeg(head: bytes) -> bool:
    """Says whether a frame of MPEG audio, or of AAC, begins here."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] not in (0xFE, 0xFF)


def sounds_in(folder: str | Path) -> list[str]:
    """Lists all sounds in a folder and in those below it, by what they are or by their endings, which broken ones have as well."""
    files = sorted(path for path in map(str, Path(folder).rglob("*")) if os.path.isfile(path))
    return [path for path in files if os.path.splitext(path)[1].lower() in ENDINGS or is_sound(path)]


def undecoded(path: str | Path, error: Any) -> AudioError:
    return AudioError(f"{path}: cannot be decoded as sound ({getattr(error, 'error_string', error)})")


@functools.lru_cache(maxsize=4096)
def warn(text: str) -> None:
    """Logs a warning, the first time."""
    logger.warning(text)


class Window:
    """A part of a file as a file, in which some bytes may read as others; without a name, which libraries would go by.

    Arguments
    ---------
    begin, end
        In bytes.
    patches
        What reads otherwise: positions in the file, and bytes.
    """

    def __init__(self, file: Any, begin: int, end: int, patches: Sequence[tuple[int, bytes]] = ()) -> None:
        self.file, self.begin, self.end, self.patches = file, begin, end, patches
        # its own, since files refuse positions that others take
        self.position = begin

    def tell(self) -> int:
        """Gives the position in the window."""
        return self.position - self.begin

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a position; one before the window's beginning is ignored, since libsndfile would not hear of an error."""
        target = offset + (self.begin, self.position, self.end)[whence]
        if target >= self.begin:
            self.position = target
        return self.tell()

    def read(self, n_bytes: int = -1) -> bytes:
        """Reads up to so many bytes, or all."""
        start, left = self.position, max(0, self.end - self.position)
        if not left:
            return b""
        self.file.seek(start)
        data = self.file.read(left if n_bytes < 0 else min(n_bytes, left))
        self.position += len(data)
        for position, new in self.patches:
            first, last = max(position, start), min(position + len(new), start + len(data))
            if first < last:
                data = data[: first - start] + new[first - position : last - position] + data[last - start :]
        return data


def untagged(file: Any, n_bytes: int) -> tuple[int, int]:
    """Where a file begins and ends without ID3 and APE tags, which may be large, and which not every demuxer knows."""
    begin, end, last = 0, n_bytes, None
    file.seek(0)
    while (head := file.read(10))[:3] == b"ID3" and len(head) == 10:
        size = sum(byte % 128 << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
        begin += 10 + size + (10 if head[5] & 16 else 0)
        file.seek(begin)
    while end != last and end > begin + 128:
        last = end
        file.seek(end - 128)
        tail = file.read(128)
        if tail[:3] == b"TAG":
            end -= 128
        elif tail[96:104] == b"APETAGEX":
            size, _, flags = struct.unpack("<III", tail[108:120])
            end -= size + (32 if flags >> 31 else 0)
    return (begin, end) if begin < end else (0, n_bytes)


def ogg_links(path: str | Path, file: Any) -> list[tuple[int, int]]:
    """Where the links of a chained Ogg file begin and end, mostly of one.

    Refuses files with damaged or missing pages, or without the end of a stream: FFmpeg goes over all of these in silence.
    """
    position, begin, links, expected, n_pages = 0, 0, [], dict[bytes, int](), 0
    file.seek(0)
    while (header := file.read(27))[:4] == b"OggS":
        table = file.read(header[26]) if len(header) == 27 else b""
        body = file.read(sum(table))
        if len(header) < 27 or len(table) < header[26] or len(body) < sum(table):
            raise undecoded(path, f"ends early, in page {n_pages + 1} of its Ogg stream")
        flags, serial, (number, crc) = header[5], header[14:18], struct.unpack("<II", header[18:26])
        # Ogg's checksum is zlib's with the bits in the other order, and begins with zeros
        page = (header[:22] + bytes(4) + header[26:] + table + body).translate(REVERSED_BITS)
        if int(f"{zlib.crc32(page, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2) != crc:
            raise undecoded(path, f"damaged: the checksum of page {n_pages + 1} of its Ogg stream is wrong")
        n_pages += 1
        if flags & 2:
            if not expected and position > begin:
                links.append((begin, position))
                begin = position
            expected[serial] = number
        # what was taken from a broadcast has the first pages, and goes on anywhere
        if number > expected.get(serial, number) > 3:
            raise undecoded(path, f"damaged: {number - expected[serial]} pages before page {n_pages} of its Ogg stream are missing")
        position += 27 + len(table) + len(body)
        expected[serial] = number + 1
        if flags & 4:
            del expected[serial]
    if expected and header:
        raise undecoded(path, f"damaged: there is no page where page {n_pages + 1} of its Ogg stream should be")
    if expected:
        raise undecoded(path, "ends early: its Ogg stream has no last page")
    return [*links, (begin, position)]


def check_end(path: str | Path, file: Any, head: bytes, n_bytes: int) -> None:
    """Refuses MP4 and Matroska files whose last part, by its length, does not end with the file."""
    position = 0
    if head[4:8] in BOXES:
        while position + 8 <= n_bytes:
            file.seek(position)
            size, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            size = large if size == 1 else size or n_bytes - position
            if kind == b"ftyp" and position:
                warn(f"{path}: another file follows at byte {position}, which is not heard")
                return
            if size < 8 or kind not in BOXES:
                # something else behind the last box
                return
            position += size
    else:
        # EBML's header, then the segment: IDs and lengths say by their leading zeros how many bytes they have
        for n_id in (4, 4):
            file.seek(position + n_id)
            length = file.read(8)
            width = 9 - length[0].bit_length() if length and length[0] else 9
            value = int.from_bytes(length[:width], "big") & (2 ** (7 * min(width, 8)) - 1)
            if width > 8 or value == 2 ** (7 * width) - 1:
                return
            position += n_id + width + value
    if position > n_bytes:
        raise undecoded(path, f"ends early: {position - n_bytes} of its {position} bytes are missing")


class Pcm:
    """The samples of a plain WAV file of 16 bits, which no library need decode.

    Arguments
    ---------
    file
        What they are read from.
    begin, length
        Where they are, in bytes.
    channels, samplerate
        As the header says.
    """

    def __init__(self, file: Any, begin: int, length: int, channels: int, samplerate: int) -> None:
        self.file, self.channels, self.samplerate = file, channels, samplerate
        self.frames = self.left = length // (2 * channels)
        file.seek(begin)

    def seek(self, n_samples: int) -> None:
        """Goes on from there on; it is called once, before anything is read."""
        self.left = self.frames - n_samples
        self.file.seek(2 * self.channels * n_samples, os.SEEK_CUR)

    def read(self, n_samples: int) -> np.ndarray:
        """Gives the next samples, int16 `[n_samples or fewer, channels]`."""
        samples = np.empty((min(n_samples, self.left), self.channels), "<i2")
        self.left -= len(samples)
        if self.file.readinto(samples) < samples.nbytes:
            raise OSError("the file became shorter while it was read")
        return samples


def pcm_of(path: str | Path, file: Any, head: bytes, n_bytes: int) -> Pcm | None:
    """Finds the samples of a plain WAV file of 16 bits, whatever length its header says; None for any other file."""
    position, channels, rate = 12, 0, 0
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    while position + 8 <= len(head):
        name, length = struct.unpack("<4sI", head[position : position + 8])
        position += 8
        if name == b"fmt " and length >= 16 and position + length <= len(head):
            code, channels, rate, _, align, bits = struct.unpack("<HHIIHH", head[position : position + 16])
            if code == 0xFFFE and length >= 26:
                (code,) = struct.unpack("<H", head[position + 24 : position + 26])
            if code != 1 or bits != 16 or align != 2 * channels or not (channels and rate):
                return None
        elif name == b"data":
            length = _true_length(path, file, head, position, length, n_bytes)
            return Pcm(file, position, length, channels, rate) if channels else None
        position += length + length % 2
    return None


def repaired(path: str | Path, file: Any, head: bytes, n_bytes: int) -> Sequence[tuple[int, bytes]]:
    """Finds headers that say of how many bytes the sound is, and say too little: patches with which they say the truth."""
    if head[:4] == b".snd" and len(head) >= 12:
        begin, declared = struct.unpack(">II", head[4:12])
        place, layout, offset = 8, ">I", 0
    elif head[:4] in CHUNKED and (found := _sound_chunk(file, head, n_bytes)):
        place, layout, offset, begin, declared = found
    else:
        return ()
    length = _true_length(path, file, head, begin, declared, n_bytes)
    # 0 for what does not fit: FFmpeg reads on to the end
    largest = 2 ** (8 * struct.calcsize(layout)) // 2
    # what programs write to a pipe, libraries know, but for W64 and CAF
    known = length < largest and layout not in ("<q", ">q") if _is_unknown(declared) else length <= declared
    if known:
        return ()
    patches = [(place, struct.pack(layout, length + offset if length + offset < largest else 0))]
    return [*patches, (16, struct.pack("<q", n_bytes))] if head[:4] == b"riff" else patches


def _true_length(path: str | Path, file: Any, head: bytes, begin: int, declared: int, n_bytes: int) -> int:
    """How many bytes of sound there are: as many as the header says, if chunks, or nothing, follow; or else all."""
    there = n_bytes - begin
    if _is_unknown(declared):
        return there
    if declared > there:
        warn(f"{path}: ends early: {there} of {declared} bytes of sound are there, and are used")
        return there
    align = CHUNKED.get(head[:4], (0, 0, "", b"", 1))[-1]
    # some programs leave out the byte that fills an odd chunk up
    ends = {begin + declared + -declared % align, begin + declared}
    if declared == there or any(end >= n_bytes or _are_chunks(path, file, end, n_bytes, head) for end in ends):
        return declared
    warn(f"{path}: its header says that there are {declared} bytes of sound; all {there} that are there are used")
    return there


def _is_unknown(length: int) -> bool:
    """Says whether a length is one that programs write to a pipe, where they cannot come back to say how long it is."""
    return length < 0 or length >= 2**62 or 0 <= length - 0x7FFFF000 <= 0x1000 or 0 <= length - 0xFFFFF000 < 0x1000


def _sound_chunk(file: Any, head: bytes, n_bytes: int) -> tuple[int, str, int, int, int] | None:
    """Where the length of the sound is, its layout, what is counted besides, where the sound begins, and its length in bytes."""
    position, n_id, layout, sound, align = CHUNKED[head[:4]]
    width = struct.calcsize(layout)
    # W64 counts the header of a chunk as well
    offset = n_id + width if n_id == 16 else 0
    while position + n_id + width <= n_bytes:
        file.seek(position)
        name, data = file.read(n_id), file.read(width)
        length = struct.unpack(layout, data)[0] - offset
        begin = position + n_id + width
        if name == sound:
            if head[:4] in (b"RF64", b"BW64") and length == 0xFFFFFFFF and head[12:16] == b"ds64" and len(head) >= 36:
                return 28, "<Q", 0, begin, struct.unpack("<Q", head[28:36])[0]
            return position + n_id, layout, offset, begin, length
        if length < 0:
            return None
        position = begin + length + -length % align
    return None


def _are_chunks(path: str | Path, file: Any, position: int, n_bytes: int, head: bytes) -> bool:
    """Says whether chunks, tags or zeros, and no samples, are from a position to the end of the file."""
    if head[:4] not in CHUNKED:
        return False
    _, n_id, layout, _, align = CHUNKED[head[:4]]
    width = struct.calcsize(layout)
    while position < n_bytes:
        file.seek(position)
        start = file.read(4096)
        if start.startswith(FIRST_CHUNKS):
            warn(f"{path}: another file follows at byte {position}, which is not heard")
            return True
        if start.startswith(TAGS) or start[:4] in KNOWN_CHUNKS:
            return True
        if not any(start):
            return all(piece == ZEROS[: len(piece)] for piece in iter(lambda: file.read(len(ZEROS)), b""))
        if len(start) < n_id + width or not all(32 <= byte < 127 for byte in start[:4]):
            return False
        length = struct.unpack(layout, start[n_id : n_id + width])[0] - (n_id + width if n_id == 16 else 0)
        position += n_id + width + length + -length % align
        if length < 0 or position > n_bytes + align:
            return False
    return True
