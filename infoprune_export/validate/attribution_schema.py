"""The form of ``attribution.json``: which step, which part of the encoder and which ONNX nodes made an error.

An error is never one figure: a cosine is blind to scale, a norm ratio to direction, the largest error to its spread.
"""

from __future__ import annotations

from typing import TypedDict


class Figures(TypedDict):
    """One comparison of two implementations; null where a figure is not finite."""

    cosine: float | None
    norm_ratio: float | None
    """Norm of the candidate over the reference's."""
    relative_error: float | None
    """Largest absolute difference over the reference's largest absolute value."""


class WorstFigures(Figures):
    """The worst of several batches, for each figure on its own."""

    case: str
    """The batch with the largest error."""


class StepRow(TypedDict):
    """What the encoder puts out behind one step, on the same images as at every other step."""

    step: str
    """original, heads, ffn, recovery, tokens, onnx, precision or engine; only those the recipe has."""
    meaning: str
    to_original: WorstFigures | None
    to_previous: WorstFigures | None
    """Both at the tokens that the two sides have; null at the original."""
    tokens_kept: float
    """Share of the original's visual tokens."""
    kept_in_common: float | None
    """Share of the kept tokens that the step before kept, too; null before tokens are selected."""
    exact: bool
    """Whether the step is meant to change nothing. Only such a step can break."""
    parity: WorstFigures | None
    """Of an exact step behind the checkpoint: against PyTorch in fp32 on the step's own choice of tokens."""
    kept_suboptimality: float | None
    """Worst step of the kept tokens under replay; null without selection, and where precision allows other choices."""
    tolerance: float | None
    min_cosine: float | None
    """What `parity` is held to."""
    passed: bool
    accuracy: float | None
    """Percent; null at a step that answered no questions."""
    accuracy_to_previous: float | None
    """Paired difference in points."""


class PartRow(TypedDict):
    """One part of the encoder in one step, given the reference's own input, so that an error shows where it is made."""

    step: str
    """rewrite (masked full-size model = plans carried out), checkpoint (plans = what was saved), onnx (PyTorch = ONNX
    fp32), precision (ONNX fp32 = typed or INT8 file), engine (file = engine)."""
    part: str
    """embedding, blocks.3.attention, blocks.3.ffn, visual_tokens, prior, selection, merging or projector."""
    block: int | None
    boundary: str
    """The value that was compared; its name in the graph too."""
    value: WorstFigures
    added: WorstFigures | None
    """What a block's part adds to the residual stream, which hides small parts; null elsewhere."""
    kept_suboptimality: float | None
    """Of the selection: worst step under replay."""
    tolerance: float
    """Largest relative error of `added` (`value` where there is none), rounding of the stream included."""
    min_cosine: float
    judged: bool
    """False where the reference, or what this part was fed, is not finite or beyond the range of the step's type."""
    passed: bool


class Overflow(TypedDict):
    """A node whose fp32 result the typed graph cannot hold."""

    node: str
    value: str
    largest: float | None
    """Largest absolute value in fp32; null if that is not finite either."""


class Broken(TypedDict):
    """Where something broke: the first step, and in it the parts that did."""

    step: str
    part: str
    reason: str
    """The figure, its limit and why the limit is that, in one line."""
    nodes: list[str]
    """ONNX nodes of the part; none in PyTorch steps."""
    overflow: list[Overflow]
    fix: str | None
    """A ready option, such as ``--set export.keep_fp32=[blocks.3.ffn]``."""


class Attribution(TypedDict):
    """``attribution.json``."""

    schema_version: int
    steps: list[StepRow]
    blocks: list[PartRow]
    """Empty if only the steps were asked for."""
    limits: dict[str, str]
    """Why each step is held to its limit."""
    broken: list[Broken]
