"""What the YAML file of a trained model may construct: this toolkit's lobes, installed plugins, and what the caller trusts.

A file that somebody else wrote must not choose which code runs. So only whole names are looked up, `module.Class` with a module
that is imported as it is called, and the class must be defined there or below: what a trusted module has itself imported is not
trusted with it.
"""

import importlib
import inspect
import os
import site
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from psla_sb.errors import InputError

# Packages with entry points of this group are trusted: whoever installed one has let its code in already.
GROUP = "psla_sb.lobes"
OWN = "psla_sb.lobes"
# What the folders that this toolkit writes name besides its lobes.
NEEDED = {
    "!apply:psla_sb.lobes.chain.attribute",
    "!name:psla_sb.checkpoints.load_module",
    "!new:speechbrain.dataio.encoder.CategoricalEncoder",
    "!new:psla_sb.checkpoints.OneFilePretrainer",
    "!new:speechbrain.utils.parameter_transfer.Pretrainer",
}
# These construct nothing.
PLAIN = {"!ref", "!copy", "!tuple"}


def check_trusted(tags: Iterable[str], source: str | Path, trust: Sequence[str] = ()) -> None:
    """Refuses YAML tags that would construct anything else than trusted classes, before anything is built.

    Arguments
    ---------
    tags
        Such as `!new:psla_sb.lobes.features.KaldiFbank`.
    source
        The file that they are in, for the message.
    trust
        Modules whose classes and functions may be used too, by their importable names.

    Raises
    ------
    InputError
        A tag is not trusted, or a trusted module cannot be imported.

    Example
    -------
    >>> check_trusted(["!new:psla_sb.lobes.pooling.MeanPooling"], "hyperparams.yaml")
    >>> check_trusted(["!new:torch.nn.Linear"], "hyperparams.yaml", trust=["torch.nn"])
    >>> check_trusted(["!apply:os.system"], "hyperparams.yaml")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: hyperparams.yaml constructs '!apply:os.system', which is not a part of psla_sb. ...
    """
    refused = untrusted(tags, trust)
    if refused:
        modules = sorted(set(refused.values()))
        raise InputError(
            f"{source} constructs {', '.join(map(repr, refused))}, which is not a part of psla_sb. If you trust the code of "
            f"{', '.join(modules)}, say so: {' '.join(f'--trust {module}' for module in modules)} on the command line, "
            f"trust: [{', '.join(modules)}] in a YAML file, trust={modules} in Python; or install it as a package with an entry "
            f"point of the group {GROUP}. AudioTagger.from_hparams builds anything"
        )


def untrusted(tags: Iterable[str], trust: Sequence[str] = ()) -> dict[str, str]:
    """Finds the tags that are not trusted, and for each the module that would have to be."""
    named, plugins = as_names(trust), _plugins()
    refused = {}
    for tag in sorted(set(tags) - PLAIN - NEEDED):
        kind, _, name = tag.partition(":")
        if kind in ("!new", "!name") and _defined(name, [OWN, *plugins], named, classes_only=True):
            continue
        if kind in ("!new", "!name", "!apply") and _defined(name, named, named):
            continue
        refused[tag] = name.rpartition(".")[0] or name
    return refused


def _plugins() -> set[str]:
    """The packages that announce themselves and were installed, or that PYTHONPATH names: not what lies in the current folder."""
    paths = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    paths |= set(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    installed = {os.path.realpath(path) for path in paths}
    return {
        entry.module.partition(".")[0]
        for entry in entry_points(group=GROUP)
        if entry.dist is not None and os.path.realpath(str(entry.dist.locate_file(""))) in installed
    }


def as_names(trust: str | Sequence[str] | None) -> list[str]:
    """The names of trusted modules, from whatever a YAML file or a caller may give.

    Example
    -------
    >>> as_names("my_lobes"), as_names(None)
    (['my_lobes'], [])
    """
    names: list[Any] = list(trust or []) if trust is None or isinstance(trust, list | tuple) else [trust]
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"trust: {name!r} is not the name of a module, such as my_lobes")
    return names


def _below(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _defined(name: str, packages: Sequence[str], named: Sequence[str], classes_only: bool = False) -> bool:
    """Whether `module.attribute` is a class (or function) that is defined in one of the packages."""
    module_name, _, attribute = name.rpartition(".")
    if not _below(module_name, packages):
        return False
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # other people's code
        if _below(module_name, named):
            raise InputError(
                f"the trusted module '{module_name}' cannot be imported ({error!r}): run the command in the folder that has "
                f"{module_name.split('.')[0]}, or put that folder into PYTHONPATH"
            ) from None
        return False
    found = getattr(module, attribute, None)
    usable = inspect.isclass(found) or (not classes_only and inspect.isroutine(found))
    return usable and _below(getattr(found, "__module__", None) or "", packages)
