"""Where an error was made: the step, the part of the encoder, the ONNX nodes, and what mends it.

Steps are compared by what the encoder puts out, which is where an error shows; parts by what each makes of the same
input, which is where it is made (see `blocks`). Broken is the first step in which a part is beyond its limit. The limit
of a part is what the whole encoder is allowed in that precision, so that no part can be beyond its own while their sum
is within.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from infoprune_export.engine.base import Engine
from infoprune_export.errors import InfopruneError
from infoprune_export.export.names import boundaries_of, parts_of
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import Recipe, TokensSpec
from infoprune_export.tokens.encoder import FEATURES, KEPT, VisionEncoder
from infoprune_export.validate import attribution_steps as outputs
from infoprune_export.validate.attribution_schema import Attribution, Broken, Overflow, PartRow, StepRow
from infoprune_export.validate.blocks import Implementation, Limits, OnnxParts, TorchParts, compare_parts
from infoprune_export.validate.parity import masked

SCHEMA_VERSION = 1
LIMITS = {
    "rewrite": "removing heads and neurons is exact, so what differs is the order of fp32 sums",
    "checkpoint": "saving and loading change no bit, so what differs is the order of fp32 sums",
    "onnx": "the same operations in fp32 in another order; 1e-4 of the scale is some hundred roundings",
    "precision": "rounding to the typed graph's numbers, as much as the whole encoder is allowed",
    "engine": "the same graph with operators fused, in its own precision",
}
MEANINGS = {
    "original": "the model as it came",
    "heads": "attention heads removed",
    "ffn": "FFNs compressed; the rewritten encoder",
    "recovery": "what is left of the encoder trained to give the original's visual tokens",
    "tokens": "visual tokens selected; the checkpoint in PyTorch",
    "onnx": "exported fp32 graph in ONNX Runtime",
    "precision": "typed or INT8 file in ONNX Runtime",
    "engine": "engine for the target",
}
WHOLE = "encoder"
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}


@dataclass(frozen=True)
class Subject:
    """Everything that is compared; models are on the CPU and in fp32."""

    recipe: Recipe
    original: VLM
    only_heads: VLM | None
    """Without recovery and FFN compression; None where no head was removed."""
    by_plans: VLM
    recovered: VLM
    """`by_plans` with what recovery trained; the same where the recipe has none."""
    pruned: VLM
    """The checkpoint, as loaded."""
    full_copy: VLM
    """A copy of the original that may be changed."""
    heads: HeadPlan
    ffn: FfnPlan
    weights: Mapping[str, Tensor]
    onnx: Path
    """The fp32 file."""
    precision: Path | None
    """The typed or INT8 file; None where the fp32 one is what was built."""
    engines: Mapping[str, Engine]
    """By step: onnx, precision where there is such a file, engine."""
    engine_file: Path | None
    """An engine whose values can be looked at."""
    providers: Sequence[str]
    """Of `engine_file`."""
    cases: outputs.Cases
    accuracy: Sequence[Mapping[str, Any]] = field(default=())


def attribute(subject: Subject, *, blocks: bool = True) -> Attribution:
    """Both tables and what broke; see `attribution_schema`."""
    steps = _steps(subject)
    parts = part_rows(subject) if blocks else []
    return Attribution(
        schema_version=SCHEMA_VERSION,
        steps=steps,
        blocks=parts,
        limits=dict(LIMITS),
        broken=find_broken(subject, steps, parts),
    )


# ── Steps and parts ──────────────────────────────────────────────────────────


def _steps(subject: Subject) -> list[StepRow]:
    recipe, several = subject.recipe, subject.recipe.export.several
    steps = {"original": outputs.in_torch(subject.original.tower, None, None)}
    if subject.only_heads is not None:
        steps["heads"] = outputs.in_torch(subject.only_heads.tower, None, None)
    steps["ffn"] = outputs.in_torch(subject.by_plans.tower, None, None)
    if subject.recovered is not subject.by_plans:
        steps["recovery"] = outputs.in_torch(subject.recovered.tower, None, None)
    steps["tokens"] = outputs.in_torch(subject.pruned.tower, recipe.tokens, several)
    for step, engine in subject.engines.items():
        steps[step] = outputs.in_engine(engine, subject.original.tower, recipe.tokens, several)
    reference = subject.pruned.tower
    return outputs.step_rows(recipe, steps, subject.engines, reference, subject.cases, MEANINGS, subject.accuracy)


def part_rows(subject: Subject) -> list[PartRow]:
    """Every pair of neighbouring implementations, part by part."""
    recipe = subject.recipe
    tokens, several, replay = recipe.tokens, recipe.export.several, recipe.validate_.replay_tolerance
    exact, typed = Limits.of("fp32", replay), Limits.of(recipe.export.numerics, replay)
    rows: list[PartRow] = []

    def add(step: str, a: Implementation, b: Implementation, limits: Limits, chosen: TokensSpec | None) -> None:
        tower = subject.pruned.tower
        calls = calls_of(tower, chosen, several if chosen is not None else None, subject.cases)
        rows.extend(compare_parts(step, a, b, calls, limits, tower, chosen))

    full = subject.full_copy.tower
    with masked(full, subject.heads, subject.ffn, subject.weights):
        add("rewrite", TorchParts(full, None), TorchParts(subject.by_plans.tower, None), exact, None)
    pruned = TorchParts(subject.pruned.tower, tokens, several)
    add("checkpoint", TorchParts(subject.recovered.tower, tokens, several), pruned, exact, tokens)
    last = OnnxParts(subject.onnx)
    add("onnx", pruned, last, exact, tokens)
    if subject.precision is not None:
        typed_file = OnnxParts(subject.precision)
        add("precision", last, typed_file, typed, tokens)
        last = typed_file
    if subject.engine_file is not None:
        engine = OnnxParts(subject.engine_file, last.types, subject.providers, optimised=True)
        add("engine", last, engine, typed, tokens)
    return rows


def calls_of(
    tower: VisionTower, tokens: TokensSpec | None, several: bool | None, cases: outputs.Cases
) -> list[tuple[str, list[dict[str, Tensor]]]]:
    """Planned tensors of every call of every case."""
    form = VisionEncoder(tower, tokens, several).form
    return [(case, tower.calls(inputs, form)) for case, inputs in cases]


# ── What broke ───────────────────────────────────────────────────────────────


def find_broken(subject: Subject, steps: Sequence[StepRow], parts: Sequence[PartRow]) -> list[Broken]:
    """The parts beyond their limits in the first step that has some, or the first step whose sum of parts is."""
    for step in LIMITS:
        if wrong := [row for row in parts if row["step"] == step and not row["passed"]]:
            return _broken_parts(subject, wrong)
    for row in steps:
        if not row["passed"]:
            looked = any(part["step"] == row["step"] for part in parts)
            why = "every part is within its own limit, so small errors add up" if looked else "parts were not looked at"
            reason = f"{_step_reason(row)}; {why}"
            return [Broken(step=row["step"], part=WHOLE, reason=reason, nodes=[], overflow=[], fix=None)]
    return []


def _step_reason(row: StepRow) -> str:
    """All figures that a step is held to: which of them failed may be any."""
    found = row["parity"]
    error, cosine = (None, None) if found is None else (found["relative_error"], found["cosine"])
    tolerance, least = row["tolerance"] or 0.0, row["min_cosine"] or 0.0
    reason = f"largest error {_text(error)} of the scale (limit {tolerance:.1e})"
    if cosine is not None and least:
        reason += f", cosine {cosine:.6f} (limit {least:.6f})"
    if row["kept_suboptimality"] is not None:
        reason += f", kept tokens worse than the best by up to {row['kept_suboptimality']:.2g}"
    return reason


def _broken_parts(subject: Subject, wrong: Sequence[PartRow]) -> list[Broken]:
    step, numerics = wrong[0]["step"], subject.recipe.export.numerics
    file = subject.onnx if step == "onnx" else (subject.precision or subject.onnx)
    rounded = step == "precision" and numerics in _LARGEST
    beyond: dict[str, list[Overflow]] = {row["part"]: [] for row in wrong}
    if rounded:
        chosen = subject.recipe.tokens, subject.recipe.export.several
        calls = [planned for _, case in calls_of(subject.pruned.tower, *chosen, subject.cases) for planned in case]
        beyond = {part: overflows(subject.onnx, part, calls, numerics) for part in beyond}
    fix = _fix(wrong, beyond) if rounded else None
    broken = []
    for row in wrong:
        part, overflow = row["part"], beyond[row["part"]]
        reason = _reason(row)
        if overflow:
            reason += f"; {len(overflow)} of its nodes exceed {_LARGEST[numerics]:g} in fp32"
        nodes = nodes_of(file, part) if step in ("onnx", "precision", "engine") else []
        broken.append(Broken(step=step, part=part, reason=reason, nodes=nodes, overflow=overflow, fix=fix))
    return broken


def _fix(wrong: Sequence[PartRow], beyond: Mapping[str, Sequence[Overflow]]) -> str | None:
    """What to keep in fp32: the stream where the sum itself is too large, a part where its own values are."""
    streams = {row["boundary"] for row in wrong if row["block"] is not None}
    kept = ["stream"] if any(node["value"] in streams for nodes in beyond.values() for node in nodes) else []
    for row in wrong:
        nodes = beyond[row["part"]]
        if row["block"] is not None and (not nodes or any(node["value"] not in streams for node in nodes)):
            kept.append(row["part"])
    return f"--set export.keep_fp32=[{','.join(kept)}]" if kept else None


def _reason(row: PartRow) -> str:
    found = row["added"] or row["value"]
    what = "what it adds to the stream" if row["added"] is not None else f"{row['boundary']}"
    if row["kept_suboptimality"] is not None:
        figure = f"kept tokens are worse than the best by up to {row['kept_suboptimality']:.2g}"
    elif row["boundary"].startswith("kept"):
        figure = "kept tokens are others"
    elif found["relative_error"] is None:
        figure = f"{what} is not finite or of another shape"
    else:
        figure = (
            f"{what} is off by {found['relative_error']:.2g} of its scale (limit {row['tolerance']:.2g}), cosine "
            f"{found['cosine']:.6f} (limit {row['min_cosine']:.6f}), norm ratio {found['norm_ratio']:.4f}"
        )
    return f"{figure}, on {found['case']}; {LIMITS[row['step']]}"


def _text(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


# ── ONNX nodes ───────────────────────────────────────────────────────────────


def nodes_of(file: Path, part: str) -> list[str]:
    """Names of a part's nodes, by what they feed; one without a name goes by its operator and result."""
    model = ir.load(file)
    return [
        node.name or f"{node.op_type} -> {node.outputs[0].name}"
        for node, belongs in parts_of(model).items()
        if belongs == part and node.op_type != "Constant"
    ]


def overflows(file: Path, part: str, calls: Sequence[Mapping[str, Tensor]], numerics: str = "fp16") -> list[Overflow]:
    """Nodes of a part of an fp32 file whose results on these inputs the typed graph could not hold, in order."""
    import onnxruntime

    model = ir.load(file)
    wanted = {
        value.name or "": node.name or ""
        for node, belongs in parts_of(model).items()
        for value in node.outputs
        if belongs == part and value.dtype == ir.DataType.FLOAT and node.op_type != "Constant"
    }
    proto = onnx.load(file, load_external_data=False)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent.resolve()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [value.name for value in session.get_inputs()]
    largest = np.zeros(len(wanted))
    for planned in calls:
        values = session.run(list(wanted), {name: planned[name].cpu().numpy() for name in taken})
        largest = np.maximum(largest, [np.nanmax(np.abs(value), initial=0.0) for value in values])
    return [
        Overflow(node=node, value=name, largest=float(most) if np.isfinite(most) else None)
        for (name, node), most in zip(wanted.items(), largest, strict=True)
        if not most <= _LARGEST[numerics]
    ]


def check_foreign(file: Path, own: Path) -> None:
    """Refuse a file that is no encoder of the same parts.

    Raises:
        InfopruneError: it cannot be read, takes other inputs, lacks outputs or boundaries.
    """
    try:
        theirs = ir.load(file)
    except Exception as error:
        raise InfopruneError(
            f"{file}: cannot be read as ONNX ({str(error).splitlines()[0]:.100}); give a .onnx file"
        ) from None
    mine = ir.load(own)
    if wrong := {value.name for value in theirs.graph.inputs} ^ {value.name for value in mine.graph.inputs}:
        raise InfopruneError(
            f"{file}: input {sorted(map(str, wrong))[0]!r} is on one side only; export the same encoder"
        )
    if lost := {value.name for value in mine.graph.outputs} - {value.name for value in theirs.graph.outputs}:
        raise InfopruneError(f"{file}: output {min(map(str, lost))!r} is not there; keep the names of the outputs")
    types = {value.name: value.dtype for value in mine.graph.inputs}
    if changed := [value for value in theirs.graph.inputs if value.dtype != types[value.name]]:
        raise InfopruneError(
            f"{file}: input {changed[0].name!r} is {changed[0].dtype}, in the run it is {types[changed[0].name]}; "
            "export the same encoder"
        )
    if not (found := boundaries_of(theirs)) or not set(found) & set(boundaries_of(mine)) - {FEATURES, KEPT}:
        raise InfopruneError(
            f"{file}: has none of the values that parts end in, such as {boundaries_of(mine)[1]!r}; keep their names"
        )
