"""The API of HEAR 2021 (Turian et al., "HEAR: Holistic Evaluation of Audio Representations", 2022) for a trained tagger.

Its tools are given this module and the model: `hear-validator psla_sb.hear -m results/psla/1/tagger`.
"""

import torch
from torch import nn

from psla_sb.inference.tagger import AudioTagger


class HearModel(nn.Module):
    """A tagger with the attributes that HEAR asks for.

    `sample_rate` is in Hz; `scene_embedding_size` and `timestamp_embedding_size` are the lengths of the vectors.

    Example
    -------
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> from psla_sb.lobes.features import GlobalNorm, KaldiFbank
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> parts = (KaldiFbank(n_mels=64), GlobalNorm(), EfficientNetEncoder("b0"), MeanPooling(1280, 1))
    >>> modules = dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True))
    >>> model = HearModel(AudioTagger(modules, {"sample_rate": 16000, "mids": ["/m/1"], "label_encoder": None}))
    >>> model.scene_embedding_size
    1280
    >>> embeddings, timestamps = get_timestamp_embeddings(torch.zeros(2, 32000), model)
    >>> embeddings.shape, timestamps[0].tolist()
    (torch.Size([2, 6, 1280]), [160.0, 480.0, 800.0, 1120.0, 1440.0, 1760.0])
    """

    def __init__(self, tagger):
        super().__init__()
        self.tagger = tagger
        self.sample_rate = tagger.hparams.sample_rate
        size = tagger.scene_embeddings(torch.zeros(1, self.sample_rate)).shape[1]
        self.scene_embedding_size = self.timestamp_embedding_size = size


def load_model(model_file_path):
    """Loads a tagger.

    Arguments
    ---------
    model_file_path : str
        The folder of a tagger or of a run, or a snapshot of a run.

    Returns
    -------
    HearModel

    Raises
    ------
    InputError
        It is none of these.

    Example
    -------
    >>> load_model("nowhere")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: nowhere: ...
    """
    return HearModel(AudioTagger.from_any(model_file_path, run_opts={"device": "cpu"}))


def get_timestamp_embeddings(audio, model):
    """Vectors along the time.

    Arguments
    ---------
    audio : torch.Tensor
        `[sounds, samples]`, in [-1, 1], at the model's sample rate.
    model : HearModel
        What `load_model` returns.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        Vectors `[sounds, steps, size]` and their times in milliseconds `[sounds, steps]`, both float32.
    """
    vectors, times = model.tagger.timestamp_embeddings(audio)
    return vectors, times.expand(len(vectors), -1)


def get_scene_embeddings(audio, model):
    """One vector a sound, of its whole length.

    Arguments
    ---------
    audio : torch.Tensor
        `[sounds, samples]`, in [-1, 1], at the model's sample rate.
    model : HearModel
        What `load_model` returns.

    Returns
    -------
    torch.Tensor
        `[sounds, size]`, float32.
    """
    if model.tagger.has_times:
        return model.tagger.timestamp_embeddings(audio)[0].mean(1)
    return model.tagger.scene_embeddings(audio)
