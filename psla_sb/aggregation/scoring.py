"""The scores of many models in one pass over the data."""

import hashlib
import json
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from psla_sb.checkpoints.sources import Source, open_source
from psla_sb.dataio.bad_clips import check_audio, listed, state_of_bad_clips, state_of_sounds
from psla_sb.dataio.batches import Reading
from psla_sb.dataio.dataset import clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import rank_and_world_size
from psla_sb.errors import InputError
from psla_sb.files import UNFINISHED, atomic_write, flush, read_json, wait_for, write_file
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.teacher_scores import new_array, stamp
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain

logger = get_logger(__name__)

HEARTBEAT = 180.0  # seconds between two lines about a pass, where there is no progress bar
# Batches between two notes of how far a pass has come.
BATCHES_AT_ONCE = 50
# That are looked through at a time.
ROWS_AT_ONCE = 65_536


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
    folder, run_opts, check = Path(folder), run_opts or {"device": "cpu"}, check or check_audio
    of_clips = {**stamp(manifest, vocabulary), "precision": run_opts.get("precision", "fp32"), "crop": crop}
    sources = {name: open_source(member, labels, trust) for name, member in members.items()}
    files = {name: folder / f"{name}.npy" for name in members}

    def load(name: str) -> AudioTagger:
        tagger = AudioTagger.from_source(sources[name], run_opts=run_opts)
        if list(tagger.hparams.mids) != vocabulary.mids:
            raise InputError(f"{sources[name].path} has other classes than the class list, or in another order")
        return tagger

    # what is there, and what fits, is for one process to say: others may see other files, and have other memory free
    of_clips |= run_on_main(state_of_sounds, [manifest, check])
    made_from = {name: {"weights": source.digest(), **of_clips} for name, source in sources.items()}
    waiting = run_on_main(
        lambda: [
            name for name, file in files.items() if not file.exists() or read_json(file.with_suffix(".json")) != made_from[name]
        ]
    )
    while waiting:
        taggers: dict[str, AudioTagger] = {}
        for name in waiting if if_main_process() else ():
            if len(taggers) >= at_a_time if at_a_time else not _has_room(taggers):
                break
            tagger = load(name)
            # of the centre, members of one length hear the same
            if crop == "first" or all(tagger.n_samples == other.n_samples for other in taggers.values()):
                taggers[name] = tagger
        together = ddp_broadcast(list(taggers))
        taggers = taggers or {name: load(name) for name in together}
        waiting = [name for name in waiting if name not in taggers]
        settings = {"members": {name: _less_bad_clips(made_from[name]) for name in taggers}, "batch_size": batch_size, "crop": crop}
        _score_together(taggers, manifest, folder, settings, num_workers, check)
        # which clips are scored as silence is known now
        run_on_main(
            _publish, [folder, {name: {**made_from[name], **state_of_bad_clips(manifest, check)} for name in taggers}, manifest]
        )
    for file in files.values():
        wait_for(file)
    # copy-on-write, since PyTorch warns of arrays that are read-only
    return {name: np.load(file, mmap_mode="c") for name, file in files.items()}


def _less_bad_clips(stamped: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass that goes on must have been begun with: clips that it has found to be bad since are in its own notes."""
    return {key: value for key, value in stamped.items() if key != "bad_clips"}


def _publish(folder: Path, made_from: Mapping[str, Any], manifest: Manifest) -> None:
    """Gives scores their names, and their stamps, if all of them are numbers."""
    for note in folder.glob(f"{UNFINISHED}pass_*.json"):
        note.unlink()
    for name in made_from:
        scores = np.load(folder / f"{UNFINISHED}{name}.npy", mmap_mode="r")
        for start in range(0, len(scores), ROWS_AT_ONCE):
            rows = np.flatnonzero(np.isnan(scores[start : start + ROWS_AT_ONCE]).any(axis=1))
            if len(rows):
                clip = manifest[start + int(rows[0])]
                raise InputError(
                    f"{name}: what it scores clip '{clip['id']}' ({clip['wav']}) is not a number; are its weights whole?"
                )
    for name, stamped in made_from.items():
        os.replace(folder / f"{UNFINISHED}{name}.npy", folder / f"{name}.npy")
        write_file(folder / f"{name}.json", json.dumps(stamped))


def _score_together(
    taggers: Mapping[str, AudioTagger],
    manifest: Manifest,
    folder: Path,
    settings: Mapping[str, Any],
    num_workers: int,
    check: Callable,
) -> None:
    """One pass over the clips, from where an earlier one with the same settings was interrupted."""
    rank, here = rank_and_world_size()[0], _ranks_here()
    n_clips, batch_size = len(manifest), settings["batch_size"]
    hparams = [tagger.hparams for tagger in taggers.values()]
    n_classes, sample_rate = len(hparams[0].mids), hparams[0].sample_rate
    if any(other.sample_rate != sample_rate for other in hparams):
        raise InputError(f"{', '.join(taggers)}: members have different sample rates; aggregate those of one rate")
    lengths = [tagger.n_samples for tagger in taggers.values()]
    n_samples = None if None in lengths else max(length for length in lengths if length is not None)
    batches = [range(row, min(row + batch_size, n_clips)) for row in range(0, n_clips, batch_size)]
    settings = {**settings, "ranks": len(here)}
    paths = {name: folder / f"{UNFINISHED}{name}.npy" for name in taggers}
    note, begun = folder / f"{UNFINISHED}pass_{rank}.json", folder / f"{UNFINISHED}pass_all.json"
    if if_main_process() and (read_json(begun) != settings or not all(path.exists() for path in paths.values())):
        # rows that a rank believes to have written are in these very files, or in none
        for stale in folder.glob(f"{UNFINISHED}pass_*.json"):
            stale.unlink()
        for path in paths.values():
            with atomic_write(path) as temporary:
                new_array(temporary, (n_clips, n_classes))
        write_file(begun, json.dumps(settings))
    ddp_barrier()
    if rank not in here:
        # machines that map one file over a network lose each other's rows: the first one scores, the others wait
        ddp_barrier()
        return
    batches = batches[here.index(rank) :: len(here)]
    noted = read_json(note) or {"batches": 0, "bad_clips": []}
    # a clip that was scored as silence, and is not in the list any more, was mended
    done = noted["batches"] if set(noted["bad_clips"]) <= set(listed(check)) else 0
    out = {name: np.lib.format.open_memmap(path, "r+") for name, path in paths.items()}

    front_ends: dict[Hashable, list[AudioTagger]] = defaultdict(list)
    for tagger in taggers.values():
        front_ends[front_end(tagger)].append(tagger)
    device = torch.device(next(iter(taggers.values())).device)
    on_gpu = device.type == "cuda"
    loader = clip_loader(manifest, sample_rate, n_samples, batches[done:], num_workers, settings["crop"], pin_memory=on_gpu)
    computed: deque[tuple[torch.Tensor, Reading]] = deque()

    def write(still_running: int = 0) -> None:
        while len(computed) > still_running:
            index, reading = computed.popleft()
            for array, scores in zip(out.values(), reading.values(), strict=True):
                array[index] = scores.numpy()

    said = time.monotonic()
    total, first = sum(map(len, batches)), sum(map(len, batches[:done]))
    with torch.inference_mode(), tqdm(total=total, initial=first, unit=" clips", disable=None if rank == 0 else True) as bar:
        for count, batch in enumerate(loader, done + 1):
            check(batch)
            wavs, wav_lens = batch.to(device, non_blocking=True).sig
            scores: dict[AudioTagger, torch.Tensor] = {}
            for same in front_ends.values():
                by_tagger = _scores_of(same, wavs, wav_lens)
                scores |= dict(zip(same, by_tagger.unbind(1), strict=True))
            computed.append((batch.index, Reading(*[scores[tagger].float() for tagger in taggers.values()])))
            # of the batch before, while a GPU is at this one
            write(int(on_gpu))
            bar.update(len(batch.index))
            if bar.disable and rank == 0 and time.monotonic() - said > HEARTBEAT:
                said = time.monotonic()
                logger.info(
                    "Scoring with %d models: %d of %d clips of this process", len(taggers), sum(map(len, batches[:count])), total
                )
            if count % BATCHES_AT_ONCE == 0:
                write()
                _flush(out, paths)
                write_file(note, json.dumps({"batches": count, "bad_clips": listed(check)}))
    write()
    _flush(out, paths)
    ddp_barrier()


def _ranks_here() -> list[int]:
    """The processes on the machine of the first one."""
    hosts: list[Any] = [None] * rank_and_world_size()[1]
    if len(hosts) > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
    return [rank for rank, host in enumerate(hosts) if host == hosts[0]]


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


def _has_room(taggers: Mapping[str, AudioTagger]) -> bool:
    """Whether one more model like these fits into half of a GPU's free memory; the rest is left to what they compute."""
    device = torch.device(next(iter(taggers.values())).device) if taggers else None
    if device is None or device.type != "cuda":
        return True
    # twice: a tagger computes with a copy of its weights
    sizes = [2 * sum(tensor.nbytes for tensor in tagger.mods.state_dict().values()) for tagger in taggers.values()]
    # what an earlier pass had, and PyTorch keeps, is free as well
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return sum(sizes) + max(sizes) <= (torch.cuda.mem_get_info(device)[0] + kept + sum(sizes) // 2) // 2


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
