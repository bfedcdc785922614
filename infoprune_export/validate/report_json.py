"""Writing and reading ``report.json``; its form is in `report_schema`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from infoprune_export.artifacts import MANIFEST, canonical_json, library_versions, read_manifest, sha256_file
from infoprune_export.errors import InfopruneError
from infoprune_export.validate import report_schema as schema
from infoprune_export.validate import report_schema_attribution as attributed
from infoprune_export.validate.report_schema_base import Part

REPORT_JSON = "report.json"
DELIVERED = ("checkpoint", "onnx", "engine", "validation", "bench", "attribution")
"""Stages whose files are named one by one."""

Model = TypeVar("Model", bound=Part)


def build(
    *,
    name: str,
    description: str,
    recipe: dict[str, Any],
    validation: Mapping[str, Any],
    bench: Mapping[str, Any],
    variants: Mapping[str, Any],
    artefacts: Mapping[str, schema.Artefact],
    attribution: Mapping[str, Any] | None = None,
) -> schema.Report:
    """A run's results in the published form; see `report.render` for the inputs."""
    ffn = validation["ffn"]
    return schema.Report(
        schema_version=1,
        name=name,
        description=description,
        verdict=validation["verdict"],
        decision=decide(validation["checks"]),
        checks=[_pick(schema.Check, check) for check in validation["checks"]],
        metric=validation["metric"],
        accuracy=_accuracy(validation["accuracy"]),
        parity=[_pick(schema.Parity, parity) for parity in validation["parity"]],
        size=_sizes(validation["size"]),
        heads=schema.Heads(
            total=list(validation["heads"]["total"]), kept=[list(kept) for kept in validation["heads"]["kept"]]
        ),
        ffn=[_ffn(width, choice) for width, choice in zip(ffn["widths"], ffn["choices"], strict=True)],
        attribution=None if attribution is None else _attribution(attribution),
        bench=_bench(bench),
        variants={
            variant: _pick(schema.Variant, found, accuracy=_accuracy(found["accuracy"]))
            for variant, found in variants.items()
        },
        recipe=recipe,
        libraries=library_versions(),
        artefacts=dict(artefacts),
    )


def describe(folders: Mapping[str, Path]) -> dict[str, schema.Artefact]:
    """Hashes of finished stages' folders."""
    found = {}
    for stage, folder in folders.items():
        manifest = read_manifest(folder)
        files = manifest["outputs"] if manifest is not None and stage in DELIVERED else {}
        found[stage] = schema.Artefact(manifest_sha256=sha256_file(folder / MANIFEST), files=files)
    return found


def write(path: Path, report: Part) -> None:
    """As canonical JSON: equal reports give equal bytes."""
    path.write_text(dumps(report), encoding="utf-8")


def dumps(report: Part) -> str:
    """What `write` writes."""
    return canonical_json(report.model_dump(mode="json"))


def read(path: Path) -> schema.Report:
    """A report as it was written.

    Raises:
        InfopruneError: no such file, another schema version, or not of the published form; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InfopruneError(
            f"{path}: cannot be read ({reason}); write it again with infoprune-export report"
        ) from None
    try:
        version = pydantic.TypeAdapter(dict[str, Any]).validate_json(text).get("schema_version")
        if type(version) is int and version != schema.SCHEMA_VERSION:
            raise InfopruneError(
                f"{path}: schema_version {version}, this version reads {schema.SCHEMA_VERSION}; write it again with "
                "infoprune-export report --force"
            )
        return schema.Report.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InfopruneError(
            f"{path}: {where}: {first['msg']}; write it again with infoprune-export report --force"
        ) from None


# ── Verdict ──────────────────────────────────────────────────────────────────


def decide(checks: Sequence[Mapping[str, Any]]) -> schema.Decision:
    """Which of a verdict's checks decided it."""
    failed = [check for check in checks if not check["passed"]]
    worst = max(failed or checks, key=used_of)
    used = used_of(worst)
    return schema.Decision(check=worst["what"], passed=worst["passed"], used=used if math.isfinite(used) else None)


def used_of(check: Mapping[str, Any]) -> float:
    """Share of a check's limit that is used up; infinite where the value is not finite.

    Of a floor, as cosines and shares have, it is the part of the allowed distance from 1. A limit that allows nothing
    is either not used or exceeded without bound.
    """
    value, limit = check["value"], check["limit"]
    if value is None:
        return math.inf
    lost, allowed = (1 - value, 1 - limit) if check["at_least"] else (value, limit)
    if allowed <= 0:
        return 0.0 if lost <= allowed else math.inf
    return float(max(lost, 0.0) / allowed)


# ── Parts ────────────────────────────────────────────────────────────────────


def _pick(model: type[Model], source: Mapping[str, Any], **nested: Any) -> Model:
    """The fields that a model has; what else a stage keeps for itself is left out."""
    return model(**{name: source[name] for name in model.model_fields if name in source} | nested)


def _estimate(source: Mapping[str, Any]) -> schema.Estimate:
    return _pick(schema.Estimate, source)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> list[schema.AccuracyRow]:
    return [
        _pick(
            schema.AccuracyRow,
            row,
            to_original=_estimate(row["to_original"]),
            to_previous=_estimate(row["to_previous"]),
        )
        for row in rows
    ]


def _sizes(size: Mapping[str, Any]) -> schema.Sizes:
    pairs = {name: _pick(schema.Pair, size[name]) for name in ("flops_per_image", "block_parameters", "visual_tokens")}
    return _pick(schema.Sizes, size, **pairs)


def _ffn(width: int, choice: Mapping[str, Any]) -> schema.Ffn:
    return schema.Ffn(
        kind=choice["kind"],
        width=width,
        neurons=len(choice["neurons"]),
        rank=choice["rank"],
        ranks=list(choice.get("ranks", ())),
    )


def _percentiles(source: Mapping[str, Any]) -> schema.Percentiles:
    intervals = {name: _pick(schema.Interval, found) for name, found in source.get("intervals", {}).items()}
    return _pick(schema.Percentiles, source, intervals=intervals)


def _bench(bench: Mapping[str, Any]) -> schema.Bench:
    return _pick(
        schema.Bench,
        bench,
        machine=_pick(schema.Machine, bench["machine"]),
        libraries=dict(bench.get("libraries", {})),
        rows=[_bench_row(row) for row in bench["rows"]],
    )


def _bench_row(row: Mapping[str, Any]) -> schema.BenchRow:
    return _pick(
        schema.BenchRow,
        row,
        milliseconds={side: _percentiles(times) for side, times in row["milliseconds"].items()},
        speedup=_pick(schema.Ratio, row["speedup"]),
        parity={side: _pick(schema.OutputParity, found) for side, found in row.get("parity", {}).items()},
        peers=[_peer(peer) for peer in row.get("peers", ())],
        memory={side: _pick(schema.Memory, found) for side, found in row.get("memory", {}).items()},
    )


def _peer(peer: Mapping[str, Any]) -> schema.Peer:
    return _pick(
        schema.Peer,
        peer,
        milliseconds=None if peer["milliseconds"] is None else _percentiles(peer["milliseconds"]),
        speedup=None if peer["speedup"] is None else _pick(schema.Ratio, peer["speedup"]),
        parity=None if peer["parity"] is None else _pick(schema.OutputParity, peer["parity"]),
    )


def _attribution(found: Mapping[str, Any]) -> attributed.Attribution:
    return _pick(
        attributed.Attribution,
        found,
        steps=[
            _pick(
                attributed.StepRow, row, **{key: _worst(row[key]) for key in ("to_original", "to_previous", "parity")}
            )
            for row in found["steps"]
        ],
        blocks=[
            _pick(attributed.PartRow, row, **{key: _worst(row[key]) for key in ("value", "added")})
            for row in found["blocks"]
        ],
        broken=[
            _pick(
                attributed.Broken,
                part,
                overflow=[_pick(attributed.Overflow, node) for node in part.get("overflow", ())],
            )
            for part in found["broken"]
        ],
    )


def _worst(figures: Mapping[str, Any] | None) -> attributed.WorstFigures | None:
    return None if figures is None else _pick(attributed.WorstFigures, figures)
