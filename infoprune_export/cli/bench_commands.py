"""The bench: a run's encoders against each other, against themselves, and against other ways to run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from infoprune_export.cli.group import bring_up_to, main, progress_bar, read, takes_json, takes_recipe, write_json

_PEERS = ("eager", "compile", "transformers", "openvino")


@main.command()
@takes_recipe
@click.option("--real-size", is_flag=True, help="Time CLIP-L/336 with random weights at the recipe's budgets instead.")
@click.option(
    "--against",
    multiple=True,
    type=click.Choice([*_PEERS, "all"]),
    help="Also time the encoder in PyTorch (eager, compile), as transformers exports it, or in OpenVINO. Repeatable.",
)
@click.option("--memory", is_flag=True, help="Also measure memory, every side in its own process.")
@click.option("--self", "itself", is_flag=True, help="Time the original against itself instead: the ratio must be 1.")
@click.option("--target", metavar="NAME", help="Target of engines/targets, or a file; overrides the recipe.")
@takes_json
def bench(
    real_size: bool,
    against: tuple[str, ...],
    memory: bool,
    itself: bool,
    target: str | None,
    file: Path | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure latency, original against compressed, interleaved in one run.

    Rounds go on until the 95% interval of every ratio is as narrow as bench.max_interval, or bench.max_rounds or
    bench.max_seconds is reached. Outputs of all that --against names are compared with PyTorch's before they are timed.
    With --device cuda, a recipe whose target is onnxruntime-cpu is timed on onnxruntime-cuda.

    \b
    Example:
      infoprune-export bench quickstart --force
      infoprune-export bench quickstart --against all --memory
      infoprune-export bench quickstart --self
      infoprune-export bench quickstart --real-size
    """
    names = _PEERS if "all" in against else tuple(dict.fromkeys(against))
    chosen = [f"bench.against=[{', '.join(names)}]"] if names else []
    chosen += ["bench.memory=true"] if memory else []
    chosen += [f"engine.target={target}"] if target else []
    options["overrides"] = (*overrides, *chosen)
    if options["device"] == "cuda" and target is None:
        named = read(options["recipe"], options["overrides"], None).engine.target
        if named == "onnxruntime-cpu":
            options["overrides"] += ("engine.target=onnxruntime-cuda",)
    if itself and (names or memory):
        raise click.UsageError("--self compares one graph with itself; leave out --against and --memory")
    if real_size:
        result = _real_size(itself, **options)
    elif itself:
        result = _against_itself(**options)
    else:
        folder = bring_up_to("bench", **options)
        result = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    from infoprune_export.console import print_bench, print_selection, print_self

    if itself:
        print_self(result)
    else:
        print_bench(result)
    if "selection" in result:
        print_selection(result["selection"])
    write_json(file, result)


def _against_itself(force: bool, **options: Any) -> Any:
    """Of the exported original, which is not made anew for this."""
    checked = read(options["recipe"], options["overrides"], options["device"])
    from infoprune_export.engine.onnxruntime import runtime_target
    from infoprune_export.recipe import load_target

    runtime_target(load_target(checked.engine.target))
    onnx = bring_up_to("onnx", force=False, **options)
    from infoprune_export.console import tracker
    from infoprune_export.validate.bench import bench_self
    from infoprune_export.validate.bench_case import case_of_run

    with progress_bar() as progress:
        return bench_self(case_of_run(checked, onnx, onnx.parent / "checkpoint"), tracker(progress))


def _real_size(
    itself: bool, recipe: str, overrides: tuple[str, ...], output: Path | None, device: str | None, force: bool
) -> Any:
    checked = read(recipe, overrides, device)
    from tempfile import TemporaryDirectory

    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import tracker
    from infoprune_export.engine import backend_of
    from infoprune_export.engine.onnxruntime import runtime_target
    from infoprune_export.recipe import load_target
    from infoprune_export.validate.bench import bench, bench_self
    from infoprune_export.validate.real_size import case_of_real_size, export_real_size, selection_cost

    backend_of(runtime_target(load_target(checked.engine.target)))
    with TemporaryDirectory() as scratch, progress_bar() as progress:
        arguments, track = (checked, Path(scratch)), tracker(progress)
        advance = track("exports", 1)
        export_real_size(*arguments)
        advance(1)
        case = case_of_real_size(*arguments)
        if itself:
            return bench_self(case, track)
        measured = bench(case_of_real_size, arguments, track, case)
        return {**measured, "selection": selection_cost(case, track)}
