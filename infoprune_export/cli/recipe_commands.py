"""Commands that take a recipe's run through its stages."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from infoprune_export.cli.group import (
    bring_up_to,
    main,
    progress_bar,
    read,
    takes_json,
    takes_recipe,
    write_json,
)


@main.command()
@takes_recipe
def run(**options: Any) -> None:
    """Run a whole recipe, from the model to the report, and end with its verdict.

    \b
    Example:
      infoprune-export run quickstart --set heads.remove=0.25
    """
    folder = bring_up_to("report", **options)
    from infoprune_export.console import print_validation

    print_validation(folder.parent / "validation")
    click.echo(f"report: {folder / 'report.html'}")
    _end_with_verdict(folder.parent / "validation")


@main.command("train-gates")
@takes_recipe
def train_gates(**options: Any) -> None:
    """Train attention-head gates and choose the heads that stay.

    \b
    Example:
      infoprune-export train-gates quickstart --set heads.method=paper
    """
    click.echo(bring_up_to("heads", **options))


@main.command("compress-ffn")
@takes_recipe
def compress_ffn(**options: Any) -> None:
    """Compress the feed-forward networks, on top of the pruned heads.

    \b
    Example:
      infoprune-export compress-ffn quickstart --set ffn.keep_macs=0.25
    """
    click.echo(bring_up_to("ffn", **options))


@main.command()
@takes_recipe
def rewrite(**options: Any) -> None:
    """Write the smaller model as a Hugging Face checkpoint.

    \b
    Example:
      infoprune-export rewrite quickstart --output runs/small
    """
    click.echo(bring_up_to("checkpoint", **options))


@main.command()
@takes_recipe
def export(**options: Any) -> None:
    """Export vision encoder, token selection and projector as one ONNX graph.

    \b
    Example:
      infoprune-export export quickstart --set tokens.keep_ratio=2/9
    """
    click.echo(bring_up_to("onnx", **options) / "compressed")


@main.command()
@takes_recipe
@click.option("--target", metavar="NAME", help="Target of engines/targets, or a file; overrides the recipe.")
def build(target: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Build the engine for a target machine.

    \b
    Example:
      infoprune-export build quickstart --target onnxruntime-cpu
    """
    chosen = (f"engine.target={target}",) if target else ()
    click.echo(_build(overrides=overrides + chosen, **options))


@main.command()
@partial(takes_recipe, required=False)
@click.option(
    "--kit-report",
    type=click.Path(path_type=Path),
    help="Read back the report.json of a kit instead. It is checked against the run of RECIPE or --output, where one "
    "is given, or the kit it lies in.",
)
def validate(kit_report: Path | None, **options: Any) -> None:
    """Compare original, compressed, ONNX and engine, and end with the verdict.

    \b
    Example:
      infoprune-export validate quickstart --set validate.max_accuracy_drop=2
      infoprune-export validate --kit-report kit/report.json
    """
    if kit_report is not None:
        _end_with_kit_report(kit_report, **options)
    if options["recipe"] is None:
        raise click.UsageError("Missing argument 'RECIPE'.")
    folder = bring_up_to("validation", **options)
    from infoprune_export.console import print_validation

    print_validation(folder)
    _end_with_verdict(folder)


@main.command("first-token")
@takes_recipe
@click.option("--real-size", is_flag=True, help="Time a model of 0.9 B random weights at the recipe's budgets instead.")
@click.option("--memory/--no-memory", default=True, help="Also measure peak memory, each model in its own process.")
@takes_json
def first_token(real_size: bool, memory: bool, file: Path | None, **options: Any) -> None:
    """Measure time to first token and peak memory of the whole model: unpruned, compressed, and with Stage 2.

    From preprocessed pixels to the first answer token: encoder, selection, prefill; interleaved in one run. The
    unpruned model runs in the same engine and with the same attention kernels.

    \b
    Example:
      infoprune-export first-token quickstart --real-size --set tokens.keep_ratio=1/9
    """
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    checked = read(options["recipe"], options["overrides"], options["device"])
    folder = None if real_size else _build(**options).parent
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import tracker, wide_console
    from infoprune_export.validate import first_token, first_token_models

    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        if folder is not None:
            prepare: Any = first_token_models.contest_of_run
            arguments: tuple[Any, ...] = (folder,)
        else:
            exported = Path(stack.enter_context(TemporaryDirectory()))
            first_token_models.export_real_size(checked, exported)
            prepare, arguments = first_token_models.contest_of_real_size, (checked, exported)
        result = first_token.measure(prepare, arguments, checked.bench, tracker(progress), memory=memory)
    wide_console().print(first_token.render(result))
    write_json(file, result)


@main.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes.")
def recipes(name: str | None, schema: bool) -> None:
    """List the shipped recipes, or print one.

    \b
    Example:
      infoprune-export recipes quickstart > mine.yaml
    """
    from infoprune_export.recipe import Recipe, assets, find_asset, load_recipe

    if schema:
        click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
    elif name is not None:
        load_recipe(name)
        click.echo(find_asset("recipes", name).read_text(encoding="utf-8"), nl=False)
    else:
        for stem, path in assets("recipes").items():
            click.echo(f"{stem:<24} {load_recipe(path).description}")


# ── Helpers ───────────────────────────────────────────────────────────────────


def _build(**options: Any) -> Path:
    """The engine's folder, and beside it the layer of Stage 2, which the engine does not need, but its answers do."""
    folder = bring_up_to("engine", **options)
    if read(options["recipe"], options["overrides"], options["device"]).decoder.method != "none":
        bring_up_to("decoder", **{**options, "force": False})
    return folder


def _end_with_verdict(validation: Path) -> None:
    verdict = json.loads((validation / "validation.json").read_text(encoding="utf-8"))["verdict"]
    click.echo(f"verdict: {verdict}")
    sys.exit(0 if verdict == "PASS" else 1)


def _end_with_kit_report(
    report: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    device: str | None,
    force: bool,
) -> NoReturn:
    from infoprune_export.console import wide_console
    from infoprune_export.validate.kit_report import conclusion, read_report, render

    run = output
    if run is None and recipe is not None:
        run = Path("runs") / read(recipe, overrides, device).name
    found = read_report(report, run)
    console = wide_console()
    for table in render(found):
        console.print(table)
    click.echo(conclusion(found))
    click.echo(f"verdict: {found.verdict}")
    sys.exit(0 if found.verdict == "PASS" else 1)
