"""The page that says what was found in somebody's own sounds: one HTML file, without scripts, that needs no other."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 2rem auto; padding: 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
li { margin: .2rem 0 } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; vertical-align: top; border-bottom: 1px solid #eee }
td { overflow-wrap: anywhere } th { border-bottom-color: #999; font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; width: 4.5rem }
.bar { height: .7rem; min-width: 1px; background: #0072B2; display: inline-block } .bar.v { background: #8FC1E3 }
.bar.t { background: #D55E00 } .grey { color: #666 } .path { font-size: .85rem } .few { color: #B03A00; font-weight: 600 }
"""
MOST_ROWS = 100
FEW = 10


def page(report: Mapping[str, Any], pairs: Sequence[Sequence[Any]], left_out: Sequence[tuple[str, str]]) -> str:
    """Makes the page of what `prepared.json` says, of pairs of duplicates (rows of `duplicates.csv`), and of what was left out."""
    clips, lengths = report["clips"], {name: _seconds(seconds) for name, seconds in report["durations"].items()}
    n_clips = sum(clips.values())
    kind = "one label each" if report["single_label"] else "several labels each, or none"
    sets = ", ".join(f"{n:,} {name}" for name, n in clips.items() if n)
    summary = [
        f"{n_clips:,} clips ({sets}), {report['hours']:.2f} hours, {report['n_classes']} classes; {kind}",
        f"lengths: half of the clips up to {lengths['median']}, 95 % up to {lengths['p95']}, the longest {lengths['max']}",
        f"{report['groups']:,} groups of clips that stay together, the largest of {report['largest_group']:,}"
        + (f"; {report['n_folds']} folds" if report["n_folds"] else ""),
        *([f"clips that are segments of recordings: {report['segments']:,}"] if report["segments"] else []),
        *report["said"],
    ]
    return "".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report["source"])}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n',
            f'<h1>What was found</h1><p class="grey path">{escape(report["source"])}</p>\n',
            _list(summary),
            _section("What to look at", _list(report["remarks"]) if report["remarks"] else "<p>Nothing.</p>\n"),
            _section("Classes", _classes(report["classes"])),
            _section("Lengths", _bars([(f"{_seconds(r['from'])} to {_seconds(r['to'])}", r["clips"]) for r in report["lengths"]])),
            _section("Sample rates", _bars([(f"{int(rate):,} Hz", n) for rate, n in report["sample_rates"].items()])),
            _section("Formats", _bars(list(report["formats"].items()))),
            _section("Left out", _left_out(report["left_out_reasons"], left_out)),
            _section("Clipped", _clipped(report)),
            _section("Duplicates and label conflicts", _pairs(pairs)),
            "</body></html>\n",
        ]
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>\n"


def _seconds(seconds: float) -> str:
    """Writes a length as people say it.

    >>> [_seconds(seconds) for seconds in (0.05, 4.0, 90.0, 7200.0)]
    ['50 ms', '4 s', '1.5 min', '2 h']
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    unit, name = (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
    return f"{seconds / unit:.3g} {name}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Makes a table of cells that are HTML; columns of `numbers` are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table><tr>{cells('th', [escape(head) for head in heads])}</tr>\n{body}</table>\n"


def _bar(value: float, most: float, kind: str = "", width: float = 22.0) -> str:
    return f'<span class="bar {kind}" style="width:{width * value / most:.2f}rem"></span>' if value else ""


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max((n for _, n in rows), default=1)
    return _table(["", "clips", ""], [(escape(name), f"{n:,}", _bar(n, most)) for name, n in rows], numbers=[1])


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    """The classes, those with most clips first: how many in each set, as numbers and as bars."""
    sets = ("train", "valid", "test")
    totals = [sum(one[name] for name in sets) for one in classes]
    most = max(totals, default=1)
    rows = []
    for _, one in sorted(zip(totals, classes, strict=True), key=lambda pair: (-pair[0], pair[1]["name"])):
        counts = [
            f"<span class=few>{one[name]:,}</span>" if name == "train" and one[name] < FEW else f"{one[name]:,}" for name in sets
        ]
        bars = "".join(_bar(one[name], most, kind, 16.0) for name, kind in zip(sets, ("", "v", "t"), strict=True))
        rows.append((escape(one["name"]), *counts, f"{one['hours']:.2f}", bars))
    return _table(["class", *sets, "hours", "clips: train, valid, test"], rows, numbers=[1, 2, 3, 4])


def _left_out(reasons: Mapping[str, int], left_out: Sequence[tuple[str, str]]) -> str:
    if not left_out:
        return "<p>Nothing: no file is broken, silent or too short.</p>\n"
    rows = [(f"<span class=path>{escape(file)}</span>", escape(reason)) for file, reason in left_out[:MOST_ROWS]]
    return _bars(list(reasons.items())) + _table(["file", "reason"], rows) + _rest(len(left_out), "left_out.csv")


def _clipped(report: Mapping[str, Any]) -> str:
    if not report["clipped"]:
        return "<p>Nothing: no clip has more than a thousandth of its samples at full scale.</p>\n"
    return f"<p>More than a thousandth of the samples at full scale: {report['clipped']:,}</p>\n" + _list(report["clipped_files"])


def _pairs(pairs: Sequence[Sequence[Any]]) -> str:
    if not pairs:
        return "<p>Nothing: no two clips sound the same.</p>\n"
    # those with other labels first, then those in two sets
    ordered = sorted(pairs, key=lambda row: (row[6] == "no", row[7] == row[8]))
    rows = []
    for first, second, what, difference, first_labels, second_labels, conflict, first_set, second_set in ordered[:MOST_ROWS]:
        files = f"<span class=path>{escape(first)}<br>{escape(second)}</span>"
        labels = f"{escape(first_labels)}<br>{escape(second_labels)}" if conflict == "yes" else escape(first_labels)
        label_cell = f"<span class=few>{labels}</span>" if conflict == "yes" else labels
        sets = first_set if first_set == second_set else f"<span class=few>{first_set}<br>{second_set}</span>"
        rows.append((files, what if what == "same" else f"alike ({difference:.0%} of bits differ)", label_cell, sets))
    return _table(["clips", "they are", "labels", "set"], rows) + _rest(len(pairs), "duplicates.csv")


def _rest(n: int, file: str) -> str:
    return f"<p class=grey>{n - MOST_ROWS:,} more are in {file}.</p>\n" if n > MOST_ROWS else ""
