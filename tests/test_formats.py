"""Sounds as people have them: every format, lengths that no header says, damaged files, and the same samples on every path."""

import io
import itertools
import logging
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from sounds import FORMATS, LOSSLESS, encoded, tones

from psla_sb.dataio.audio import AudioError, duration, read_audio, read_blocks, read_if_short, to_waveform
from psla_sb.dataio.containers import is_sound, sounds_in, warn
from psla_sb.errors import InputError
from psla_sb.lobes.features import KaldiFbank

# which codecs add at the ends: a packet's worth
ADDED = {"mp3": 0.12, "mp2": 0.06, "aac": 0.1, "m4a": 0.1, "mov": 0.1, "mka": 0.1, "wma": 0.1, "amr": 0.05, "ima": 0.05}


def all_paths(data, rate=16000):
    """What every path makes of a file: the samples, in one piece, in pieces, as a short clip, and the seconds; or an error each."""
    paths = {
        "whole": lambda file: read_audio(file, rate),
        "pieces": lambda file: torch.cat(list(read_blocks(file, rate, seconds=0.7))),
        "short": lambda file: read_if_short(file, rate, 10**8)[0],
        "seconds": lambda file: range(round(duration(file) * rate)),
    }
    answers = {}
    for name, read in paths.items():
        try:
            answers[name] = read(io.BytesIO(data))
        except AudioError:
            answers[name] = None
    return answers


def heard(data, rate=16000):
    """The samples, if all paths agree on them; None if all refuse the file."""
    answers = all_paths(data, rate)
    if answers["whole"] is None:
        # the length of a damaged file may be known
        assert answers["pieces"] is None
        assert answers["short"] is None
        return None
    whole = answers["whole"]
    # torchaudio computes lengths in float32
    assert max(abs(len(answers[name]) - len(whole)) for name in ("pieces", "short")) <= 1
    shortest = min(len(whole), len(answers["pieces"]))
    torch.testing.assert_close(answers["pieces"][:shortest], whole[:shortest], atol=1e-5, rtol=1e-5)
    # a FLAC file's header is believed, also if another file follows
    assert data.startswith(b"fLaC") or abs(len(answers["seconds"]) - len(whole)) <= 2 + len(whole) // 1000
    return whole


def similarity(wave, expected):
    """The highest correlation of two signals at any lag of up to 0.1 s, of the parts that both have."""
    lags = np.fft.irfft(np.fft.rfft(wave, 2**19) * np.conj(np.fft.rfft(expected, 2**19)))
    return np.concatenate([lags[:4000], lags[-4000:]]).max() / np.sqrt((wave**2).sum() * (expected**2).sum())


# the headers of MP4 are written at the end, so it cannot be written to a pipe; AMR is mono
CANNOT = {("m4a", "pipe"), ("mov", "pipe"), ("alac", "pipe"), ("amr", "stereo")}


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in itertools.product(FORMATS, ["file", "pipe", "stereo"]) if pair not in CANNOT]
)
def test_all_of_every_format(name, kind):
    rate = FORMATS[name][2]
    seconds = 2.5
    wave = tones(rate, seconds)
    found = heard(encoded(name, wave, channels=2 if kind == "stereo" else 1, pipe=kind == "pipe"), rate).numpy()
    if name in LOSSLESS:
        # FFmpeg counts what fills a W64 file's last 8 bytes
        assert len(found) - len(wave) in ((0, 1, 2, 3) if name == "w64" else (0,))
        np.testing.assert_allclose(found[: len(wave)], wave, atol=0.005)  # some encoders take 8 bits by default
    else:
        # FFmpeg's WMA encoder leaves out what does not fill a packet
        assert (-0.05 if name == "wma" else -0.01) <= len(found) / rate - seconds <= ADDED.get(name, 0.06)
        assert similarity(found, wave) > (0.8 if name == "amr" else 0.97)


def test_an_mp3_without_its_length_is_heard_whole():
    wave = tones(44100, 16.0)
    for options in ({"write_xing": "0"}, {}):
        data = encoded("mp3", wave, container_options=options)
        assert heard(data).shape[0] / 16000 == pytest.approx(16, abs=0.1)
    xing = data.index(b"Info") if b"Info" in data else data.index(b"Xing")
    for n_frames in (0, 20, 2**31):
        changed = bytearray(data)
        changed[xing + 8 : xing + 12] = struct.pack(">I", n_frames)
        assert heard(bytes(changed)).shape[0] / 16000 == pytest.approx(16, abs=0.1), n_frames


@pytest.mark.parametrize("name", ["mp3", "opus", "oggflac", "vorbis", "flac", "aac"])
def test_several_streams_one_after_the_other(name):
    rate = FORMATS[name][2]
    first, second = tones(rate, 2.0), tones(rate, 1.0, (700.0,))
    found = heard(encoded(name, first) + encoded(name, second), rate)
    assert len(found) / rate == pytest.approx(3.0, abs=0.2)
    assert similarity(found[: 2 * rate].numpy(), first) > 0.95
    assert similarity(found[-rate:].numpy(), second) > 0.9


def test_streams_of_other_rates_and_channels():
    data = encoded("oggflac", tones(44100, 2.0)) + encoded("oggflac", tones(22050, 1.0), rate=22050, channels=2)
    assert len(heard(data)) / 16000 == pytest.approx(3.0, abs=0.01)


def wav(header_says, n_samples=8000, after=b"", riff=b"RIFF", riff_says=None):
    file = io.BytesIO()
    wave = np.sin(np.arange(n_samples) / 5) / 2
    soundfile.write(file, wave, 16000, format="WAV", subtype="PCM_16", endian="BIG" if riff == b"RIFX" else "LITTLE")
    data = bytearray(file.getvalue())
    place = data.index(b"data") + 4
    order = ">I" if riff == b"RIFX" else "<I"
    assert data[:4] == riff
    data[place : place + 4] = struct.pack(order, header_says)
    if riff_says is not None:
        data[4:8] = struct.pack(order, riff_says)
    return bytes(data) + after, wave


@pytest.mark.parametrize("riff", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize("says", [(0, 0), (0, None), (4000, 4036), (4000, None), (2**32 - 1, 2**32 - 1), (2**31 - 1, None)])
def test_a_wav_whose_recorder_crashed(says, riff, caplog):
    warn.cache_clear()
    data, wave = wav(says[0], riff=riff, riff_says=says[1])
    np.testing.assert_allclose(heard(data), wave, atol=1e-4)
    warned = [record for record in caplog.records if "all 16000 that are there" in record.getMessage()]
    # what programs write to a pipe is no fault
    assert bool(warned) == (says[0] < 16000)


@pytest.mark.parametrize("container", ["RF64", "AIFF", "AU", "CAF", "WAVEX"])
@pytest.mark.parametrize("says", [0, 4000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_sisters_of_that_wav(container, says, subtype):
    file = io.BytesIO()
    wave = np.sin(np.arange(8000) / 5) / 2
    soundfile.write(file, wave, 16000, format=container, subtype=subtype)
    data = bytearray(file.getvalue())
    place, layout = {
        "RF64": (28, "<Q"),
        "AIFF": (data.index(b"SSND") + 4 if b"SSND" in data else 0, ">I"),
        "AU": (8, ">I"),
        "CAF": (data.index(b"data") + 4 if b"data" in data else 0, ">Q"),
        "WAVEX": (data.index(b"data") + 4 if b"data" in data else 0, "<I"),
    }[container]
    data[place : place + struct.calcsize(layout)] = struct.pack(layout, says)
    np.testing.assert_allclose(heard(bytes(data)), wave, atol=1e-4)


@pytest.mark.parametrize("after", [b"LIST\x04\0\0\0abcd", b"id3 \x05\0\0\0abcde\0", b"TAG" + b"a" * 125, bytes(500)])
def test_what_follows_the_sound_is_not_heard(after):
    data, wave = wav(16000, after=after)
    assert len(heard(data)) == len(wave)


def test_a_wav_that_just_ends(caplog):
    warn.cache_clear()
    data, wave = wav(16000)
    np.testing.assert_allclose(heard(data[:-5000]), wave[:5500], atol=1e-4)
    assert "11000 of 16000 bytes" in caplog.text


@pytest.mark.parametrize("name", ["mp3", "aac", "ac3", "amr"])
def test_streams_that_just_end(name):
    rate = FORMATS[name][2]
    data = encoded(name, tones(rate, 3.0))
    found = heard(data[: len(data) * 2 // 3])
    assert len(found) / 16000 == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("name", ["flac", "opus", "vorbis", "oggflac", "m4a", "mov", "alac", "wv", "tta", "mka", "webm"])
@pytest.mark.parametrize("share", [0.3, 0.65, 0.97])
def test_files_that_end_early_are_refused(name, share):
    data = encoded(name, tones(FORMATS[name][2], 3.0))
    assert heard(data[: int(len(data) * share)]) is None


@pytest.mark.parametrize("name", ["flac", "opus", "vorbis", "oggflac", "wv", "tta"])
def test_damage_in_the_middle_is_refused(name):
    data = bytearray(encoded(name, tones(FORMATS[name][2], 3.0)))
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    assert heard(bytes(data)) is None


def test_a_flac_of_unknown_length():
    data = bytearray(encoded("flac", tones(44100, 6.0)))
    assert int.from_bytes(data[21:26], "big") % 2**36 == 6 * 44100
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert duration(io.BytesIO(data)) == 6.0
    assert len(heard(bytes(data))) == 96000


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "IMA_ADPCM", "MS_ADPCM", "ULAW", "ALAW"])
def test_codecs_in_wav(subtype):
    file = io.BytesIO()
    soundfile.write(file, tones(8000, 2.0), 8000, format="WAV", subtype=subtype)
    found = heard(file.getvalue(), 8000)
    assert len(found) == pytest.approx(16000, abs=400)
    assert similarity(found.numpy(), tones(8000, 2.0)) > 0.95


def test_contents_count_and_not_endings(tmp_path):
    data = {name: encoded(name, tones(FORMATS[name][2], 1.0)) for name in ("m4a", "webm", "mp3", "wav", "aiff", "opus")}
    names = {"a.mp3": "m4a", "b.wav": "webm", "c": "mp3", "d.WAVE": "wav", "e.aiff": "aiff", "f.bin": "opus"}
    for name, kind in names.items():
        (tmp_path / name).write_bytes(data[kind])
        assert duration(tmp_path / name) == pytest.approx(1.0, abs=0.1)
        assert is_sound(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no sound")
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(100))
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "x.webp").write_bytes(b"RIFF\x10\0\0\0WEBPVP8 " + bytes(100))
    (tmp_path / "broken.wma").write_text("no sound, but it should be")
    assert [os.path.basename(path) for path in sounds_in(tmp_path)] == sorted([*names, "broken.wma"])


def test_playlists_and_films_without_sound(tmp_path):
    (tmp_path / "list.wav").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "list2.wav").write_text("ffconcat version 1.0\nfile a.wav\n")
    for name in ("list.wav", "list2.wav"):
        with pytest.raises(AudioError, match="cannot be decoded"):
            read_audio(tmp_path / name)
    import av

    with av.open(str(tmp_path / "silent.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        film.mux(stream.encode(None))
    with pytest.raises(AudioError, match=r"silent\.mp4: has no sound in it"):
        read_audio(tmp_path / "silent.mp4")


def test_file_objects_and_names_of_any_bytes(tmp_path):
    for name in (b"latin-\xe9.wav", b"line\nbreak.flac", b"-dash.m4a"):
        kind = name.decode("latin-1").partition(".")[2]
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        with open(path, "wb") as file:
            file.write(encoded(kind, tones(44100, 1.0)))
        assert len(read_audio(path)) == pytest.approx(16000, abs=800)
        with open(path, "rb") as file:
            assert torch.equal(read_audio(file), read_audio(path))
    with pytest.raises(AudioError, match="the sound: cannot be decoded"):
        read_audio(io.BytesIO(b"no sound"))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", ["mono", "columns", "rows"])
def test_arrays(dtype, shape):
    wave = tones(44100, 1.0)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        array = wave.astype(dtype)
    else:
        array = (wave * (2 ** (8 * kind.itemsize - 1) - 1) + (128 if kind.kind == "u" else 0)).round().astype(dtype)
    array = {"mono": array, "columns": np.stack([array, array], 1), "rows": np.stack([array, array])}[shape]
    expected = to_waveform(torch.from_numpy(wave), 44100)
    np.testing.assert_allclose(to_waveform(array, 44100), expected, atol=0.02 if kind.itemsize == 1 else 1e-4)


def test_arrays_that_are_no_sound():
    for array in (np.zeros((2, 3, 4)), np.zeros(0), np.array(["a"]), np.zeros(9, bool), np.array([1.0, np.nan])):
        with pytest.raises(InputError):
            to_waveform(array, 16000)
    with pytest.raises(InputError, match="sample rate of 10 Hz"):
        to_waveform(np.zeros(9), 10)
    with pytest.raises(InputError, match=r"far outside of \[-1, 1\].*up to 1\.2e\+04; divide"):
        to_waveform(np.array([0.0, 12000.0]), 16000)


def test_float_wavs_of_integers_scale(tmp_path, caplog):
    warn.cache_clear()
    soundfile.write(tmp_path / "a.wav", tones(16000, 1.0) * 2**15, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: .*far outside of \[-1, 1\]"):
        read_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "quiet.wav", tones(16000, 1.0) * 300, 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        read_audio(tmp_path / "quiet.wav")
    assert "quiet.wav: samples far outside" in caplog.text


# measured levels in dB: with torchaudio's own settings 7.5 kHz loses 3.7, and 8.2 kHz comes back at -8
RESPONSE = [(7000, -0.1, 0.1), (7400, -0.5, 0.1), *((hz, -999, -60) for hz in (8200, 8500, 9000, 10000, 12000))]


@pytest.mark.parametrize(
    ("rate", "hz", "least", "most"),
    [(rate, *level) for rate in (44100, 48000, 32000, 22050) for level in RESPONSE if level[0] < rate / 2],
)
def test_the_resamplers_response(rate, hz, least, most):
    wave = np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate)
    middle = to_waveform(wave, rate)[4000:-4000].numpy()
    level = 10 * np.log10(2 * (middle**2).mean() + 1e-20)
    assert least <= level <= most


def damaged(rng, files):
    """A file with some bytes changed, its end cut off, something put into it, or half of another behind it."""
    name = str(rng.choice(list(files)))
    data = bytearray(files[name])
    kind = rng.integers(5)
    if kind == 0:
        data = data[: rng.integers(len(data) + 1)]
    elif kind in (1, 2):
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data) if kind == 1 else min(len(data), 300))] = rng.integers(256)
    elif kind == 3:
        place = rng.integers(len(data))
        data[place : place + rng.integers(1, 2000)] = rng.integers(0, 256, rng.integers(0, 2000)).astype(np.uint8).tobytes()
    else:
        other = files[str(rng.choice(list(files)))]
        data = data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]
    return name, bytes(data)


@pytest.mark.parametrize(
    ("seed", "n_files"), [(0, 200), *(pytest.param(seed, 4000, marks=pytest.mark.slow) for seed in range(1, 7))]
)
def test_damaged_files_of_every_format(seed, n_files, tmp_path, caplog):
    """No crash, no hang, nothing but AudioErrors, and no difference between the paths."""
    caplog.set_level(logging.CRITICAL)
    files = {name: encoded(name, tones(FORMATS[name][2], 1.5)) for name in FORMATS}
    rng = np.random.default_rng(seed)
    for number in range(n_files):
        name, data = damaged(rng, files)
        path = tmp_path / f"a.{rng.choice(['wav', 'mp3', 'flac', 'au', 'm4a', 'ogg', 'raw', 'txt'])}"
        path.write_bytes(data)
        try:
            found = heard(data)
            if found is None:
                with pytest.raises(AudioError):
                    read_audio(path)
            else:
                assert torch.equal(read_audio(path), found)
        except Exception as error:
            raise AssertionError(f"file {number}, {name}: {error}") from error


def test_silence_within_a_crashed_recording_is_no_padding():
    wave = np.concatenate([np.ones(4000), np.zeros(6000), np.ones(6000)]) / 4
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", 8000)
    assert len(heard(bytes(data))) == 16000


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("after", [b"LIST\x06\0\0\0INFOab", b"id3 \xff\0\0\0abc", b"LIST\x02\0\0\0ab\0"])
def test_odd_chunks_without_their_last_byte_and_chunks_of_a_wrong_length(subtype, after):
    file = io.BytesIO()
    soundfile.write(file, tones(16000, 0.5)[:7999], 16000, format="WAV", subtype=subtype)
    data = file.getvalue()
    length = struct.unpack("<I", data[data.index(b"data") + 4 :][:4])[0]
    data = data[: data.index(b"data") + 8 + length]
    assert len(heard(data + after)) == 7999
    assert len(heard(data + bytes(length % 2) + after)) == 7999


def test_an_empty_wav_with_a_list_behind_it_has_no_samples():
    data, _ = wav(0, n_samples=0, after=b"LIST\x06\0\0\0INFOab")
    with pytest.raises(AudioError, match="has no samples"):
        read_audio(io.BytesIO(data))


@pytest.mark.parametrize("says", [2**32 - 1, 0, 5_000_000_000 % 2**32])
def test_a_wav_of_more_than_four_gigabytes(says, tmp_path):
    data, _ = wav(says)
    path = tmp_path / "large.wav"
    path.write_bytes(data)
    os.truncate(path, 44 + 5_000_000_000)  # a file with a hole takes no room
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\0")
    assert duration(path) == 5_000_000_000 / 2 / 16000


@pytest.mark.parametrize("name", ["opus", "vorbis", "oggflac"])
def test_a_missing_page(name):
    data = encoded(name, tones(FORMATS[name][2], 20.0))
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    assert len(pages) > 6
    assert heard(b"".join(pages)) is not None
    assert heard(b"".join(pages[:5] + pages[6:])) is None
    assert heard(b"".join(pages[:-1])) is None


@pytest.mark.parametrize(
    ("first", "second"), [("opus", "vorbis"), ("oggflac", "opus"), ("vorbis", "vorbis"), ("opus", "opus"), ("vorbis", "oggflac")]
)
def test_chained_ogg_of_other_kinds(first, second):
    one = encoded(first, tones(FORMATS[first][2], 2.0))
    other = encoded(second, tones(FORMATS[second][2], 1.0), channels=2)
    assert len(heard(one + other)) / 16000 == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("ending", ["au", "snd", "vox", "sln", "gsm", "txt", "raw"])
def test_the_ending_of_a_name_decides_nothing(ending, tmp_path):
    path = tmp_path / f"text.{ending}"
    path.write_text("these are no sounds " * 5000)
    with pytest.raises(AudioError, match="cannot be decoded"):
        read_audio(path)
    path.write_bytes(encoded("wma", tones(44100, 2.0)))
    assert torch.equal(read_audio(path), read_audio(io.BytesIO(path.read_bytes())))


def id3v2(n_bytes):
    size = bytes(n_bytes >> 7 * i & 127 for i in (3, 2, 1, 0))
    return b"ID3\x04\0\0" + size + bytes(n_bytes)


def apev2(n_bytes):
    return bytes(n_bytes - 32) + b"APETAGEX" + struct.pack("<IIII", 2000, n_bytes, 1, 0) + bytes(8)


TAGGED = {
    "id3v1": lambda data: data + b"TAG" + b"a" * 125,
    "small ape": lambda data: data + apev2(500),
    "large ape": lambda data: data + apev2(60_000),
    "ape and id3v1": lambda data: data + apev2(5000) + b"TAG" + b"a" * 125,
    "id3v2": lambda data: id3v2(20_000) + data,
}


@pytest.mark.parametrize("tag", TAGGED)
@pytest.mark.parametrize("name", ["mp3", "mp2", "aac", "ac3", "amr", "wv", "tta", "flac", "m4a"])
def test_tags(name, tag, caplog):
    warn.cache_clear()
    data = encoded(name, tones(FORMATS[name][2], 2.0))
    expected = heard(data)
    found = heard(TAGGED[tag](data))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not caplog.records


def test_joined_mp3s_with_pictures_in_their_tags():
    data = encoded("mp3", tones(44100, 2.0))
    found = heard((id3v2(40_000) + data) * 3)
    assert len(found) / 16000 == pytest.approx(6.0, abs=0.1)


def test_an_mp4_with_something_behind_it():
    data = encoded("m4a", tones(44100, 2.0))
    assert torch.equal(heard(data + b"something" * 100), heard(data))


def test_an_mp4_whose_time_has_a_gap():
    """Phones and browsers write such files: the microphone was muted, or frames came late."""
    import av

    file, wave = io.BytesIO(), tones(48000, 4.0)
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000, layout="mono")
        for k in range(len(wave) // 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, 1024 * k : 1024 * (k + 1)].copy(), format="fltp", layout="mono")
            frame.rate, frame.pts = 48000, 1024 * k + (24000 if k > 90 else 0)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert len(heard(file.getvalue())) / 16000 == pytest.approx(4.0, abs=0.1)


def test_a_flac_whose_header_says_less_than_there_is():
    data = bytearray(encoded("flac", tones(44100, 6.0)))
    data[22:26] = struct.pack(">I", 3 * 44100)
    assert len(read_audio(io.BytesIO(data), 44100)) == 6 * 44100


def test_rates_that_are_nearly_the_models(tmp_path):
    for rate in (15995, 16001, 16008):
        soundfile.write(tmp_path / "a.wav", tones(rate, 1.0), rate, subtype="FLOAT")
        blocks = torch.cat(list(read_blocks(tmp_path / "a.wav", seconds=0.3)))
        torch.testing.assert_close(blocks, read_audio(tmp_path / "a.wav"))


def test_films_are_sounds_too(tmp_path):
    for name, container in (("a", "avi"), ("b", "mpegts"), ("c", "mov")):
        FORMATS[name] = ("mp2" if container != "mov" else "aac", container, 48000)
        (tmp_path / name).write_bytes(encoded(name, tones(48000, 2.0)))
        del FORMATS[name]
        assert is_sound(tmp_path / name)
        assert duration(tmp_path / name) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("n_bytes", [2_200_000_000, 3_000_000_000])
@pytest.mark.parametrize("container", ["WAV", "RF64"])
def test_a_large_wav_with_a_list_behind_it(n_bytes, container, tmp_path):
    file = io.BytesIO()
    soundfile.write(file, np.ones(10) / 4, 16000, format=container, subtype="PCM_16")
    data = bytearray(file.getvalue())
    begin = data.index(b"data") + 8
    if container == "WAV":
        data[begin - 4 : begin] = struct.pack("<I", n_bytes)
    else:
        data[28:36] = struct.pack("<Q", n_bytes)
    path = tmp_path / "large.wav"
    path.write_bytes(data)
    os.truncate(path, begin + n_bytes)
    with open(path, "ab") as large:
        large.write(b"LIST\x06\0\0\0INFOab")
    assert duration(path) == n_bytes / 2 / 16000


# These two compare with programs that nothing here needs, and that a machine may lack; what they hold is held without them as well:
# the resampler by its response, the decoders by what was encoded.
@pytest.mark.skipif(shutil.which("sox") is None, reason="sox is not installed")
@pytest.mark.parametrize("rate", [44100, 48000])
def test_features_of_resampled_noise_are_those_after_sox(rate, tmp_path):
    """PSLA's data went through sox; with torchaudio's own settings the highest band is 3.8 higher than with it."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 10 * rate), rate, subtype="FLOAT")
    options = ["-r", "16000", "-b", "32", "-e", "floating-point"]
    subprocess.run(["sox", tmp_path / "a.wav", *options, tmp_path / "b.wav"], check=True, capture_output=True)
    ours, theirs = (KaldiFbank()(read_audio(tmp_path / f"{name}.wav")[None])[0].mean(0) for name in "ab")
    difference = (ours - theirs).abs()
    assert difference[:-2].max() < 0.02
    assert difference[-2:].max() < 1.2


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", sorted({*FORMATS} - {"mka"}))  # of which ffmpeg keeps what the encoder put before the sound
def test_the_samples_are_those_of_ffmpeg(name, tmp_path):
    path, rate = tmp_path / "sound", FORMATS[name][2]
    path.write_bytes(encoded(name, tones(rate, 3.0)))
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-f", "f32le", "-"], check=True, capture_output=True)
    expected = np.frombuffer(done.stdout, "<f4").reshape(-1, 2 if name == "vorbis" else 1).mean(1)
    # libsndfile's IMA ADPCM rounds otherwise
    np.testing.assert_allclose(read_audio(path, rate), expected, atol=0.002 if name == "ima" else 1e-5)


def test_a_file_that_must_not_be_read_is_an_error_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    path.write_bytes(encoded("flac", tones(44100, 1.0)))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for read in (duration, read_audio):
        with pytest.raises(AudioError, match=r"a\.flac: cannot be read \(Permission denied\)"):
            read(path)
