"""The part of ``report.json`` about where errors were made: ``attribution.json`` as published.

An error is never one figure: a cosine is blind to scale, a norm ratio to direction, the largest error to its spread.
"""

from __future__ import annotations

from infoprune_export.validate.report_schema_base import Part, Share


class WorstFigures(Part):
    """The worst of several batches, for each figure on its own; null where a figure is not finite."""

    cosine: float | None
    norm_ratio: float | None
    """Norm of the candidate over the reference's."""
    relative_error: float | None
    """Largest absolute difference over the reference's largest absolute value."""
    case: str
    """The batch with the largest error."""


class StepRow(Part):
    """What the encoder puts out behind one step, on the same images as at every other step."""

    step: str
    meaning: str
    to_original: WorstFigures | None
    to_previous: WorstFigures | None
    tokens_kept: Share
    """Of the original's visual tokens."""
    kept_in_common: Share | None
    """Of the kept tokens, those that the step before kept, too; null before tokens are selected."""
    exact: bool
    """Whether the step is meant to change nothing. Only such a step can break."""
    parity: WorstFigures | None
    """Of an exact step: against PyTorch in fp32 on the step's own choice of tokens."""
    kept_suboptimality: float | None
    """Worst step of the kept tokens under replay."""
    tolerance: float | None
    min_cosine: float | None
    """What `parity` is held to."""
    passed: bool
    accuracy: float | None
    """Percent; null at a step that answered no questions."""
    accuracy_to_previous: float | None
    """Paired difference in points."""


class PartRow(Part):
    """One part of the encoder in one step, fed the reference's own input, so that an error shows where it is made."""

    step: str
    part: str
    """Such as ``blocks.3.ffn``."""
    block: int | None
    boundary: str
    """The value that was compared, by its name in the graph."""
    value: WorstFigures
    added: WorstFigures | None
    """What a block's part adds to the residual stream; null elsewhere."""
    kept_suboptimality: float | None
    tolerance: float
    """Of the largest relative error of `added`, or of `value` where there is none."""
    min_cosine: float
    judged: bool
    """False where the reference, or what the part was fed, is beyond the step's type."""
    passed: bool


class Overflow(Part):
    """A node whose fp32 result the typed graph cannot hold."""

    node: str
    value: str
    largest: float | None
    """Largest absolute value in fp32; null if that is not finite either."""


class Broken(Part):
    """Where something broke."""

    step: str
    part: str
    reason: str
    nodes: list[str]
    """ONNX nodes of the part; none in PyTorch steps."""
    overflow: list[Overflow]
    fix: str | None
    """A ready option of the command line."""


class Attribution(Part):
    """Which step, which part of the encoder and which ONNX nodes made an error."""

    schema_version: int
    """Of ``attribution.json``."""
    steps: list[StepRow]
    blocks: list[PartRow]
    """Empty where only the steps were asked for."""
    limits: dict[str, str]
    """Why each step is held to its limit."""
    broken: list[Broken]
    """The first step that broke, and in it the parts; empty where nothing did."""
