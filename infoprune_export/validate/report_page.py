"""What the package's pages share: their templates, figures that follow the reader's colour scheme, a strip of errors.

A page needs no script and nothing outside its file. Text comes from people and is escaped; figures are this package's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
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


def figure(key: str, svg: str, alternative: str) -> Markup:
    """A drawn SVG for a page: with its text alternative, colours of the style, and names of its own by `key`."""
    svg = re.sub(r"(fill|stroke): ?(#[0-9a-f]{6})\b", _variable, svg)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{key}-", svg)
    named = f'<svg role="img" aria-label="{escape(alternative)}" '
    return Markup(f'<figure class="shrinks">{svg.strip().replace("<svg ", named, 1)}</figure>')


def _variable(found: re.Match[str]) -> str:
    place, colour = found.groups()
    name = _COLOURS.get(colour)
    return f"{place}: {colour}" if name is None else f"{place}: var(--{name})"


CELL, ROW, NAMES = 50, 24, 86
"""Pixels of a strip: width of a block, height of a part, width of the parts' names."""


def strip(rows: Mapping[str, Sequence[float | None]], limit: float | Sequence[float], alternative: str) -> Markup:
    """Errors of every block as a heat strip: a row per part, a column per block, each cell with its number.

    Colour says how much of `limit` (one, or one for each row) an error takes: less than a hundredth, a tenth, a half,
    all of it, or more, which is also said by bold figures and a mark. None is nothing measured, infinity not finite.
    """
    limits = [limit] * len(rows) if isinstance(limit, (int, float)) else list(limit)
    blocks = max(map(len, rows.values()))
    width, height = NAMES + CELL * blocks, ROW * (len(rows) + 1)
    parts = [
        f'<text class="name" x="{NAMES + CELL * (block + 0.5):.0f}" y="16" text-anchor="middle">{block}</text>'
        for block in range(blocks)
    ]
    parts.append('<text class="name" x="0" y="16">block</text>')
    for line, ((name, errors), most) in enumerate(zip(rows.items(), limits, strict=True), start=1):
        top = ROW * line
        parts.append(f'<text class="name" x="0" y="{top + 16}">{escape(name)}</text>')
        for block, error in enumerate(errors):
            if error is None:
                continue
            level, left = _level(error, most), NAMES + CELL * block
            said = "inf" if math.isinf(error) else f"{error:.0e}"
            mark = " !" if level == 4 else ""
            parts.append(
                f'<rect class="h{level}" x="{left + 1}" y="{top + 1}" width="{CELL - 2}" height="{ROW - 2}" rx="3"/>'
                f'<text class="t{4 if level == 4 else ""}" x="{left + CELL / 2:.0f}" y="{top + 16}" '
                f'text-anchor="middle">{said}{mark}</text>'
            )
    return Markup(
        f'<figure class="strip" tabindex="0"><svg role="img" aria-label="{escape(alternative)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg></figure>'
    )


def _level(error: float, limit: float) -> int:
    if error > limit:
        return 4
    return sum(error > share * limit for share in (0.01, 0.1, 0.5))


# ── Numbers ──────────────────────────────────────────────────────────────────


def number(value: float | None, form: str = "%.3g") -> str:
    """A figure, or that it is none."""
    return "not finite" if value is None else form % value


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
