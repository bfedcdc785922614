"""Reading back what a kit's verify.py found on a device: strict, because ``engine verified`` rests on it alone.

A report is believed when it has exactly the expected form, belongs to the kit at hand (by the manifest's sha256), and
its figures give the verdict that it states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from infoprune_export.artifacts import MANIFEST, sha256_file
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.base import Name, Spec

if TYPE_CHECKING:
    from rich.table import Table

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Milliseconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
KITS = "kits"
"""Folder of a run with the manifest of every kit that was made from it, by target."""


# ── Form ─────────────────────────────────────────────────────────────────────


class Features(Spec):
    """Figures are null where the engine's output was not finite or no row could be compared."""

    max_error: float | None = Field(ge=0)
    cosine: float | None
    norm_ratio: float | None = Field(ge=0)
    rows: int = Field(ge=0)
    compared: int = Field(ge=0)


class Kept(Spec):
    equal: bool
    overlap: Share
    suboptimality: Share


class Outputs(Spec):
    image_features: Features
    kept_indices: Kept | None = None


class CaseReport(Spec):
    case: str
    outside: str
    """Why the case does not fit the engine's profile; empty if it does."""
    outputs: Outputs | None
    """None where the case was not run, or an output had another shape."""


class Percentiles(Spec):
    p50: Milliseconds
    p90: Milliseconds
    p99: Milliseconds


class Flags(Spec):
    cuda_graph: bool
    copies_included: bool
    warmup: int = Field(ge=0)


class Clocks(Spec):
    idle: dict[str, str]
    busy: dict[str, str]


class Latency(Spec):
    case: str
    rounds: int = Field(ge=1)
    device_ms: Percentiles
    host_ms: Percentiles
    flags: Flags
    clocks: Clocks


class EngineFacts(Spec):
    backend: Literal["tensorrt"]
    tensorrt: str = Field(pattern=r"^\d+\.\d+[0-9A-Za-z.+]*$")
    cuda_driver: str
    device: str
    sm: str = Field(pattern=r"^\d{2,3}$")
    precision: str
    plan_sha256: Sha256
    profile_level: int = Field(ge=0)
    """How often memory made build.py take a smaller profile than the kit asked for."""


class Attention(Spec):
    fused: int = Field(ge=0)
    expected: int = Field(ge=0)
    layers: int = Field(ge=0)


class KitReport(Spec):
    """``report.json`` of a kit."""

    schema_version: Literal[1]
    kit: Sha256
    """Of the kit's manifest.json."""
    name: str
    target: Name
    engine: EngineFacts
    cases: tuple[CaseReport, ...] = Field(min_length=1)
    attention: Attention
    latency: tuple[Latency, ...]
    verdict: Literal["PASS", "FAIL"]
    reasons: tuple[str, ...]


class _Part(pydantic.BaseModel):
    """Of the kit's manifest, which holds more than is looked at here."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Tolerances(_Part):
    max_error: float
    min_cosine: float
    kept_suboptimality: float


class KitTarget(_Part):
    name: str
    tensorrt: str
    sm: int
    hardware_compatible: bool


class KitCase(_Part):
    name: str


class KitAttention(_Part):
    expected_fused: int


class KitManifest(_Part):
    """``manifest.json`` of a kit, as far as a report is checked against it."""

    schema_version: Literal[1]
    name: str
    precision: str
    target: KitTarget
    cases: tuple[KitCase, ...]
    attention: KitAttention
    tolerances: Tolerances
    selection: dict[str, Any] | None


# ── Reading ──────────────────────────────────────────────────────────────────


def read_report(path: Path, run: Path | None = None) -> KitReport:
    """A report, checked against the manifest of the kit that it is about.

    That is the run's own where a run's folder is given, otherwise ``manifest.json`` beside the report.

    Raises:
        InfopruneError: no such file, another form, another kit's report, or a verdict that its figures do not give.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InfopruneError(f"{path}: cannot be read ({reason}); name the report.json that verify.py wrote") from None
    try:
        report = KitReport.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise InfopruneError(f"{path}: {_first_problem(error)}; take the report.json as verify.py wrote it") from None
    source = path.parent / MANIFEST if run is None else run / KITS / f"{report.target}.json"
    manifest = _read_manifest(source, path, run)
    _check_belongs(report, manifest, sha256_file(source), path)
    found = judge(report, manifest)
    if bool(found) != (report.verdict == "FAIL"):
        raise InfopruneError(
            f"{path}: states {report.verdict}, but {found[0] if found else 'none of its figures breaks a limit'}; take "
            "the report.json as verify.py wrote it"
        )
    return report


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    shown = repr(problem["input"])
    return (
        f"{key} = {shown if len(shown) < 60 else shown[:57] + '...'}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    )


def _read_manifest(source: Path, report: Path, run: Path | None) -> KitManifest:
    try:
        return KitManifest.model_validate_json(source.read_bytes())
    except OSError:
        fix = "make the kit from this run first" if run else "put it into its kit's folder, or name the run with -o"
        raise InfopruneError(f"{report}: no kit manifest at {source} to check the report against; {fix}") from None
    except pydantic.ValidationError as error:
        raise InfopruneError(f"{source}: no kit manifest ({_first_problem(error)}); make the kit again") from None


def _check_belongs(report: KitReport, manifest: KitManifest, digest: str, path: Path) -> None:
    if report.kit != digest:
        raise InfopruneError(
            f"{path}: report of another kit (manifest {report.kit[:12]}, here it is {digest[:12]}); run verify.py of "
            "this kit"
        )
    target = manifest.target
    stated = {
        "name": (report.name, manifest.name),
        "target": (report.target, target.name),
        "precision": (report.engine.precision, manifest.precision),
        "cases": ([case.case for case in report.cases], [case.name for case in manifest.cases]),
        "fused attention expected": (report.attention.expected, manifest.attention.expected_fused),
        "TensorRT": (report.engine.tensorrt.split(".")[:2], target.tensorrt.split(".")[:2]),
    }
    if not target.hardware_compatible:
        stated["SM"] = (report.engine.sm, str(target.sm))
    for what, (theirs, ours) in stated.items():
        if theirs != ours:
            raise InfopruneError(f"{path}: {what} {theirs}, the kit has {ours}; run verify.py of this kit")


# ── Verdict ──────────────────────────────────────────────────────────────────


def judge(report: KitReport, manifest: KitManifest) -> list[str]:
    """What is wrong with a report's figures, by the kit's tolerances; the verdict is PASS when nothing is."""
    problems = []
    for case in report.cases:
        if case.outside and not report.engine.profile_level:
            problems.append(f"{case.case}: {case.outside}")
        elif not case.outside:
            problems += [f"{case.case}: {problem}" for problem in _case_problems(case, manifest)]
    if all(case.outside for case in report.cases):
        problems.append("no case fits the engine's profile")
    if report.attention.fused < report.attention.expected:
        problems.append(f"fused attention in {report.attention.fused} of {report.attention.expected} layers")
    return problems


def _case_problems(case: CaseReport, manifest: KitManifest) -> list[str]:
    if case.outputs is None:
        return ["an output has another shape"]
    limits, features, kept = manifest.tolerances, case.outputs.image_features, case.outputs.kept_indices
    figures = (features.max_error, features.cosine, features.norm_ratio)
    problems = []
    if not features.compared or any(figure is None for figure in figures):
        problems.append("features are not finite, or none could be compared")
    else:
        error, cosine, ratio = (figure or 0.0 for figure in figures)
        if error > limits.max_error:
            problems.append(f"largest error {error:.3g}, limit {limits.max_error:.3g}")
        if cosine < limits.min_cosine:
            problems.append(f"cosine {cosine:.7f}, limit {limits.min_cosine:.7f}")
        if abs(ratio - 1) > limits.max_error:
            problems.append(f"norm ratio {ratio:.4f}, limit 1 +- {limits.max_error:.3g}")
    if (kept is None) != (manifest.selection is None):
        problems.append("kept tokens are missing" if kept is None else "kept tokens where none are selected")
    elif kept is not None and kept.suboptimality > limits.kept_suboptimality:
        problems.append(f"kept tokens worse by {kept.suboptimality:.3g}, limit {limits.kept_suboptimality:.3g}")
    return problems


# ── Printing ─────────────────────────────────────────────────────────────────


def render(report: KitReport) -> list[Table]:
    """Figures of every case, and latencies with the clocks they were measured at."""
    from rich.markup import escape
    from rich.table import Table

    cases = Table("case", "largest error", "cosine", "norm ratio", "rows", "kept tokens")
    for case in report.cases:
        if case.outputs is None:
            cases.add_row(escape(case.case), escape(case.outside) or "another shape", "", "", "", "")
            continue
        features, kept = case.outputs.image_features, case.outputs.kept_indices
        chosen = (
            "" if kept is None else "equal" if kept.equal else f"{kept.overlap:.1%}, worst {kept.suboptimality:.2g}"
        )
        cases.add_row(
            escape(case.case),
            _shown(features.max_error, ".2e"),
            _shown(features.cosine, ".7f"),
            _shown(features.norm_ratio, ".4f"),
            f"{features.compared} of {features.rows}",
            chosen,
        )
    times = Table("case", "p50 ms", "p90", "p99", "host p50", "CUDA graph", "clocks")
    for row in report.latency:
        device = row.device_ms
        clocks = ", ".join(f"{name} {value}" for name, value in sorted(row.clocks.busy.items()))
        times.add_row(
            escape(row.case),
            f"{device.p50:.3f}",
            f"{device.p90:.3f}",
            f"{device.p99:.3f}",
            f"{row.host_ms.p50:.3f}",
            "yes" if row.flags.cuda_graph else "no",
            escape(clocks) or "not reported",
        )
    return [cases, times]


def _shown(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def conclusion(report: KitReport) -> str:
    """One line: what the report proves."""
    engine = report.engine
    where = f"{engine.device}, TensorRT {engine.tensorrt}, {engine.precision}"
    if report.verdict == "FAIL":
        return f"engine NOT verified on {where}: {'; '.join(report.reasons)}"
    smaller = f", for a profile that was made smaller {engine.profile_level} times" if engine.profile_level else ""
    return f"engine verified on {where}{smaller}; fused attention in {report.attention.fused} layers"
