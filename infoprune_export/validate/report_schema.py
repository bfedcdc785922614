"""Form of ``report.json``: everything a machine wants to know of a finished run, and nothing unexplained.

Strict both ways: a report is written through these models and read back through them, and a key that they do not know
is refused. `SCHEMA_VERSION` changes when a key changes its meaning or goes. The JSON schema of it is published as
``docs/report.schema.json``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from infoprune_export.validate.report_schema_attribution import Attribution
from infoprune_export.validate.report_schema_base import (
    Bytes,
    Count,
    Milliseconds,
    Part,
    Sha256,
    Share,
    Side,
    Verdict,
    schema_of,
)

SCHEMA_VERSION = 1


# ── Verdict, parity, accuracy ────────────────────────────────────────────────


class Check(Part):
    """One demand of the recipe."""

    what: str
    passed: bool
    value: float | None
    """Null where what was measured is not finite, which never passes."""
    limit: float
    at_least: bool
    """Whether the value must reach the limit; otherwise it must not exceed it."""
    detail: str


class Decision(Part):
    """The check that decided: the worst that failed, or of all that passed the one nearest to its limit."""

    check: str
    """Its ``what``."""
    passed: bool
    used: float | None
    """Share of the limit that is used up, more than 1 where it failed; null where that is not finite. Of a floor it is
    the part of the allowed distance from 1."""


class Parity(Part):
    """One comparison of two implementations of the same thing."""

    step: str
    case: str
    """What went in."""
    relative_error: float | None
    """Largest absolute difference over the largest absolute reference value; null where it is not finite."""
    cosine: float
    norm_ratio: float
    """Norm of the candidate over the reference's."""
    tolerance: float
    """Limit of `relative_error`."""
    min_cosine: float = 0.0
    kept_suboptimality: float | None = None
    """Worst step of the kept tokens replayed in float64, 1 - residual / best residual; null without selection."""
    replay_tolerance: float | None = None
    """Limit of `kept_suboptimality`."""
    passed: bool


class Estimate(Part):
    """A mean over questions, in percent."""

    percent: float
    standard_error: float
    """In points, clustered by image."""
    questions: Count


class AccuracyRow(Estimate):
    """Accuracy behind one step."""

    step: str
    meaning: str
    to_original: Estimate
    """Paired differences, in points."""
    to_previous: Estimate
    by_kind: dict[str, float]
    """Percent for every kind of question there is."""
    official: dict[str, float] = Field(default_factory=dict)
    """The benchmark's own figures, by its names for them and in its units."""


# ── Sizes and structure ──────────────────────────────────────────────────────


class Pair(Part):
    original: Count
    compressed: Count


class Sizes(Part):
    """Of the vision encoder, selection and projector included."""

    flops_per_image: Pair
    """Two per multiply-accumulate, counted on the first validation image."""
    block_parameters: Pair
    visual_tokens: Pair
    """Of that image, as the language model sees them."""
    heads_removed: Share
    ffn_macs_kept: Annotated[float, Field(ge=0)]
    """Share of the FFNs' multiply-accumulates; above 1 where factors are dearer than what they replace."""


class Heads(Part):
    total: list[Count]
    """Of every block."""
    kept: list[list[Count]]
    """Places of those that stayed, by block."""


class Ffn(Part):
    """What became of one block's feed-forward network."""

    kind: Literal["mlp", "linear", "factored", "bypass"]
    width: Count
    """Neurons it had."""
    neurons: Count
    """Neurons it has."""
    rank: Count
    """Of a linear replacement or a bypass."""
    ranks: list[Count]
    """Of factored projections."""


class Variant(Part):
    """A variant of the recipe, in PyTorch; no part of the verdict."""

    heads_removed: Share
    ffn_macs_kept: Annotated[float, Field(ge=0)]
    tokens_kept: Share
    methods: dict[str, str]
    accuracy: list[AccuracyRow]


# ── Latency ──────────────────────────────────────────────────────────────────


class Interval(Part):
    """95%; null where there were too few rounds to bound it."""

    low: float | None
    high: float | None


class Percentiles(Part):
    p50: Milliseconds
    p90: Milliseconds
    p99: Milliseconds
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """By ``p50``, ``p90`` and ``p99``, in milliseconds."""


class Ratio(Part):
    """How many times as long one alternative takes as another, from pairs of rounds."""

    median: float
    low: float
    high: float
    confidence: float = 0.95
    """What the interval covers."""
    observations: Count | None = None
    effective: float | None = None
    """Independent observations that these are worth."""


class Memory(Part):
    """Of one side in a process of its own."""

    weights_bytes: Bytes
    """Held before the first call."""
    call_bytes: Bytes
    """What one call takes on top of it, at most."""


class OutputParity(Part):
    """Outputs against PyTorch's in fp32."""

    relative_error: float | None
    cosine: float
    norm_ratio: float
    tolerance: float
    min_cosine: float
    passed: bool


class Peer(Part):
    """Another way to run the same encoder, timed in the same interleaved run."""

    peer: str
    side: Side
    version: str | None
    reason: str | None
    """Why it was not timed."""
    milliseconds: Percentiles | None
    speedup: Ratio | None
    """Our original in ONNX Runtime over this."""
    parity: OutputParity | None
    prepare_seconds: float | None
    """Export or compilation, and the first call."""


class BenchRow(Part):
    """One batch size; milliseconds are of a whole batch."""

    batch_size: Count
    rounds: Count | None = None
    stopped: Literal["narrow", "rounds", "time"] | None = None
    """Why no more rounds were made."""
    milliseconds: dict[Side, Percentiles]
    speedup: Ratio
    flops: dict[Side, Count] = Field(default_factory=dict)
    flop_ratio: float
    efficiency: float
    """Speed-up over FLOP ratio."""
    parity: dict[str, OutputParity] = Field(default_factory=dict)
    peers: list[Peer] = Field(default_factory=list)
    memory: dict[str, Memory] = Field(default_factory=dict)
    """By side, or by ``peer, side``; bytes."""


class Machine(Part):
    """What latency depends on and no library version shows."""

    processor: str
    cores: Count | None
    governor: str
    system: str | None = None
    load: float | None = None
    """Processes that ran or waited in the last minute, on average."""
    gpus: list[dict[str, str]] = Field(default_factory=list)
    power_mode: str | None = None


class Bench(Part):
    target: str
    provider: str
    """ONNX Runtime's."""
    threads: Count
    rounds: Count
    """The most that any row took."""
    warmup: Count
    max_interval: float | None = None
    """Width of a ratio's interval over the ratio at which rounds end."""
    machine: Machine
    libraries: dict[str, str]
    rows: list[BenchRow]


# ── The report ───────────────────────────────────────────────────────────────


class Artefact(Part):
    """One folder of the run."""

    manifest_sha256: Sha256
    """Of its manifest, which has the sha256 of every file in it."""
    files: dict[str, Sha256] = Field(default_factory=dict)
    """Of the files themselves, for what is delivered; by name within the folder."""


class Report(Part):
    """A finished run of infoprune-export."""

    schema_version: Literal[1]
    name: str
    description: str
    verdict: Verdict
    decision: Decision
    checks: list[Check]
    metric: str
    """What `accuracy` is in percent of."""
    accuracy: list[AccuracyRow]
    parity: list[Parity]
    size: Sizes
    heads: Heads
    ffn: list[Ffn]
    attribution: Attribution | None = None
    """Null in a run without the stage."""
    bench: Bench
    variants: dict[str, Variant]
    recipe: dict[str, Any]
    """As it was run, defaults included; keys as in the YAML file."""
    libraries: dict[str, str]
    """Versions that the report was written with."""
    artefacts: dict[str, Artefact]
    """By stage."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    return schema_of(Report, "report.schema.json")
