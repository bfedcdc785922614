"""Tables of the report that take some reckoning: variants side by side, and a budget part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infoprune_export.budget.cost import CostTable

_STEPS = {
    "original": "original",
    "heads": "heads",
    "ffn": "+ FFN",
    "recovery": "+ recovery",
    "language": "+ language",
    "tokens": "+ tokens",
    "decoder": "+ decoder",
}
"""Steps that variants go through, and what their columns are called."""
_SECTIONS = ("heads", "ffn", "tokens")


@dataclass(frozen=True)
class Comparison:
    """A run and its variants as text."""

    columns: list[str]
    """Of numbers; before them come a run's name and what it changes."""
    rows: list[tuple[str, str, list[str]]]
    """Name, changes, and one text per column."""
    same: list[str]
    """What is equal in all rows, and so has no column."""


def compare_runs(validation: Mapping[str, Any], recipe: Mapping[str, Any], variants: Mapping[str, Any]) -> Comparison:
    """One row per run; accuracies in percent, ``lost`` of the last step with the difference's standard error.

    A column that says the same of all runs is left out, and so is a step that changes nothing in any of them.
    """
    # In the recipe's order, which JSON artefacts do not keep.
    runs = {
        "this run": _as_variant(validation),
        **{name: variants[name] for name in recipe["variants"] if name in variants},
    }
    settings = {"this run": {section: recipe[section]["method"] for section in _SECTIONS}, **recipe["variants"]}
    changes = {name: ", ".join(f"{key} {value}" for key, value in keys.items()) for name, keys in settings.items()}
    sizes = {
        "heads removed": [f"{100 * run['heads_removed']:.0f}%" for run in runs.values()],
        "FFN MACs kept": [f"{100 * run['ffn_macs_kept']:.0f}%" for run in runs.values()],
        "tokens kept": [f"{100 * run['tokens_kept']:.0f}%" for run in runs.values()],
    }
    accuracies = [{row["step"]: row for row in run["accuracy"] if row["step"] in _STEPS} for run in runs.values()]
    steps: dict[str, list[str]] = {}
    for step, title in _STEPS.items():
        texts = [f"{rows[step]['percent']:.1f}" if step in rows else "" for rows in accuracies]
        if any(texts) and (not steps or texts != list(steps.values())[-1]):
            steps[title] = texts
    last = [list(rows.values())[-1]["to_original"] for rows in accuracies]
    # Subtracted, so that nothing lost is not "-0.0".
    lost = [f"{0.0 - round(change['percent'], 1):.1f} ± {change['standard_error']:.1f}" for change in last]
    shown, same = {}, []
    for title, texts in {**sizes, **steps}.items():
        if len(runs) > 1 and len(set(texts)) == 1 and (title in sizes or title == "original"):
            same.append(f"{title} {texts[0]}")
        else:
            shown[title] = texts
    shown["lost"] = lost
    rows = [
        (name, changes.get(name, ""), [texts[number] for texts in shown.values()]) for number, name in enumerate(runs)
    ]
    return Comparison(list(shown), rows, same)


def _as_variant(validation: Mapping[str, Any]) -> dict[str, Any]:
    size = validation["size"]
    return {
        "heads_removed": size["heads_removed"],
        "ffn_macs_kept": size["ffn_macs_kept"],
        "tokens_kept": size["visual_tokens"]["compressed"] / size["visual_tokens"]["original"],
        "accuracy": validation["accuracy"],
    }


def budget_parts(budget: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the parts of a run with one budget cost before and after, by its table; None without such a budget.

    ``parts`` are rows of name, original and compressed cost in ``unit`` per image; ``predicted`` is the speed-up.
    """
    allocation = budget["allocation"]
    if allocation is None:
        return None
    table = CostTable(**budget["table"])
    heads: Sequence[int] = [len(kept) for kept in allocation["heads"]]
    attention = [sum(costs[-1] for costs in table.attention), _sum_at(table.attention, heads)]
    ffn = [
        sum(costs[-1] for _, costs in table.ffn),
        sum(table.ffn_cost(block, width) for block, width in enumerate(allocation["widths"])),
    ]
    rest = [table.rest, table.rest]
    whole = [sum(part) for part in zip(attention, ffn, rest, strict=True)]
    costs = {"attention": attention, "FFNs": ffn, "embedding, projector": rest, "whole encoder": whole}
    parts = [(name, *pair) for name, pair in costs.items()]
    return {"unit": table.unit, "parts": parts, "predicted": allocation["speed_up"]}


def _sum_at(costs: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    return sum(of_block[count] for of_block, count in zip(costs, counts, strict=True))
