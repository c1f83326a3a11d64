"""The API of HEAR 2021 (Turian et al., "HEAR: Holistic Evaluation of Audio Representations", 2022) for a trained tagger."""

import torch
from torch import Tensor, nn

from psla_sb.inference.tagger import AudioTagger


class HearModel(nn.Module):
    """Gives a tagger the attributes that HEAR asks for: the sample rate in Hz and the lengths of the vectors."""

    def __init__(self, tagger: AudioTagger):
        super().__init__()
        self.tagger, self.sample_rate = tagger, tagger.hparams.sample_rate
        size = tagger.scene_embeddings(torch.zeros(1, self.sample_rate)).shape[1]
        self.scene_embedding_size = self.timestamp_embedding_size = size


def load_model(model_file_path: str) -> HearModel:
    """Loads the folder of a tagger or of a run, or a snapshot of a run."""
    return HearModel(AudioTagger.from_any(model_file_path, run_opts={"device": "cpu"}))


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Turns `[sounds, samples]` into vectors `[sounds, steps, size]` and their times in ms `[sounds, steps]`, float32."""
    vectors, times = model.tagger.timestamp_embeddings(audio)
    return vectors, times.expand(len(vectors), -1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Turns `[sounds, samples]` into one vector a sound, of its whole length: `[sounds, size]`, float32."""
    if model.tagger.has_times:
        return model.tagger.timestamp_embeddings(audio)[0].mean(1)
    return model.tagger.scene_embeddings(audio)
