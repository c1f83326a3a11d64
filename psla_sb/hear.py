"""The module that HEAR's tools are told: `hear-validator psla_sb.hear -m FOLDER`."""

from psla_sb.inference.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings, load_model

__all__ = ["HearModel", "get_scene_embeddings", "get_timestamp_embeddings", "load_model"]
