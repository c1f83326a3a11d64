"""Tags for any sound, from a folder that `psla_sb.export` wrote."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING
from psla_sb.checkpoints.sources import Published, Snapshot, TaggerFolder, open_source, run_weights
from psla_sb.dataio.audio import read_blocks, read_clip
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.windows import batches, joined, overlapped, windows
from psla_sb.errors import InputError
from psla_sb.inference.encoder import SoundEncoder, finite
from psla_sb.inference.timeline import Timeline, events
from psla_sb.lobes import chain
from psla_sb.lobes.chain import MODULES


class Tag(NamedTuple):
    """A class that a sound was scored for.

    Example
    -------
    >>> Tag("Speech", "/m/09x0r", 0.97).label
    'Speech'
    """

    label: str
    mid: str
    score: float


class FileTags(NamedTuple):
    """What became of one of many files: `tags`, a list of Tag, or, if it could not be tagged, None and an `error`.

    Example
    -------
    >>> FileTags("nowhere.wav", None, "nowhere.wav: no such file").error
    'nowhere.wav: no such file'
    """

    path: str
    tags: list | None
    error: str | None


class AudioTagger(SoundEncoder):
    """A trained tagger.

    Example
    -------
    >>> import soundfile
    >>> from psla_sb.checkpoints.tagger_folder import export_tagger
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "run.yaml").write_text('''
    ... sample_rate: 16000
    ... compute_features: !new:psla_sb.lobes.features.KaldiFbank {n_mels: 64}
    ... mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    ... embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder {variant: b0}
    ... classifier: !new:psla_sb.lobes.pooling.MeanPooling {in_channels: 1280, n_classes: 2}
    ... ''')
    >>> modules = {"embedding_model": EfficientNetEncoder("b0"), "classifier": MeanPooling(1280, 2)}
    >>> export_tagger(folder / "tagger", folder / "run.yaml", modules, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]))
    >>> tagger = AudioTagger.from_hparams(source=str(folder / "tagger"))
    >>> soundfile.write(folder / "sound.wav", [0.0] * 16000, 16000)
    >>> sorted(tag.label for tag in tagger.tag_file(folder / "sound.wav"))
    ['Bell', 'Rain']
    """

    MODULES_NEEDED = MODULES
    HPARAMS_NEEDED = ("sample_rate", "mids", "label_encoder")

    @classmethod
    def from_hparams(cls, source, savedir=None, **kwargs):
        """Loads a folder on this machine, or a repository on Hugging Face.

        `hyperparams.yaml` is SpeechBrain's HyperPyYAML: this constructs whatever it names, so **it can run any code of whoever
        wrote it**. Load what you trust, pinned to a revision that you have read. `from_folder` loads a folder on this machine and
        constructs nothing but the toolkit's parts.

        Arguments
        ---------
        source : str
            A folder, or the name of a repository, such as `somebody/tagger`.
        savedir : str or Path, optional
            Where to keep what is downloaded; otherwise in Hugging Face's cache.
        **kwargs
            For SpeechBrain's `Pretrained.from_hparams`, such as `run_opts={"device": "cuda:0"}`, or
            `fetch_config=FetchConfig(revision="5c0be3875fda05e81f3c004ed8c7c06be308de1e")` from `speechbrain.utils.fetching`.
        """
        return super().from_hparams(source=str(source), savedir=savedir, **kwargs)

    @classmethod
    def from_source(cls, source, **kwargs):
        """Loads what `psla_sb.checkpoints.sources.open_source` has opened.

        Arguments
        ---------
        source : Source
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.
        """
        hparams = source.hparams()
        return cls({name: hparams[name] for name in MODULES}, hparams, **kwargs)

    @classmethod
    def from_folder(cls, folder, trust=(), **kwargs):
        """Loads an exported folder, whose `hyperparams.yaml` may construct nothing but the toolkit's parts and what is trusted.

        `from_hparams` loads the same folder, and any other, but constructs whatever the file names: that can run code.

        Arguments
        ---------
        folder : str or Path
            What a run or `psla-export` wrote.
        trust : sequence of str
            Modules whose classes may be constructed too, such as `["my_lobes"]`. Installed packages with an entry point of the
            group `psla_sb.lobes` are trusted as they are.
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            There is no such folder, or its file names other parts.
        """
        return cls.from_source(TaggerFolder(folder, trust), **kwargs)

    @classmethod
    def from_psla_checkpoint(cls, path, labels, padding=PUBLISHED_PADDING, n_frames=AUDIOSET_FRAMES, **kwargs):
        """Loads a checkpoint of the published PSLA code; `psla-import` writes it as a folder, which loads faster and by itself.

        Arguments
        ---------
        path : str or Path
            The `.pth` file.
        labels : str or Path
            The class list, such as AudioSet's `class_labels_indices.csv`.
        padding : str
            "symmetric" for official models; see `psla_sb.checkpoints.psla.load_psla_checkpoint`.
        n_frames : int
            Frames that the model was trained on: 1056 for AudioSet, 3000 for FSD50K.
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            A file is wrong, or the class list does not fit the model.

        Example
        -------
        >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
        >>> from psla_sb.labels.vocabulary import Vocabulary
        >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
        >>> from psla_sb.lobes.pooling import MeanPooling
        >>> folder = getfixture("tmp_path")
        >>> save_psla_checkpoint(folder / "model.pth", EfficientNetEncoder("b0"), MeanPooling(1280, 2))
        >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "labels.csv")
        >>> tagger = AudioTagger.from_psla_checkpoint(folder / "model.pth", labels=folder / "labels.csv")
        >>> tagger.tag_batch(torch.zeros(1, 16000)).shape
        torch.Size([1, 2])
        """
        return cls.from_source(Published(path, labels, padding, n_frames), **kwargs)

    @classmethod
    def from_experiment(cls, folder, weights="average", trust=(), **kwargs):
        """Loads what a training run wrote.

        Arguments
        ---------
        folder : str or Path
            The run's `output_folder`.
        weights : str or int
            "average" (of the last epochs), "best" (on the validation set), "last", or the number of an epoch.
        trust, **kwargs
            See `from_folder`.

        Raises
        ------
        InputError
            It is not the folder of a run, or these weights are not there.
        """
        return cls.from_snapshot(run_weights(folder, weights), trust, **kwargs)

    @classmethod
    def from_snapshot(cls, path, trust=(), **kwargs):
        """Loads a snapshot of a training run, from the run's folder.

        Arguments
        ---------
        path : str or Path
            Such as `results/psla/1/snapshots/epoch_30.safetensors`.
        trust, **kwargs
            See `from_folder`.

        Raises
        ------
        InputError
            There is no such file, it is not whole, or it does not fit the model of the run.
        """
        return cls.from_source(Snapshot(path, trust), **kwargs)

    @classmethod
    def from_any(cls, source, labels=None, trust=(), **kwargs):
        """Loads a tagger's folder, a run's folder (its weight average), a snapshot, or a checkpoint of the published code.

        Arguments
        ---------
        source : str or Path
            See `psla_sb.checkpoints.sources.open_source`.
        labels : str or Path, optional
            The class list, for a checkpoint of the published code.
        trust, **kwargs
            See `from_folder`.

        Raises
        ------
        InputError
            It is none of these.
        """
        return cls.from_source(open_source(source, labels, trust), **kwargs)

    def tag_batch(self, wavs, wav_lens=None):
        """Scores of a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, or `[samples]` of a single clip; floating point, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, in [0, 1].

        Raises
        ------
        ValueError
            Tensors of another kind, or samples that are not finite or too large.
        """
        feats, lens = self.features_and_lens(wavs, wav_lens)
        return self.tag_features(finite(feats), lens)

    def tag_features(self, feats, lens=None):
        """Scores of a batch of normalised features.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, on the tagger's device.
        lens : torch.Tensor, optional
            `[batch]`, relative lengths, for encoders and classifiers that take them.

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, in [0, 1].
        """
        feature_map = self.encode_features(feats, lens)
        with torch.inference_mode(), self.inference_ctx:
            return chain.classify(self.mods, feature_map, lens).clamp(0.0, 1.0)

    def tag_file(self, path, top_k=5, threshold=None):
        """The best-scored classes of a sound file; of a long one, of its beginning, as much as the model was trained on.

        Arguments
        ---------
        path : str or Path
            Any format, sample rate and number of channels that `psla_sb.dataio.audio.read_audio` reads.
        top_k : int
            How many classes at most.
        threshold : float, optional
            The score that a class must have at least.

        Returns
        -------
        list of Tag
            Best first.

        Raises
        ------
        InputError
            The file cannot be read, or its samples are too large.
        ValueError
            `top_k` is below 1.
        """
        return self._tags(self._file_scores(path)[0], top_k, threshold)

    def _file_scores(self, path):
        feats, lens = self.features_and_lens(read_clip(path, self.hparams.sample_rate))
        return self.tag_features(finite(feats, path), lens)

    def _tags(self, scores, top_k, threshold):
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        best = scores.float().cpu().topk(min(top_k, len(scores)))
        return [
            Tag(self.hparams.label_encoder.ind2lab[i], self.hparams.mids[i], score)
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if threshold is None or score >= threshold
        ]

    def tag_files(self, paths, batch_size=16, num_workers=0, top_k=5, threshold=None, progress=True):
        """Tags many files, batch by batch, in their order.

        Arguments
        ---------
        paths : iterable of str or Path
            The files.
        batch_size : int
            Files that are on the device together.
        num_workers : int
            Processes that decode.
        top_k, threshold
            See `tag_file`.
        progress : bool
            Whether a bar on stderr, where that is a terminal, shows how far it is.

        Yields
        ------
        FileTags
            Of each file; one that cannot be tagged has an error.

        Raises
        ------
        ValueError
            A number is out of range.
        """
        if min(batch_size, top_k) < 1 or num_workers < 0:
            raise ValueError(f"batch_size and top_k must be 1 or more, num_workers 0 or more: {batch_size}, {top_k}, {num_workers}")
        paths = [str(path) for path in paths]
        if not paths:
            return
        # a name that is no Unicode cannot be opened from a table; it is reported as a file that is not there
        names = [path.encode("utf-8", "replace").decode() or "(no name)" for path in paths]
        manifest = Manifest.from_columns([str(row) for row in range(len(paths))], names, [0.0] * len(paths), [""] * len(paths))
        if getattr(self.mods.compute_features, "n_frames", None) is None:
            # a longer clip in the batch would lengthen what the classifier sees of this one
            batch_size = 1
        rows = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
        loader = clip_loader(manifest, self.hparams.sample_rate, self.n_samples, rows, num_workers)
        with tqdm(total=len(paths), unit=" files", disable=None if progress else True) as bar:
            for batch in loader:
                yield from self._tags_of_batch(batch, paths, top_k, threshold)
                bar.update(len(batch.index))

    def _tags_of_batch(self, batch, paths, top_k, threshold):
        errors = list(batch.error)
        try:
            feats, lens = self.features_and_lens(*batch.to(self.device).sig)
            usable = torch.isfinite(feats).flatten(1).all(1)
            answers = self.tag_features(feats.where(usable[:, None, None], 0.0), lens).cpu()
        except InputError as refused:
            # other people's parts, whose clips are tagged one by one
            errors, answers = [error or f"{paths[row]}: {refused}" for row, error in zip(batch.index, errors, strict=True)], errors
        else:
            bad = "samples that are not finite, or far outside of [-1, 1]"
            checked = zip(batch.index, errors, usable.tolist(), strict=True)
            errors = [error if error or good else f"{paths[row]}: {bad}" for row, error, good in checked]
        for row, error, answer in zip(batch.index, errors, answers, strict=True):
            yield FileTags(paths[row], None if error else self._tags(answer, top_k, threshold), error)

    def classify_batch(self, wavs, wav_lens=None):
        """Scores and the best class, as SpeechBrain's `EncoderClassifier.classify_batch` returns them.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, or `[samples]` of a single clip; floating point, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        (torch.Tensor, torch.Tensor, torch.Tensor, list of str)
            Probabilities `[batch, classes]`; the best class's probability, index and label, `[batch]` each.

        Raises
        ------
        ValueError
            See `tag_batch`.
        """
        return self._classified(self.tag_batch(wavs, wav_lens))

    def classify_file(self, path):
        """As `classify_batch`, for a file.

        Arguments
        ---------
        path : str or Path
            See `tag_file`.

        Raises
        ------
        InputError
            See `tag_file`.
        """
        return self._classified(self._file_scores(path))

    def _classified(self, scores):
        best, index = scores.max(dim=-1)
        return scores, best, index, self.hparams.label_encoder.decode_torch(index)

    @property
    def has_timeline(self):
        """Whether `tag_timeline` works: the classifier has `segment_scores`, and the encoder's steps follow the clip."""
        return hasattr(self.mods.classifier, "segment_scores") and self.has_times

    def tag_timeline(self, path, window=10.0, hop=1.0, batch_size=8):
        """The scores of all classes along a recording of any length, which is read piece by piece.

        Overlapping windows are scored at each step of the encoder (0.32 s), without attention, which compares steps with each
        other; where windows overlap, the curve is their mean.

        Arguments
        ---------
        path : str or Path
            See `tag_file`.
        window : float
            Seconds that the model sees together; at most what it was trained on.
        hop : float
            Seconds from a window to the next, rounded to whole steps.
        batch_size : int
            Windows that are on the device together.

        Returns
        -------
        Timeline
            The curves.

        Raises
        ------
        InputError
            The file cannot be read, or its samples are too large.
        ValueError
            A number is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        n_samples, hop_samples, hop_steps = self.window_and_hop(window, hop)
        pieces = windows(read_blocks(path, self.hparams.sample_rate), n_samples, hop_samples)
        scores = joined(overlapped(self._window_scores(pieces, n_samples, batch_size, path), hop_steps))
        labels = [self.hparams.label_encoder.ind2lab[i] for i in range(len(self.hparams.mids))]
        return Timeline(self.step_times(len(scores)).numpy(), scores, labels, list(self.hparams.mids))

    events = staticmethod(events)

    def _window_scores(self, pieces, n_samples, batch_size, path):
        """Yields each window's `[steps, classes]`."""
        segment_scores = getattr(self.mods.classifier, "segment_scores", None)
        if segment_scores is None:
            classifier = type(self.mods.classifier).__qualname__
            raise InputError(
                f"this model's classifier ({classifier}) has no segment_scores: it tells what is in a clip, not when, so there is "
                "no timeline"
            )
        for wavs in batches(pieces, batch_size):
            feats, lens = self.features_and_lens(*self.whole_window(wavs, n_samples))
            feature_map = self.encode_features(finite(feats, path), lens)
            with torch.inference_mode():
                scores = segment_scores(feature_map)
            yield from scores[..., : self.n_steps_of(wavs.shape[1])].transpose(1, 2).cpu()

    forward = tag_batch
