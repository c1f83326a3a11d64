"""Tags for any sound, from a folder that `psla_sb.export` wrote."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.interfaces import Pretrained

from psla_sb.brain import read_results, trained_modules
from psla_sb.checkpoints import load_into, load_weights, snapshot_path
from psla_sb.dataio.audio import read_clip
from psla_sb.errors import InputError
from psla_sb.export import MODULES, definitions_text, label_encoder, read_definitions
from psla_sb.interop import AUDIOSET_FRAMES, PUBLISHED_PADDING, psla_to_tagger
from psla_sb.labels.vocabulary import Vocabulary

# What the hyperparams.yaml of an exported folder may construct, if it is not to run code of whoever wrote it.
KNOWN_PARTS = (
    "!ref",
    "!new:psla_sb.lobes.",
    "!name:psla_sb.checkpoints.load_module",
    "!new:speechbrain.dataio.encoder.CategoricalEncoder",
    "!new:speechbrain.utils.parameter_transfer.Pretrainer",
)


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


class AudioTagger(Pretrained):
    """A trained tagger.

    Example
    -------
    >>> import soundfile
    >>> from psla_sb.export import export_tagger
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
    def from_folder(cls, folder, **kwargs):
        """Loads an exported folder, whose `hyperparams.yaml` may construct nothing but the toolkit's parts.

        `from_hparams` loads the same folder, and any other, but constructs whatever the file names: that can run code.

        Arguments
        ---------
        folder : str or Path
            What `psla_sb.export.export_tagger` wrote.
        **kwargs
            For `from_hparams`, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            There is no such folder, or its file names other parts.
        """
        file = Path(folder) / "hyperparams.yaml"
        if not file.is_file():
            raise InputError(f"{folder}: not the folder of a tagger (it has no hyperparams.yaml)")
        try:
            tags = {
                str(event.tag)
                for event in ruamel.yaml.YAML().parse(file.read_text(encoding="utf-8"))
                if getattr(event, "tag", None)
            }
        except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not a YAML file: {error}") from None
        for tag in sorted(tags):
            if not tag.startswith(KNOWN_PARTS):
                raise InputError(
                    f"{file} constructs '{tag}', which is not a part of psla_sb; AudioTagger.from_hparams would run it"
                )
        try:
            tagger = cls.from_hparams(source=str(folder), **kwargs)
        except InputError:
            raise
        except (KeyError, ValueError, AttributeError, TypeError, OSError) as error:
            raise InputError(f"{folder}: not the whole folder of a tagger: {type(error).__name__}: {error}") from error
        if len(tagger.hparams.label_encoder) != len(tagger.hparams.mids):
            raise InputError(f"{folder}: label_encoder.ckpt has not as many names as hyperparams.yaml has mids")
        return tagger

    @classmethod
    def from_psla_checkpoint(cls, path, labels, padding=PUBLISHED_PADDING, n_frames=AUDIOSET_FRAMES, **kwargs):
        """Loads a checkpoint of the published PSLA code.

        `python -m psla_sb.interop` writes it as a folder, which loads faster and by itself.

        Arguments
        ---------
        path : str or Path
            The `.pth` file.
        labels : str or Path
            The class list, such as AudioSet's `class_labels_indices.csv`.
        padding : str
            "symmetric" for official models; see `psla_sb.interop.load_psla_checkpoint`.
        n_frames : int
            Frames that the model was trained on: 1056 for AudioSet, 3000 for FSD50K.
        **kwargs
            For `from_hparams`, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            A file is wrong, or the class list does not fit the model.

        Example
        -------
        >>> from psla_sb.interop import save_psla_checkpoint
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
        with tempfile.TemporaryDirectory() as folder:
            psla_to_tagger(path, labels, folder, padding, n_frames)
            return cls.from_folder(folder, **kwargs)

    @classmethod
    def from_experiment(cls, folder, weights="average", **kwargs):
        """Loads what a training run wrote.

        Arguments
        ---------
        folder : str or Path
            The run's `output_folder`.
        weights : str or int
            "average" (of the last epochs), "best" (on the validation set), "last", or the number of an epoch.
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            It is not the folder of a run, or these weights are not there.
        """
        epochs = read_results(folder).get("epochs")
        if not epochs:
            raise InputError(f"{folder}: not the output folder of a run that has trained an epoch")
        named = {"last": epochs[-1]["epoch"], "best": max(epochs, key=lambda epoch: epoch["mAP"])["epoch"]}
        if weights == "average":
            return cls.from_snapshot(Path(folder) / "snapshots" / "average.safetensors", **kwargs)
        return cls.from_snapshot(snapshot_path(folder, int(named.get(weights, weights))), **kwargs)

    @classmethod
    def from_snapshot(cls, path, **kwargs):
        """Loads a snapshot of a training run, from the run's folder.

        Arguments
        ---------
        path : str or Path
            Such as `results/psla/1/snapshots/epoch_30.safetensors`.
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            There is no such file, it is not whole, or it does not fit the model of the run.
        """
        state, run = load_weights(path), Path(path).resolve().parents[1]
        if not (run / "hyperparams.yaml").is_file():
            raise InputError(f"{path}: beside its folder there is no hyperparams.yaml that says what model it is of")
        hparams = load_hyperpyyaml(definitions_text(read_definitions(run / "hyperparams.yaml")))
        modules = {name: hparams[name] for name in MODULES}
        load_into(trained_modules(modules), state, path)
        vocabulary = Vocabulary.from_csv(run / "class_labels_indices.csv")
        hparams |= {"mids": vocabulary.mids, "label_encoder": label_encoder(vocabulary)}
        return cls(modules, hparams, **kwargs)

    @classmethod
    def from_any(cls, source, labels=None, **kwargs):
        """Loads a tagger's folder, a run's folder (its weight average), a snapshot, or a checkpoint of the published code.

        Arguments
        ---------
        source : str or Path
            A folder, a `.safetensors` or a `.pth` file.
        labels : str or Path, optional
            The class list, for a checkpoint of the published code.
        **kwargs
            For the constructor, such as `run_opts={"device": "cuda:0"}`.

        Raises
        ------
        InputError
            It is none of these.
        """
        source = Path(source)
        if (source / "results.json").is_file():
            return cls.from_experiment(source, **kwargs)
        if source.is_dir():
            return cls.from_folder(source, **kwargs)
        if source.suffix == ".safetensors":
            return cls.from_snapshot(source, **kwargs)
        if labels is None:
            raise InputError(f"{source}: a checkpoint of the published code needs a class list beside it, see --labels")
        return cls.from_psla_checkpoint(source, labels, **kwargs)

    def tag_batch(self, wavs, wav_lens=None):
        """Scores of a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, at the model's sample rate.
        wav_lens : torch.Tensor, optional
            `[batch]`, relative lengths.

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, in [0, 1].
        """
        if wav_lens is not None:
            wav_lens = wav_lens.to(self.device)
        with torch.inference_mode():
            return self.tag_features(self.mods.mean_var_norm(self.mods.compute_features(wavs.to(self.device), wav_lens)))

    def tag_features(self, feats):
        """Scores of a batch of normalised features.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, on the tagger's device.

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, in [0, 1].
        """
        with torch.inference_mode(), self.inference_ctx:
            return self.mods.classifier(self.mods.embedding_model(feats)).clamp(0.0, 1.0)

    def tag_file(self, path, top_k=5):
        """The best-scored classes of a sound file.

        Arguments
        ---------
        path : str or Path
            Any format, sample rate and number of channels that `psla_sb.dataio.audio.read_audio` reads.
        top_k : int
            How many classes.

        Returns
        -------
        list of Tag
            Best first.

        Raises
        ------
        AudioError
            The file cannot be read.
        """
        wave = read_clip(path, self.hparams.sample_rate)
        best = self.tag_batch(wave[None])[0].cpu().topk(min(top_k, len(self.hparams.mids)))
        return [
            Tag(self.hparams.label_encoder.ind2lab[i], self.hparams.mids[i], score)
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    forward = tag_batch
