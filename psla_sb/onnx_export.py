"""A tagger as one ONNX file, front end included: a waveform of any length in, probabilities out.

ONNX's own Fourier transform is slow or missing in many runtimes. Everything from a frame's samples to its spectrum is linear, so
here it is one convolution.
"""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from psla_sb.checkpoints import atomic_write
from psla_sb.errors import InputError
from psla_sb.lobes.efficientnet import fold_norms
from psla_sb.lobes.features import ENERGY_FLOOR, PREEMPHASIS, KaldiFbank, n_frames_of, n_samples_for

TOLERANCE = 1e-4
OPSET = 17


class OnnxTagger(nn.Module):
    """A tagger's computation in operations that ONNX has.

    Arguments
    ---------
    tagger : AudioTagger
        Its `compute_features` must be a `KaldiFbank`.

    Raises
    ------
    InputError
        It is another.
    """

    def __init__(self, tagger):
        super().__init__()
        fbank = tagger.mods.compute_features
        if not isinstance(fbank, KaldiFbank):
            raise InputError(f"ONNX export knows the front end KaldiFbank, not {type(fbank).__name__}")
        self.fbank, self.norm, self.classifier = fbank, tagger.mods.mean_var_norm, tagger.mods.classifier
        self.encoder = fold_norms(tagger.mods.embedding_model)
        self.min_frames = max(getattr(module, "_min_size", 1) for module in self.encoder.modules())
        # what the front end makes of each unit impulse within a frame
        frames = torch.eye(fbank.frame_length, dtype=torch.float64)
        frames = frames - frames.mean(1, keepdim=True)
        frames[:, 1:] -= PREEMPHASIS * frames[:, :-1]
        # without the last bin, which is in no mel filter
        spectrum = torch.fft.rfft(frames * fbank.window.double().cpu(), fbank.n_fft)[:, :-1]
        kernel = torch.cat([spectrum.real, spectrum.imag], dim=1).T[:, None]
        self.register_buffer("kernel", kernel.float())

    def forward(self, wavs):
        """`[batch, samples]` -> `[batch, classes]`."""
        fbank = self.fbank
        n_frames = n_frames_of(torch._shape_as_tensor(wavs)[1], fbank.sample_rate)
        wavs = wavs - wavs.mean(1, keepdim=True)
        if fbank.n_frames is None:
            # room for the frames that the encoder adds to what is too short for it
            n_kept = torch.clamp(n_frames, min=self.min_frames)
            wavs = F.pad(wavs, (0, n_samples_for(self.min_frames, fbank.sample_rate)))
        else:
            n_kept, n_samples = fbank.n_frames, n_samples_for(fbank.n_frames, fbank.sample_rate)
            wavs = F.pad(wavs, (0, n_samples))[:, :n_samples]
        real, imag = F.conv1d(wavs[:, None], self.kernel, stride=fbank.frame_shift).transpose(1, 2).chunk(2, dim=2)
        feats = ((real.square() + imag.square()) @ fbank.mel_banks[:-1]).clamp(min=ENERGY_FLOOR).log()[:, :n_kept]
        past_end = (torch.arange(n_kept) >= n_frames)[:, None]
        if fbank.n_frames is None:
            feats = self.norm(feats).masked_fill(past_end, 0.0)
        else:
            feats = self.norm(feats.masked_fill(past_end, 0.0))
        return self.classifier(self.encoder(feats)).clamp(0.0, 1.0)


def _sigmoid(graph, x):
    """The sigmoid from its formula. onnxruntime's own has an absolute error: where attention is faint all along, as it may be at
    1e-6, the shares of the steps would be wrong."""
    one = graph.op("Constant", value_t=torch.tensor(1.0))
    return graph.op("Div", one, graph.op("Add", one, graph.op("Exp", graph.op("Neg", x))))


def export_onnx(tagger, path):
    """Writes a tagger as an ONNX file, if onnxruntime gets the same probabilities from it as PyTorch, to 1e-4.

    The input is `waveform`, float32 `[batch, samples]` at the model's sample rate, the output `probabilities` `[batch, classes]`.
    Needs the packages `onnx` and `onnxruntime`: `pip install 'psla_sb[onnx]'`.

    Arguments
    ---------
    tagger : AudioTagger
        On the CPU.
    path : str or Path
        The file to write.

    Returns
    -------
    float
        The largest difference that was found.

    Raises
    ------
    InputError
        The packages are missing, the front end is unknown, or the probabilities differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise InputError(f"ONNX export needs the packages onnx and onnxruntime: pip install 'psla_sb[onnx]' ({error})") from None
    rate = tagger.hparams.sample_rate
    model, generator = OnnxTagger(tagger).eval(), torch.Generator().manual_seed(0)
    with atomic_write(path) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            # the exporter warns of every size that it takes for constant, which these are
            warnings.simplefilter("ignore")
            torch.onnx.register_custom_op_symbolic("aten::sigmoid", _sigmoid, OPSET)
            try:
                torch.onnx.export(
                    model,
                    (torch.randn(2, rate, generator=generator) / 10,),
                    str(temporary),
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=["waveform"],
                    output_names=["probabilities"],
                    dynamic_axes={"waveform": {0: "batch", 1: "samples"}, "probabilities": {0: "batch"}},
                )
            finally:
                torch.onnx.unregister_custom_op_symbolic("aten::sigmoid", OPSET)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        worst = 0.0
        for batch, n_samples, level in ((1, 100, 0.1), (1, rate, 1e-4), (3, 2 * rate + 7, 0.1), (2, 12 * rate, 0.5)):
            wavs = level * torch.randn(batch, n_samples, generator=generator)
            (answer,) = session.run(None, {"waveform": wavs.numpy()})
            worst = max(worst, (torch.from_numpy(answer) - tagger.tag_batch(wavs)).abs().max().item())
        if not worst <= TOLERANCE:
            raise InputError(f"{path}: onnxruntime's probabilities differ from PyTorch's by {worst:.1e}, so it was not written")
    return worst
