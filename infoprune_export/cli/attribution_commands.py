"""The command that says where an error was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from infoprune_export.cli.group import bring_up_to, main, progress_bar, read, takes_json, takes_recipe, write_json


@main.command()
@takes_recipe
@click.option("--blocks/--no-blocks", default=True, show_default=True, help="Also every part of every block.")
@click.option(
    "--onnx",
    "foreign",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An ONNX file of the same encoder in place of the exported one, such as after graph surgery of your own.",
)
@takes_json
def attribute(blocks: bool, foreign: Path | None, file: Path | None, **options: Any) -> None:
    """Say which step, which part of which block and which ONNX nodes made an error; exit code 1 if something broke.

    Outputs are compared behind every step; parts are given the reference's own input, so that an error shows where it
    is made. Cosine, norm ratio and largest error belong together.

    \b
    Example:
      infoprune-export attribute quickstart
      infoprune-export attribute quickstart --set export.precision=fp16
    """
    folder = bring_up_to("attribution", **options)
    found = json.loads((folder / "attribution.json").read_text(encoding="utf-8"))
    from infoprune_export.console import wide_console
    from infoprune_export.validate.attribution_tables import render

    if foreign is not None:
        found = _foreign(foreign, blocks=blocks, folder=folder, **options)
    render(wide_console(), found, blocks=blocks)
    write_json(file, found)
    sys.exit(1 if found["broken"] else 0)


def _foreign(
    file: Path,
    *,
    blocks: bool,
    folder: Path,
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    **_: Any,
) -> dict[str, Any]:
    """The finished run once more, with the user's file."""
    from infoprune_export.pipeline import Run, execute
    from infoprune_export.stages import STAGES
    from infoprune_export.stages.attribution import attribute_file

    with progress_bar() as progress:
        run = Run(read(recipe, overrides, device), folder.parent, progress)
        execute(run, STAGES, "attribution")
        return attribute_file(run, file, blocks=blocks)
