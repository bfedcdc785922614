"""What commands print: results as tables, read from a run's files or handed over as they were measured."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress


def wide_console() -> Console:
    """For tables; whoever reads a log has more than 80 columns."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def print_validation(folder: Path) -> None:
    """Accuracy of every step and the verdict's checks, from the folder of the validation stage."""
    result = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    table = Table("step", result["metric"], "± s.e.", "to original", "± s.e.", title=None)
    for row in result["accuracy"]:
        difference = row["to_original"]
        table.add_row(
            row["step"],
            f"{row['percent']:.1f}",
            f"{row['standard_error']:.1f}",
            f"{difference['percent']:+.1f}",
            f"{difference['standard_error']:.1f}",
        )
    console = Console()
    console.print(table)
    checks = Table("check", "value", "limit", "passed")
    for check in result["checks"]:
        value = "not finite" if check["value"] is None else f"{check['value']:.3g}"
        checks.add_row(check["what"], value, f"{check['limit']:.3g}", "yes" if check["passed"] else "NO")
    console.print(checks)


def print_bench(result: Mapping[str, Any]) -> None:
    """One row for every batch size, then every percentile with its interval, peers, memory, and the machine."""
    console = wide_console()
    table = Table("batch", "original ms", "compressed", "speed-up (95%)", "FLOPs", "efficiency", "rounds")
    for row in result["rows"]:
        times = row["milliseconds"]
        table.add_row(
            str(row["batch_size"]),
            f"{times['original']['p50']:.2f}",
            f"{times['compressed']['p50']:.2f}",
            ratio_text(row["speedup"]),
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
            rounds_text(row),
        )
    console.print(table)
    console.print(_percentile_table(result["rows"]))
    for row in result["rows"]:
        if row["peers"]:
            console.print(_peer_table(row))
        if row["memory"]:
            memory = Table("side", "weights MiB", "and a call", title=f"memory, batch {row['batch_size']}")
            for side, held in row["memory"].items():
                memory.add_row(side, f"{held['weights_bytes'] / 2**20:.1f}", f"{held['call_bytes'] / 2**20:.1f}")
            console.print(memory)
    _print_machine(console, result)


def print_self(result: Mapping[str, Any]) -> None:
    """The graph against itself."""
    console = wide_console()
    table = Table("batch", "first ms", "second", "ratio (95%)", "contains 1", "width", "rounds")
    for row in result["rows"]:
        times, width = row["milliseconds"], row["relative_width"]
        table.add_row(
            str(row["batch_size"]),
            f"{times['first']['p50']:.2f}",
            f"{times['second']['p50']:.2f}",
            ratio_text(row["ratio"], 3),
            "yes" if row["contains_one"] else "NO",
            "too few rounds" if width is None else f"{100 * width:.1f}%",
            rounds_text(row),
        )
    console.print(table)
    _print_machine(console, result)


def ratio_text(ratio: Mapping[str, Any], digits: int = 2) -> str:
    """A ratio and its interval, with what it covers if that is less than 95%."""
    text = f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f}-{ratio['high']:.{digits}f})"
    return text if ratio["confidence"] >= 0.95 else f"{text}, {100 * ratio['confidence']:.0f}% only"


def percentile_text(times: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """A percentile in ms and its interval; an end that the rounds do not bound is a question mark."""
    ends = times["intervals"][name]
    low, high = ("?" if end is None else f"{end:.{digits}f}" for end in (ends["low"], ends["high"]))
    return f"{times[name]:.{digits}f} ({low}-{high})"


def rounds_text(row: Mapping[str, Any]) -> str:
    """Rounds, and which limit ended them before the interval was narrow."""
    return f"{row['rounds']}" + {"narrow": "", "rounds": ", all", "time": ", time over"}[row["stopped"]]


def _percentile_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("batch", "side", "p50 ms (95%)", "p90", "p99")
    for row in rows:
        for side, times in row["milliseconds"].items():
            cells = (percentile_text(times, name) for name in ("p50", "p90", "p99"))
            table.add_row(str(row["batch_size"]), side, *cells)
    return table


def _peer_table(row: Mapping[str, Any]) -> Table:
    """Ours first, then every peer: time, how many times as fast as our original, and the error against PyTorch."""
    table = Table(
        "runs in",
        "p50 ms (95%)",
        "original over it (95%)",
        "largest error",
        "cosine",
        "",
        title=f"batch {row['batch_size']}",
    )
    for side in ("original", "compressed"):
        ratio = "1" if side == "original" else ratio_text(row["speedup"])
        table.add_row(
            f"ONNX Runtime, {side}",
            percentile_text(row["milliseconds"][side], "p50"),
            ratio,
            *_parity(row["parity"][side]),
        )
    for peer in row["peers"]:
        name = f"{peer['peer']}, {peer['side']}"
        if peer["reason"] is not None:
            table.add_row(name, "-", "-", "-", "-", escape(peer["reason"]))
            continue
        times, ratio = percentile_text(peer["milliseconds"], "p50"), ratio_text(peer["speedup"])
        table.add_row(name, times, ratio, *_parity(peer["parity"]))
    return table


def _parity(parity: Mapping[str, Any]) -> tuple[str, str, str]:
    error = parity["relative_error"]
    shown = "not finite" if error is None else f"{error:.1e}"
    return shown, f"{parity['cosine']:.6f}", "" if parity["passed"] else f"WRONG, limit {parity['tolerance']:.0e}"


def _print_machine(console: Console, result: Mapping[str, Any]) -> None:
    described = result["machine"]
    parts = [result["provider"], f"{result['threads']} thread(s)", described["processor"]]
    parts += [gpu["name"] for gpu in described["gpus"]]
    if described["load"] is not None:
        parts.append(f"load {described['load']:.1f}")
    console.print(", ".join(parts), markup=False)


def print_selection(cost: Mapping[str, Any]) -> None:
    """What token selection costs, in a line."""
    click.echo(
        f"selection {cost['tokens']} -> {cost['kept']}: {cost['milliseconds']:.2f} ms, "
        f"{100 * cost['fraction']:.2f}% of the original encoder's latency (95% interval "
        f"{100 * cost['low']:.2f} .. {100 * cost['high']:.2f}%)"
    )


# ── Progress ─────────────────────────────────────────────────────────────────


def tracker(progress: Progress) -> Callable[[str, int], Callable[[int], None]]:
    """Adds a line to a progress display, from its title and total; what is returned advances it until it is gone."""

    def track(title: str, total: int) -> Callable[[int], None]:
        task = progress.add_task(title, total=total)

        def advance(amount: int) -> None:
            if task not in progress.task_ids:
                return
            progress.advance(task, amount)
            if progress.tasks[progress.task_ids.index(task)].finished:
                progress.remove_task(task)

        return advance

    return track


# ── Other libraries ──────────────────────────────────────────────────────────


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
