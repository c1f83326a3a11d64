"""What model a YAML file defines: `sample_rate`, `n_frames` and the definitions of the four modules, as YAML nodes."""

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml.comments import CommentedMap

from psla_sb.checkpoints.trust import check_trusted
from psla_sb.errors import InputError
from psla_sb.lobes.chain import MODULES, attribute

# HyperPyYAML writes `!ref <module.name>` as the first of these; the second one reads nothing but numbers and texts.
GETATTR, ATTRIBUTE = "!apply:getattr", "!apply:psla_sb.lobes.chain.attribute"
PLAIN_KEYS = ("sample_rate", "n_frames", "eval_crop")


def read_yaml(file: str | Path) -> dict[str, Any]:
    """What a YAML file says, by its keys, without building anything; an `InputError` if it is not such a file."""
    try:
        content = ruamel.yaml.YAML().load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, ruamel.yaml.YAMLError) as error:
        raise InputError(f"{file}: not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: has no keys, such as recipes/AudioSet/hparams/psla.yaml has")
    return content


def read_definitions(file: str | Path) -> dict[str, Any]:
    """The definitions in a run's or a tagger's `hyperparams.yaml`, without pretrained weights.

    Raises
    ------
    InputError
        The file is missing, is not YAML, or does not define a tagger.

    Example
    -------
    >>> file = getfixture("tmp_path") / "run.yaml"
    >>> _ = file.write_text("lr: 1\\nsample_rate: 16000\\n" + "".join(f"{name}: {{}}\\n" for name in MODULES))
    >>> list(read_definitions(file))
    ['sample_rate', 'compute_features', 'mean_var_norm', 'embedding_model', 'classifier']
    """
    run = read_yaml(file)
    try:
        definitions = {name: run[name] for name in ("sample_rate", *MODULES)}
    except KeyError as error:
        raise InputError(f"{file}: does not define a tagger: it lacks {error}") from None
    plain = {name: run[name] for name in PLAIN_KEYS if name == "sample_rate" or isinstance(run.get(name), int | str)}
    definitions = plain | {name: definitions[name] for name in MODULES}
    refer_to_plain_attributes(definitions, run)
    without_pretrained(definitions)
    for node in _nodes(definitions):
        if hasattr(node, "ca"):
            # comments stay with the line before them, and would be those of something else
            node.ca.comment = None
            node.ca.items.clear()
    return definitions


def without_pretrained(definitions: Any) -> None:
    """Takes the pretrained weights out of definitions, in place: other weights are going to be loaded."""
    for node in _nodes(definitions):
        if isinstance(node, dict) and node.get("pretrained") is not None:
            node["pretrained"] = None
        elif isinstance(node, list) and str(_tag(node)).endswith((".EfficientNetEncoder", ".MobileNetV3Encoder")) and len(node) > 1:
            node[1] = None


def refer_to_plain_attributes(definitions: dict[str, Any], run: Mapping[str, Any]) -> None:
    """Lets `!ref <module.name>` give numbers and texts only, and measure an encoder's `out_channels` if it does not say them.

    Blocks of the file that definitions refer to are added to them, since they must be built as well.
    """
    for node in list(_nodes(definitions)):
        if _tag(node) == GETATTR:
            if node[0] is run.get("embedding_model"):
                node += [run[name] for name in ("compute_features", "mean_var_norm")]
            node.yaml_set_ctag(ruamel.yaml.Tag(suffix=ATTRIBUTE))
            name = next((name for name, block in run.items() if block is node[0]), None)
            if name is not None:
                definitions.setdefault(name, node[0])


def definitions_text(definitions: Mapping[str, Any]) -> str:
    """Definitions as YAML, which HyperPyYAML builds and which can be compared.

    Example
    -------
    >>> definitions_text({"sample_rate": 16000})
    'sample_rate: 16000\\n'
    """
    text = io.StringIO()
    ruamel.yaml.YAML().dump(CommentedMap(definitions), text)
    return text.getvalue()


def tags_of(text: str) -> set[str]:
    """All tags in YAML text, without building anything."""
    return {str(event.tag) for event in ruamel.yaml.YAML().parse(text) if getattr(event, "tag", None)}


def check_tuples(text: str, source: str | Path) -> None:
    """Refuses tags inside of texts in parentheses: HyperPyYAML reads these as YAML of its own, with a loader that runs code."""
    for event in ruamel.yaml.YAML().parse(text):
        value = getattr(event, "value", None)
        if isinstance(value, str) and "!" in value and (value.lstrip().startswith("(") or str(event.tag) == "!tuple"):
            raise InputError(f"{source}: the tuple {value[:100]!r} has a tag in it, which could run code")


def build(definitions: Mapping[str, Any], source: str | Path, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Builds what definitions describe, if all of it is trusted.

    Raises
    ------
    InputError
        It is not, or it cannot be built; the message names `source`.

    Example
    -------
    >>> yaml = ruamel.yaml.YAML()
    >>> build(yaml.load("classifier: !new:psla_sb.lobes.pooling.MeanPooling {in_channels: 8, n_classes: 2}"), "run.yaml")
    {'classifier': MeanPooling(...)}
    """
    try:
        text = definitions_text(definitions)
        # before references are resolved, which includes files, and again after it, when they have become what they stand for
        check_trusted(tags_of(text), source, trust)
        resolved = ruamel.yaml.YAML().load(resolve_references(text).getvalue())
        refer_to_plain_attributes(resolved, resolved)
        text = definitions_text(resolved)
        check_trusted(tags_of(text), source, trust)
        check_tuples(text, source)
    except InputError:
        raise
    except Exception as error:  # whatever somebody has written
        raise InputError(f"{source}: the model that it defines cannot be read: {type(error).__name__}: {error}") from error
    try:
        return load_hyperpyyaml(text)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except Exception as error:  # other people's constructors
        reason = ": ".join(map(str, error.args)) or error
        raise InputError(f"{source}: the model that it defines cannot be built: {type(error).__name__}: {reason}") from error


def plain_definitions(definitions: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """Definitions that refer to no attributes: what `!ref <embedding_model.out_channels>` became is a number.

    Arguments
    ---------
    definitions
        As `read_definitions` returns them.
    built
        What they describe, by the same keys.

    Raises
    ------
    InputError
        An attribute is no number and no text.

    Example
    -------
    >>> import torch
    >>> text = "mean_var_norm: &norm !new:m.Norm {}\\nclassifier: !new:m.Classifier {size: !apply:getattr [*norm, eps]}"
    >>> run = ruamel.yaml.YAML().load(text)
    >>> refer_to_plain_attributes(run, run)
    >>> plain_definitions(run, {"mean_var_norm": torch.nn.LayerNorm(2, eps=0.1)})["classifier"]["size"]
    0.1
    """
    plain = copy.deepcopy(dict(definitions))
    of_blocks = {id(block): built.get(name) for name, block in plain.items()}
    front_end: list[Any] = [built.get(name) for name in MODULES[:2]]

    for node in list(_nodes(plain)):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(items):
            if _tag(child) == ATTRIBUTE:
                measure = front_end if len(child) > 2 and all(front_end) else []
                node[key] = attribute(of_blocks.get(id(child[0])), child[1], *measure)
    return {name: plain[name] for name in (*PLAIN_KEYS, *MODULES) if name in plain}


def _tag(node: Any) -> str | None:
    return getattr(getattr(node, "tag", None), "value", None)


def _nodes(node: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """A YAML node and all that is in it, each once."""
    seen = set() if seen is None else seen
    if id(node) not in seen:
        seen.add(id(node))
        yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from _nodes(child, seen)
