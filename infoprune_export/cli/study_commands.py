"""The command that carries out a recipe's grid."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from infoprune_export.cli.group import main, progress_bar, reads_recipe, takes_json, write_json
from infoprune_export.errors import InfopruneError


def _writable(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """Refused before any work is done."""
    if file is not None and not file.absolute().parent.is_dir():
        raise InfopruneError(f"--plot: {file.absolute().parent}: no such folder")
    return file


@main.command()
@reads_recipe
@click.option("--grid", "grid", multiple=True, metavar="KEY=VALUE,VALUE", help="A key and its values. Repeatable.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder of the sweep, with one run for each point. [default: runs/NAME-sweep of the recipe]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes of this machine, a thread each. [default: 1]")
@click.option("--ray", metavar="ADDRESS", help="Ray cluster instead: its address, auto, or local to start one here.")
@click.option("--bench", is_flag=True, help="Give every point a bench stage of its own too, when all are made.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_writable,
    help="Write the picture to this SVG file too.",
)
@takes_json
def sweep(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    grid: tuple[str, ...],
    output: Path | None,
    workers: int | None,
    ray: str | None,
    bench: bool,
    plot: Path | None,
    file: Path | None,
) -> None:
    """Run every combination of a grid's values up to its verdict, and set accuracy against latency.

    A recipe may have a grid: section; --grid adds keys to it and replaces their values. What points share is made once,
    and what is finished stays: the same command resumes. Latency is that of all points in one interleaved run at the
    end. Ends with exit code 1 unless every point's verdict is PASS.

    \b
    Example:
      infoprune-export sweep quickstart --grid heads.remove=0.25,0.5 --grid ffn.keep_macs=0.5,0.25
      infoprune-export sweep pruning-int8 --workers 2 --plot pruning-int8.svg
    """
    from infoprune_export.recipe import load_recipe

    checked = load_recipe(recipe, [*overrides, *([f"device={device}"] if device else [])], grid)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.artifacts import write_text
    from infoprune_export.console import wide_console
    from infoprune_export.validate.study import PICTURE, RESULT, study
    from infoprune_export.validate.study_figure import draw, render

    folder = output or Path("runs") / f"{checked.name}-sweep"
    with progress_bar() as progress:
        result = study(checked, folder, progress, workers=workers, ray=ray, bench=bench)
    console = wide_console()
    for table in render(result):
        console.print(table)
    if plot is not None:
        write_text(plot, draw(result))
    write_json(file, result)
    click.echo(f"{folder / RESULT}, {folder / PICTURE}")
    passed = sum(point["verdict"] == "PASS" for point in result["points"])
    click.echo(f"verdicts: {passed} of {len(result['points'])} points PASS")
    sys.exit(0 if passed == len(result["points"]) else 1)
