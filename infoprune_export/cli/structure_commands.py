"""Commands that look at heads and FFNs: criteria and methods side by side."""

from __future__ import annotations

from pathlib import Path

import click

from infoprune_export.cli.group import main, progress_bar, read, reads_recipe, takes_json, write_json
from infoprune_export.errors import InfopruneError


@main.command("compare-structure")
@reads_recipe
@click.option("--heads", "heads", multiple=True, metavar="NAME", help="Head criterion; repeatable. [default: all]")
@click.option("--ffn", "ffn", multiple=True, metavar="NAME", help="FFN method; repeatable. [default: all]")
@click.option("--remove", "removed", type=float, multiple=True, help="Share of heads. [default: .25, .5, .69]")
@click.option("--keep", "kept", type=float, multiple=True, help="Share of FFN MACs. [default: .5, .25]")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Draws of random methods.")
@takes_json
def compare_structure(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    heads: tuple[str, ...],
    ffn: tuple[str, ...],
    removed: tuple[float, ...],
    kept: tuple[float, ...],
    seeds: int,
    file: Path | None,
) -> None:
    """Compare head criteria and FFN methods: one model, one set of questions.

    Every row removes heads or compresses FFNs of the recipe's model and leaves all else alone. Naming methods of one
    part only leaves the other part out. Accuracy comes with standard errors, differences are paired.

    \b
    Example:
      infoprune-export compare-structure quickstart --heads random --heads michel --remove 0.5
    """
    checked = read(recipe, overrides, device)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import tracker, wide_console
    from infoprune_export.validate import compare_structure as room

    everything = not heads and not ffn
    with progress_bar() as progress:
        rows = room.compare_structure(
            checked,
            room.HEAD_METHODS if everything else heads,
            removed or (0.25, 0.5, 0.69),
            room.FFN_METHODS if everything else ffn,
            kept or (0.5, 0.25),
            tracker(progress),
            seeds=seeds,
        )
    wide_console().print(room.render(rows))
    write_json(file, rows)


@main.command()
@reads_recipe
@click.option(
    "--speed-up",
    "speed_ups",
    type=click.FloatRange(min=1, min_open=True),
    multiple=True,
    metavar="TIMES",
    help="Repeatable. [default: 1.25, 1.5, 2, 2.5, 3]",
)
@click.option(
    "--of",
    "parts",
    type=click.Choice(["heads", "ffn", "both"]),
    multiple=True,
    help="What is made smaller; repeatable. [default: all three]",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the picture here, as SVG.")
@takes_json
def front(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    speed_ups: tuple[float, ...],
    parts: tuple[str, ...],
    plot: Path | None,
    file: Path | None,
) -> None:
    """Accuracy against latency: what each speed-up of the vision encoder costs.

    Heads, FFNs and both are allocated under measured latency, carried out, refitted, asked and timed in ONNX Runtime.
    With a recovery section (--set recovery.method=distill) both are fine-tuned too, on a line of their own.

    \b
    Example:
      infoprune-export front quickstart --set budget.images=16 --speed-up 2 --speed-up 3 --plot front.svg
    """
    checked = read(recipe, overrides, device)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise InfopruneError(f"--plot: {plot.absolute().parent}: no such folder")
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.artifacts import write_text
    from infoprune_export.console import tracker, wide_console
    from infoprune_export.validate import front as room

    with progress_bar() as progress:
        chosen = [part for part in room.PARTS if part in parts] or list(room.PARTS)
        result = room.front(checked, speed_ups or (1.25, 1.5, 2.0, 2.5, 3.0), chosen, tracker(progress))
    wide_console().print(room.render(result))
    write_json(file, result)
    if plot is not None:
        write_text(plot, room.draw(result))
