"""Every part of an encoder by itself: two implementations of it, given the same input, must make the same of it.

An `Implementation` computes the boundaries (see `models.boundaries`) of one call. Given another implementation's
boundaries, it goes on from those instead of its own, so that what it makes of each is the local error of one part and
no earlier one's. PyTorch does that through `visiting`; an ONNX file through a copy in which every use of a boundary is
a use of a new graph input. One run judges all parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoprune_export.models.boundaries import (
    CHOSEN,
    EMBEDDING,
    KEPT,
    PRIOR,
    TOKENS,
    behind_attention,
    behind_block,
    block_of,
    is_boundary,
    order_of,
    part_of,
    visiting,
)
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate.attribution_schema import PartRow, WorstFigures
from infoprune_export.validate.parity import LIMITS, MARGIN, certain_merges, suboptimality

Values = Mapping[str, Tensor]
"""Boundaries by name, floats in fp32."""

ROUNDING = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-23}
"""Spacing of the stream's numbers at 1, by `ExportSpec.numerics`: a sum keeps no more of what is added to it."""
_GIVEN = "given."


class Implementation(Protocol):
    def __call__(self, planned: Mapping[str, Tensor], given: Values | None = None) -> dict[str, Tensor]: ...


# ── Implementations ──────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TorchParts:
    """A tower in PyTorch."""

    tower: VisionTower
    tokens: TokensSpec | None
    several: bool | None = None

    def __call__(self, planned: Mapping[str, Tensor], given: Values | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}

        def visit(value: Tensor, name: str) -> Tensor:
            values.setdefault(name, value)
            return value if given is None or name not in given else given[name].to(value.dtype)

        with visiting(visit), torch.inference_mode():
            outputs = VisionEncoder(self.tower, self.tokens, self.several).eval().run(dict(planned))
        return {name: _plain(value) for name, value in {**outputs, **values}.items()}


class OnnxParts:
    """An ONNX file whose boundaries have names, in ONNX Runtime.

    `types` says what those of an optimised file are, which has lost that; `providers` and `optimised` as the engine's.
    """

    def __init__(
        self,
        path: Path,
        types: Mapping[str, int] | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        *,
        optimised: bool = False,
    ) -> None:
        self._path, self._providers, self._optimised = path, list(providers), optimised
        self._sessions: dict[bool, Any] = {}
        graph = onnx.load(path, load_external_data=False).graph
        known = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
        self.types: dict[str, int] = {
            name: (types or {}).get(name) or known[name]
            for node in graph.node
            for name in node.output
            if is_boundary(name) and ((types or {}).get(name) or known.get(name))
        }

    @property
    def boundaries(self) -> list[str]:
        return sorted(self.types, key=order_of)

    def __call__(self, planned: Mapping[str, Tensor], given: Values | None = None) -> dict[str, Tensor]:
        session = self._session(given is not None)
        feed = {}
        for value in session.get_inputs():
            name = value.name.removeprefix(_GIVEN)
            source = planned if name == value.name else given or {}
            dtype = _numpy_type(value.type)
            with np.errstate(over="ignore"):
                feed[value.name] = source[name].cpu().numpy().astype(dtype, copy=False)
        names = self.boundaries
        outputs = session.run(names, feed)
        return {name: _plain(torch.from_numpy(value)) for name, value in zip(names, outputs, strict=True)}

    def _session(self, taught: bool) -> Any:
        if taught not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if self._optimised:
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # The graph is in memory, its weights stay where they are.
            folder = str(self._path.parent.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            model = opened(self._path, self.types, taught=taught)
            self._sessions[taught] = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=self._providers
            )
        return self._sessions[taught]


def opened(path: Path, types: Mapping[str, int], *, taught: bool) -> onnx.ModelProto:
    """A file's graph, without its weights, whose boundaries are outputs and, if it is taught, inputs too."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    outputs = {value.name for value in graph.output}
    for name, dtype in types.items():
        if name not in outputs:
            graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    if not taught:
        return model
    used = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in types:
                node.input[place] = _GIVEN + name
                used.add(name)
    for name in sorted(used, key=order_of):
        graph.input.append(onnx.helper.make_tensor_value_info(_GIVEN + name, types[name], None))
    return model


def _numpy_type(name: str) -> np.dtype[Any]:
    return np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8"}[name])


def _plain(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


# ── Comparison ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Limits:
    """What the parts of a step are held to: no part may do worse than the whole encoder may in this precision."""

    numerics: str
    tolerance: float
    min_cosine: float
    replay: float

    @classmethod
    def of(cls, numerics: str, replay: float) -> Limits:
        """For `ExportSpec.numerics`; rounded features may also change a choice between tokens that are alike."""
        return cls(numerics, *LIMITS[numerics], replay if numerics == "fp32" else max(replay, 0.05))


def compare_parts(
    step: str,
    reference: Implementation,
    candidate: Implementation,
    cases: Iterable[tuple[str, Sequence[Mapping[str, Tensor]]]],
    limits: Limits,
    tower: VisionTower,
    tokens: TokensSpec | None,
) -> list[PartRow]:
    """One row per part, the worst of all cases; each case is a name and the planned tensors of its calls."""
    worst: dict[str, PartRow] = {}
    for case, calls in cases:
        for planned in calls:
            expected = reference(planned)
            actual = candidate(planned, expected)
            for row in _rows(step, case, expected, actual, limits, _Selection(tower, tokens, planned)):
                known = worst.get(row["part"])
                worst[row["part"]] = row if known is None else _worse(known, row)
    return sorted(worst.values(), key=lambda row: order_of(row["boundary"]))


@dataclass(frozen=True)
class _Selection:
    tower: VisionTower
    tokens: TokensSpec | None
    planned: Mapping[str, Tensor]

    def counts(self, visual: Tensor) -> Tensor:
        return self.tower.token_counts(visual, self.planned)


def _rows(
    step: str, case: str, expected: Values, actual: Values, limits: Limits, selection: _Selection
) -> Iterable[PartRow]:
    for name in sorted(expected.keys() & actual.keys(), key=order_of):
        part = part_of(name, actual.keys())
        stream = stream_before(name)
        fed = expected.get(stream) if stream is not None else None
        row = PartRow(
            step=step,
            part=part,
            block=block_of(name),
            boundary=name,
            value=figures(expected[name], actual[name], case),
            added=None,
            kept_suboptimality=None,
            tolerance=limits.tolerance,
            min_cosine=limits.min_cosine,
            judged=_representable(expected, name, limits.numerics),
            passed=True,
        )
        if name == CHOSEN and {TOKENS, PRIOR} <= expected.keys() and selection.tokens is not None:
            visual = expected[TOKENS]
            compared = visual[..., : selection.tower.selection_width]
            seen = compared, expected[PRIOR], selection.counts(visual)
            kept = suboptimality(*seen, selection.tokens, actual[name])
            row["kept_suboptimality"], row["passed"] = kept, kept <= limits.replay
        elif name in (CHOSEN, KEPT):
            row["passed"] = torch.equal(expected[name], actual[name])
        elif fed is not None and stream in actual and expected[name].shape == actual[name].shape:
            _judge_added(row, expected[name], actual[name], fed, case, limits)
        else:
            mine, theirs = expected[name], actual[name]
            if part == "merging" and selection.tokens is not None and mine.shape == theirs.shape:
                visual, margin = expected[TOKENS], min(limits.tolerance, MARGIN)
                sure = certain_merges(visual, selection.counts(visual), selection.tokens, expected[CHOSEN], margin)
                mine, theirs = mine[sure], theirs[sure]
                row["value"] = figures(mine, theirs, case)
                if not len(mine):
                    row["judged"] = False
            row["passed"] = _within(row["value"], limits.tolerance, limits.min_cosine)
        row["passed"] = row["passed"] or not row["judged"]
        yield row


def stream_before(boundary: str) -> str | None:
    """The residual stream that a block's part adds to; None for other boundaries."""
    block = block_of(boundary)
    if block is None:
        return None
    if not boundary.endswith(".attention"):
        return behind_attention(block)
    return behind_block(block - 1) if block else EMBEDDING


def _judge_added(row: PartRow, mine: Tensor, theirs: Tensor, fed: Tensor, case: str, limits: Limits) -> None:
    """Hold a block's part to what it adds, as far as the stream's own rounding lets that be seen."""
    seen = fed.half().float() if limits.numerics == "fp16" else fed
    seen = fed.bfloat16().float() if limits.numerics == "bf16" else seen
    added, rounding = mine.double() - fed.double(), ROUNDING[limits.numerics]
    row["added"] = found = figures(added, theirs.double() - seen.double(), case)
    largest, norm = float(added.abs().max()), float(added.norm())
    lost = rounding * float(mine.abs().max()), rounding * float(mine.double().norm())
    if largest <= 4 * lost[0]:
        # Nothing of it would be seen in the stream anyway.
        row["passed"] = _within(row["value"], limits.tolerance, limits.min_cosine)
        return
    row["tolerance"] = limits.tolerance + 4 * lost[0] / largest
    row["min_cosine"] = limits.min_cosine / math.sqrt(1 + (lost[1] / norm) ** 2)
    row["passed"] = _within(found, row["tolerance"], row["min_cosine"])


def figures(reference: Tensor | NDArray[Any], candidate: Tensor | NDArray[Any], case: str) -> WorstFigures:
    """All three figures of one comparison; null where shapes differ or something is not finite."""
    a, b = (torch.as_tensor(value).double().flatten() for value in (reference, candidate))
    if (
        tuple(reference.shape) != tuple(candidate.shape)
        or not len(a)
        or not a.isfinite().all()
        or not b.isfinite().all()
    ):
        return WorstFigures(cosine=None, norm_ratio=None, relative_error=None, case=case)
    tiny = torch.finfo(torch.float64).tiny
    norms = float(a.norm()), float(b.norm())
    equal = bool((a == b).all())
    return WorstFigures(
        cosine=1.0 if equal else float(a @ b) / max(norms[0] * norms[1], tiny),
        norm_ratio=1.0 if equal else norms[1] / max(norms[0], tiny),
        relative_error=0.0 if equal else float((a - b).abs().max()) / max(float(a.abs().max()), tiny),
        case=case,
    )


def _within(found: WorstFigures, tolerance: float, min_cosine: float) -> bool:
    """Whether all three figures hold; a norm may be off by as much as one entry may."""
    error, cosine, ratio = found["relative_error"], found["cosine"], found["norm_ratio"]
    if error is None or cosine is None or ratio is None:
        return False
    return error <= tolerance and cosine >= min_cosine and abs(ratio - 1) <= max(tolerance, 1 - min_cosine)


def _representable(expected: Values, boundary: str, numerics: str) -> bool:
    """Whether a part's fp32 result is finite and what it is fed fits its type."""
    if expected[boundary].is_floating_point() and not expected[boundary].isfinite().all():
        return False
    before = stream_before(boundary)
    if numerics != "fp16" or before is None or before not in expected:
        return True
    return bool(expected[before].abs().max() <= torch.finfo(torch.float16).max)


def _worse(known: PartRow, row: PartRow) -> PartRow:
    """The row that takes more of its limits, with the worst of both for every figure."""
    judged = row if _strain(row) > _strain(known) else known
    other = known if judged is row else row
    worst = PartRow(**judged)
    worst["value"] = worst_of([judged["value"], other["value"]])
    if judged["added"] is not None and other["added"] is not None:
        worst["added"] = worst_of([judged["added"], other["added"]])
    return worst


def _strain(row: PartRow) -> tuple[bool, bool, float]:
    found = row["added"] or row["value"]
    error = found["relative_error"]
    share = math.inf if error is None else error / max(row["tolerance"], 1e-30)
    return not row["passed"], row["judged"], max(share, row["kept_suboptimality"] or 0.0)


def worst_of(rows: Sequence[WorstFigures]) -> WorstFigures:
    """The worst of each figure; the case is that of the largest error."""
    worst = max(rows, key=lambda row: math.inf if row["relative_error"] is None else row["relative_error"])
    finite = [row for row in rows if row["cosine"] is not None and row["norm_ratio"] is not None]
    if len(finite) < len(rows):
        return worst
    return WorstFigures(
        cosine=min(row["cosine"] or 0.0 for row in rows),
        norm_ratio=max((row["norm_ratio"] or 0.0 for row in rows), key=lambda ratio: abs(ratio - 1)),
        relative_error=worst["relative_error"],
        case=worst["case"],
    )
