"""The folder of a kit: where it may be, and the shipped files that go into it. Imports nothing heavy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export.artifacts import MANIFEST
from infoprune_export.errors import InfopruneError
from infoprune_export.shipped import shipped_folder

if TYPE_CHECKING:
    from infoprune_export.recipe import Route, TensorRtTarget

SCRIPTS = ("bench.py", "build.py", "compare.py", "device.py", "shared.py", "timing.py", "verify.py")
PLUGIN, LIBRARY = "plugin", "plugin/build/libtoken_select.so"
_SOURCES = (".cpp", ".cuh", ".cu", ".h", ".hpp", ".txt", ".cmake")


def check_kit(target: TensorRtTarget, folder: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a folder that exists or a target that no kit can serve.

    With `force` a kit may be replaced, and nothing else.
    """
    if folder.exists():
        is_kit = (folder / "verify.py").is_file() and (folder / MANIFEST).is_file()
        if not is_kit:
            raise InfopruneError(f"{folder}: exists already and is no kit; name another folder")
        if not force:
            raise InfopruneError(f"{folder}: exists already; name another folder, or replace the kit with --force")
    if target.strip_weights:
        raise InfopruneError(
            f"target {target.name}: strip_weights engines need their weights put back before they run, which the kit's "
            "scripts do not do; set strip_weights to false"
        )


def copy_scripts(route: Route, kit: Path) -> None:
    """Put the scripts, and the plugin's source where the route needs it, into a kit."""
    scripts = shipped_folder("kit")
    for name in SCRIPTS:
        shutil.copyfile(scripts / name, kit / name)
    if route == "plugin":
        (kit / PLUGIN).mkdir()
        for path in sorted(shipped_folder("token_select").iterdir()):
            if path.suffix in _SOURCES:
                shutil.copyfile(path, kit / PLUGIN / path.name)
