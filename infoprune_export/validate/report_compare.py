"""Two finished runs side by side: what differs in the recipes, and what came of it.

Accuracies are compared question by question where both runs answered the same questions, which is far sharper than two
independent samples; latencies are compared where they were measured on the same machine with the same libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from infoprune_export.measure.statistics import CONFIDENCE, NORMAL_95, clustered_mean
from infoprune_export.validate import report_compare_schema as schema
from infoprune_export.validate import report_schema
from infoprune_export.validate.report_runs import FinishedRun


def compare(a: FinishedRun, b: FinishedRun) -> schema.Comparison:
    """Everything two runs have in common or apart; B is what is asked about, A what it is compared with."""
    return schema.Comparison(
        schema_version=1,
        a=_run(a),
        b=_run(b),
        same_model=dict(a.model) == dict(b.model),
        recipe=differences(flat(a.report.recipe), flat(b.report.recipe)),
        sizes=_sizes(a.report, b.report),
        accuracy=_accuracy(a, b),
        parity=_parity(a.report.parity, b.report.parity),
        latency=_latency(a.report.bench, b.report.bench, _same_original(a, b)),
        libraries=differences(a.report.libraries, b.report.libraries),
        machine=differences(_machine(a.report.bench), _machine(b.report.bench)),
    )


def _run(run: FinishedRun) -> schema.ComparedRun:
    report = run.report
    return schema.ComparedRun(folder=run.name, name=report.name, verdict=report.verdict, decision=report.decision)


# ── Recipes ──────────────────────────────────────────────────────────────────


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a recipe by dotted key; lists are leaves, and so is an empty section."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[schema.Difference]:
    """Keys whose values are not the same, in A's order and then B's; a missing one is null."""
    return [
        schema.Difference(key=key, a=a.get(key), b=b.get(key))
        for key in dict.fromkeys((*a, *b))
        if a.get(key) != b.get(key) or (key in a) != (key in b)
    ]


# ── Sizes ────────────────────────────────────────────────────────────────────


def _sizes(a: report_schema.Report, b: report_schema.Report) -> list[schema.SizeRow]:
    pairs: tuple[tuple[str, str, Callable[[report_schema.Sizes], report_schema.Pair]], ...] = (
        ("FLOPs per image", "FLOPs", lambda size: size.flops_per_image),
        ("parameters of the blocks", "parameters", lambda size: size.block_parameters),
        ("visual tokens", "tokens", lambda size: size.visual_tokens),
    )
    rows = []
    for what, unit, of in pairs:
        originals = of(a.size).original, of(b.size).original
        if originals[0] != originals[1]:
            rows.append(_size(f"{what}, original", unit, *originals))
        rows.append(_size(what, unit, of(a.size).compressed, of(b.size).compressed))
    rows.append(_size("attention heads kept", "share", 1 - a.size.heads_removed, 1 - b.size.heads_removed))
    rows.append(_size("FFN multiply-accumulates kept", "share", a.size.ffn_macs_kept, b.size.ffn_macs_kept))
    return rows


def _size(what: str, unit: str, a: float, b: float) -> schema.SizeRow:
    return schema.SizeRow(what=what, unit=unit, a=a, b=b, ratio=b / a if a else None)


# ── Accuracy ─────────────────────────────────────────────────────────────────


def _accuracy(a: FinishedRun, b: FinishedRun) -> schema.Accuracy:
    because = _unpaired_because(a, b)
    rows_a, rows_b = ({row.step: row for row in run.report.accuracy} for run in (a, b))
    comparable = a.report.metric == b.report.metric
    steps = []
    for step in merged(list(rows_a), list(rows_b)):
        first, second = _estimate(rows_a.get(step)), _estimate(rows_b.get(step))
        difference = None
        if first is not None and second is not None and comparable:
            difference = _paired(a, b, step) if because is None else _unpaired(first, second)
        steps.append(schema.StepRow(step=step, a=first, b=second, difference=difference))
    return schema.Accuracy(
        metric_a=a.report.metric,
        metric_b=b.report.metric,
        paired=because is None,
        unpaired_because=because,
        steps=steps,
    )


def _unpaired_because(a: FinishedRun, b: FinishedRun) -> str | None:
    """Why differences cannot be taken question by question; None where they can."""
    if a.report.metric != b.report.metric:
        return f"A is measured by {a.report.metric}, B by {b.report.metric}"
    for label, run in (("A", a), ("B", b)):
        if run.scores is None:
            return f"{label} was validated by an earlier version, which kept no scores of single questions"
    assert a.scores is not None
    assert b.scores is not None
    if dict(a.data) != dict(b.data):
        return "their data is not the same"
    if a.scores.questions_sha256 != b.scores.questions_sha256 or a.scores.clusters != b.scores.clusters:
        return "they answered other questions of the same data"
    return None


def merged(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Both lists as one, each in its own order; what only B has comes before what follows it there."""
    result = list(a)
    for place, step in enumerate(b):
        if step not in result:
            after = next((result.index(later) for later in b[place + 1 :] if later in result), len(result))
            result.insert(after, step)
    return result


def _estimate(row: report_schema.AccuracyRow | None) -> report_schema.Estimate | None:
    if row is None:
        return None
    return report_schema.Estimate(percent=row.percent, standard_error=row.standard_error, questions=row.questions)


def _paired(a: FinishedRun, b: FinishedRun, step: str) -> schema.StepDifference | None:
    assert a.scores is not None
    assert b.scores is not None
    if step not in a.scores.scores or step not in b.scores.scores:
        return None
    change = np.array(b.scores.scores[step]) - np.array(a.scores.scores[step])
    return _difference(*clustered_mean(change, a.scores.clusters))


def _unpaired(a: report_schema.Estimate, b: report_schema.Estimate) -> schema.StepDifference:
    return _difference(b.percent - a.percent, math.hypot(a.standard_error, b.standard_error))


def _difference(percent: float, error: float) -> schema.StepDifference:
    reach = NORMAL_95 * error
    return schema.StepDifference(percent=percent, standard_error=error, low=percent - reach, high=percent + reach)


# ── Parity ───────────────────────────────────────────────────────────────────


def _parity(a: Sequence[report_schema.Parity], b: Sequence[report_schema.Parity]) -> list[schema.ParityRow]:
    names = merged(list(dict.fromkeys(p.step for p in a)), list(dict.fromkeys(p.step for p in b)))
    return [schema.ParityRow(step=step, a=_worst(a, step), b=_worst(b, step)) for step in names]


def _worst(parities: Sequence[report_schema.Parity], step: str) -> schema.Worst | None:
    mine = [parity for parity in parities if parity.step == step]
    if not mine:
        return None
    errors = [parity.relative_error for parity in mine]
    return schema.Worst(
        relative_error=None if None in errors else max(error for error in errors if error is not None),
        cosine=min(parity.cosine for parity in mine),
        norm_ratio=max((parity.norm_ratio for parity in mine), key=lambda ratio: abs(ratio - 1)),
        passed=all(parity.passed for parity in mine),
    )


# ── Latency ──────────────────────────────────────────────────────────────────


def _machine(bench: report_schema.Bench) -> dict[str, Any]:
    """What a latency depends on, but for the load, which is never the same."""
    machine = bench.machine
    names = [gpu.get("name", "") for gpu in machine.gpus]
    return {
        "processor": machine.processor,
        "cores": machine.cores,
        "governor": machine.governor,
        "system": machine.system,
        "GPUs": names,
        "power mode": machine.power_mode,
        "target": bench.target,
        "provider": bench.provider,
        "threads": bench.threads,
    }


DRIFT = 1.03
"""Times that one graph may differ by between two runs before their milliseconds are not compared any more."""


def _same_original(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether both runs timed one and the same graph of the original."""
    return dict(a.model) == dict(b.model) and a.report.recipe["export"] == b.report.recipe["export"]


def _latency(a: report_schema.Bench, b: report_schema.Bench, same_original: bool) -> schema.Latency:
    apart = [
        *differences(_machine(a), _machine(b)),
        *differences(a.libraries, b.libraries),
    ]
    warnings = [f"{found.key}: A {_said(found.a)}, B {_said(found.b)}" for found in apart]
    rows_b = {row.batch_size: row for row in b.rows}
    pairs = [(row, rows_b[row.batch_size]) for row in a.rows if row.batch_size in rows_b]
    drifted = [_drift(*pair) for pair in pairs] if same_original and not apart else []
    warnings += [
        f"batch {row.batch_size}: the original itself took {drift:.2f} times as long in B, so the machine had changed"
        for (row, _), drift in zip(pairs, drifted, strict=False)
        if drift is not None
    ]
    comparable = not apart and not any(drifted)
    rows = [_latency_row(*pair, comparable) for pair in pairs]
    for label, machine in (("A", a.machine), ("B", b.machine)):
        if machine.load is not None and machine.cores is not None and machine.load > machine.cores:
            warnings.append(f"{label} was measured while {machine.load:.1f} processes shared {machine.cores} cores")
    only = sorted({row.batch_size for row in a.rows} ^ set(rows_b))
    if only:
        warnings.append(f"batch size{'s' if len(only) > 1 else ''} {', '.join(map(str, only))}: in one run only")
    return schema.Latency(comparable=comparable, warnings=warnings, rows=rows)


def _drift(a: report_schema.BenchRow, b: report_schema.BenchRow) -> float | None:
    """How much longer the original took in B, if that is more than `DRIFT` either way and no chance."""
    found = ratio(_median(b.milliseconds["original"]), _median(a.milliseconds["original"]))
    large = not 1 / DRIFT <= found.value <= DRIFT
    by_chance = found.low is not None and found.high is not None and found.low <= 1 <= found.high
    return found.value if large and not by_chance else None


def _said(value: Any) -> str:
    return "not recorded" if value in (None, []) else str(value)


def _latency_row(a: report_schema.BenchRow, b: report_schema.BenchRow, comparable: bool) -> schema.LatencyRow:
    medians = {
        f"{side}_{label}": _median(row.milliseconds[side])
        for side in ("original", "compressed")
        for label, row in (("a", a), ("b", b))
    }
    speedup_a, speedup_b = (_speedup(row.speedup) for row in (a, b))
    return schema.LatencyRow(
        batch_size=a.batch_size,
        **medians,
        speedup_a=speedup_a,
        speedup_b=speedup_b,
        faster=ratio(medians["compressed_a"], medians["compressed_b"]) if comparable else None,
        speedup_ratio=ratio(speedup_b, speedup_a),
    )


def _speedup(found: report_schema.Ratio) -> schema.Within:
    """Without bounds where they cover less than 95%."""
    known = found.confidence >= CONFIDENCE
    return schema.Within(value=found.median, low=found.low if known else None, high=found.high if known else None)


def _median(times: report_schema.Percentiles) -> schema.Within:
    interval = times.intervals.get("p50")
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return schema.Within(value=times.p50, low=low, high=high)


def ratio(a: schema.Within, b: schema.Within) -> schema.Within:
    """A over B of two independent measurements.

    Its interval adds the squared reaches of both logarithms to either side: upwards A's to its upper bound and B's to
    its lower, downwards the others.
    """
    value = a.value / b.value
    bounds = (a.low, a.high, b.low, b.high)
    if any(bound is None or bound <= 0 for bound in bounds):
        return schema.Within(value=value, low=None, high=None)
    a_low, a_high, b_low, b_high = (math.log(bound) for bound in bounds if bound is not None)
    middle_a, middle_b = math.log(a.value), math.log(b.value)
    up = math.hypot(a_high - middle_a, middle_b - b_low)
    down = math.hypot(middle_a - a_low, b_high - middle_b)
    return schema.Within(value=value, low=value * math.exp(-down), high=value * math.exp(up))
