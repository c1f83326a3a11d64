"""A tagger as one ONNX file, front end included: a waveform of any length in, probabilities out.

ONNX's own Fourier transform is slow or missing in many runtimes. Everything from a frame's samples to its spectrum is linear, so
here it is one convolution.
"""

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from speechbrain.processing.features import STFT
from torch import Tensor, nn
from torch.nn import functional as F

from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.inference.tagger import AudioTagger
from psla_sb.lobes import chain
from psla_sb.lobes.efficientnet import fold_norms
from psla_sb.lobes.features import ENERGY_FLOOR, PREEMPHASIS, CentredFbank, KaldiFbank, LogMel, n_frames_of, n_samples_for

TOLERANCE = 1e-4
OPSET = 17


class OnnxTagger(nn.Module):
    """Computes what a tagger on the CPU computes, in operations that ONNX has.

    `KaldiFbank` is computed as one convolution, and so are the Fourier transforms of `CentredFbank` and, in other front ends, of
    SpeechBrain. What else there is must consist of operations that PyTorch's exporter knows.
    """

    kernel: Tensor

    def __init__(self, tagger: AudioTagger):
        super().__init__()
        # the exporter and what is swapped below must leave the tagger as it is
        self.front_end = copy.deepcopy(tagger.mods.compute_features)
        self.norm, self.classifier = tagger.mods.mean_var_norm, tagger.mods.classifier
        self.sample_rate, self.n_samples = tagger.hparams.sample_rate, tagger.n_samples
        self.encoder = fold_norms(tagger.mods.embedding_model)
        self.min_frames = max(getattr(module, "_min_size", 1) for module in self.encoder.modules())
        self.fills_up = isinstance(self.front_end, LogMel)
        if not isinstance(self.front_end, KaldiFbank):
            self.front_end = _without_complex_numbers(self.front_end)
            return
        # what the front end makes of each unit impulse within a frame
        fbank = self.front_end
        frames = torch.eye(fbank.frame_length, dtype=torch.float64)
        frames = frames - frames.mean(1, keepdim=True)
        frames[:, 1:] -= PREEMPHASIS * frames[:, :-1]
        # without the last bin, which is in no mel filter
        spectrum = torch.fft.rfft(frames * fbank.window.double().cpu(), fbank.n_fft)[:, :-1]
        self.register_buffer("kernel", torch.cat([spectrum.real, spectrum.imag], dim=1).T[:, None].float())

    def forward(self, wavs: Tensor) -> Tensor:
        """`[batch, samples]` -> `[batch, classes]`."""
        lens = torch.ones_like(wavs[:, 0])
        if self.n_samples is not None:
            lens = lens * (torch._shape_as_tensor(wavs)[1] / self.n_samples).clamp(max=1.0)
        if isinstance(self.front_end, KaldiFbank):
            feats = self._kaldi_features(wavs)
        else:
            wavs = wavs if self.n_samples is None or self.fills_up else F.pad(wavs, (0, self.n_samples))[:, : self.n_samples]
            feats = chain.call(self.norm, chain.call(self.front_end, wavs, lens), lens)
        return chain.call(self.classifier, chain.call(self.encoder, feats, lens), lens).clamp(0.0, 1.0)

    def _kaldi_features(self, wavs: Tensor) -> Tensor:
        fbank = self.front_end
        n_samples: Any = torch._shape_as_tensor(wavs)[1]
        n_frames = n_frames_of(n_samples, fbank.sample_rate)
        wavs = wavs - wavs.mean(1, keepdim=True)
        if fbank.n_frames is None:
            # room for the frames that the encoder adds to what is too short for it
            n_kept: Any = torch.clamp(n_frames, min=self.min_frames)
            wavs = F.pad(wavs, (0, n_samples_for(self.min_frames, fbank.sample_rate)))
        else:
            n_kept, n_samples = fbank.n_frames, n_samples_for(fbank.n_frames, fbank.sample_rate)
            wavs = F.pad(wavs, (0, n_samples))[:, :n_samples]
        real, imag = F.conv1d(wavs[:, None], self.kernel, stride=fbank.frame_shift).transpose(1, 2).chunk(2, dim=2)
        feats = ((real.square() + imag.square()) @ fbank.mel_banks[:-1]).clamp(min=ENERGY_FLOOR).log()[:, :n_kept]
        past_end = (torch.arange(n_kept) >= n_frames)[:, None]
        if fbank.n_frames is None:
            return self.norm(feats).masked_fill(past_end, 0.0)
        return self.norm(feats.masked_fill(past_end, 0.0))


class _ConvolutionalCentredFbank(nn.Module):
    """Computes a `CentredFbank` with its Fourier transform as a convolution."""

    kernel: Tensor

    def __init__(self, fbank: CentredFbank):
        super().__init__()
        self.fbank = fbank
        # of what the window lets through
        self.start = (fbank.n_fft - fbank.frame_length) // 2
        frames = torch.diag(fbank.window.double().cpu())[self.start : self.start + fbank.frame_length]
        # without the last bin, which is in no mel filter
        spectrum = torch.fft.rfft(frames)[:, :-1]
        self.register_buffer("kernel", torch.cat([spectrum.real, spectrum.imag], dim=1).T[:, None].float())

    def forward(self, wavs: Tensor) -> Tensor:
        fbank, n_kept = self.fbank, self.fbank.n_frames
        n_samples: Any = torch._shape_as_tensor(wavs)[1]
        n_frames: Any = fbank.frames_of(n_samples)
        # as `CentredFbank` reflects, but in tensors alone: what is computed in numbers would be constant in the file
        half = fbank.n_fft // 2
        least = half + 1
        x = F.pad(wavs[:, 1:] - PREEMPHASIS * wavs[:, :-1], (0, least))
        last: Any = torch.clamp(n_samples - 1, min=least) - 1
        index = torch.arange(self.start - half, last + 1 + half).abs()
        x = x[:, torch.where(index > last, 2 * last - index, index)]
        real, imag = F.conv1d(x[:, None], self.kernel, stride=fbank.frame_shift).transpose(1, 2).chunk(2, dim=2)
        feats = ((real.square() + imag.square()) @ fbank.mel_banks[:-1] + 1e-5).log()[:, :n_frames]
        return feats if n_kept is None else F.pad(feats, (0, 0, 0, n_kept))[:, :n_kept]


class _ConvolutionalSTFT(nn.Module):
    """Computes SpeechBrain's `STFT` as a convolution: `[batch, samples]` -> `[batch, frames, bins, 2]`."""

    kernel: Tensor

    def __init__(self, stft: STFT):
        super().__init__()
        self.hop_length, self.pad, self.pad_mode = stft.hop_length, stft.n_fft // 2 if stft.center else 0, stft.pad_mode
        start = (stft.n_fft - stft.win_length) // 2
        window = F.pad(stft.window.double().cpu(), (start, stft.n_fft - stft.win_length - start))
        frames = torch.eye(stft.n_fft, dtype=torch.float64) * window
        spectrum = torch.fft.rfft(frames) if stft.onesided else torch.fft.fft(frames)
        scale = stft.n_fft**-0.5 if stft.normalized_stft else 1.0
        self.register_buffer("kernel", (scale * torch.cat([spectrum.real, spectrum.imag], dim=1).T[:, None]).float())

    def forward(self, wavs: Tensor) -> Tensor:
        wavs = F.pad(wavs[:, None], (self.pad, self.pad), mode=self.pad_mode)
        real, imag = F.conv1d(wavs, self.kernel, stride=self.hop_length).transpose(1, 2).chunk(2, dim=2)
        return torch.stack([real, imag], dim=3)


def _without_complex_numbers(module: nn.Module) -> nn.Module:
    """The module, whose Fourier transforms, which the exporter does not know, have become convolutions."""
    if isinstance(module, CentredFbank):
        return _ConvolutionalCentredFbank(module)
    if isinstance(module, STFT):
        return _ConvolutionalSTFT(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _without_complex_numbers(child))
    return module


def _sigmoid(graph: Any, x: Any) -> Any:
    # onnxruntime's own has an absolute error: where attention is faint all along, as it may be at 1e-6, the shares of the steps
    # would be wrong; so it is computed by its formula
    one = graph.op("Constant", value_t=torch.tensor(1.0))
    return graph.op("Div", one, graph.op("Add", one, graph.op("Exp", graph.op("Neg", x))))


def _add_metadata(onnx: Any, path: Path, tagger: AudioTagger) -> None:
    """Adds what tells a user of the file what goes in, what the outputs are, and when to take one for heard."""
    said: dict[str, Any] = {"labels": tagger.labels, "mids": list(tagger.hparams.mids), "sample_rate": tagger.hparams.sample_rate}
    said |= {"window": tagger.window, "longest": tagger.longest, "crop": "first" if tagger.n_samples else None}
    if (calibration := tagger.calibration) is not None:
        thresholds = [threshold if math.isfinite(threshold) else None for threshold in calibration.threshold.tolist()]
        said |= {"thresholds": thresholds, "criterion": calibration.criterion}
        said["calibration"] = {"slopes": calibration.slope.tolist(), "biases": calibration.bias.tolist()}
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in said.items()})
    onnx.save(model, str(path))


def import_onnx() -> tuple[Any, Any]:
    """Imports `onnx` and `onnxruntime`; an InputError says how to install what is missing."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"ONNX export needs the packages onnx and onnxruntime: pip install 'psla_sb[onnx]' ({error})") from None
    return onnx, onnxruntime


def export_onnx(tagger: AudioTagger, path: str | Path) -> float:
    """Writes a tagger on the CPU as an ONNX file, if onnxruntime gets the same probabilities from it as PyTorch, to 1e-4.

    The input is `waveform`, float32 `[batch, samples]` at the model's sample rate, less its mean, the output `probabilities`
    `[batch, classes]`. The file's metadata have, each as JSON:

        labels, mids    of the classes, in the outputs' order
        sample_rate     of the waveform, in Hz
        window          samples that the model hears at a time
        longest         samples of the longest sound that is one window; a longer one is heard in windows that overlap by half
        crop            what it hears of a longer waveform: "first" (its first window), or null (all)
        thresholds      of a tagger that has them: on the output as it comes, one per class (null: never)
        criterion       what these were chosen by
        calibration     slopes and biases of the output's log odds, which make it a probability

    Needs the packages `onnx` and `onnxruntime`: `pip install 'psla_sb[onnx]'`. Returns the largest difference that was found;
    InputError, if the packages are missing, a part has operations that ONNX has not, or the probabilities differ.
    """
    onnx, onnxruntime = import_onnx()
    rate = tagger.hparams.sample_rate
    model, generator = OnnxTagger(tagger).eval(), torch.Generator().manual_seed(0)
    noise = torch.randn(2, rate, generator=generator) / 10
    names: dict[str, Any] = {"input_names": ["waveform"], "output_names": ["probabilities"]}
    names["dynamic_axes"] = {"waveform": {0: "batch", 1: "samples"}, "probabilities": {0: "batch"}}
    with atomic_write(path) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            # the exporter warns of every size that it takes for constant, which these are
            warnings.simplefilter("ignore")
            torch.onnx.register_custom_op_symbolic("aten::sigmoid", _sigmoid, OPSET)
            # PyTorch's fused attention is one operation, which the exporter does not know
            fused = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                torch.onnx.export(model, (noise,), str(temporary), dynamo=False, opset_version=OPSET, **names)
            except Exception as error:  # the exporter, or what it runs of other people's
                parts = ", ".join(f"{name} {type(tagger.mods[name]).__qualname__}" for name in chain.MODULES)
                reason = str(error).strip().partition("\n")[0]
                raise InputError(f"PyTorch cannot export this model ({parts}) to ONNX: {reason}") from error
            finally:
                torch.backends.mha.set_fastpath_enabled(fused)
                torch.onnx.unregister_custom_op_symbolic("aten::sigmoid", OPSET)
        _add_metadata(onnx, temporary, tagger)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        worst = 0.0
        for batch, n_samples, level in ((1, 100, 0.1), (1, rate, 1e-4), (3, 2 * rate + 7, 0.1), (2, 12 * rate, 0.5)):
            wavs = level * torch.randn(batch, n_samples, generator=generator)
            try:
                expected = tagger.tag_features(*tagger.features_and_lens(wavs))
            except InputError:
                # too short for this front end, here and there
                continue
            try:
                (answer,) = session.run(None, {"waveform": wavs.numpy()})
            except Exception as error:  # onnxruntime's own, of which it exports no common class
                shape = f"{batch} clips of {n_samples} samples"
                raise InputError(f"{path}: the model in ONNX cannot take {shape}, so it was not written: {error}") from error
            worst = max(worst, (torch.from_numpy(answer) - expected).abs().max().item())
        if not worst <= TOLERANCE:
            raise InputError(f"{path}: onnxruntime's probabilities differ from PyTorch's by {worst:.1e}, so it was not written")
    return worst
