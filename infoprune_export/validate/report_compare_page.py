"""A comparison of two runs as a page, as tables on a terminal, and in two sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infoprune_export import __version__
from infoprune_export.validate.report_compare_schema import Comparison, StepRow, Within
from infoprune_export.validate.report_page import figure, number, render_page, setting, share_of_limit

if TYPE_CHECKING:
    from rich.table import Table


def headline(comparison: Comparison) -> list[str]:
    """What became of accuracy and of speed, one sentence each."""
    return [_accuracy_sentence(comparison), *_speed_sentence(comparison)]


def _accuracy_sentence(comparison: Comparison) -> str:
    shared = [row for row in comparison.accuracy.steps if row.difference is not None]
    if not shared:
        return "Their accuracies cannot be compared."
    last, change = shared[-1], shared[-1].difference
    assert change is not None
    how = "paired" if comparison.accuracy.paired else "not paired"
    figures = f"{abs(change.percent):.2f} ± {change.standard_error:.2f} points ({how})"
    if change.low <= 0 <= change.high:
        return f"Behind the step {last.step}, no difference in accuracy is shown: {figures}, 0 within the 95% interval."
    return f"Behind the step {last.step}, B is {'better' if change.percent > 0 else 'worse'} by {figures}."


def _speed_sentence(comparison: Comparison) -> list[str]:
    if not comparison.latency.rows:
        return []
    row = comparison.latency.rows[-1]
    found, what = (row.faster, "B is {} as fast as A")
    if found is None:
        found, what = (row.speedup_ratio, "B's speed-up is {} that of A, each within its own run")
    interval = "" if found.low is None or found.high is None else f" (95% {found.low:.2f} to {found.high:.2f})"
    return [f"At batch {row.batch_size}, {what.format(f'{found.value:.2f} times')}{interval}."]


# ── Page ─────────────────────────────────────────────────────────────────────


def render(comparison: Comparison) -> str:
    """The page as text; nothing outside it is needed."""
    return render_page(
        "report_compare.html.j2",
        c=comparison,
        headline=headline(comparison),
        figures={"accuracy": _figure(comparison)},
        version=__version__,
    )


def _figure(comparison: Comparison) -> Any:
    from infoprune_export.validate import plots

    said = "; ".join(
        f"{row.step}: " + ", ".join(f"{label} {it.percent:.1f}" for label, it in (("A", row.a), ("B", row.b)) if it)
        for row in comparison.accuracy.steps
    )
    drawn = plots.accuracy_pair([row.model_dump() for row in comparison.accuracy.steps])
    return figure("accuracy", drawn, f"Accuracy in % behind every step. {said}.")


# ── Terminal ─────────────────────────────────────────────────────────────────


def tables(comparison: Comparison) -> list[Table]:
    """What differs, accuracy, latency, sizes."""
    from rich.markup import escape
    from rich.table import Table

    verdicts = Table("run", "recipe", "verdict", "decided by", "limit used")
    for label, run in (("A", comparison.a), ("B", comparison.b)):
        name = f"{label}: {escape(run.folder)}"
        used = share_of_limit(run.decision.used)
        verdicts.add_row(name, escape(run.name), run.verdict, escape(run.decision.check), used)
    recipe = Table("recipe key", "A", "B")
    for found in comparison.recipe:
        recipe.add_row(escape(found.key), escape(setting(found.a)), escape(setting(found.b)))
    sizes = Table("size", "A", "B", "B / A")
    for size in comparison.sizes:
        values = (f"{100 * v:.1f}%" if size.unit == "share" else f"{v:,.0f}" for v in (size.a, size.b))
        sizes.add_row(size.what, *values, "" if size.ratio is None else f"{size.ratio:.3f}")
    accuracy = Table("step", "A %", "± s.e.", "B %", "± s.e.", "B - A", "± s.e.", "95%")
    for row in comparison.accuracy.steps:
        accuracy.add_row(escape(row.step), *_accuracy_cells(row))
    parity = Table("parity", "A max error", "B max error", "A 1 - cosine", "B 1 - cosine", "A", "B")
    for worst in comparison.parity:
        sides = (worst.a, worst.b)
        parity.add_row(
            escape(worst.step),
            *("" if it is None else number(it.relative_error, "%.1e") for it in sides),
            *("" if it is None else f"{max(1 - it.cosine, 0.0):.1e}" for it in sides),
            *("" if it is None else "passed" if it.passed else "FAILED" for it in sides),
        )
    latency = Table("batch", "A ms", "B ms", "B faster", "A speed-up", "B speed-up", "B / A")
    for times in comparison.latency.rows:
        latency.add_row(
            str(times.batch_size),
            _within(times.compressed_a),
            _within(times.compressed_b),
            "not comparable" if times.faster is None else _within(times.faster),
            *map(_within, (times.speedup_a, times.speedup_b, times.speedup_ratio)),
        )
    return [table for table in (verdicts, recipe, sizes, accuracy, parity, latency) if table.row_count]


def notes(comparison: Comparison) -> list[str]:
    """Warnings, one a line."""
    found = []
    if not comparison.same_model:
        found.append("the two runs began with different models")
    if comparison.accuracy.unpaired_because is not None:
        found.append(f"accuracies are not paired: {comparison.accuracy.unpaired_because}")
    if not comparison.latency.comparable:
        found.append("milliseconds are not comparable, only speed-ups within each run")
    return found + comparison.latency.warnings


def _accuracy_cells(row: StepRow) -> list[str]:
    cells = []
    for it in (row.a, row.b):
        cells += ["", ""] if it is None else [f"{it.percent:.2f}", f"{it.standard_error:.2f}"]
    change = row.difference
    if change is None:
        return [*cells, "", "", ""]
    return [
        *cells,
        f"{change.percent:+.2f}",
        f"{change.standard_error:.2f}",
        f"{change.low:+.2f} .. {change.high:+.2f}",
    ]


def _within(found: Within) -> str:
    interval = "" if found.low is None or found.high is None else f" ({found.low:.2f}-{found.high:.2f})"
    return f"{found.value:.2f}{interval}"
