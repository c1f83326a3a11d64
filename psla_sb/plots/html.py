"""What a page of HTML is made of: one file without scripts of others, in which pictures and sounds are."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psla_sb.files import write_file

# A click on the head of a column sorts by it: numbers by value, and what has none last.
SORT = """
for (const head of document.querySelectorAll('table.sorted th')) head.onclick = () => {
  const table = head.closest('table'), body = table.tBodies[0], column = head.cellIndex
  const down = head.dataset.down = head.dataset.down === '1' ? '0' : '1'
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)]
    if (x === '' || y === '') return (x === '') - (y === '')
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y
    return down === '1' && !isNaN(x) ? -order : order
  })
  body.append(...rows)
}
"""
STYLE = """
body {font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px; margin: 2em auto; padding: 0 1em}
h1, h2 {line-height: 1.2} h2 {margin-top: 2em; border-bottom: 1px solid #ccc}
table {border-collapse: collapse; margin: 1em 0; font-size: 14px}
th, td {padding: .25em .7em; text-align: left; vertical-align: top}
th {border-bottom: 2px solid #888} td {border-bottom: 1px solid #eee; overflow-wrap: anywhere}
table.sorted th {cursor: pointer} td.number, th.number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap}
.wide {overflow-x: auto; max-height: 36em; overflow-y: auto} .wide th {position: sticky; top: 0; background: #fff}
img {max-width: 100%; height: auto} .small {color: #555; font-size: 14px}
.right {font-weight: 600} .decided::before {content: "\\2713 "}
.clip {border: 1px solid #ddd; border-radius: 6px; padding: .6em 1em; margin: .8em 0; overflow-wrap: anywhere}
.clip p {margin: .2em 0}
audio {width: 100%; max-width: 30em; height: 36px}
@media print {.wide {max-height: none; overflow: visible} audio {display: none}}
"""


def text(value: Any) -> str:
    """Makes text of anything, in which nothing is markup.

    Example
    -------
    >>> text("<b>Rock & roll</b>")
    '&lt;b&gt;Rock &amp; roll&lt;/b&gt;'
    """
    return html.escape(str(value))


def number(value: float | None, form: str = ".3f") -> str:
    """Writes a number; what there is none of is a dash.

    Example
    -------
    >>> number(0.12345), number(float("nan")), number(None), number(7, "d")
    ('0.123', '-', '-', '7')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], by_click: bool = False) -> str:
    """Makes a table: cells that are texts are escaped, numbers stand to the right, a pair (value, shown) is sorted by its value."""
    shown = [[cell if isinstance(cell, tuple) else (cell, str(cell)) for cell in row] for row in rows]
    numeric = [bool(shown) and all(not isinstance(row[i][0], str) for row in shown) for i in range(len(heads))]
    kind = [' class="number"' if one else "" for one in numeric]
    head = "".join(f"<th{of}>{text(name)}</th>" for name, of in zip(heads, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{of}{_value(*cell)}>{text(cell[1])}</td>" for cell, of in zip(row, kind, strict=True)) + "</tr>\n"
        for row in shown
    )
    made = f'<table class="{"sorted" if by_click else ""}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="wide">{made}</div>'


def _value(value: Any, shown: str) -> str:
    if isinstance(value, str) or str(value) == shown:
        return ""
    return f' data-value="{value if value is not None and math.isfinite(value) else ""}"'


def picture(path: str | Path, says: str) -> str:
    """Puts a PNG file into the page; `says` is for those who do not see it."""
    return f'<img alt="{text(says)}" src="data:image/png;base64,{_base64(Path(path).read_bytes())}">'


def player(flac: bytes) -> str:
    """Puts a FLAC file into the page, to be played."""
    return f'<audio controls preload="none" src="data:audio/flac;base64,{_base64(flac)}"></audio>'


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def write_html(path: str | Path, title: str, parts: Sequence[str]) -> None:
    """Writes a page of parts, which are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    body = "\n".join([f"<h1>{text(title)}</h1>", *parts, f"<script>{SORT}</script>"])
    write_file(path, f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n')
