"""The command line: parse, call one function, print. Help and recipe errors import neither torch nor transformers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from infoprune_export import __version__
from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
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
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to resume", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="infoprune-export")
def main() -> None:
    """Compress the vision encoder of a vision-language model, export it, and prove it equal enough.

    Every command that takes a RECIPE brings the run up to its stage: what is up to date stays, the rest is made. Exit
    codes: 0 done (and the verdict, if there is one, is PASS), 1 the verdict is FAIL, 2 a mistake in the input or the
    environment, 130 interrupted.
    """


# ── Options ──────────────────────────────────────────────────────────────────


def _takes_recipe(command: Command) -> Command:
    """RECIPE, --set, --output, --device, --force."""
    for decorate in reversed(
        (
            click.argument("recipe"),
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


def _recipe(recipe: str, overrides: tuple[str, ...], device: str | None) -> Recipe:
    from infoprune_export.recipe import load_recipe

    return load_recipe(recipe, [*overrides, *([f"device={device}"] if device else [])])


def _run(
    last: str, recipe: str, overrides: tuple[str, ...], output: Path | None, device: str | None, force: bool
) -> Path:
    """Load the recipe, then bring its run up to stage `last`; returns the stage's folder."""
    checked = _recipe(recipe, overrides, device)
    quiet_libraries()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from infoprune_export.pipeline import Run, execute
    from infoprune_export.stages import STAGES, check_everything

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        run = Run(checked, output or Path("runs") / checked.name, progress)
        check_everything(run)
        return execute(run, STAGES, last, force=force)


def quiet_libraries() -> None:
    """Their progress bars and advice would break ours; errors still reach the user as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore")
    import torch.onnx  # noqa: F401  (sets its loggers' levels when it is imported, so ours come after)
    from transformers.utils import logging as hf_logging

    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


# ── Commands ─────────────────────────────────────────────────────────────────


@main.command()
@_takes_recipe
def run(**options: Any) -> None:
    """Run a whole recipe, from the model to the report, and end with its verdict.

    \b
    Example:
      infoprune-export run quickstart --set heads.remove=0.25
    """
    folder = _run("report", **options)
    click.echo(f"report: {folder / 'report.html'}")
    _end_with_verdict(folder.parent / "validation")


@main.command("train-gates")
@_takes_recipe
def train_gates(**options: Any) -> None:
    """Train attention-head gates and choose the heads that stay.

    \b
    Example:
      infoprune-export train-gates quickstart --set heads.method=paper
    """
    click.echo(_run("heads", **options))


@main.command("compress-ffn")
@_takes_recipe
def compress_ffn(**options: Any) -> None:
    """Compress the feed-forward networks, on top of the pruned heads.

    \b
    Example:
      infoprune-export compress-ffn quickstart --set ffn.keep_macs=0.25
    """
    click.echo(_run("ffn", **options))


@main.command()
@_takes_recipe
def rewrite(**options: Any) -> None:
    """Write the smaller model as a Hugging Face checkpoint.

    \b
    Example:
      infoprune-export rewrite quickstart --output runs/small
    """
    click.echo(_run("checkpoint", **options))


@main.command()
@_takes_recipe
def export(**options: Any) -> None:
    """Export vision encoder, token selection and projector as one ONNX graph.

    \b
    Example:
      infoprune-export export quickstart --set tokens.keep_ratio=2/9
    """
    click.echo(_run("onnx", **options) / "compressed")


@main.command()
@_takes_recipe
@click.option("--target", metavar="NAME", help="Target of engines/targets, or a file; overrides the recipe.")
def build(target: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Build the engine for a target machine.

    \b
    Example:
      infoprune-export build quickstart --target onnxruntime-cpu
    """
    chosen = (f"engine.target={target}",) if target else ()
    click.echo(_run("engine", overrides=overrides + chosen, **options))


@main.command()
@_takes_recipe
def validate(**options: Any) -> None:
    """Compare original, compressed, ONNX and engine, and end with the verdict.

    \b
    Example:
      infoprune-export validate quickstart --set validate.max_accuracy_drop=2
    """
    folder = _run("validation", **options)
    from infoprune_export.console import print_validation

    print_validation(folder)
    _end_with_verdict(folder)


@main.command()
@_takes_recipe
@click.option("--real-size", is_flag=True, help="Time CLIP-L/336 with random weights at the recipe's budgets instead.")
def bench(real_size: bool, **options: Any) -> None:
    """Measure latency, original against compressed, interleaved in one run.

    \b
    Example:
      infoprune-export bench quickstart --force
      infoprune-export bench quickstart --real-size
    """
    if real_size:
        _bench_real_size(**options)
        return
    import json

    from infoprune_export.console import print_bench

    folder = _run("bench", **options)
    print_bench(json.loads((folder / "bench.json").read_text(encoding="utf-8")))


@main.command()
@_takes_recipe
def report(**options: Any) -> None:
    """Write the HTML report of a run.

    \b
    Example:
      infoprune-export report quickstart
    """
    click.echo(_run("report", **options) / "report.html")


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
        import json

        click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
    elif name is not None:
        load_recipe(name)
        click.echo(find_asset("recipes", name).read_text(encoding="utf-8"), nl=False)
    else:
        for stem, path in assets("recipes").items():
            click.echo(f"{stem:<24} {load_recipe(path).description}")


@main.command("real-size")
@click.option("--export", "only", flag_value="export", help="Only what exporting costs.")
@click.option("--speed", "only", flag_value="speed", help="Only what pruning and INT8 buy.")
@click.option("--rounds", type=click.IntRange(min=3), default=10, show_default=True, help="Rounds of the speed run.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers to this file as JSON."
)
def real_size(only: str | None, rounds: int, file: Path | None) -> None:
    """Measure towers of published sizes (CLIP-L/336, Qwen2-VL-7B, Qwen2.5-VL-7B) with random weights.

    Export: wall time, peak memory and file size. Speed: 69% of heads removed, half of the FFN neurons, both, and both
    in INT8, against the dense tower in one interleaved run on one CPU thread. Needs 10 GiB of memory.

    \b
    Example:
      infoprune-export real-size --export
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InfopruneError(f"--json: {file.absolute().parent}: no such folder")
    quiet_libraries()
    import json

    from rich.console import Console

    from infoprune_export.models.zoo import REAL
    from infoprune_export.recipe import BenchSpec, load_target
    from infoprune_export.validate import export_cost, real_size

    console, result = Console(), {}
    if only != "speed":
        costs = [(name, dtype) for name in REAL for dtype in ("float32", "float16")]
        with console.status("exporting"):
            result["export"] = [export_cost.export_cost(name, dtype) for name, dtype in costs]
        console.print(export_cost.render(result["export"]))
    if only != "export":
        spec, target = BenchSpec(rounds=rounds, warmup=2), load_target("onnxruntime-cpu")
        with console.status("timing"):
            result["speed"] = [
                row for name in real_size.SPEED_TOWERS for row in real_size.speed_table(name, target, spec)
            ]
        console.print(real_size.render(result["speed"]))
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@main.command()
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@click.option("--peer", type=click.Choice(["transformers"]), help="Sweep another exporter's graphs beside ours.")
@click.option("--every", type=click.IntRange(min=1), default=1, help="Only every N-th case, for a quick look.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers to this file as JSON."
)
def parity(families: tuple[str, ...], peer: str | None, every: int, file: Path | None) -> None:
    """Prove exports right on every resolution, with small random models of every family.

    Every graph is made once and then runs on all patch grids up to 40 x 40, extreme aspect ratios, mixed images and
    videos, in ONNX Runtime and in the Hugging Face model. Ends with exit code 1 unless all outputs are equal.

    \b
    Example:
      infoprune-export parity
      infoprune-export parity qwen2.5-vl --peer transformers --json parity.json
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InfopruneError(f"--json: {file.absolute().parent}: no such folder")
    quiet_libraries()
    from rich.console import Console
    from rich.progress import Progress

    from infoprune_export.validate.sweep import render, sweep

    progress_console = Console(stderr=True)
    with Progress(console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        result = sweep(families, peer=peer, every=every, progress=progress)
    console = Console()
    if not console.is_terminal:
        # Whoever reads a log has more than 80 columns.
        console.width = 120
    for part in render(result):
        console.print(part)
    if file is not None:
        from infoprune_export.artifacts import canonical_json

        try:
            file.write_text(canonical_json(result.to_dict()), encoding="utf-8")
        except OSError as error:
            raise InfopruneError(f"--json: {file}: {error.strerror}") from None
    sys.exit(0 if result.right else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
def doctor(as_json: bool) -> None:
    """List every package and backend, what is missing or clashes, and the command that mends it.

    Ends with exit code 1 when there is a problem.

    \b
    Example:
      infoprune-export doctor
    """
    from infoprune_export.doctor import examine, render, worst

    findings = examine()
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console

        render(findings, Console())
    sys.exit(1 if worst(findings) == "problem" else 0)


# ── Helpers ───────────────────────────────────────────────────────────────────


def _end_with_verdict(validation: Path) -> None:
    import json

    verdict = json.loads((validation / "validation.json").read_text(encoding="utf-8"))["verdict"]
    click.echo(f"verdict: {verdict}")
    sys.exit(0 if verdict == "PASS" else 1)


def _bench_real_size(
    recipe: str, overrides: tuple[str, ...], output: Path | None, device: str | None, force: bool
) -> None:
    checked = _recipe(recipe, overrides, device)
    quiet_libraries()
    from infoprune_export.console import print_bench, print_selection
    from infoprune_export.recipe import load_target
    from infoprune_export.validate.real_size import bench_real_size

    result = bench_real_size(checked, load_target(checked.engine.target))
    print_bench(result)
    print_selection(result["selection"])


if __name__ == "__main__":
    main()
