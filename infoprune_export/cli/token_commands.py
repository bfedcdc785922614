"""Commands that look at a model: token selectors side by side, and the papers' analyses."""

from __future__ import annotations

from pathlib import Path

import click

from infoprune_export.cli.group import main, progress_bar, read, reads_recipe, takes_json, write_json


@main.command("compare-tokens")
@reads_recipe
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Repeatable. [default: all]")
@click.option("--keep", "ratios", multiple=True, metavar="SHARE", help="Repeatable. [default: 1/2, 2/9, 1/9]")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Draws of random methods.")
@takes_json
def compare_tokens(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    methods: tuple[str, ...],
    ratios: tuple[str, ...],
    seeds: int,
    file: Path | None,
) -> None:
    """Compare this package's token selection with published methods and controls: one model, one set of questions.

    The model is the recipe's, nothing else of it is pruned. Methods of the encoder go by their name (divprune), those
    inside the language model by decoder:NAME (decoder:fastv). Accuracy comes with standard errors, differences are
    paired.

    \b
    Example:
      infoprune-export compare-tokens quickstart --method random --method divprune --keep 1/9
    """
    checked = read(recipe, overrides, device)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import tracker, wide_console
    from infoprune_export.validate import compare_tokens

    with progress_bar() as progress:
        rows = compare_tokens.compare_tokens(
            checked,
            methods or compare_tokens.ALL,
            [compare_tokens.share(ratio) for ratio in ratios or ("1/2", "2/9", "1/9")],
            tracker(progress),
            seeds=seeds,
        )
    wide_console().print(compare_tokens.render(rows))
    write_json(file, rows)


@main.command()
@reads_recipe
@click.option(
    "--what",
    multiple=True,
    type=click.Choice(["increments", "flows", "maturity", "kept", "heads", "density", "ranks", "damage"]),
    help="Which analysis; repeatable. [default: all]",
)
@click.option("--images", type=click.IntRange(min=1), default=64, show_default=True, help="Validation images used.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder. [default: runs/NAME-analysis]")
def analyse(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    what: tuple[str, ...],
    images: int,
    output: Path | None,
) -> None:
    """Draw both papers' analyses of a recipe's model.

    Visual tokens: what each adds in the order it is chosen (increments), how much they give to text and to each other
    by layer (flows), from which layer on the answer is settled (maturity), and what selection keeps (kept).

    The vision encoder's structure: what each head matters (heads), which rows of the FFNs are not sparse (density),
    which ranks an epsilon keeps (ranks), and what removing heads and neurons costs (damage).

    \b
    Example:
      infoprune-export analyse quickstart --what increments --images 32
    """
    checked = read(recipe, overrides, device)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.analysis.analyse import PAGE, WHAT, analyse
    from infoprune_export.console import tracker

    folder = output or Path("runs") / f"{checked.name}-analysis"
    with progress_bar() as progress:
        analyse(checked, folder, what or WHAT, images, tracker(progress))
    click.echo(f"analysis: {folder / PAGE}")
