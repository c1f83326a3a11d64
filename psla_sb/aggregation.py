"""More from checkpoints already paid for: averages of weights, and the scores of many models in one pass over the data."""

import hashlib
import json
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger
from torch.utils.data import DataLoader
from tqdm import tqdm

from psla_sb.brain import check_audio
from psla_sb.checkpoints import UNFINISHED, atomic_write, flush, load_weights
from psla_sb.dataio.dataset import TaggingDataset, ignore_signals
from psla_sb.errors import InputError
from psla_sb.inference import AudioTagger
from psla_sb.labels.label_sets import LabelSets
from psla_sb.lobes.features import n_samples_for

logger = get_logger(__name__)

# Batches between two notes of how far a pass has come.
BATCHES_AT_ONCE = 50


def average_weights(paths):
    """The mean of the weights of several snapshots, batch-norm statistics included.

    Sums are kept in float64, with one file in memory at a time; entries that are not floating point (batch norm counts its
    batches) are averaged and rounded.

    Arguments
    ---------
    paths : sequence of Path
        Snapshots, as `psla_sb.checkpoints.save_weights` writes them.

    Returns
    -------
    dict of str to torch.Tensor
        A state dict, each entry of the dtype that the files have.

    Raises
    ------
    InputError
        There are no files, or two of them differ in keys or shapes.

    Example
    -------
    >>> from psla_sb.checkpoints import save_weights
    >>> folder = getfixture("tmp_path")
    >>> for i in (1, 2):
    ...     linear = torch.nn.Linear(1, 1)
    ...     _ = torch.nn.init.constant_(linear.weight, i)
    ...     save_weights({"classifier": linear}, folder / f"{i}.safetensors")
    >>> average_weights([folder / "1.safetensors", folder / "2.safetensors"])["classifier.weight"]
    tensor([[1.5000]])
    """
    if not paths:
        raise InputError("no snapshots to average")
    first = load_weights(paths[0])
    total = {key: value.double() for key, value in first.items()}
    for path in paths[1:]:
        state = load_weights(path)
        differing = set(state) ^ set(total) or {key for key in total if state[key].shape != total[key].shape}
        if differing:
            raise InputError(f"{path} and {paths[0]} are not weights of the same model: they differ in '{min(differing)}'")
        for key, value in state.items():
            total[key] += value
    mean = {key: value / len(paths) for key, value in total.items()}
    return {key: (value if first[key].is_floating_point() else value.round()).to(first[key].dtype) for key, value in mean.items()}


def score(members, manifest, vocabulary, folder, batch_size=32, num_workers=0, run_opts=None, at_a_time=None, labels=None):
    """The scores of many models on the same clips, in one pass over the sound files.

    A clip is decoded once; features are computed once for each distinct front end, and every member scores the batch while it is
    on the device. Scores go to disk as they come: a pass that was killed goes on where it was, and a member whose scores of the
    same annotation are in the folder is not scored again. Started by torchrun, the ranks share the clips out.

    Arguments
    ---------
    members : dict of str to str or Path
        What `AudioTagger.from_any` loads, by name.
    manifest : Manifest
        The clips, from a file.
    vocabulary : Vocabulary
        The classes, which must be those of every member, in this order.
    folder : str or Path
        Where to write `<name>.npy`, float32 `[clips, classes]` in the order of the annotation, and what it was made from.
    batch_size, num_workers : int
        Of the loader, for each process.
    run_opts : dict, optional
        SpeechBrain's, such as `{"device": "cuda:0", "precision": "bf16"}`.
    at_a_time : int, optional
        Members that are on the device together; by default as many as fit into half of a GPU's free memory, or all on a CPU.
    labels : str or Path, optional
        The class list of members that are checkpoints of the published code.

    Returns
    -------
    dict of str to np.ndarray
        Memory-mapped scores, by name.

    Raises
    ------
    InputError
        A member cannot be loaded, or has other classes; or a sound file cannot be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {name: _made_from(source, manifest) for name, source in members.items()}
    files = {name: folder / f"{name}.npy" for name in members}
    waiting = [name for name, file in files.items() if not file.exists() or _read(file.with_suffix(".json")) != made_from[name]]
    ddp_barrier()
    while waiting:
        taggers, room = {}, at_a_time or 1
        while waiting and len(taggers) < room:
            tagger = AudioTagger.from_any(members[waiting[0]], labels, run_opts=run_opts or {"device": "cpu"})
            if list(tagger.hparams.mids) != vocabulary.mids:
                raise InputError(f"{members[waiting[0]]} has other classes than the class list, or in another order")
            taggers[waiting.pop(0)] = tagger
            room = at_a_time or _fitting(tagger)
        settings = {"members": {name: made_from[name] for name in taggers}, "batch_size": batch_size}
        _score_together(taggers, manifest, folder, settings, num_workers)
        if if_main_process():
            for name in taggers:
                os.replace(folder / f"{UNFINISHED}{name}.npy", files[name])
                with atomic_write(files[name].with_suffix(".json")) as temporary:
                    temporary.write_text(json.dumps(made_from[name]), encoding="utf-8")
        ddp_barrier()
    return {name: np.load(file, mmap_mode="r") for name, file in files.items()}


def _score_together(taggers, manifest, folder, settings, num_workers):
    """One pass over the clips, from where an earlier one with the same settings was interrupted."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    n_clips, batch_size = len(manifest), settings["batch_size"]
    hparams = [tagger.hparams for tagger in taggers.values()]
    n_classes, sample_rate = len(hparams[0].mids), hparams[0].sample_rate
    if any(other.sample_rate != sample_rate for other in hparams):
        raise InputError(f"{', '.join(taggers)}: members have different sample rates; aggregate those of one rate")
    lengths = [getattr(tagger.mods.compute_features, "n_frames", None) for tagger in taggers.values()]
    n_samples = None if None in lengths else n_samples_for(max(lengths), sample_rate)
    unlabelled = LabelSets(np.zeros(n_clips + 1, np.int64), np.zeros(0, np.int32))
    dataset = TaggingDataset(manifest, unlabelled, n_classes, sample_rate, n_samples)
    batches = [range(row, min(row + batch_size, n_clips)) for row in range(0, n_clips, batch_size)][rank::world_size]

    note, settings = folder / f"{UNFINISHED}pass_{rank}.json", {**settings, "ranks": world_size}
    paths = {name: folder / f"{UNFINISHED}{name}.npy" for name in taggers}
    earlier = _read(note)
    done = earlier["batches"] if earlier is not None and earlier["settings"] == settings else 0
    if if_main_process():
        for path in paths.values():
            if done == 0 or not path.exists():
                np.lib.format.open_memmap(path, "w+", np.float32, (n_clips, n_classes)).flush()
    ddp_barrier()
    out = {name: np.lib.format.open_memmap(path, "r+") for name, path in paths.items()}

    front_ends = defaultdict(list)
    for tagger in taggers.values():
        front_ends[pickle.dumps([tagger.mods.compute_features, tagger.mods.mean_var_norm])].append(tagger)
    loader = DataLoader(
        dataset,
        batch_sampler=batches[done:],
        collate_fn=PaddedBatch,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
    )
    total, first = sum(map(len, batches)), sum(map(len, batches[:done]))
    with torch.inference_mode(), tqdm(total=total, initial=first, unit=" clips", disable=None if rank == 0 else True) as bar:
        for count, batch in enumerate(loader, done + 1):
            check_audio(batch)
            wavs, wav_lens = (x.to(next(iter(taggers.values())).device) for x in batch.sig)
            scores = {}
            for same in front_ends.values():
                feats = same[0].mods.mean_var_norm(same[0].mods.compute_features(wavs, wav_lens))
                scores |= {tagger: tagger.tag_features(feats) for tagger in same}
            for name, tagger in taggers.items():
                out[name][batch.index] = scores[tagger].float().cpu().numpy()
            bar.update(len(batch.index))
            if count % BATCHES_AT_ONCE == 0:
                _flush(out, paths)
                with atomic_write(note) as temporary:
                    temporary.write_text(json.dumps({"settings": settings, "batches": count}), encoding="utf-8")
    _flush(out, paths)
    ddp_barrier()
    note.unlink(missing_ok=True)


def _flush(arrays, paths):
    for name, array in arrays.items():
        array.flush()
        flush(paths[name])


def _fitting(tagger):
    """How many models like this fit into a GPU's memory, half of which is left to what they compute; on a CPU, all do."""
    if tagger.device_type != "cuda":
        return float("inf")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tagger.mods.state_dict().values())
    return max(1, torch.cuda.get_device_properties(tagger.device).total_memory // 2 // size)


def _made_from(source, manifest):
    """What tells one set of scores from another: the bytes of the member's files and of the annotation."""
    source = Path(source)
    if (source / "results.json").is_file():
        source = source / "snapshots" / "average.safetensors"
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        digest.update(file.read_bytes())
    return {"weights": digest.hexdigest(), "annotation": manifest.digest()}


def _read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
