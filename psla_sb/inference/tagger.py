"""What users call to tag sounds: a trained tagger, loaded from wherever it is kept."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING
from psla_sb.checkpoints.sources import Published, Snapshot, Source, TaggerFolder, open_source, run_weights
from psla_sb.dataio.audio import read_blocks, read_clip
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.windows import batches, joined, overlapped, windows
from psla_sb.errors import InputError
from psla_sb.inference.encoder import NOT_FINITE, SoundEncoder, taking
from psla_sb.inference.timeline import Timeline, events
from psla_sb.lobes import chain
from psla_sb.lobes.chain import MODULES


class Tag(NamedTuple):
    """A class that a sound was scored for; the score is in [0, 1]."""

    label: str
    mid: str
    score: float


class FileTags(NamedTuple):
    """What became of one of many files: its `tags`, or, if it could not be tagged, None and an `error`."""

    path: str
    tags: list[Tag] | None
    error: str | None


class AudioTagger(SoundEncoder):
    """Tags sounds with a trained model.

    Constructors hand `**kwargs`, such as `run_opts={"device": "cuda:0"}`, to SpeechBrain. Waveforms are floating point, at the
    model's sample rate. What cannot be used, source, file or samples, is an InputError; numbers out of range are ValueErrors.

    Example
    -------
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
    """

    MODULES_NEEDED = MODULES
    HPARAMS_NEEDED = ("sample_rate", "mids", "label_encoder")

    @classmethod
    def from_hparams(cls, source: str | Path, savedir: str | Path | None = None, **kwargs: Any) -> "AudioTagger":
        """Loads a folder, or a repository on Hugging Face such as `somebody/tagger`, which is downloaded to `savedir` or its cache.

        `hyperparams.yaml` is SpeechBrain's HyperPyYAML: this constructs whatever it names, so **it can run any code of whoever
        wrote it**. Load what you trust, pinned to a revision that you have read, with `speechbrain.utils.fetching`'s
        `fetch_config=FetchConfig(revision="5c0be3875fda05e81f3c004ed8c7c06be308de1e")`. Of folders, `from_folder` is the safe way.
        """
        return super().from_hparams(source=str(source), savedir=savedir, **kwargs)

    @classmethod
    def from_source(cls, source: Source, **kwargs: Any) -> "AudioTagger":
        """Loads what `psla_sb.checkpoints.sources.open_source` has opened."""
        hparams = source.hparams()
        return cls({name: hparams[name] for name in MODULES}, hparams, **kwargs)

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
        """Loads a tagger's folder, a run's folder (its weight average), a snapshot, or a published checkpoint with its `labels`."""
        return cls.from_source(open_source(source, labels, trust), **kwargs)

    def tag_batch(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Scores waveforms `[batch, samples]` or `[samples]`, of relative lengths `[batch]`: `[batch, classes]`, in [0, 1]."""
        return self.tag_features(*self._checked_features(wavs, wav_lens))

    def tag_features(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Scores normalised features `[batch, frames, mels]` on the tagger's device: `[batch, classes]`, in [0, 1]."""
        feature_map = self.encode_features(feats, lens)
        with torch.inference_mode(), self.inference_ctx, taking(self.mods.classifier, feats):
            return chain.classify(self.mods, feature_map, lens).clamp(0.0, 1.0)

    def tag_file(self, path: str | Path, top_k: int = 5, threshold: float | None = None) -> list[Tag]:
        """Gives the best-scored classes of a sound file, best first: `top_k` at most, each with a score of `threshold` at least.

        Whatever `dataio.audio.read_audio` reads is taken; of a long file, the beginning, as much as the model was trained on.
        """
        return self._tags(self._file_scores(path)[0], top_k, threshold)

    def _file_scores(self, path: str | Path) -> Tensor:
        return self.tag_features(*self._checked_features(read_clip(path, self.hparams.sample_rate), source=path))

    def _tags(self, scores: Tensor, top_k: int, threshold: float | None) -> list[Tag]:
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        best = scores.float().cpu().topk(min(top_k, len(scores)))
        return [
            Tag(self.hparams.label_encoder.ind2lab[i], self.hparams.mids[i], score)
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if threshold is None or score >= threshold
        ]

    def tag_files(
        self,
        paths: Iterable[str | Path],
        batch_size: int = 16,
        num_workers: int = 0,
        top_k: int = 5,
        threshold: float | None = None,
        progress: bool = True,
    ) -> Iterator[FileTags]:
        """Tags many files as `tag_file` does, in their order; one that cannot be tagged has an error.

        `batch_size` files are on the device together, `num_workers` processes decode; `progress` shows a bar on a terminal.
        """
        if min(batch_size, top_k) < 1 or num_workers < 0:
            raise ValueError(f"batch_size and top_k must be 1 or more, num_workers 0 or more: {batch_size}, {top_k}, {num_workers}")
        files = [str(path) for path in paths]
        if not files:
            return
        # a name that is no Unicode cannot be opened from a table; it is reported as a file that is not there
        names = [path.encode("utf-8", "replace").decode() or "(no name)" for path in files]
        manifest = Manifest.from_columns([str(row) for row in range(len(files))], names, [0.0] * len(files), [""] * len(files))
        if self.n_samples is None:
            # a longer clip in the batch would lengthen what the classifier sees of this one
            batch_size = 1
        rows = [range(len(files))[start : start + batch_size] for start in range(0, len(files), batch_size)]
        loader = clip_loader(manifest, self.hparams.sample_rate, self.n_samples, rows, num_workers)
        with tqdm(total=len(files), unit=" files", disable=None if progress else True) as bar:
            for batch in loader:
                yield from self._tags_of_batch(batch, files, top_k, threshold)
                bar.update(len(batch.index))

    def _tags_of_batch(self, batch: Any, files: list[str], top_k: int, threshold: float | None) -> Iterator[FileTags]:
        bad, usable, answers = NOT_FINITE, [False] * len(batch.index), batch.error
        try:
            feats, lens = self.features_and_lens(*batch.to(self.device).sig)
            finite = torch.isfinite(feats).flatten(1).all(1)
            answers, usable = self.tag_features(feats.where(finite[:, None, None], 0.0), lens).cpu(), finite.tolist()
        except InputError as refused:
            # other people's parts, whose clips are tagged one by one
            bad = str(refused)
        for row, error, good, answer in zip(batch.index, batch.error, usable, answers, strict=True):
            error = error if error or good else f"{files[row]}: {bad}"
            yield FileTags(files[row], None if error else self._tags(answer, top_k, threshold), error)

    def classify_batch(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Gives what SpeechBrain's method does: scores `[batch, classes]`; the best class's score, index and label, `[batch]`."""
        return self._classified(self.tag_batch(wavs, wav_lens))

    def classify_file(self, path: str | Path) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Gives what `classify_batch` does, of a file."""
        return self._classified(self._file_scores(path))

    def _classified(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        best, index = scores.max(dim=-1)
        return scores, best, index, self.hparams.label_encoder.decode_torch(index)

    @property
    def has_timeline(self) -> bool:
        """Says whether `tag_timeline` works: the classifier has `segment_scores`, and the encoder's steps follow the clip."""
        return chain.has_segment_scores(self.mods.classifier) and self.has_times

    def tag_timeline(self, path: str | Path, window: float = 10.0, hop: float = 1.0, batch_size: int = 8) -> Timeline:
        """Scores all classes along a recording of any length, which is read piece by piece.

        Overlapping windows are scored at each step of the encoder (0.32 s), without attention, which compares steps with each
        other; where windows overlap, the curve is their mean.

        Arguments
        ---------
        window, hop
            Seconds that the model sees together, at most what it was trained on; from a window to the next, as whole steps.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        n_samples, hop_samples, hop_steps = self.window_and_hop(window, hop)
        pieces = windows(read_blocks(path, self.hparams.sample_rate), n_samples, hop_samples)
        scores = joined(overlapped(self._window_scores(pieces, n_samples, batch_size, path), hop_steps))
        labels = [self.hparams.label_encoder.ind2lab[i] for i in range(len(self.hparams.mids))]
        return Timeline(self.step_times(len(scores)).numpy(), scores, labels, list(self.hparams.mids))

    events = staticmethod(events)

    def _window_scores(self, pieces: Iterable[Tensor], n_samples: int, batch_size: int, path: str | Path) -> Iterator[Tensor]:
        """Yields each window's `[steps, classes]`."""
        if not chain.has_segment_scores(self.mods.classifier):
            classifier = type(self.mods.classifier).__qualname__
            raise InputError(
                f"this model's classifier ({classifier}) has no segment_scores: it tells what is in a clip, not when, so there is "
                "no timeline"
            )
        for wavs in batches(pieces, batch_size):
            feature_map = self.encode_features(*self._checked_features(*self.whole_window(wavs, n_samples), path))
            with torch.inference_mode(), taking(self.mods.classifier, wavs):
                scores = chain.segment_scores(self.mods, feature_map)
            yield from scores[..., : self.n_steps_of(wavs.shape[1])].transpose(1, 2).cpu()

    forward = tag_batch
