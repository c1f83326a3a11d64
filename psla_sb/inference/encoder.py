"""Waveforms -> what a trained encoder makes of them: feature maps, one vector a clip, vectors along the time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.autocast import AMPConfig
from speechbrain.utils.distributed import infer_device
from torch import Tensor, nn
from torch.nn import functional as F

from psla_sb.checkpoints.weights import move_statistics
from psla_sb.dataio.audio import NOT_FINITE, Opened, check_scale, named, opened, read_blocks
from psla_sb.dataio.windows import covering, overlapped, windows
from psla_sb.errors import InputError, largest_that_fits
from psla_sb.lobes import chain
from psla_sb.lobes.compiled import Recorded
from psla_sb.lobes.efficientnet import CONVOLUTIONAL, cast_convolutions, fold_norms
from psla_sb.lobes.features import LogMel, frame_length_and_shift, true_lengths
from psla_sb.lobes.pooling import AttentionPooling, ConvPooling, MeanPooling, MLPPooling

# That a CPU encodes at a time. With more, activations pass the 32 MB up to which glibc keeps freed memory for the next layer, and
# asking the system for fresh pages takes a third of the time.
CPU_FRAMES = 2112
WINDOW = 10.0  # seconds
# What has no more columns, and no fewer rows, is taken for a waveform the wrong way round.
MOST_CHANNELS, LEAST_SAMPLES = 8, 256

# what has faster forms
FASTER = (*CONVOLUTIONAL, AttentionPooling, MeanPooling, MLPPooling, ConvPooling)

FeaturesAndLens = tuple[Tensor, Tensor | None]  # [batch, frames, mels]; relative lengths, [batch]
FeatureMap = Tensor | tuple[Tensor, ...]  # [batch, channels, freq, steps] or [batch, channels, steps]; an ensemble gives several


class SoundEncoder(Pretrained):
    """Computes a trained model's feature maps and embeddings.

    Wherever waveforms are taken, they are `[batch, samples]`, or `[samples]` of a single clip, floating point, at the model's
    sample rate; `wav_lens` are `[batch]`, lengths relative to the longest clip. Tensors of another kind are a ValueError.
    """

    MODULES_NEEDED: tuple[str, ...] = ("compute_features", "mean_var_norm", "embedding_model")
    HPARAMS_NEEDED: tuple[str, ...] = ("sample_rate",)
    # by name of a module: its state, and its faster form; replaced, never changed
    _faster: dict[str, tuple[Any, Any]] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        move_statistics(self.mods, self.device)

    @property
    def device(self) -> str:
        """Says where the modules are, of several GPUs on which."""
        return self._device

    @device.setter
    def device(self, device: str | None) -> None:
        # SpeechBrain, which sets it at first, complains of one that does not say which
        device = infer_device() if device is None else device
        self._device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        moved = super()._apply(*args, **kwargs)
        self.device = str(next((parameter.device for parameter in self.mods.parameters()), self.device))
        move_statistics(self.mods, self.device)
        return moved

    @property
    def n_samples(self) -> int | None:
        """Says how much of a clip the model takes, in samples: as much as it was trained on; None if all."""
        return chain.n_samples_of(self.mods, getattr(self.hparams, "n_frames", None), self.hparams.sample_rate)

    @property
    def window(self) -> int:
        """Says how many samples the model hears at a time: `n_samples`, or 10 s where a model takes any length."""
        return self.n_samples or round(WINDOW * self.hparams.sample_rate)

    @property
    def longest(self) -> int:
        """Says how many samples of a clip the model hears in one `window`; less than a frame may be left over."""
        _, shift = frame_length_and_shift(self.hparams.sample_rate)
        return self.window + (shift - 1 if self.n_samples else 0)

    @property
    def cut(self) -> Callable[[Iterable[Tensor]], Iterator[Tensor]]:
        """Cuts a sound's blocks into windows that overlap by half, the last of which ends where the sound ends."""
        return partial(covering, length=self.window, hop=self.window - self.window // 2, longest=self.longest)

    def features(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Computes normalised features `[batch, frames, mels]`; not finite where samples, or their energy, are not."""
        return self.features_and_lens(wavs, wav_lens)[0]

    def features_and_lens(self, wavs: Tensor, wav_lens: Tensor | None = None) -> FeaturesAndLens:
        """Computes `features`, and the relative lengths of what comes out, for encoders and classifiers that take them."""
        wavs, wav_lens = self._checked(wavs, wav_lens)
        with torch.inference_mode(), taking(self.mods.compute_features, wavs):
            return chain.features(self.mods, wavs, wav_lens, n_samples=self.n_samples)

    def _checked(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Brings waveforms and lengths to the device, `[batch, samples]` and `[batch]`, and refuses what they cannot be."""
        wavs = torch.as_tensor(wavs)
        wavs = wavs[None] if wavs.dim() == 1 else wavs
        given = f"{wavs.dtype} {list(wavs.shape)}"
        if wavs.dim() != 2 or not wavs.numel() or not wavs.is_floating_point():
            raise ValueError(
                f"waveforms must be floating-point numbers in [-1, 1], [batch, samples] with a sample or more, not {given}"
            )
        if wavs.shape[1] <= MOST_CHANNELS and len(wavs) >= LEAST_SAMPLES:
            looks = "looks like [samples, channels]: give wavs.mean(1), or tag_file the array"
            raise ValueError(f"waveforms are [batch, samples], but {given} {looks}")
        if wav_lens is not None:
            wav_lens = torch.as_tensor(wav_lens, dtype=torch.float32).to(self.device)
            if wav_lens.shape != wavs.shape[:1] or not ((wav_lens > 0) & (wav_lens <= 1)).all():
                raise ValueError(f"wav_lens must be {len(wavs)} relative lengths in (0, 1], not {wav_lens.tolist()}")
        wavs = wavs.to(self.device).float()
        check_scale("waveforms", wavs)
        return wavs, wav_lens

    def checked_features(self, wavs: Tensor, wav_lens: Tensor | None = None, source: str | Path = "waveforms") -> FeaturesAndLens:
        """Computes `features_and_lens`, but refuses samples that are not finite, or so large that their energy is not."""
        feats, lens = self.features_and_lens(wavs, wav_lens)
        if not torch.isfinite(feats).all():
            raise InputError(f"{source}: {NOT_FINITE}")
        return feats, lens

    def encode_features(self, feats: Tensor, lens: Tensor | None = None) -> FeatureMap:
        """Computes the feature maps of normalised features `[batch, frames, mels]` on the encoder's device."""
        try:
            return self._encoded(feats, lens)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        torch.cuda.empty_cache()
        fits = largest_that_fits(lambda n: self._encoded(feats[:n], None if lens is None else lens[:n]), len(feats))
        advice = f"{fits} fit, give a smaller batch_size" if fits else "not even one fits"
        raise InputError(f"{self.device} has too little memory for {len(feats)} clips at a time: {advice} ({reason})")

    def _encoded(self, feats: Tensor, lens: Tensor | None) -> FeatureMap:
        encoder = self._fast("embedding_model", self._fast_encoder)
        at_a_time = max(1, CPU_FRAMES // feats.shape[1]) if feats.device.type == "cpu" else len(feats)
        parts = feats.split(at_a_time)
        lens_of_parts = [None] * len(parts) if lens is None else lens.split(at_a_time)
        with torch.inference_mode(), self.inference_ctx, taking(encoder, feats):
            maps = [chain.call(encoder, *part) for part in zip(parts, lens_of_parts, strict=True)]
            if len(maps) == 1:
                return maps[0]
            return tuple(map(torch.cat, zip(*maps, strict=True))) if isinstance(maps[0], tuple) else torch.cat(maps)

    def _fast(self, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Gives a faster form of one of the modules, made anew when its weights have changed.

        `mods` keeps the weights as they were trained.
        """
        module = self.mods[name]
        if module.training or not any(isinstance(part, FASTER) for part in module.modules()):
            return module
        # a write in place raises a tensor's version, a new tensor has another address; tensors of inference mode have no version
        tensors = [*module.parameters(), *module.buffers()]
        state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self._faster.get(name, (None, None))[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                # in a tuple, so that it is no part of the module
                self._faster = {**self._faster, name: (state, make(module))}
        return self._faster[name][1]

    def _fast_encoder(self, encoder: nn.Module) -> nn.Module:
        """On a CPU with batch normalisations in the convolutions; a GPU is faster with the network as it is, recorded."""
        if self.device_type != "cuda":
            return fold_norms(encoder)
        dtype = AMPConfig.from_name(self.precision).dtype
        encoder = encoder if dtype == torch.float32 else cast_convolutions(encoder, dtype)
        return Recorded(encoder) if isinstance(encoder, CONVOLUTIONAL) else encoder

    def _fast_classifier(self, classifier: nn.Module) -> nn.Module:
        return Recorded(classifier) if self.device_type == "cuda" and isinstance(classifier, FASTER) else classifier

    def encode_batch(self, wavs: Tensor, wav_lens: Tensor | None = None, normalize: bool = False) -> FeatureMap:
        """Computes feature maps as SpeechBrain's `EncoderClassifier.encode_batch` does, but padding is told from silence.

        `normalize` must be False: these models have no statistics of embeddings.
        """
        if normalize:
            raise ValueError("normalize=True needs statistics of embeddings, which these models do not have")
        return self.encode_features(*self.checked_features(wavs, wav_lens))

    def encode_file(self, path: Any, sample_rate: int | None = None) -> FeatureMap:
        """Computes the feature map of a sound, of a long one of its first `window`.

        It is a path or a file object that `psla_sb.dataio.audio.read_audio` reads, or an array of `sample_rate`, see `to_waveform`
        there.
        """
        sound = self._opened(path, sample_rate)
        wave = next(covering(read_blocks(sound, self.hparams.sample_rate), self.window, self.window, self.longest))
        return self.encode_features(*self.checked_features(wave - wave.mean(), source=named(sound)))

    def _opened(self, source: Any, sample_rate: int | None) -> Opened:
        return opened(source, sample_rate, self.hparams.sample_rate)

    @cached_property
    def _step(self) -> tuple[int | None, int]:
        """Frames of a step of the feature map (None: a clip of any length has as many steps), and samples of a frame."""
        rate, front_end = self.hparams.sample_rate, self.mods.compute_features
        feats = self.features(torch.zeros(1, self.n_samples or 10 * rate))
        return chain.frames_per_step(self.mods.embedding_model, *feats.shape[1:]), chain.frame_shift(front_end, rate)

    @property
    def has_times(self) -> bool:
        """Says whether the steps of the feature map follow the clip, so that they have times."""
        return self._step[0] is not None

    def _frames_per_step(self) -> int:
        frames = self._step[0]
        if frames is None:
            encoder = type(self.mods.embedding_model).__qualname__
            raise InputError(
                f"this model's embedding_model ({encoder}) gives as many steps for a clip of any length: they have no times"
            )
        return frames

    def n_steps_of(self, n_samples: int | Tensor) -> Any:
        """Counts the steps of the feature map, one at least, whose middle is within so many samples: a number, or a tensor."""
        stride, shift = self._frames_per_step(), self._step[1]
        front_end = self.mods.compute_features
        n_frames = front_end.frames_of(n_samples) if isinstance(front_end, LogMel) else n_samples // shift
        offset = chain.step_offset(self.mods.embedding_model)
        n_steps = (n_frames + (stride // 2 if offset is None else stride - max(1, offset))) // stride
        return n_steps.clamp(min=1) if isinstance(n_steps, Tensor) else max(1, n_steps)

    def step_times(self, n_steps: int, first: int = 0) -> Tensor:
        """Gives the middles of so many steps of the feature map in seconds, from the `first` on: float64 `[n_steps - first]`."""
        stride, offset = self._frames_per_step(), chain.step_offset(self.mods.embedding_model)
        # a step that is alone stands for all that there is
        middles = torch.arange(first, n_steps, dtype=torch.float64) + (0.5 if offset is None or n_steps == 1 else offset / stride)
        return middles * stride * self._step[1] / self.hparams.sample_rate

    def window_and_hop(self, window: float, hop: float) -> tuple[int, int, int]:
        """Turns seconds into samples of a window, no longer than the model takes, samples of the hop, and its whole steps."""
        if not (0 < window < float("inf") and 0 < hop < float("inf")):
            raise ValueError(f"window and hop must be positive numbers of seconds, not {window} and {hop}")
        rate, stride = self.hparams.sample_rate, self._frames_per_step() * self._step[1]
        n_samples = max(round(window * rate), stride)
        n_samples = min(n_samples, self.n_samples or n_samples)
        hop_steps = max(1, min(round(hop * rate / stride), n_samples // stride))
        return n_samples, hop_steps * stride, hop_steps

    def whole_window(self, wavs: Tensor, n_samples: int) -> tuple[Tensor, Tensor | None]:
        """Fills a recording's last piece up for front ends that cannot take any length, and gives its relative lengths."""
        if isinstance(self.mods.compute_features, LogMel) or wavs.shape[1] == n_samples or self.n_samples is not None:
            return wavs, None
        return F.pad(wavs, (0, n_samples - wavs.shape[1])), torch.full((len(wavs),), wavs.shape[1] / n_samples)

    def scene_embeddings(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Computes one vector a clip, float32 `[batch, channels]`: the feature map's mean over frequency and the true length.

        Of clips that are longer than those that the model was trained on, the beginning counts.
        """
        if wav_lens is not None and self.n_samples is None:
            return chain.by_length(self.scene_embeddings, *self._checked(wavs, wav_lens))
        vectors = step_vectors(self.encode_batch(wavs, wav_lens))
        if not self.has_times:
            return vectors.mean(1)
        lengths = true_lengths(torch.atleast_2d(torch.as_tensor(wavs)).to(vectors.device), wav_lens)
        n_steps = self.n_steps_of(lengths).clamp(max=vectors.shape[1])[:, None]
        inside = torch.arange(vectors.shape[1], device=vectors.device) < n_steps
        return (vectors * inside[..., None]).sum(1) / n_steps

    def timestamp_embeddings(self, wavs: Tensor, hop: float = 1.0) -> tuple[Tensor, Tensor]:
        """Computes vectors along clips of any length, without padding, from windows that begin `hop` seconds after each other.

        Returns float32 `[batch, steps, channels]`, and the middles of the steps in milliseconds, `[steps]`.
        """
        wavs = torch.atleast_2d(torch.as_tensor(wavs))
        seconds = wavs.shape[1] / self.hparams.sample_rate
        n_samples, hop_samples, hop_steps = self.window_and_hop(seconds or 1.0, hop)

        def vectors_of(window):
            feature_map = self.encode_batch(*self.whole_window(window, n_samples))
            return step_vectors(feature_map)[:, : self.n_steps_of(window.shape[1])].transpose(0, 1)

        # each step is in several windows: `overlapped` weighs their values by how far it is from the windows' ends
        parts = map(vectors_of, windows([wavs], n_samples, hop_samples))
        vectors = torch.cat(list(overlapped(parts, hop_steps))).transpose(0, 1)
        # the only step of a clip shorter than half a step has its middle beyond the clip
        times = self.step_times(vectors.shape[1]).clamp(max=seconds)
        return vectors, (1000 * times).float().to(vectors.device)


def step_vectors(feature_map: FeatureMap) -> Tensor:
    """Averages a feature map over frequency: float32 `[batch, steps, channels]`; of several maps, the channels are joined."""
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map,)
    means = [one.float().mean(2) if one.dim() == 4 else one.float() for one in maps]
    steps = max(mean.shape[2] for mean in means)
    return torch.cat([F.interpolate(mean, size=steps) for mean in means], dim=1).transpose(1, 2)


@contextmanager
def taking(module: Any, x: Tensor) -> Iterator[None]:
    """Turns what another's part says of a clip that is too short for it into an error about the clip."""
    try:
        yield
    except Exception as error:
        if type(module).__module__.startswith("psla_sb.") or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{type(module).__qualname__} cannot take {list(x.shape)}: {error}") from error
