"""Benchmarks by their released files: one module each, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.data.formats.base import Format

FORMATS = {
    "vqav2": "vqav2:VQAV2",
    "textvqa": "textvqa:TEXTVQA",
    "gqa": "gqa:GQA",
    "pope": "pope:POPE",
    "mme": "mme:MME",
    "mmbench": "mmbench:MMBENCH",
    "mmbench_cn": "mmbench:MMBENCH_CN",
    "scienceqa": "scienceqa:SCIENCEQA",
    "vizwiz": "vizwiz:VIZWIZ",
}
"""Name in a recipe to module and variable."""


def format_of(name: str) -> Format:
    """The format of this name.

    Raises:
        InfopruneError: there is none.
    """
    if name not in FORMATS:
        raise InfopruneError(f"data.format = {name!r}: no such format; there are {', '.join(FORMATS)}")
    module, variable = FORMATS[name].split(":")
    known: Format = getattr(import_module(f"{__name__}.{module}"), variable)
    return known
