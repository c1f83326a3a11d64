"""Tags a sound of any length with a tagger's `model.onnx` (`psla-export RUN --out FOLDER --onnx`), without PyTorch.

Needs numpy, onnxruntime and soundfile: `python onnx_only.py FOLDER/model.onnx SOUND [K]` prints the K best of all classes (5).
"""

import json
import math
import sys

import numpy as np
import onnxruntime
import soundfile


def resample(wave, rate, to_rate, lobes=64, rolloff=0.96, beta=10.0):
    """A windowed sinc, which passes 0.46 of the lower rate."""
    rate, to_rate = np.array([rate, to_rate]) // math.gcd(rate, to_rate)
    cutoff = rolloff * min(rate, to_rate)
    width = math.ceil(lobes * rate / cutoff)
    # where the inputs around a period lie, seen from each of the outputs in it, in zero crossings
    time = (np.arange(-width, width + rate) / rate - np.arange(to_rate)[:, None] / to_rate) * cutoff
    window = np.i0(beta * np.sqrt(np.clip(1 - (time / lobes) ** 2, 0, None))) / np.i0(beta) * (abs(time) < lobes)
    periods = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (width, width + rate)), 2 * width + rate)[::rate]
    return (periods @ (np.sinc(time) * window * cutoff / rate).T).ravel()[: math.ceil(len(wave) * to_rate / rate)]


def score(session, wave, window, longest):
    """Each class's highest score in windows that overlap by half, the last of which ends where the sound ends."""
    starts = [0] if len(wave) <= longest else [*range(0, len(wave) - window, window - window // 2), len(wave) - window]
    pieces = [wave if len(wave) <= longest else wave[start : start + window] for start in starts]
    return np.max([session.run(None, {"waveform": (one - one.mean())[None].astype(np.float32)})[0][0] for one in pieces], axis=0)


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    samples, rate = soundfile.read(sys.argv[2], always_2d=True)
    wave = samples.mean(1) if rate == about["sample_rate"] else resample(samples.mean(1), rate, about["sample_rate"])
    scores = score(session, wave, about["window"], about["longest"])
    for c in np.argsort(-scores)[: int(sys.argv[3]) if len(sys.argv) > 3 else 5]:
        heard = (
            "yes"
            if (about.get("thresholds") or [None] * len(scores))[c] is not None and scores[c] >= about["thresholds"][c]
            else ""
        )
        print(f"{scores[c]:.3f}  {about['mids'][c]}  {about['labels'][c]}  {heard}".rstrip())
