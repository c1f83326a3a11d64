"""Waveforms -> what a trained encoder makes of them: feature maps, one vector a clip, vectors along the time."""

from contextlib import contextmanager
from functools import cached_property

import torch
from speechbrain.inference.interfaces import Pretrained
from torch.nn import functional as F

from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.windows import overlapped, windows
from psla_sb.errors import InputError
from psla_sb.lobes import chain
from psla_sb.lobes.efficientnet import EfficientNetEncoder, fold_norms
from psla_sb.lobes.features import KaldiFbank, n_frames_of, n_samples_for, true_lengths

# That a CPU encodes at a time. With more, activations pass the 32 MB up to which glibc keeps freed memory for the next layer, and
# asking the system for fresh pages takes a third of the time.
CPU_FRAMES = 2112


class SoundEncoder(Pretrained):
    """The front end and the encoder of a trained model.

    For speed it computes with a copy of the encoder whose batch normalisations are folded into the convolutions; the copy is made
    anew when the weights have changed. `mods.embedding_model` keeps the weights as they were trained.

    Example
    -------
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> from psla_sb.lobes.features import GlobalNorm, KaldiFbank
    >>> modules = {
    ...     "compute_features": KaldiFbank(n_mels=64),
    ...     "mean_var_norm": GlobalNorm(),
    ...     "embedding_model": EfficientNetEncoder("b0"),
    ... }
    >>> encoder = SoundEncoder(modules, {"sample_rate": 16000})
    >>> encoder.encode_batch(torch.zeros(1, 16000)).shape
    torch.Size([1, 1280, 2, 3])
    >>> encoder.scene_embeddings(torch.zeros(1, 16000)).shape
    torch.Size([1, 1280])
    """

    MODULES_NEEDED = ("compute_features", "mean_var_norm", "embedding_model")
    HPARAMS_NEEDED = ("sample_rate",)
    _folded = (None, None)

    def _apply(self, *args, **kwargs):
        moved = super()._apply(*args, **kwargs)
        self.device = str(next(self.mods.parameters()).device)
        return moved

    @property
    def n_samples(self):
        """What the model takes of a clip, in samples: as much as it was trained on; None if all."""
        n_frames = getattr(self.mods.compute_features, "n_frames", getattr(self.hparams, "n_frames", None))
        return None if n_frames is None else n_samples_for(n_frames, self.hparams.sample_rate)

    def features(self, wavs, wav_lens=None):
        """Normalised features of a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, or `[samples]` of a single clip; floating point, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        torch.Tensor
            `[batch, frames, mels]`. Where samples are not finite, or so large that their energy is not, features are not finite.

        Raises
        ------
        ValueError
            Tensors of another kind.
        """
        return self.features_and_lens(wavs, wav_lens)[0]

    def features_and_lens(self, wavs, wav_lens=None):
        """As `features`, and the relative lengths of what comes out, for encoders and classifiers that take them."""
        wavs = torch.as_tensor(wavs)
        if wavs.dim() == 1:
            wavs = wavs[None]
        if wavs.dim() != 2 or not wavs.numel() or not wavs.is_floating_point():
            raise ValueError(
                "waveforms must be floating-point numbers in [-1, 1], [batch, samples] with a sample or more, not "
                f"{wavs.dtype} {list(wavs.shape)}"
            )
        if wav_lens is not None:
            wav_lens = torch.as_tensor(wav_lens, dtype=torch.float32).to(self.device)
            if wav_lens.shape != wavs.shape[:1] or not ((wav_lens > 0) & (wav_lens <= 1)).all():
                raise ValueError(f"wav_lens must be {len(wavs)} relative lengths in (0, 1], not {wav_lens.tolist()}")
        wavs = wavs.to(self.device).float()
        cuts_itself = getattr(self.mods.compute_features, "n_frames", None) is not None
        if not cuts_itself and self.n_samples is not None and wavs.shape[1] > self.n_samples:
            wav_lens = None if wav_lens is None else (wav_lens * (wavs.shape[1] / self.n_samples)).clamp(max=1.0)
            wavs = wavs[:, : self.n_samples]
        with torch.inference_mode(), _taking(self.mods.compute_features, wavs):
            return chain.features(self.mods, wavs, wav_lens)

    def encode_features(self, feats, lens=None):
        """The encoder's feature maps of normalised features.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, on the encoder's device.
        lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        torch.Tensor
            `[batch, channels, freq, steps]` or `[batch, channels, steps]`; of an ensemble, a tuple of them.
        """
        encoder = self._fast_encoder()
        at_a_time = max(1, CPU_FRAMES // feats.shape[1]) if feats.device.type == "cpu" else len(feats)
        parts = feats.split(at_a_time)
        with torch.inference_mode(), self.inference_ctx, _taking(encoder, feats):
            maps = [
                chain.call(encoder, part, part_lens)
                for part, part_lens in zip(parts, [None] * len(parts) if lens is None else lens.split(at_a_time), strict=True)
            ]
            if len(maps) == 1:
                return maps[0]
            return tuple(map(torch.cat, zip(*maps, strict=True))) if isinstance(maps[0], tuple) else torch.cat(maps)

    def _fast_encoder(self):
        encoder = self.mods.embedding_model
        if encoder.training or not any(isinstance(part, EfficientNetEncoder) for part in encoder.modules()):
            return encoder
        tensors = [*encoder.parameters(), *encoder.buffers()]
        state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self._folded[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                # in a tuple, so that it is no part of the module
                self._folded = state, fold_norms(encoder)
        return self._folded[1]

    def encode_batch(self, wavs, wav_lens=None, normalize=False):
        """The encoder's answer, as SpeechBrain's `EncoderClassifier.encode_batch` gives it, but padding is told from silence.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, or `[samples]` of a single clip; floating point, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.
        normalize : bool
            Must be False: these models have no statistics of embeddings.

        Returns
        -------
        torch.Tensor
            Feature map `[batch, channels, freq, steps]`.

        Raises
        ------
        ValueError
            Tensors of another kind, or samples that are not finite or too large.
        """
        if normalize:
            raise ValueError("normalize=True needs statistics of embeddings, which these models do not have")
        feats, lens = self.features_and_lens(wavs, wav_lens)
        return self.encode_features(finite(feats), lens)

    def encode_file(self, path):
        """As `encode_batch`, for a file.

        Arguments
        ---------
        path : str or Path
            Any file that `psla_sb.dataio.audio.read_audio` reads.

        Returns
        -------
        torch.Tensor
            Feature map `[1, channels, freq, steps]`.

        Raises
        ------
        InputError
            The file cannot be read, or its samples are too large.
        """
        feats, lens = self.features_and_lens(read_clip(path, self.hparams.sample_rate))
        return self.encode_features(finite(feats, path), lens)

    @cached_property
    def _step(self):
        """Frames of a step of the feature map (None: a clip of any length has as many steps), and samples of a frame."""
        rate, front_end = self.hparams.sample_rate, self.mods.compute_features
        feats = self.features(torch.zeros(1, self.n_samples or 10 * rate))
        return chain.frames_per_step(self.mods.embedding_model, *feats.shape[1:]), chain.frame_shift(front_end, rate)

    @property
    def has_times(self):
        """Whether the steps of the feature map follow the clip, so that it can be said when they are."""
        return self._step[0] is not None

    def _frames_per_step(self):
        if not self.has_times:
            encoder = type(self.mods.embedding_model).__qualname__
            raise InputError(
                f"this model's embedding_model ({encoder}) gives as many steps for a clip of any length: they have no times"
            )
        return self._step[0]

    def n_steps_of(self, n_samples):
        """Steps of the feature map whose middle is within the first samples of a clip; at least one.

        Arguments
        ---------
        n_samples : int or torch.Tensor
            The clip's true length.

        Returns
        -------
        int or torch.Tensor
        """
        stride, shift = self._frames_per_step(), self._step[1]
        is_kaldi = isinstance(self.mods.compute_features, KaldiFbank)
        n_frames = n_frames_of(n_samples, self.hparams.sample_rate) if is_kaldi else n_samples // shift
        n_steps = (n_frames + stride // 2) // stride
        return n_steps.clamp(min=1) if isinstance(n_steps, torch.Tensor) else max(1, n_steps)

    def step_times(self, n_steps):
        """Middles of the steps of the feature map in seconds, float64 `[steps]`."""
        rate = self.hparams.sample_rate
        return (torch.arange(n_steps, dtype=torch.float64) + 0.5) * self._frames_per_step() * self._step[1] / rate

    def window_and_hop(self, window, hop):
        """Seconds -> (samples of a window, samples of the hop, steps of the hop): no longer than the model takes, whole steps.

        Raises
        ------
        ValueError
            A length is not positive and finite.
        """
        rate = self.hparams.sample_rate
        if not (0 < window < float("inf") and 0 < hop < float("inf")):
            raise ValueError(f"window and hop must be positive numbers of seconds, not {window} and {hop}")
        stride = self._frames_per_step() * self._step[1]
        n_samples = min(max(round(window * rate), stride), self.n_samples or float("inf"))
        hop_steps = max(1, min(round(hop * rate / stride), n_samples // stride))
        return n_samples, hop_steps * stride, hop_steps

    def whole_window(self, wavs, n_samples):
        """Fills the last piece of a recording up for front ends that cannot take any length; and its relative lengths."""
        if isinstance(self.mods.compute_features, KaldiFbank) or wavs.shape[1] == n_samples:
            return wavs, None
        return F.pad(wavs, (0, n_samples - wavs.shape[1])), torch.full((len(wavs),), wavs.shape[1] / n_samples)

    def scene_embeddings(self, wavs, wav_lens=None):
        """One vector a clip: the mean of the feature map over frequency and over the steps of the clip's true length.

        Of clips that are longer than those that the model was trained on, the beginning counts.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        torch.Tensor
            `[batch, channels]`, float32.

        Raises
        ------
        ValueError
            See `encode_batch`.
        """
        vectors = step_vectors(self.encode_batch(wavs, wav_lens))
        if not self.has_times:
            return vectors.mean(1)
        lengths = true_lengths(torch.atleast_2d(torch.as_tensor(wavs)).to(vectors.device), wav_lens)
        n_steps = self.n_steps_of(lengths).clamp(max=vectors.shape[1])[:, None]
        inside = torch.arange(vectors.shape[1], device=vectors.device) < n_steps
        return (vectors * inside[..., None]).sum(1) / n_steps

    def timestamp_embeddings(self, wavs, hop=1.0):
        """Vectors along the time of clips of any length, from windows that overlap.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, at the model's sample rate, without padding.
        hop : float
            Seconds from a window to the next.

        Returns
        -------
        (torch.Tensor, torch.Tensor)
            Vectors float32 `[batch, steps, channels]`, and the middles of the steps in milliseconds, `[steps]`.

        Raises
        ------
        ValueError
            See `encode_batch`.
        """
        wavs = torch.atleast_2d(torch.as_tensor(wavs))
        n_samples, hop_samples, hop_steps = self.window_and_hop(wavs.shape[1] / self.hparams.sample_rate or 1.0, hop)

        def vectors_of(window):
            feature_map = self.encode_batch(*self.whole_window(window, n_samples))
            return step_vectors(feature_map)[:, : self.n_steps_of(window.shape[1])].transpose(0, 1)

        parts = map(vectors_of, windows([wavs], n_samples, hop_samples))
        vectors = torch.cat(list(overlapped(parts, hop_steps))).transpose(0, 1)
        # the only step of a clip shorter than half a step has its middle beyond the clip
        times = self.step_times(vectors.shape[1]).clamp(max=wavs.shape[1] / self.hparams.sample_rate)
        return vectors, (1000 * times).float().to(vectors.device)


def step_vectors(feature_map):
    """A feature map's mean over frequency.

    Arguments
    ---------
    feature_map : torch.Tensor or tuple of them
        `[batch, channels, freq, steps]` or `[batch, channels, steps]`; of several, the channels are joined.

    Returns
    -------
    torch.Tensor
        `[batch, steps, channels]`, float32.

    Example
    -------
    >>> step_vectors(torch.zeros(2, 1280, 4, 33)).shape
    torch.Size([2, 33, 1280])
    """
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map,)
    means = [one.float().mean(2) if one.dim() == 4 else one.float() for one in maps]
    steps = max(mean.shape[2] for mean in means)
    return torch.cat([F.interpolate(mean, size=steps) for mean in means], dim=1).transpose(1, 2)


@contextmanager
def _taking(module, x):
    """What a part that is not of this toolkit says of a clip that is too short for it, as an error about the clip."""
    try:
        yield
    except RuntimeError as error:
        if type(module).__module__.startswith("psla_sb.") or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{type(module).__qualname__} cannot take {list(x.shape)}: {error}") from error


def finite(feats, source="waveforms"):
    """The features themselves, if they are numbers.

    Raises
    ------
    InputError
        They are not: some samples are not finite, or so large that their energy is not.

    Example
    -------
    >>> finite(torch.tensor([[[float("nan")]]]), "loud.wav")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: loud.wav: samples that are not finite, or far outside of [-1, 1]
    """
    if not torch.isfinite(feats).all():
        raise InputError(f"{source}: samples that are not finite, or far outside of [-1, 1]")
    return feats
