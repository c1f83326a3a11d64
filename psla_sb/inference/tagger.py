"""What users call to tag sounds: a trained tagger, loaded from wherever it is kept."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from psla_sb.checkpoints import hub
from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING
from psla_sb.checkpoints.sources import Published, Snapshot, Source, TaggerFolder, open_source, run_weights
from psla_sb.checkpoints.tagger_folder import read_calibration
from psla_sb.dataio.audio import Opened, centred, named, read_blocks, read_if_short
from psla_sb.dataio.windows import batches, joined, overlapped, windows
from psla_sb.inference.encoder import SoundEncoder, taking
from psla_sb.inference.many_files import Pooled, check_pool, over_files
from psla_sb.inference.stream import AudioStream, window_scores
from psla_sb.inference.timeline import Timeline, events
from psla_sb.labels.calibration import Calibration
from psla_sb.labels.enhancement import propagation_matrix
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain
from psla_sb.lobes.chain import MODULES
from psla_sb.lobes.features import true_lengths

WINDOWS_AT_ONCE = 8


class Tag(NamedTuple):
    """A class that a sound was scored for; the score is in [0, 1].

    Of a tagger that has a `calibration` there are the `probability` that the sound has the class, and the `decision` that it has,
    which is that the score reaches the class's threshold. Both are of single clips: of a sound in several windows whose scores
    were pooled by "max", they say that of the best window.
    """

    label: str
    mid: str
    score: float
    probability: float | None = None
    decision: bool | None = None


class FileTags(NamedTuple):
    """What became of one of many files: its `tags`, or, if it could not be tagged, None and an `error`."""

    path: str
    tags: list[Tag] | None
    error: str | None


class AudioTagger(SoundEncoder):
    """Tags sounds with a trained model.

    Constructors take `device`, such as "cuda:0", and hand `**kwargs`, such as `run_opts`, to SpeechBrain. Waveforms are floating
    point, at the model's sample rate. What cannot be used, source, file or samples, is an InputError; numbers out of range are
    ValueErrors.

    Example
    -------
    >>> import numpy as np
    >>> import soundfile
    >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> from psla_sb.lobes import efficientnet, pooling
    >>> folder = getfixture("tmp_path")
    >>> save_psla_checkpoint(folder / "model.pth", efficientnet.EfficientNetEncoder("b0"), pooling.MeanPooling(1280, 2))
    >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "labels.csv")
    >>> open_source(folder / "model.pth", labels=folder / "labels.csv").export(folder / "tagger")
    >>> tagger = AudioTagger.from_hparams(source=folder / "tagger")
    >>> soundfile.write(folder / "sound.wav", [0.0] * 16000, 16000)
    >>> sorted(tag.label for tag in tagger.tag_file(folder / "sound.wav"))
    ['Bell', 'Rain']
    >>> stream = tagger.stream(sample_rate=44100)
    >>> stream.push(np.zeros((44100, 2), np.int16)).scores.shape, stream.finish().scores.shape
    ((0, 2), (3, 2))
    """

    MODULES_NEEDED = MODULES
    HPARAMS_NEEDED = ("sample_rate", "mids", "label_encoder")
    _hierarchy: Tensor | None = None  # [2, pairs]: a class, and one above it that follows from it

    @classmethod
    def from_hparams(
        cls, source: str | Path, savedir: str | Path | None = None, device: str | None = None, **kwargs: Any
    ) -> "AudioTagger":
        """Loads a folder, or a repository on Hugging Face such as `somebody/tagger`, which is downloaded to `savedir` or its cache.

        `hyperparams.yaml` is SpeechBrain's HyperPyYAML: this constructs whatever it names, so **it can run any code of whoever
        wrote it**. Load what you trust, pinned to a revision that you have read, with `speechbrain.utils.fetching`'s
        `fetch_config=FetchConfig(revision="5c0be3875fda05e81f3c004ed8c7c06be308de1e")`. Of folders, `from_folder` is the safe way.
        """
        tagger = super().from_hparams(source=str(source), savedir=savedir, **_on_device(device, kwargs))
        folder = hub.with_calibration(source, savedir, **{key: kwargs[key] for key in kwargs if key == "fetch_config"})
        tagger.hparams.calibration = read_calibration(folder, Vocabulary(tagger.hparams.mids, tagger.labels))
        return tagger

    @classmethod
    def from_source(cls, source: Source, device: str | None = None, **kwargs: Any) -> "AudioTagger":
        """Loads what `psla_sb.checkpoints.sources.open_source` has opened."""
        hparams = source.hparams()
        return cls({name: hparams[name] for name in MODULES}, hparams, **_on_device(device, kwargs))

    @classmethod
    def from_folder(cls, folder: str | Path, trust: Sequence[str] = (), **kwargs: Any) -> "AudioTagger":
        """Loads a folder that a run or `psla-export` wrote; it constructs nothing but the toolkit's parts and what is trusted.

        Trusted are the modules that `trust` names, such as `["my_lobes"]`, and installed packages with an entry point of the group
        `psla_sb.lobes`.
        """
        return cls.from_source(TaggerFolder(folder, trust), **kwargs)

    @classmethod
    def from_psla_checkpoint(
        cls, path: str | Path, labels: str | Path, padding: str = PUBLISHED_PADDING, n_frames: int = AUDIOSET_FRAMES, **kwargs: Any
    ) -> "AudioTagger":
        """Loads a `.pth` file of the published PSLA code; `psla-import` writes it as a folder, which loads faster and by itself.

        `from_any(path, labels)` loads EfficientAT's files as well.

        Arguments
        ---------
        labels
            The class list, such as AudioSet's `class_labels_indices.csv`; it must fit the model.
        padding, n_frames
            "symmetric" for official models; frames that it was trained on: 1056 for AudioSet, 3000 for FSD50K.
        """
        return cls.from_source(Published(path, labels, padding, n_frames), **kwargs)

    @classmethod
    def from_experiment(
        cls, folder: str | Path, weights: str | int = "average", trust: Sequence[str] = (), **kwargs: Any
    ) -> "AudioTagger":
        """Loads a run from its `output_folder`: the weights "average" (of the last epochs), "best", "last", or of an epoch."""
        return cls.from_snapshot(run_weights(folder, weights), trust, **kwargs)

    @classmethod
    def from_snapshot(cls, path: str | Path, trust: Sequence[str] = (), **kwargs: Any) -> "AudioTagger":
        """Loads a snapshot of a run, such as `results/psla/1/snapshots/epoch_30.safetensors`, from the run's folder."""
        return cls.from_source(Snapshot(path, trust), **kwargs)

    @classmethod
    def from_any(
        cls, source: str | Path, labels: str | Path | None = None, trust: Sequence[str] = (), **kwargs: Any
    ) -> "AudioTagger":
        """Loads a tagger's folder, a run's folder (its weight average), a snapshot, or a published checkpoint with its `labels`.

        Or a repository on Hugging Face, `hf://owner/name` or `hf://owner/name@revision`; or a published model by its name, such as
        "efficientat-mn10", see `psla-models`. Both are downloaded once; loading them constructs no more than `from_folder` does.
        """
        return cls.from_source(open_source(source, labels, trust), **kwargs)

    @property
    def labels(self) -> list[str]:
        """Names the classes, in the order of the scores."""
        return [self.hparams.label_encoder.ind2lab[i] for i in range(len(self.hparams.mids))]

    @property
    def calibration(self) -> Calibration | None:
        """Holds what turns scores into probabilities and decisions, `psla_sb.labels.calibration`; None if the model has nothing."""
        return getattr(self.hparams, "calibration", None)

    def use_hierarchy(self, ontology: Ontology | str | Path | None, parents: str = "ontology") -> None:
        """Makes a parent's score the highest of its own and its children's, upward as far as there is one parent alone.

        From then on this holds for tags, scores, timelines and events: of the scores of pooled windows, before thresholds and
        probabilities, which were fitted to scores without it. It does not for `tag_features`, nor for ONNX files. None ends it.

        Arguments
        ---------
        ontology
            Or its file, such as AudioSet's `ontology.json`; an InputError if nothing follows by it from any class.
        parents
            Where parents are counted, "ontology" or "vocabulary", see `psla_sb.labels.enhancement.propagation_matrix`.
        """
        pairs = None
        if ontology is not None:
            relations = ontology if isinstance(ontology, Ontology) else Ontology.from_json(ontology)
            matrix = propagation_matrix(Vocabulary(self.hparams.mids, self.labels), relations, parents)
            pairs = torch.from_numpy(matrix).nonzero().T
        self._hierarchy = pairs

    def raised(self, scores: Tensor) -> Tensor:
        """Does to scores `[..., classes]` what `use_hierarchy` has asked for."""
        if self._hierarchy is None:
            return scores
        below, above = self._hierarchy.to(scores.device)
        return scores.scatter_reduce(-1, above.expand(*scores.shape[:-1], -1), scores[..., below], "amax")

    def score_batch(self, wavs: Tensor, wav_lens: Tensor | None = None, pool: str = "max") -> Tensor:
        """Scores waveforms `[batch, samples]` or `[samples]`, of relative lengths `[batch]`: `[batch, classes]`, in [0, 1].

        Those that are longer than what the model hears at a time are heard in windows, see `tag_file`.
        """
        wavs, wav_lens = self._checked(wavs, wav_lens)
        if wavs.shape[1] > self.longest:
            lengths = true_lengths(wavs, wav_lens).tolist()
            each = (self.cut([wav[:length]]) for wav, length in zip(wavs, lengths, strict=True))
            return torch.stack([self._pooled(pieces, pool, "waveforms") for pieces in each])
        check_pool(pool)
        if wav_lens is None or self.n_samples is not None:
            return self.raised(self.tag_features(*self.checked_features(wavs, wav_lens)))
        return self.raised(chain.by_length(lambda clips: self.tag_features(*self.checked_features(clips)), wavs, wav_lens))

    def tag_batch(
        self, wavs: Tensor, wav_lens: Tensor | None = None, top_k: int = 5, threshold: float | None = None, pool: str = "max"
    ) -> list[list[Tag]]:
        """Gives the best-scored classes of each waveform, as `tag_file` does; waveforms as of `score_batch`."""
        return [self._tags(scores, top_k, threshold) for scores in self.score_batch(wavs, wav_lens, pool)]

    def tag_features(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Scores normalised features `[batch, frames, mels]` on the tagger's device: `[batch, classes]`, in [0, 1]."""
        feature_map = self.encode_features(feats, lens)
        with torch.inference_mode(), self.inference_ctx, taking(self.mods.classifier, feats):
            classifier = self._fast("classifier", self._fast_classifier)
            return chain.classify({"classifier": classifier}, feature_map, lens).clamp(0.0, 1.0)

    def tag_file(
        self,
        source: Any,
        top_k: int = 5,
        threshold: float | None = None,
        pool: str = "max",
        sample_rate: int | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> list[Tag]:
        """Gives the best-scored classes of a sound, best first: `top_k` at most, each with a score of `threshold` at least.

        A sound that is not longer than what the model hears at a time (`window`) is one clip. A longer one is heard whole, piece by
        piece, in windows that overlap by half, the last of which ends where the sound ends.

        Arguments
        ---------
        source
            A path or a file object that `dataio.audio.read_audio` reads; or an array, see `dataio.audio.to_waveform`.
        pool
            What a class's score is of those of several windows: "max", "mean" or the "first" window's.
        sample_rate
            Of an array, in Hz.
        on_progress
            Is called, during this call, with the seconds of a long sound that have been read so far; what it raises ends the work.
        """
        return self._tags(self._scores_of(self._opened(source, sample_rate), pool, on_progress), top_k, threshold)

    def _scores_of(self, sound: Opened, pool: str = "max", on_progress: Callable[[float], Any] | None = None) -> Tensor:
        """Scores one sound: `[classes]`."""
        check_pool(pool)
        rate = self.hparams.sample_rate
        clip = read_if_short(sound, rate, self.longest)
        if clip is not None:
            return self.raised(self.tag_features(*self.checked_features(centred(*clip), source=named(sound))))[0]
        return self._pooled(self.cut(read_blocks(sound, rate, on_progress=on_progress)), pool, named(sound))

    def _pooled(self, pieces: Iterable[Tensor], pool: str, source: Any) -> Tensor:
        """Scores windows, less their means, and pools them: `[classes]`."""
        pooled = Pooled(pool)
        pieces = islice(pieces, 1) if pool == "first" else pieces
        for wavs in batches((piece - piece.mean() for piece in pieces), WINDOWS_AT_ONCE):
            pooled.add(self.tag_features(*self.checked_features(wavs, source=source)).float().cpu())
        return self.raised(pooled.result().to(self.device))

    def _tags(self, scores: Tensor, top_k: int, threshold: float | None) -> list[Tag]:
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        scores = scores.float().cpu()
        best = scores.topk(min(top_k, len(scores)))
        known = [[None] * len(scores)] * 2
        if self.calibration is not None:
            known = [of(scores.numpy()).tolist() for of in (self.calibration.probabilities, self.calibration.decisions)]
        return [
            Tag(self.hparams.label_encoder.ind2lab[i], self.hparams.mids[i], score, known[0][i], known[1][i])
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if threshold is None or score >= threshold
        ]

    def tag_files(
        self,
        paths: Iterable[Any],
        batch_size: int = 16,
        num_workers: int = 0,
        top_k: int = 5,
        threshold: float | None = None,
        progress: bool = True,
        pool: str = "max",
        sample_rate: int | None = None,
    ) -> Iterator[FileTags]:
        """Tags many of what `tag_file` takes, as it does, in their order; one that cannot be tagged has an error.

        `batch_size` sounds are on the device together; `num_workers` processes decode, if all are paths; `progress` shows a bar on
        a terminal.
        """
        if min(batch_size, top_k) < 1 or num_workers < 0:
            raise ValueError(f"batch_size and top_k must be 1 or more, num_workers 0 or more: {batch_size}, {top_k}, {num_workers}")
        sounds = paths if isinstance(paths, Sequence) else list(paths)
        # a file object has one position, which processes would share
        num_workers = num_workers if all(isinstance(sound, str | os.PathLike) for sound in sounds) else 0
        found = over_files(self, sounds, self.score_batch, pool, batch_size, num_workers, sample_rate)
        for row, scores, error in tqdm(found, total=len(sounds), unit=" files", disable=None if progress else True):
            yield FileTags(named(sounds[row]), None if scores is None else self._tags(scores, top_k, threshold), error)

    def classify_batch(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Gives what SpeechBrain's method does: scores `[batch, classes]`; the best class's score, index and label, `[batch]`."""
        return self._classified(self.score_batch(wavs, wav_lens))

    def classify_file(self, path: Any, sample_rate: int | None = None) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Gives what `classify_batch` does, of whatever `tag_file` takes."""
        return self._classified(self._scores_of(self._opened(path, sample_rate))[None])

    def _classified(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        best, index = scores.max(dim=-1)
        return scores, best, index, self.hparams.label_encoder.decode_torch(index)

    @property
    def has_timeline(self) -> bool:
        """Says whether `tag_timeline` works: the classifier has `segment_scores`, and the encoder's steps follow the clip."""
        return chain.has_segment_scores(self.mods.classifier) and self.has_times

    def tag_timeline(
        self,
        path: Any,
        window: float = 10.0,
        hop: float = 1.0,
        batch_size: int = 8,
        sample_rate: int | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> Timeline:
        """Scores all classes along a recording of any length, whatever `tag_file` takes; a file is read piece by piece.

        Overlapping windows are scored at each step of the encoder (0.32 s), without attention, which compares steps with each
        other; where windows overlap, the curve is their mean.

        Arguments
        ---------
        window, hop
            Seconds that the model sees together, at most what it was trained on; from a window to the next, as whole steps.
        on_progress
            As of `tag_file`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        n_samples, hop_samples, hop_steps = self.window_and_hop(window, hop)
        sound = self._opened(path, sample_rate)
        blocks = read_blocks(sound, self.hparams.sample_rate, on_progress=on_progress)
        pieces = windows(blocks, n_samples, hop_samples)
        curve = overlapped(window_scores(self, pieces, n_samples, batch_size, named(sound)), hop_steps)
        scores = joined(map(self.raised, curve))
        return Timeline(self.step_times(len(scores)).numpy(), scores, self.labels, list(self.hparams.mids))

    def stream(self, sample_rate: int, window: float = 10.0, hop: float = 1.0, batch_size: int = 8) -> AudioStream:
        """Begins a stream, which takes a sound of `sample_rate` in blocks, and gives what `tag_timeline` gives of the whole.

        Scores come a `window` after what they are of: a shorter one is sooner, and hears less around each step.
        """
        return AudioStream(self, sample_rate, window, hop, batch_size)

    events = staticmethod(events)

    forward = score_batch


def _on_device(device: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if device is None else {**kwargs, "run_opts": {**(kwargs.get("run_opts") or {}), "device": device}}
