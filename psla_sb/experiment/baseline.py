"""What a network has to be better than: logistic regression on the mean and spread of each mel band."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.experiment.hparams import crop_of
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain
from psla_sb.lobes.features import LogMel, true_lengths
from psla_sb.metrics import FIGURES, summarize

WHAT = "logistic regression on the mean and standard deviation of each mel band"
STRENGTHS = (0.01, 0.1, 1.0)
BATCH_SIZE = 32
# To learn from: more do not make it better, and take minutes.
MOST_CLIPS = 20_000


def baseline(hparams: Mapping[str, Any], clips: Mapping[str, Manifest], vocabulary: Vocabulary) -> dict[str, Any]:
    """Fits logistic regression to the training clips and gives its figures on the clips that are reported.

    Arguments
    ---------
    hparams
        Of the run: its front end, and what of a clip it hears.
    clips
        "train", "valid" (which decides how strongly it is regularised) and, if there is one, "test".

    Returns
    -------
    `what` it is, mAP, mAUC and d_prime, and the regularisation chosen, scikit-learn's `C`.
    """
    # of more clips to learn from some, spread over all: they may be sorted by class
    most = {"train": MOST_CLIPS}
    rows = {name: np.unique(np.linspace(0, len(one) - 1, most.get(name, len(one))).astype(int)) for name, one in clips.items()}
    statistics = {name: band_statistics(manifest, hparams, rows[name]) for name, manifest in clips.items()}
    targets = {name: manifest.targets(vocabulary)[rows[name]] for name, manifest in clips.items()}
    train = statistics["train"], targets["train"]
    reported = "test" if "test" in clips else "valid"
    best: tuple[float, dict[str, Any]] = -1.0, {}
    for strength in STRENGTHS:
        scores = {name: _scores(*train, statistics[name], strength) for name in {"valid", reported}}
        valid = np.nan_to_num(summarize(scores["valid"], targets["valid"])["mAP"])
        if valid > best[0]:
            figures = summarize(scores[reported], targets[reported])
            best = valid, {"what": WHAT, "C": strength, **{name: figures[name] for name in FIGURES}}
    return best[1]


def band_statistics(clips: Manifest, hparams: Mapping[str, Any], rows: np.ndarray | None = None) -> np.ndarray:
    """Computes each mel band's mean and standard deviation over a clip's frames, float32 `[rows, 2 x mels]`."""
    rows = np.arange(len(clips)) if rows is None else rows
    batches = [rows[start : start + BATCH_SIZE].tolist() for start in range(0, len(rows), BATCH_SIZE)]
    rate, n_samples = hparams["sample_rate"], chain.n_samples_of(hparams["modules"], hparams["n_frames"], hparams["sample_rate"])
    loader = clip_loader(clips, rate, n_samples, batches, hparams["num_workers"], crop_of("eval_crop", hparams))
    # what is drawn anew for each batch is drawn in training alone
    front_end = hparams["modules"]["compute_features"].eval()
    device = next((buffer.device for buffer in front_end.buffers()), torch.device("cpu"))
    found = []
    for batch in tqdm(loader, desc="A baseline", unit=" batches", disable=None):
        wavs, wav_lens = batch.to(device).sig
        with torch.no_grad():
            feats = chain.call(front_end, wavs, wav_lens)
        frames = torch.arange(feats.shape[1], device=device)
        if isinstance(front_end, LogMel):
            n_frames = front_end.frames_of(true_lengths(wavs, wav_lens))
        else:
            n_frames = (wav_lens.to(device) * feats.shape[1]).ceil()
        inside = (frames < n_frames.clamp(min=1)[:, None])[..., None].float()
        n = inside.sum(1)
        mean = (feats * inside).sum(1) / n
        spread = (((feats - mean[:, None]) ** 2 * inside).sum(1) / n).sqrt()
        found.append(torch.cat([mean, spread], dim=1).cpu())
    return torch.cat(found).numpy()


def _scores(statistics: np.ndarray, targets: np.ndarray, asked: np.ndarray, strength: float) -> np.ndarray:
    """Fits one class after the other and scores other clips, float32 `[clips, classes]`."""
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=strength, max_iter=1000)))
    with warnings.catch_warnings():
        # a class that no clip has, or every one: it gets the score 0 or 1
        warnings.filterwarnings("ignore", message="Label .* is present in|Label not", category=UserWarning)
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        model.fit(statistics, (targets > 0.5).astype(int))
        return model.predict_proba(asked).astype(np.float32)
