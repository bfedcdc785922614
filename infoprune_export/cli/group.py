"""What all commands share: the group and its exit codes, the options of a recipe, and the run brought up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from infoprune_export import __version__
from infoprune_export.errors import InfopruneError, is_interrupt, is_out_of_memory, memory_advice

if TYPE_CHECKING:
    from rich.progress import Progress

    from infoprune_export.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Prints user errors as one line and ends with the documented exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InfopruneError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except (KeyboardInterrupt, Exception) as error:
            if is_interrupt(error):
                click.echo("interrupted; run the same command again to resume", err=True)
                ctx.exit(130)
            if is_out_of_memory(error):
                click.echo(f"error: out of memory; {memory_advice(error)}", err=True)
                ctx.exit(2)
            raise


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="infoprune-export")
def main() -> None:
    """Compress the vision encoder of a vision-language model, export it, and prove it equal enough.

    Every command that takes a RECIPE brings the run up to its stage: what is up to date stays, the rest is made. Exit
    codes: 0 done (and the verdict, if there is one, is PASS), 1 the verdict is FAIL, 2 a mistake in the input or the
    environment, 130 interrupted.
    """


# ── Options ──────────────────────────────────────────────────────────────────


def takes_recipe(command: Command, *, required: bool = True) -> Command:
    """RECIPE, --set, --output, --device, --force."""
    for decorate in reversed(
        (
            click.argument("recipe", required=required),
            click.option(
                "--set",
                "overrides",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override a recipe key, for example heads.remove=0.25. Repeatable.",
            ),
            click.option(
                "--output",
                "-o",
                type=click.Path(path_type=Path),
                help="Folder of the run. [default: runs/NAME of the recipe]",
            ),
            click.option(
                "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute; overrides the recipe."
            ),
            click.option("--force", is_flag=True, help="Make this command's stage again even if it is up to date."),
        )
    ):
        command = decorate(command)
    return command


def reads_recipe(command: Command) -> Command:
    """RECIPE, --set and --device, of a command that has no run folder."""
    for decorate in reversed(
        (
            click.argument("recipe"),
            click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Overrides the recipe."),
        )
    ):
        command = decorate(command)
    return command


def read(recipe: str, overrides: tuple[str, ...], device: str | None) -> Recipe:
    from infoprune_export.recipe import load_recipe

    return load_recipe(recipe, [*overrides, *([f"device={device}"] if device else [])])


def bring_up_to(
    last: str, recipe: str, overrides: tuple[str, ...], output: Path | None, device: str | None, force: bool
) -> Path:
    """Load the recipe, then bring its run up to stage `last`; returns the stage's folder."""
    checked = read(recipe, overrides, device)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.pipeline import Run, execute, order
    from infoprune_export.stages import STAGES, check_everything

    with progress_bar() as progress:
        run = Run(checked, output or Path("runs") / checked.name, progress)
        ahead = order(STAGES, last)
        check_everything(run, exporting="onnx" in ahead, building="engine" in ahead, timing="bench" in ahead)
        return execute(run, STAGES, last, force=force)


def progress_bar() -> Progress:
    """On a terminal only, and gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def takes_json(command: Command) -> Command:
    """--json, as `file`."""
    return click.option(
        "--json",
        "file",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_writable,
        help="Write the numbers to this file as JSON.",
    )(command)


def _writable(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """Refused before any work is done."""
    if file is not None and not file.absolute().parent.is_dir():
        raise InfopruneError(f"--json: {file.absolute().parent}: no such folder")
    return file


def write_json(file: Path | None, result: Any) -> None:
    """Write a command's numbers where the user asked for them, if they did."""
    if file is None:
        return
    from infoprune_export.artifacts import canonical_json

    try:
        file.write_text(canonical_json(result), encoding="utf-8")
    except OSError as error:
        raise InfopruneError(f"--json: {file}: {error.strerror}") from None
