"""What an ablation runs: a recipe as it is, without each technique, with each alone, and with other values of any key."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from psla_sb.errors import InputError

# Techniques that are switched off by an override, as on the command line: PSLA's, and those of later systems, which psla_plus.yaml
# has. Aggregation needs no runs of its own.
TECHNIQUES = {
    "pretraining": {"pretrained": "null"},
    "balanced sampling": {"balanced_sampling": "False"},
    "mixup": {"mixup_rate": "0"},
    "masks": {"freq_mask": "0", "time_mask": "0"},
    "label enhancement": {"label_enhancement": "null"},
    "gain": {"gain": "0"},
    "roll": {"roll": "0"},
    "larger half": {"mixup_at_least_half": "False"},
    "Freq-MixStyle": {"freq_mixstyle": "0"},
    "mel edges": {"edge_ranges": "[0, 0]"},
    "teacher": {"teacher_scores": "null"},
    "moving average": {"ema_decay": "null"},
    "estimated statistics": {"batch_norm_clips": "null"},
}


class Variant(NamedTuple):
    """One row of an ablation: what it is called, which overrides make it, and what it is compared with."""

    name: str
    group: str  # "full", "off", "alone" or "varied"
    overrides: dict[str, str]
    against: str | None  # the name of another variant
    folder: str  # of its runs; variants that are the same have the same


def techniques_in_use(settings: Mapping[str, Any]) -> list[str]:
    """The techniques that a recipe has switched on.

    Example
    -------
    >>> techniques_in_use({"pretrained": None, "balanced_sampling": True, "mixup_rate": 0, "freq_mask": 0, "time_mask": 40})
    ['balanced sampling', 'masks']
    """
    values = {name: [settings.get(key) for key in off] for name, off in TECHNIQUES.items()}
    return [name for name, of_keys in values.items() if any(any(one) if isinstance(one, list) else one for one in of_keys)]


def variants_of(settings: Mapping[str, Any], varied: Mapping[str, Mapping[str, Any]] | None = None) -> list[Variant]:
    """The variants of a recipe: full, each technique off, all off (the baseline), each alone on the baseline, other values.

    Arguments
    ---------
    settings
        What the recipe's YAML file says, with the overrides of all runs.
    varied
        By key: other values, as on the command line, and what each of them means.

    Example
    -------
    >>> settings = {"balanced_sampling": True, "mixup_rate": 0.5, "freq_mask": 16, "time_mask": 40, "lr": 0.1}
    >>> for variant in variants_of(settings, {"lr": {"0.2": 0.2}}):
    ...     print(f"{variant.name:24}{variant.against!s:10}{changes(variant.overrides)}")
    full                    None      nothing
    no balanced sampling    full      balanced_sampling=False
    no mixup                full      mixup_rate=0
    no masks                full      freq_mask=0 time_mask=0
    baseline                full      balanced_sampling=False mixup_rate=0 freq_mask=0 time_mask=0
    only balanced sampling  baseline  mixup_rate=0 freq_mask=0 time_mask=0
    only mixup              baseline  balanced_sampling=False freq_mask=0 time_mask=0
    only masks              baseline  balanced_sampling=False mixup_rate=0
    lr=0.2                  full      lr=0.2
    """
    on = techniques_in_use(settings)

    def without(names: Iterable[str]) -> dict[str, str]:
        return {key: value for name in names for key, value in TECHNIQUES[name].items() if key in settings}

    rows: list[tuple[str, str, dict[str, str], str | None]] = [("full", "full", {}, None)]
    rows += [(f"no {name}", "off", without([name]), "full") for name in on]
    rows += [("baseline", "off", without(on), "full")] if on else []
    rows += [(f"only {name}", "alone", without(other for other in on if other != name), "baseline") for name in on]
    for key, values in (varied or {}).items():
        # the recipe's own value needs no runs beside those of the full recipe
        rows += [
            (f"{key}={text}", "varied", {} if value == settings.get(key) else {key: text}, "full") for text, value in values.items()
        ]
    folders: dict[tuple, str] = {}
    variants = [Variant(*row, folders.setdefault(tuple(sorted(row[2].items())), slug(row[0]))) for row in rows]
    if len(set(folders.values())) < len(folders):
        raise InputError(f"two of the variants cannot have the same folder: {', '.join(sorted(folders.values()))}")
    return variants


def changes(overrides: Mapping[str, str]) -> str:
    """The overrides of a variant as they are read: `lr=1 n_mels=32`."""
    return " ".join(f"{key}={value}" for key, value in overrides.items()) or "nothing"


def slug(name: str) -> str:
    """A name that a folder can have.

    Example
    -------
    >>> slug("no balanced sampling"), slug("lr=1e-3"), slug("trust=[a/b, c]")
    ('no_balanced_sampling', 'lr=1e-3', 'trust=_a_b_c_')
    """
    return re.sub(r"[^\w.=+-]+", "_", name)


def key_and_values(text: str) -> tuple[str, list[str]]:
    """Splits what `--vary` is given; commas within brackets and quotes are part of a value.

    Example
    -------
    >>> key_and_values("mixup_rate=0.25,1"), key_and_values("train_segments=[a.csv,b.csv],[a.csv]")
    (('mixup_rate', ['0.25', '1']), ('train_segments', ['[a.csv,b.csv]', '[a.csv]']))
    """
    key, _, values = text.partition("=")
    split = re.findall(r"""(?:\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)
    if not key or not split or ",".join(split) != values:
        raise InputError(f"--vary '{text}': is written KEY=VALUE,VALUE,...")
    return key, [value.strip() for value in split]


def chosen(variants: Sequence[Variant], names: Sequence[str] | None) -> list[Variant]:
    """Those of the variants that `--only` names, with or without `_` in place of blanks; all if it names none.

    Example
    -------
    >>> [variant.name for variant in chosen(variants_of({"mixup_rate": 0.5}), ["full", "no_mixup"])]
    ['full', 'no mixup']
    >>> chosen(variants_of({"mixup_rate": 0.5}), ["no masks"])
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: --only: there is no variant 'no masks' here, but full, no mixup, baseline, only mixup
    """
    if names is None:
        return list(variants)
    by_slug = {slug(variant.name): variant for variant in variants}
    for name in names:
        if slug(name) not in by_slug:
            known = ", ".join(variant.name for variant in variants)
            raise InputError(f"--only: there is no variant '{name}' here, but {known}")
    wanted = {slug(name) for name in names}
    return [variant for name, variant in by_slug.items() if name in wanted]
