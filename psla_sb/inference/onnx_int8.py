"""A tagger's ONNX file in numbers of 8 bits, and what that loses on clips that it has not seen."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.inference.onnx_export import import_onnx
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision

CLIPS = 100  # of which the ranges of the activations are taken
ENCODER = "/encoder/"  # what the exporter calls its operations; the front end and the pooling stay in float


def quantize_onnx(
    model: str | Path, out: str | Path, clips: Manifest, vocabulary: Vocabulary, sample_rate: int, window: int
) -> dict:
    """Writes the ONNX file of a tagger with its encoder's convolutions in 8 bits, and measures what they lose.

    Ranges of the activations are taken from half of the clips, 100 at most, drawn by a fixed seed; the others are scored by both
    files.

    Arguments
    ---------
    model, out
        What `export_onnx` wrote, and where to write.
    clips
        Clips with labels, of which each class should have some; of each its first `window` samples are heard.

    Returns
    -------
    dict
        `clips` (how many were scored), `mAP` and `mAP_int8` (None if no class has labels among them), and by how much scores
        `changed`: `mean` and `most`.

    Raises
    ------
    InputError
        There are fewer than four clips, or the packages are missing.
    """
    onnx, onnxruntime = import_onnx()
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if len(clips) < 4:
        raise InputError(f"{clips.source}: has {len(clips)} clips; 8 bits need four at least, and are better off with 200")
    order = np.random.default_rng(0).permutation(len(clips))
    known, others = order[: min(CLIPS, len(clips) // 2)], order[min(CLIPS, len(clips) // 2) :]

    def waveforms(rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for row in rows:
            yield {"waveform": read_clip(clips[int(row)]["wav"], sample_rate, window)[None].numpy()}

    class Clips(CalibrationDataReader):
        feeds = waveforms(known)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    level = logging.getLogger().level
    # it advises what is done here already
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with atomic_write(out) as temporary, atomic_write(f"{out}.prepared.onnx") as prepared:
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
            nodes = [node.name for node in onnx.load(str(prepared)).graph.node if not node.name.startswith(ENCODER)]
            options: dict[str, Any] = {
                "per_channel": True,
                "nodes_to_exclude": nodes,
                "extra_options": {"CalibMovingAverage": True},
            }
            quantize_static(str(prepared), str(temporary), Clips(), **options)
            quantized = onnx.load(str(temporary))
            onnx.helper.set_model_props(quantized, {prop.key: prop.value for prop in onnx.load(str(model)).metadata_props})
            onnx.save(quantized, str(temporary))
    finally:
        logging.getLogger().setLevel(level)
        Path(f"{out}.prepared.onnx").unlink(missing_ok=True)
    sessions = [onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]) for file in (model, out)]
    scores = np.stack([[session.run(None, feed)[0][0] for session in sessions] for feed in waveforms(others)])
    targets = clips.targets(vocabulary)[others]
    both = [float(np.nanmean(average_precision(scores[:, i], targets))) if targets.any() else None for i in (0, 1)]
    change = np.abs(scores[:, 0] - scores[:, 1])
    changed = {"mean": float(change.mean()), "most": float(change.max())}
    return {"clips": len(others), "mAP": both[0], "mAP_int8": both[1], "changed": changed}
