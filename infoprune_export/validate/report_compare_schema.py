"""Form of what ``compare --json`` writes, as ``docs/compare.schema.json`` has it. A is the first run, B the next."""

from __future__ import annotations

from typing import Any, Literal

from infoprune_export.validate.report_schema import Decision, Estimate
from infoprune_export.validate.report_schema_base import Count, Part, Verdict, schema_of

SCHEMA_VERSION = 1


class ComparedRun(Part):
    folder: str
    """Its name, without the way there."""
    name: str
    """Of the recipe."""
    verdict: Verdict
    decision: Decision


class Difference(Part):
    """Of two settings, versions or properties; null where a side has none."""

    key: str
    a: Any
    b: Any


class SizeRow(Part):
    what: str
    unit: str
    a: float
    b: float
    ratio: float | None
    """B over A; null where A is 0."""


class StepDifference(Part):
    """B minus A, in points."""

    percent: float
    standard_error: float
    """Clustered by image where paired; of two independent samples otherwise."""
    low: float
    """Of the 95% interval, normal approximation."""
    high: float


class StepRow(Part):
    step: str
    a: Estimate | None
    """Null where the run has no such step."""
    b: Estimate | None
    difference: StepDifference | None
    """Null where a side is missing, or the two metrics are not the same."""


class Accuracy(Part):
    metric_a: str
    metric_b: str
    paired: bool
    """Whether differences are question by question."""
    unpaired_because: str | None
    steps: list[StepRow]


class Worst(Part):
    """Of a step's comparisons, each figure by itself."""

    relative_error: float | None
    """Largest; null where one is not finite."""
    cosine: float
    """Smallest."""
    norm_ratio: float
    """Farthest from 1."""
    passed: bool


class ParityRow(Part):
    step: str
    a: Worst | None
    b: Worst | None


class Within(Part):
    """A figure with its 95% interval; bounds are null where they are not known."""

    value: float
    low: float | None
    high: float | None


class LatencyRow(Part):
    """One batch size; the original and the compressed encoder of both runs."""

    batch_size: Count
    original_a: Within
    """Median milliseconds."""
    original_b: Within
    compressed_a: Within
    compressed_b: Within
    speedup_a: Within
    """Original over compressed, within the run."""
    speedup_b: Within
    faster: Within | None
    """Median of A's compressed encoder over B's; null where latencies are not comparable."""
    speedup_ratio: Within
    """Speed-up of B over that of A: each in its own measure, so that a slower machine alone does not change it."""


class Latency(Part):
    comparable: bool
    """Same machine, libraries, provider and threads, as far as recorded, and the original, where both timed the same
    graph of it, was as fast in both."""
    warnings: list[str]
    rows: list[LatencyRow]
    """Of batch sizes that both runs measured."""


class Comparison(Part):
    """Two finished runs side by side."""

    schema_version: Literal[1]
    a: ComparedRun
    b: ComparedRun
    same_model: bool
    """Whether both began with the same files."""
    recipe: list[Difference]
    """Settings that differ, by dotted key."""
    sizes: list[SizeRow]
    accuracy: Accuracy
    parity: list[ParityRow]
    latency: Latency
    libraries: list[Difference]
    """Versions that differ between the two reports."""
    machine: list[Difference]
    """What differs between the machines of the two benches."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a comparison."""
    return schema_of(Comparison, "compare.schema.json")
