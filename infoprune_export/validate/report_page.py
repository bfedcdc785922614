"""What the package's pages share: their templates, figures that follow the reader's colour scheme, a strip of errors.

A page needs no script and nothing outside its file. Text comes from people and is escaped; figures are this package's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_FOLDER = Path(__file__).parent

_COLOURS: Mapping[str, str] = {
    "#8a94a6": "before",
    "#1668b8": "after",
    "#e3e7ee": "gone",
    "#b3261e": "alert",
    "#1b8a7a": "teal",
    "#7a4fb5": "violet",
    "#c75000": "orange",
    "#5b6675": "soft",
    "#444444": "label",
    "#222222": "ink",
    "#000000": "axis",
}
"""Colours of `plots` and of analyses, and the style's names for them, which differ in the dark."""


def render_page(template: str, **values: Any) -> str:
    """A template of this folder as text; everything in it is escaped but markup of `figure` and `strip`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["num"] = number
    environment.filters["used"] = share_of_limit
    environment.filters["value"] = setting
    return environment.get_template(template).render(**values)


def style() -> Markup:
    """The pages' style sheet, for a template that lies elsewhere."""
    return Markup((_FOLDER / "report_style.css.j2").read_text(encoding="utf-8"))


# ── Figures ──────────────────────────────────────────────────────────────────


NARROW, LEGIBLE = 480, 0.7
"""A figure of so many CSS pixels may shrink to a telephone's width; a wider one to this share of its own, then it
scrolls."""


def figure(key: str, svg: str, alternative: str) -> Markup:
    """A drawn SVG for a page: with its text alternative, colours of the style, and names of its own by `key`."""
    svg = re.sub(r"(fill|stroke): ?(#[0-9a-f]{6})\b", _variable, svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{key}-", svg)
    named = f'<svg role="img" aria-label="{escape(alternative)}"'
    found = re.search(r'<svg [^>]*?\bwidth="([\d.]+)pt"', svg)
    width = float(found[1]) * 4 / 3 if found else 0.0
    scrolls = width > NARROW
    if scrolls:
        named += f' style="min-width: {LEGIBLE * width:.0f}px"'
    svg = svg.strip().replace("<svg", named, 1)
    return Markup(f'<figure class="shrinks"{" tabindex=0" if scrolls else ""}>{svg}</figure>')


def _variable(found: re.Match[str]) -> str:
    place, colour = found.groups()
    name = _COLOURS.get(colour)
    return f"{place}: {colour}" if name is None else f"{place}: var(--{name})"


CELL, ROW, NAMES = 50, 24, 86
"""Pixels of a strip: width of a block, height of a part, width of the parts' names."""
Cell = tuple[float | None, float]
"""An error, None where it is not finite, and its limit."""


def strip(rows: Mapping[str, Mapping[int, Cell]], alternative: str) -> Markup:
    """Errors of every block as a heat strip: a row per part, a column per block, each cell with its number.

    Colour says how much of its limit an error takes: less than a hundredth, a tenth, a half, all of it, or more, which
    a mark and bold figures say, too. A block without an error has no cell.
    """
    blocks = 1 + max(block for cells in rows.values() for block in cells)
    width, height = NAMES + CELL * blocks, ROW * (len(rows) + 1)
    parts = ['<text class="name" x="0" y="16">block</text>']
    parts += [_text("name", block, 0, str(block)) for block in range(blocks)]
    for line, (name, cells) in enumerate(rows.items(), start=1):
        parts.append(f'<text class="name" x="0" y="{ROW * line + 16}">{escape(name)}</text>')
        for block, (error, limit) in sorted(cells.items()):
            level = heat(error, limit)
            left, top = NAMES + CELL * block + 1, ROW * line + 1
            said = "inf" if error is None else f"{error:.0e}"
            parts.append(f'<rect class="h{level}" x="{left}" y="{top}" width="{CELL - 2}" height="{ROW - 2}" rx="3"/>')
            parts.append(_text("t4" if level == 4 else "t", block, line, said + (" !" if level == 4 else "")))
    return Markup(
        f'<figure class="strip" tabindex="0"><svg role="img" aria-label="{escape(alternative)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg></figure>'
    )


def _text(kind: str, block: int, line: int, said: str) -> str:
    x, y = NAMES + CELL * block + CELL // 2, ROW * line + 16
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="middle">{said}</text>'


def heat(error: float | None, limit: float) -> int:
    """0 to 3 by the share of the limit that an error takes, 4 beyond it."""
    if error is None or error > limit:
        return 4
    return sum(error > share * limit for share in (0.01, 0.1, 0.5))


# ── Numbers ──────────────────────────────────────────────────────────────────


def number(value: float | None, form: str | None = None) -> str:
    """A figure, or that it is none; without a form to three digits, and near 1 with the digits that matter there."""
    if value is None:
        return "not finite"
    return (form or ("%.7g" if 0.99 < value < 1 else "%.3g")) % value


def setting(value: Any) -> str:
    """A setting as JSON would have it, text without quotes."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def share_of_limit(used: float | None) -> str:
    """How much of a limit is used, in words."""
    if used is None:
        return "beyond any bound"
    return f"{100 * used:.0f}% of what is allowed" if used < 10 else f"{used:.3g} times what is allowed"
