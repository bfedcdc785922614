"""Is an export right on every resolution? Families with random weights, through ONNX Runtime and through PyTorch.

A graph is traced on one example, and can be wrong on another size without any error. So every family is exported once,
and then run on every patch grid up to 40 x 40, extreme aspect ratios, mixed images and videos:

1. `cases_of` lists a family's images; each is one of `KINDS`.
2. The reference is the Hugging Face model's own ``get_image_features``, not this package's tower, so an adapter's
   mistake counts as the export's.
3. Contenders are this package's graphs (`_Graph`), those of a randomly pruned tower too, and optionally the graphs that
   transformers' own exporter makes of the same model (`Peer`).
4. Each comparison ends in one of `OUTCOMES`; a `Tally` counts them.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from infoprune_export.engine.onnxruntime import feed_of, open_session
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.models.llava_next import LlavaNextTower
from infoprune_export.models.tower import Form, Inputs, VisionTower
from infoprune_export.models.zoo import TINY, random_model
from infoprune_export.recipe import load_target
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT, apply_ffn, apply_heads
from infoprune_export.tokens.encoder import FEATURES
from infoprune_export.validate.parity import compare
from infoprune_export.validate.sweep_cases import KINDS, Case, Features, Kind, cases_of, model_features
from infoprune_export.validate.sweep_peer import TARGET, THREADS, Peer, examine_peer, one_line, version_of

TOLERANCE = 1e-4
"""Largest absolute difference over the largest absolute value of the reference that counts as right."""
OPSET = 20

Outcome = Literal["right", "wrong", "refused", "no export"]
OUTCOMES: dict[Outcome, str] = {
    "right": "equal to PyTorch",
    "wrong": "SILENTLY WRONG, another output and no error",
    "refused": "an error instead of an output",
    "no export": "no graph at all",
}

_PRUNED_CASES = 48
_EXAMPLES = 3


@dataclass
class Tally:
    """What became of one contender's cases."""

    family: str
    contender: str
    ours: bool = True
    counts: dict[Kind, Counter[Outcome]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    worst: float = 0.0
    """Largest relative error of a case that returned something; infinite if its shape was wrong or not all finite."""
    seconds: float = 0.0
    """Export and ONNX Runtime."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first cases of every outcome but right."""

    @property
    def cases(self) -> int:
        return sum(counter.total() for counter in self.counts.values())

    @property
    def right(self) -> bool:
        """Every case is, and there was one."""
        return 0 < self.cases == sum(counter["right"] for counter in self.counts.values())

    def add(self, case: Case, outcome: Outcome, error: float | None, message: str) -> None:
        """Count one case."""
        self.counts[case.kind][outcome] += 1
        self.worst = max(self.worst, error or 0.0)
        if outcome != "right" and sum(example["outcome"] == outcome for example in self.examples) < _EXAMPLES:
            finite = error if error is None or np.isfinite(error) else None
            self.examples.append({"case": case.label, "outcome": outcome, "error": finite, "message": message})

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "contender": self.contender,
            "ours": self.ours,
            "cases": self.cases,
            "counts": {kind: dict(counter) for kind, counter in self.counts.items() if counter},
            # JSON has no infinity.
            "worst_relative_error": self.worst if np.isfinite(self.worst) else None,
            "seconds": round(self.seconds, 2),
            "right": self.right,
            "examples": self.examples,
        }


@dataclass(frozen=True)
class Sweep:
    """All tallies of one run."""

    tallies: Sequence[Tally]
    seconds: Mapping[str, float]
    """By family, PyTorch's forwards included."""
    peer: Mapping[str, Any] | None = None
    """Name, version, and the reason if it is not available; None if no peer was asked for."""

    @property
    def right(self) -> bool:
        """Every case of this package's graphs is."""
        return all(tally.right for tally in self.tallies if tally.ours)

    def to_dict(self) -> dict[str, Any]:
        packages = ("torch", "transformers", "onnx", "onnxruntime")
        return {
            "right": self.right,
            "tolerance": TOLERANCE,
            "opset": OPSET,
            "packages": {name: version_of(name) for name in packages},
            "peer": self.peer,
            "seconds": {family: round(value, 2) for family, value in self.seconds.items()},
            "rows": [tally.to_dict() for tally in self.tallies],
        }


# ── Models ────────────────────────────────────────────────────────────────────


def prune_at_random(tower: VisionTower, seed: int) -> None:
    """Remove heads and neurons in place: some block is left no head, one has one, one has all.

    FFNs become constant, linear, or narrower.
    """
    draw = np.random.default_rng(seed)
    counts, shapes = tower.head_counts(), tower.ffn_shapes()
    heads = [0, 1, counts[0], *(int(draw.integers(1, counts[0])) for _ in counts[3:])]
    kinds = ["none", "linear", *("some" for _ in shapes[2:])]
    draw.shuffle(heads)
    draw.shuffle(kinds)
    choices, weights = [], {}
    for number, (kind, shape, block) in enumerate(zip(kinds, shapes, tower.blocks, strict=True)):
        if kind == "linear":
            width, rank = block.ffn_out.out_features, int(draw.integers(1, 17))
            for role, extents in ((FFN_IN, (rank, width)), (FFN_OUT, (width, rank))):
                values = torch.from_numpy(draw.normal(size=extents)).float()
                weights[f"{number}.{role}.weight"] = values / extents[1] ** 0.5
            choices.append(FfnChoice("linear", rank=rank))
        else:
            kept = int(draw.integers(1, shape.size)) if kind == "some" else 0
            choices.append(FfnChoice("mlp", neurons=_some(draw, shape.size, kept)))
    kept_heads = tuple(_some(draw, total, kept) for total, kept in zip(counts, heads, strict=True))
    apply_heads(tower, HeadPlan(tuple(counts), kept_heads), {})
    apply_ffn(tower, FfnPlan(tuple(shape.size for shape in shapes), tuple(choices)), weights)


def _some(draw: np.random.Generator, total: int, kept: int) -> tuple[int, ...]:
    return tuple(sorted(int(index) for index in draw.choice(total, kept, replace=False)))


def _tiles_model(family: str) -> Any:
    """LLaVA-NeXT whose own forward lays out all tokens of all tiles, which its configuration cannot ask of it."""
    model = random_model(family)
    model.config.image_packing = "tiles"
    model.model.pack_image_features = lambda features, *_, **__: ([tiles.flatten(0, 1) for tiles in features], None)
    return model


# ── Contenders ───────────────────────────────────────────────────────────────


class Contender(Protocol):
    """Something that claims to compute a model's features."""

    def serves(self, case: Case) -> bool:
        """Whether it claims to for this case."""

    def run(self, inputs: Inputs) -> Features:
        """Features, or any exception: a refusal."""


@dataclass(frozen=True)
class Entry:
    """A contender that is yet to be made."""

    name: str
    make: Callable[[], Contender]
    ours: bool = True


class _Graph:
    """This package's export of a tower, planned on the host and run by ONNX Runtime."""

    def __init__(self, tower: VisionTower, several: bool) -> None:
        self._tower = tower
        with TemporaryDirectory() as folder:
            self.form: Form = export_onnx(tower, None, Path(folder), opset=OPSET, several=several)
            self._session = open_session(Path(folder) / MODEL, load_target(TARGET), THREADS)

    def serves(self, case: Case) -> bool:
        return self.form.several or case.alone

    def run(self, inputs: Inputs) -> Features:
        self._tower.check_inputs(inputs)
        parts = [
            self._session.run([FEATURES], feed_of(self._session, planned))[0]
            for planned in self._tower.calls(inputs, self.form)
        ]
        return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


# ── Sweeping ─────────────────────────────────────────────────────────────────


def sweep(
    families: Sequence[str] = (), *, peer: str | None = None, every: int = 1, progress: Progress | None = None
) -> Sweep:
    """Try families of `TINY`, all by default, on every `every`-th of their cases.

    Raises:
        InfopruneError: no such family or peer.
    """
    if unknown := [family for family in families if family not in TINY]:
        raise InfopruneError(f"no family {unknown[0]!r}; there are: {', '.join(TINY)}")
    examined = examine_peer(peer) if peer is not None else None
    with_peer = examined is not None and examined["not_available"] is None
    tallies: list[Tally] = []
    seconds = {}
    # A family named twice is swept once.
    for family in dict.fromkeys(families or TINY):
        start = time.perf_counter()
        tallies += _sweep_family(family, with_peer, every, progress or Progress(disable=True))
        seconds[family] = time.perf_counter() - start
    return Sweep(tallies, seconds, examined)


def _sweep_family(family: str, with_peer: bool, every: int, progress: Progress) -> Iterator[Tally]:
    model = random_model(family)
    tower = tower_of(model)
    cases = cases_of(tower, model)
    entries = [Entry("ours, several images", partial(_Graph, tower, True))]
    if tower.ragged:
        entries.append(Entry("ours, one image", partial(_Graph, tower, False)))
    if with_peer:
        entries.append(Entry(f"transformers {version_of('transformers')}", partial(Peer, family), ours=False))
    yield from judge(family, model, entries, cases[::every], progress)

    pruned = random_model(family)
    pruned_tower = tower_of(pruned)
    prune_at_random(pruned_tower, seed=0)
    # Spread over all kinds; the list is sorted by them.
    spread = cases[:: max(1, len(cases) // _PRUNED_CASES)]
    entries = [Entry("ours, pruned", partial(_Graph, pruned_tower, True))]
    yield from judge(family, pruned, entries, spread[::every], progress)
    if isinstance(tower, LlavaNextTower):
        tiles = _tiles_model(family)
        entries = [Entry("ours, all tiles", partial(_Graph, tower_of(tiles), True))]
        yield from judge(family, tiles, entries, cases[::every], progress)


def judge(family: str, model: Any, entries: Sequence[Entry], cases: Sequence[Case], progress: Progress) -> list[Tally]:
    """Compare contenders with a Hugging Face model's own forward on every case that they claim to serve."""
    judged: list[tuple[Tally, Contender | None, str]] = []
    for entry in entries:
        tally, contender, failure = Tally(family, entry.name, entry.ours), None, ""
        task = progress.add_task(f"{family}: exporting, {entry.name}", total=None)
        start = time.perf_counter()
        try:
            # torch's exporter reports its steps on standard output when it is not we who call it.
            with contextlib.redirect_stdout(io.StringIO()):
                contender = entry.make()
        except Exception as error:  # (whatever it is, there is no graph)
            failure = one_line(error)
        tally.seconds += time.perf_counter() - start
        progress.remove_task(task)
        judged.append((tally, contender, failure))
    task = progress.add_task(f"{family}: {', '.join(entry.name for entry in entries)}", total=len(cases))
    for case in cases:
        inputs = case.make()
        expected = model_features(model, inputs)
        for tally, contender, failure in judged:
            if contender is None:
                tally.add(case, "no export", None, failure)
            elif contender.serves(case):
                start = time.perf_counter()
                outcome = _outcome(contender, inputs, expected)
                tally.seconds += time.perf_counter() - start
                tally.add(case, *outcome)
        progress.advance(task)
    progress.remove_task(task)
    return [tally for tally, _, _ in judged]


def _outcome(contender: Contender, inputs: Inputs, expected: Features) -> tuple[Outcome, float | None, str]:
    try:
        features = contender.run(inputs)
    except Exception as error:  # (whatever it is, it is no silent mistake)
        return "refused", None, one_line(error)
    distance = compare(expected, features, step="", case="", tolerance=TOLERANCE).relative_error
    if distance <= TOLERANCE:
        return "right", distance, ""
    shapes = "" if expected.shape == features.shape else f"shape {list(features.shape)}, not {list(expected.shape)}"
    return "wrong", distance, shapes


# ── Printing ─────────────────────────────────────────────────────────────────


def render(result: Sweep) -> list[RenderableType]:
    """The table, what its words mean, and an example of every failure."""
    table = Table("family", "graph", *KINDS.values(), "worst error", "cases", "s")
    for column in table.columns[2:]:
        column.justify = "right"
    for family, seconds in result.seconds.items():
        first = f"{family}\n{seconds:.0f} s in all"
        for tally in result.tallies:
            if tally.family == family:
                worst = f"{tally.worst:.0e}" if np.isfinite(tally.worst) else "infinite"
                counts = (_counts(tally.counts[kind]) for kind in KINDS)
                table.add_row(first, tally.contender, *counts, worst, str(tally.cases), f"{tally.seconds:.0f}")
                first = ""
        table.add_section()
    lines = [
        f"right: equal to the model's own forward within {TOLERANCE:g} of its largest value (the worst error's unit)"
    ]
    seen = {outcome for tally in result.tallies for counter in tally.counts.values() for outcome in counter}
    lines += [f"{name}: {meaning}" for name, meaning in OUTCOMES.items() if name in seen and name != "right"]
    for tally in result.tallies:
        first_ones = {example["outcome"]: example for example in reversed(tally.examples)}
        for outcome, example in first_ones.items():
            distance = "" if example["error"] is None else f", error {example['error']:.0e}"
            message = f": {example['message']}" if example["message"] else ""
            lines.append(f"{tally.family}, {tally.contender}: {outcome}, e.g. {example['case']}{distance}{message}")
    if result.peer is not None and result.peer["not_available"] is not None:
        lines.append(f"{result.peer['name']} {result.peer['version']}: not available: {result.peer['not_available']}")
    return [table, *map(Text, lines)]


def _counts(counter: Counter[Outcome]) -> str:
    return "\n".join(f"{counter[name]} {name}" for name in OUTCOMES if counter[name]) or "-"
