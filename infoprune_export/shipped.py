"""Files that are shipped beside the code: recipes, targets, the scripts of kits, the kernel's source."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Literal

Kind = Literal["recipes", "targets", "kit", "token_select"]


def shipped_folder(kind: Kind) -> Path:
    """Their folder: of the installed package, or of the source tree."""
    package = Path(str(importlib.resources.files("infoprune_export")))
    installed = package / "assets" / kind
    if installed.is_dir():
        return installed
    return package.parent / kind if kind == "recipes" else package.parent / "engines" / kind
