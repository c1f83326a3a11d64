"""The scores of many models in one pass over the data."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from tqdm import tqdm

from psla_sb.checkpoints.sources import Source, open_source
from psla_sb.dataio.bad_clips import check_audio
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import UNFINISHED, atomic_write, flush, write_file
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.teacher_scores import new_array, stamp
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain

# Batches between two notes of how far a pass has come.
BATCHES_AT_ONCE = 50


def score(
    members: Mapping[str, Source | str | Path],
    manifest: Manifest,
    vocabulary: Vocabulary,
    folder: str | Path,
    batch_size: int = 32,
    num_workers: int = 0,
    run_opts: Mapping[str, Any] | None = None,
    at_a_time: int | None = None,
    labels: str | Path | None = None,
    crop: str = "first",
    check: Callable | None = None,
    trust: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Scores the same clips with many models, in one pass over the sound files; returns memory-mapped scores by name.

    A clip is decoded once; features are computed once for each distinct front end, and every member scores the batch while it is
    on the device. Scores go to disk as they come: a pass that was killed goes on where it was, and a member whose scores of the
    same annotation are in the folder is not scored again. Started by torchrun, the ranks, on one machine, share the clips out.

    Arguments
    ---------
    members
        What `open_source` opens, by name. All must have the classes of the vocabulary, in its order.
    folder
        Gets `<name>.npy`, float32 `[clips, classes]` in the order of the annotation, and `<name>.json`, which tells what it was
        made from.
    run_opts
        SpeechBrain's, such as `{"device": "cuda:0", "precision": "bf16"}`.
    at_a_time
        Members that are on the device together; by default as many as fit into half of a GPU's free memory, or all on a CPU.
    labels, trust
        See `open_source`.
    crop
        What members hear of a clip that is longer than they were trained on: its "first" samples or its "centre".
    check
        What is done with each batch of clips before it is scored; by default one that cannot be read is an error.

    Raises
    ------
    InputError
        A member cannot be loaded, or has other classes; or a sound file cannot be read.
    """
    folder, run_opts = Path(folder), run_opts or {"device": "cpu"}
    of_clips = {**stamp(manifest, vocabulary), "precision": run_opts.get("precision", "fp32"), "crop": crop}
    sources = {name: open_source(member, labels, trust) for name, member in members.items()}
    made_from = {name: {"weights": source.digest(), **of_clips} for name, source in sources.items()}
    files = {name: folder / f"{name}.npy" for name in members}
    waiting = [name for name, file in files.items() if not file.exists() or _read(file.with_suffix(".json")) != made_from[name]]
    ddp_barrier()
    while waiting:
        taggers: dict[str, AudioTagger] = {}
        while waiting and (len(taggers) < at_a_time if at_a_time else _has_room(taggers)):
            tagger = AudioTagger.from_source(sources[waiting[0]], run_opts=run_opts)
            if list(tagger.hparams.mids) != vocabulary.mids:
                raise InputError(f"{sources[waiting[0]].path} has other classes than the class list, or in another order")
            taggers[waiting.pop(0)] = tagger
        settings = {"members": {name: made_from[name] for name in taggers}, "batch_size": batch_size, "crop": crop}
        _score_together(taggers, manifest, folder, settings, num_workers, check)
        if if_main_process():
            for name in taggers:
                os.replace(folder / f"{UNFINISHED}{name}.npy", files[name])
                write_file(files[name].with_suffix(".json"), json.dumps(made_from[name]))
            for note in folder.glob(f"{UNFINISHED}pass_*.json"):
                note.unlink()
        ddp_barrier()
    # copy-on-write, since PyTorch warns of arrays that are read-only
    return {name: np.load(file, mmap_mode="c") for name, file in files.items()}


def _score_together(
    taggers: Mapping[str, AudioTagger],
    manifest: Manifest,
    folder: Path,
    settings: Mapping[str, Any],
    num_workers: int,
    check: Callable | None,
) -> None:
    """One pass over the clips, from where an earlier one with the same settings was interrupted."""
    rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n_clips, batch_size = len(manifest), settings["batch_size"]
    hparams = [tagger.hparams for tagger in taggers.values()]
    n_classes, sample_rate = len(hparams[0].mids), hparams[0].sample_rate
    if any(other.sample_rate != sample_rate for other in hparams):
        raise InputError(f"{', '.join(taggers)}: members have different sample rates; aggregate those of one rate")
    lengths = [tagger.n_samples for tagger in taggers.values()]
    n_samples = None if None in lengths else max(length for length in lengths if length is not None)
    batches = [range(row, min(row + batch_size, n_clips)) for row in range(0, n_clips, batch_size)][rank::world_size]
    if int(os.environ.get("GROUP_RANK", 0)) > 0:
        # machines that map one file over a network lose each other's rows: the first one scores, the others wait
        rank, batches = int(os.environ["RANK"]), []

    settings = {**settings, "ranks": world_size}
    paths = {name: folder / f"{UNFINISHED}{name}.npy" for name in taggers}
    note, begun = folder / f"{UNFINISHED}pass_{rank}.json", folder / f"{UNFINISHED}pass_all.json"
    if if_main_process() and (_read(begun) != settings or not all(path.exists() for path in paths.values())):
        # rows that a rank believes to have written are in these very files, or in none
        for stale in folder.glob(f"{UNFINISHED}pass_*.json"):
            stale.unlink()
        for path in paths.values():
            with atomic_write(path) as temporary:
                new_array(temporary, (n_clips, n_classes))
        write_file(begun, json.dumps(settings))
    ddp_barrier()
    done = (_read(note) or {"batches": 0})["batches"]
    out = {name: np.lib.format.open_memmap(path, "r+") for name, path in paths.items()}

    front_ends: dict[Hashable, list[AudioTagger]] = defaultdict(list)
    for tagger in taggers.values():
        front_ends[front_end(tagger)].append(tagger)
    loader = clip_loader(manifest, sample_rate, n_samples, batches[done:], num_workers, settings["crop"])
    total, first = sum(map(len, batches)), sum(map(len, batches[:done]))
    with torch.inference_mode(), tqdm(total=total, initial=first, unit=" clips", disable=None if rank == 0 else True) as bar:
        for count, batch in enumerate(loader, done + 1):
            (check or check_audio)(batch)
            wavs, wav_lens = batch.to(next(iter(taggers.values())).device).sig
            scores: dict[AudioTagger, torch.Tensor] = {}
            for same in front_ends.values():
                by_tagger = _scores_of(same, wavs, wav_lens)
                scores |= dict(zip(same, by_tagger.unbind(1), strict=True))
            for name, tagger in taggers.items():
                out[name][batch.index] = scores[tagger].float().cpu().numpy()
            bar.update(len(batch.index))
            if count % BATCHES_AT_ONCE == 0:
                _flush(out, paths)
                write_file(note, json.dumps({"batches": count}))
    _flush(out, paths)
    ddp_barrier()


def _scores_of(taggers: Sequence[AudioTagger], wavs: torch.Tensor, wav_lens: torch.Tensor | None) -> torch.Tensor:
    """Scores clips with taggers of one front end: `[batch, taggers, classes]`."""
    if wav_lens is not None and taggers[0].n_samples is None:
        return chain.by_length(lambda clips: _scores_of(taggers, clips, None), wavs, wav_lens)
    feats, lens = taggers[0].features_and_lens(wavs, wav_lens)
    return torch.stack([tagger.tag_features(feats, lens) for tagger in taggers], dim=1)


def _flush(arrays: Mapping[str, np.memmap], paths: Mapping[str, Path]) -> None:
    for name, array in arrays.items():
        array.flush()
        flush(paths[name])


def _read(path: Path) -> dict[str, Any] | None:
    """What a JSON file says; None if it is not there, or not as it was written: what it is about is then done again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _has_room(taggers: Mapping[str, AudioTagger]) -> bool:
    """Whether one more model like these fits into half of a GPU's free memory; the rest is left to what they compute."""
    if not taggers or next(iter(taggers.values())).device_type != "cuda":
        return True
    # twice: a tagger computes with a copy of its weights
    sizes = [2 * sum(tensor.nbytes for tensor in tagger.mods.state_dict().values()) for tagger in taggers.values()]
    return sum(sizes) + max(sizes) <= (torch.cuda.mem_get_info()[0] + sum(sizes) // 2) // 2


def front_end(tagger: AudioTagger) -> Hashable:
    """What two taggers whose features are the same have in common: their parts' settings, or else the features of some noise."""
    parts = [tagger.mods[name] for name in ("compute_features", "mean_var_norm")]
    if all(type(part).__module__.startswith("psla_sb.") for part in parts):
        # what follows from equal arguments is equal
        settings = [{key: value for key, value in vars(part).items() if not key.startswith("_")} for part in parts]
        return repr([(type(part), setting) for part, setting in zip(parts, settings, strict=True)])
    rate = tagger.hparams.sample_rate
    noise = 0.1 * torch.randn(2, rate, generator=torch.Generator().manual_seed(0))
    feats, lens = tagger.features_and_lens(noise, torch.tensor([1.0, 0.7]))
    tensors = [x.cpu().numpy().tobytes() for x in (feats, lens) if x is not None]
    return *map(type, parts), rate, tagger.n_samples, tuple(feats.shape), hashlib.sha256(b"".join(tensors)).hexdigest()
