"""Which trained models an ensemble is made of, and the ensemble as the folder of one tagger."""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import ruamel.yaml

from psla_sb.aggregation.scoring import front_end
from psla_sb.checkpoints.definitions import definitions_text, plain_definitions
from psla_sb.checkpoints.run_folder import snapshot_path, trained_epochs
from psla_sb.checkpoints.sources import Source, on_disk, run_weights
from psla_sb.checkpoints.tagger_folder import LABEL_ENCODER, write_tagger
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.ensemble import EnsembleEncoder, EnsemblePooling

# arguments of modules that change nothing once the weights are there
TRAINING_ONLY = ("pretrained", "stem", "norm_momentum", "drop_connect", "dropout")
MEMBERS = ("checkpoints", "last", "average", "best")


def find_members(runs: str | Path | list, which: str, first_epoch: int = 1) -> dict[str, Path]:
    """Finds the models to aggregate, by names made from their paths, in the order given.

    Arguments
    ---------
    runs
        Output folders of training runs; also whatever else `open_source` opens, a member each.
    which
        Of a run: "checkpoints" (every epoch's snapshot), "last", "best" (on the validation set) or "average" (of the last epochs).
    first_epoch
        The first of a run's checkpoints.

    Raises
    ------
    InputError
        There are none, one of them is not there, or is there twice.
    """
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or runs == [None]:
        raise InputError("no runs to aggregate: pass --runs=[FOLDER,...], the output folders of training runs")
    if which not in MEMBERS:
        raise InputError(f"members must be one of {', '.join(MEMBERS)}, not {which!r}")
    paths = []
    for run in map(on_disk, map(str, runs)):
        if not run.exists():
            raise InputError(f"{run}: no such run")
        if run.is_file() or (run / LABEL_ENCODER).is_file():
            paths.append(run)
        elif which == "checkpoints":
            numbers = [epoch["epoch"] for epoch in trained_epochs(run)]
            paths += [snapshot_path(run, number) for number in numbers if number >= first_epoch]
        else:
            paths.append(run_weights(run, which))
    if not paths:
        raise InputError(f"no run has an epoch {first_epoch}, which is first_epoch")
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file of weights")
    parts = [[part for part in path.resolve().with_suffix("").parts[1:] if part != "snapshots"] for path in paths]
    # as short as they can be and still differ
    for length in range(3, max(map(len, parts)) + 1):
        names = ["-".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    twice = Counter(map(str, paths)).most_common(1)[0][0]
    raise InputError(f"{twice} is a member twice; give every run once")


def on_cpu(source: Source) -> AudioTagger:
    """Loads a member to look at it."""
    return AudioTagger.from_source(source, run_opts={"device": "cpu"})


def why_no_average(sources: Iterable[Source]) -> str | None:
    """Says why the weights of these members have no mean; None if they have one."""
    distinct = {definitions_text(source.definitions): source for source in sources}.values()
    taggers = [on_cpu(source) for source in distinct]
    if len({front_end(tagger) for tagger in taggers}) > 1:
        return "members have different front ends"
    alike = set(map(_architecture, distinct, taggers))
    return None if len(alike) == 1 else "members are of different architectures"


def _architecture(source: Source, tagger: AudioTagger) -> str:
    """What encoder and pooling compute with their weights, as text: their definitions without what matters in training alone."""
    plain = plain_definitions(source.definitions, {**vars(tagger.hparams), **tagger.mods})
    parts = {name: copy.deepcopy(plain[name]) for name in ("embedding_model", "classifier")}
    for part in parts.values():
        for key in TRAINING_ONLY if isinstance(part, dict) else ():
            part.pop(key, None)
    return definitions_text(parts)


def export_ensemble(folder: str | Path, sources: Sequence[Source], vocabulary: Vocabulary) -> None:
    """Writes an ensemble as the folder of one tagger; a member that is there twice counts twice.

    Example
    -------
    >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
    >>> from psla_sb.checkpoints.sources import open_source
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> from psla_sb.lobes.pooling import MeanPooling
    >>> folder, vocabulary = getfixture("tmp_path"), Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])
    >>> vocabulary.to_csv(folder / "labels.csv")
    >>> paths = [folder / "a.pth", folder / "b.pth"]
    >>> for path in paths:
    ...     save_psla_checkpoint(path, EfficientNetEncoder("b0"), MeanPooling(1280, 2))
    >>> export_ensemble(folder / "tagger", [open_source(path, folder / "labels.csv") for path in paths], vocabulary)
    >>> len(AudioTagger.from_folder(folder / "tagger").mods.classifier.members)
    2
    """
    counts = Counter(sources)
    taggers, weights = [on_cpu(source) for source in counts], list(counts.values())
    if len({front_end(tagger) for tagger in taggers}) > 1:
        raise InputError("members have different front ends, so their ensemble cannot be one tagger")
    built = [{**vars(tagger.hparams), **tagger.mods} for tagger in taggers]
    parts = [plain_definitions(source.definitions, modules) for source, modules in zip(counts, built, strict=True)]
    ensemble = ruamel.yaml.YAML().load(
        "embedding_model: !new:psla_sb.lobes.ensemble.EnsembleEncoder {}\n"
        "classifier: !new:psla_sb.lobes.ensemble.EnsemblePooling {}"
    )
    for name in ("embedding_model", "classifier"):
        ensemble[name]["members"] = [part[name] for part in parts]
        # in the other style, what has a tag and one argument would be written without its braces
        ensemble[name].fa.set_block_style()
    ensemble["classifier"]["weights"] = weights
    modules = {
        "embedding_model": EnsembleEncoder([modules["embedding_model"] for modules in built]),
        "classifier": EnsemblePooling([modules["classifier"] for modules in built], weights),
    }
    write_tagger(folder, parts[0] | ensemble, {**built[0], **modules}, vocabulary)
