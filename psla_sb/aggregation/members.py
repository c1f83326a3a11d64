"""Which trained models an ensemble is made of, and the ensemble as the folder of one tagger."""

from collections import Counter
from pathlib import Path

import ruamel.yaml

from psla_sb.aggregation.scoring import front_end
from psla_sb.checkpoints.definitions import definitions_text, plain_definitions
from psla_sb.checkpoints.run_folder import best_epoch, read_results, snapshot_path
from psla_sb.checkpoints.tagger_folder import write_tagger
from psla_sb.errors import InputError
from psla_sb.inference.tagger import AudioTagger
from psla_sb.lobes.ensemble import EnsembleEncoder, EnsemblePooling

MEMBERS = ("checkpoints", "last", "average", "best")


def find_members(runs, which, first_epoch=1):
    """The models to aggregate.

    Arguments
    ---------
    runs : str or list of str
        Output folders of training runs; also folders of taggers, snapshots and checkpoints of the published code, which are a
        member each.
    which : str
        Of a run: "checkpoints" (every epoch's snapshot), "last", "best" (on the validation set) or "average" (of the last epochs).
    first_epoch : int
        The first of a run's checkpoints.

    Returns
    -------
    dict of str to Path
        By a name made from the path, in the order given.

    Raises
    ------
    InputError
        There are none, one of them is not there, or is there twice.

    Example
    -------
    >>> from psla_sb.checkpoints.run_folder import write_results
    >>> run = getfixture("tmp_path") / "psla" / "1"
    >>> for epoch in (1, 2):
    ...     with atomic_write(snapshot_path(run, epoch)) as temporary:
    ...         _ = temporary.write_bytes(b"")
    >>> write_results(run, {"epochs": [{"epoch": 1, "mAP": 0.2}, {"epoch": 2, "mAP": 0.1}]})
    >>> list(find_members(str(run), "checkpoints")), list(find_members([run], "checkpoints", first_epoch=2))
    (['psla-1-epoch_01', 'psla-1-epoch_02'], ['psla-1-epoch_02'])
    """
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or runs == [None]:
        raise InputError("no runs to aggregate: pass --runs=[FOLDER,...], the output folders of training runs")
    if which not in MEMBERS:
        raise InputError(f"members must be one of {', '.join(MEMBERS)}, not {which!r}")
    sources = []
    for run in map(Path, map(str, runs)):
        if not run.exists():
            raise InputError(f"{run}: no such run")
        if run.is_file() or (run / "embedding_model.ckpt").is_file():
            sources.append(run)
            continue
        try:
            epochs = read_results(run).get("epochs")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{run / 'results.json'}: not what a run writes ({error})") from None
        if not epochs:
            raise InputError(f"{run}: not the output folder of a run that has trained an epoch, and not the folder of a tagger")
        numbers = {
            "checkpoints": [epoch["epoch"] for epoch in epochs if epoch["epoch"] >= first_epoch],
            "last": [epochs[-1]["epoch"]],
            "best": [best_epoch(epochs)],
        }
        if which == "average":
            sources.append(run / "snapshots" / "average.safetensors")
        else:
            sources += [snapshot_path(run, number) for number in numbers[which]]
    if not sources:
        raise InputError(f"no run has an epoch {first_epoch}, which is first_epoch")
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file of weights")
    parts = [[part for part in source.resolve().with_suffix("").parts[1:] if part != "snapshots"] for source in sources]
    for length in range(3, max(map(len, parts)) + 1):
        names = ["-".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, sources, strict=True))
    twice = Counter(map(str, sources)).most_common(1)[0][0]
    raise InputError(f"{twice} is a member twice; give every run once")


def _distinct_taggers(sources):
    """One tagger for each model definition among the members, by the definition's text."""
    first = {}
    for source in sources:
        first.setdefault(definitions_text(source.definitions), source)
    return {text: _on_cpu(source) for text, source in first.items()}


def _on_cpu(source):
    return AudioTagger.from_source(source, run_opts={"device": "cpu"})


def _why_no_average(sources, taggers):
    """Why the weights of these members have no mean; None if they have one."""
    used = [taggers[text] for text in {definitions_text(source.definitions) for source in sources}]
    if len({front_end(tagger) for tagger in used}) > 1:
        return "members have different front ends"
    layouts = [{key: tuple(value.shape) for key, value in tagger.mods.state_dict().items()} for tagger in used]
    return None if all(layout == layouts[0] for layout in layouts) else "members are of different architectures"


def export_ensemble(folder, sources, vocabulary):
    """Writes an ensemble as the folder of one tagger, which `AudioTagger` and SpeechBrain's `EncoderClassifier` load.

    Arguments
    ---------
    folder : str or Path
        Where to write; made if there is none.
    sources : sequence of Source
        The members; one that is there twice counts twice.
    vocabulary : Vocabulary
        The classes.

    Raises
    ------
    InputError
        A member cannot be loaded, or front ends differ.

    Example
    -------
    >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
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
    taggers = [_on_cpu(source) for source in counts]
    if len({front_end(tagger) for tagger in taggers}) > 1:
        raise InputError("members have different front ends, so their ensemble cannot be one tagger")
    encoders, poolings = ([tagger.mods[name] for tagger in taggers] for name in ("embedding_model", "classifier"))
    weights = list(counts.values())
    parts = [
        plain_definitions(source.definitions, {**vars(tagger.hparams), **tagger.mods})
        for source, tagger in zip(counts, taggers, strict=True)
    ]
    definitions = parts[0] | ruamel.yaml.YAML().load(
        "embedding_model: !new:psla_sb.lobes.ensemble.EnsembleEncoder {}\n"
        "classifier: !new:psla_sb.lobes.ensemble.EnsemblePooling {}"
    )
    for name in ("embedding_model", "classifier"):
        definitions[name]["members"] = [part[name] for part in parts]
    definitions["classifier"]["weights"] = weights
    modules = {
        **taggers[0].mods,
        "embedding_model": EnsembleEncoder(encoders),
        "classifier": EnsemblePooling(poolings, weights),
    }
    write_tagger(folder, definitions, modules, vocabulary)
