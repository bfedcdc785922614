"""Commands that measure and examine: exports, speed, tokens, the installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from infoprune_export.cli.group import main, progress_bar, takes_json, write_json


@main.command("real-size")
@click.option("--export", "only", flag_value="export", help="Only what exporting costs.")
@click.option("--speed", "only", flag_value="speed", help="Only what pruning and INT8 buy.")
@click.option("--select", "only", flag_value="select", help="Only token selection against other algorithms.")
@click.option("--compress", "only", flag_value="compress", help="Only what compressing costs.")
@click.option("--gpu", "only", flag_value="gpu", help="What pruning buys on an NVIDIA GPU; only when asked for.")
@click.option("--rounds", type=click.IntRange(min=3), default=10, show_default=True, help="Rounds of the speed runs.")
@takes_json
def real_size(only: str | None, rounds: int, file: Path | None) -> None:
    """Measure towers of published sizes (CLIP-L/336, Qwen2-VL-7B, Qwen2.5-VL-7B) with random weights.

    Export: wall time, peak memory and file size. Speed: 69% of heads removed, half of the FFN neurons, both, and both
    in INT8, against the dense tower in one interleaved run on one CPU thread. Select: this package's operator against
    Algorithm 1 as it is printed, Gram-Schmidt and pivoted QR. Compress: half of Qwen2-VL-7B's FFN by the default method
    on 64 images, and the spectral terms of gate training; takes long. Needs 12 GiB of memory. Gpu: Qwen2-VL-7B's tower
    in fp16, dense against half of its heads and neurons, in ONNX Runtime's CUDA provider and in torch.compile;
    and the token selection kernel against PyTorch's operators.

    \b
    Example:
      infoprune-export real-size --export
    """
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import tracker, wide_console
    from infoprune_export.models.zoo import REAL
    from infoprune_export.recipe import BenchSpec, load_target
    from infoprune_export.validate import compress_cost, export_cost, gpu_speed, real_size, select_bench, select_gpu

    console, result = wide_console(), dict[str, Any]()
    if only in (None, "export"):
        costs = [(name, dtype) for name in REAL for dtype in ("float32", "float16")]
        with console.status("exporting"):
            result["export"] = [export_cost.export_cost(name, dtype) for name, dtype in costs]
        console.print(export_cost.render(result["export"]))
    if only in (None, "speed"):
        spec, target = BenchSpec(rounds=rounds, warmup=2), load_target("onnxruntime-cpu")
        with console.status("timing"):
            result["speed"] = [
                row for name in real_size.SPEED_TOWERS for row in real_size.speed_table(name, target, spec)
            ]
        console.print(real_size.render(result["speed"]))
    if only in (None, "select"):
        with progress_bar() as progress:
            result["select"] = select_bench.select_speed(select_bench.SIZES, rounds, tracker(progress))
        console.print(select_bench.render(result["select"]))
    if only in (None, "compress"):
        with console.status("compressing"):
            result["compress"] = compress_cost.compress_cost()
        console.print(compress_cost.render(result["compress"]))
    if only == "gpu":
        with progress_bar() as progress:
            advance = tracker(progress)("loads", len(gpu_speed.LOADS))
            result["gpu"] = gpu_speed.gpu_speed(rounds, on_load=lambda _: advance(1))
            ahead = tracker(progress)("selections", len(select_bench.SIZES) * len(select_gpu.BATCHES))
            result["select_gpu"] = select_gpu.select_gpu(rounds, on_row=lambda: ahead(1))
        console.print(gpu_speed.render(result["gpu"]))
        console.print(select_gpu.render(result["select_gpu"]))
    write_json(file, result)


@main.command()
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@click.option("--peer", type=click.Choice(["transformers"]), help="Sweep another exporter's graphs beside ours.")
@click.option("--every", type=click.IntRange(min=1), default=1, help="Only every N-th case, for a quick look.")
@takes_json
def parity(families: tuple[str, ...], peer: str | None, every: int, file: Path | None) -> None:
    """Prove exports right on every resolution, with small random models of every family.

    Every graph is made once and then runs on all patch grids up to 40 x 40, extreme aspect ratios, mixed images and
    videos, in ONNX Runtime and in the Hugging Face model. Ends with exit code 1 unless all outputs are equal.

    \b
    Example:
      infoprune-export parity
      infoprune-export parity qwen2.5-vl --peer transformers --json parity.json
    """
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.console import wide_console
    from infoprune_export.validate.sweep import render, sweep

    with progress_bar() as progress:
        result = sweep(families, peer=peer, every=every, progress=progress)
    console = wide_console()
    for part in render(result):
        console.print(part)
    write_json(file, result.to_dict())
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
        from dataclasses import asdict

        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console

        render(findings, Console())
    sys.exit(1 if worst(findings) == "problem" else 0)
