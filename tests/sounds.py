"""Sound files of every format, made with FFmpeg's encoders."""

import io

import av
import numpy as np

# name -> codec, container, sample rate, the least samples of a packet's padding that may be added
FORMATS = {
    "mp3": ("mp3", "mp3", 44100),
    "mp2": ("mp2", "mp2", 44100),
    "m4a": ("aac", "mp4", 44100),
    "mov": ("aac", "mov", 48000),
    "alac": ("alac", "mp4", 44100),
    "aac": ("aac", "adts", 44100),
    "webm": ("opus", "webm", 48000),
    "opus": ("opus", "ogg", 48000),
    "vorbis": ("vorbis", "ogg", 44100),
    "oggflac": ("flac", "ogg", 44100),
    "flac": ("flac", "flac", 44100),
    "wma": ("wmav2", "asf", 44100),
    "mka": ("aac", "matroska", 44100),
    "ac3": ("ac3", "ac3", 48000),
    "wv": ("wavpack", "wv", 44100),
    "tta": ("tta", "tta", 44100),
    "amr": ("amr_nb", "amr", 8000),
    "ima": ("adpcm_ima_wav", "wav", 44100),
    "ms": ("adpcm_ms", "wav", 44100),
    "wav": ("pcm_s16le", "wav", 44100),
    "aiff": ("pcm_s16be", "aiff", 44100),
    "au": ("pcm_s16be", "au", 44100),
    "caf": ("pcm_s16le", "caf", 44100),
    "w64": ("pcm_s16le", "w64", 44100),
}
# of which every sample comes back, to 16 bits
LOSSLESS = {"alac", "oggflac", "flac", "wv", "tta", "wav", "aiff", "au", "caf", "w64"}


def tones(rate, seconds, frequencies=(440.0, 1000.0), level=0.3):
    """A mixture of tones that differs from second to second: `[samples]`, float32."""
    t = np.arange(round(rate * seconds)) / rate
    wave = sum(np.sin(2 * np.pi * frequency * (1 + 0.1 * (t // 1 % 5)) * t) for frequency in frequencies)
    return (level * wave / len(frequencies)).astype(np.float32)


class _Pipe(io.BytesIO):
    """A file that cannot be gone back in, as a pipe is."""

    def seekable(self):
        return False

    seek = None


def encoded(name, wave, channels=1, pipe=False, container_options=None, rate=None):
    """Encodes `[samples]` float32 as a file of one of `FORMATS`, in all channels alike: bytes."""
    codec, container, own_rate = FORMATS[name]
    rate = rate or own_rate
    layout = "mono" if channels == 1 else "stereo"
    file = _Pipe() if pipe else io.BytesIO()
    with av.open(file, "w", format=container, container_options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        context = stream.codec_context
        context.layout = layout
        if codec == "wmav2":
            context.bit_rate = 128_000
        if codec == "vorbis":
            stream.options = {"strict": "experimental"}
            context.layout = layout = "stereo"
        context.open()
        resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or 1024)
        array = np.ascontiguousarray(np.repeat(wave[None].astype(np.float32), 1 if layout == "mono" else 2, axis=0))
        frame = av.AudioFrame.from_ndarray(array, format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        for given in (frame, None):
            for part in resampler.resample(given):
                output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()
