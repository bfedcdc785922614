"""Tower, selection and projector behind one call: what is exported, and what PyTorch compares it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models import boundaries
from infoprune_export.models.boundaries import SELECTED, mark
from infoprune_export.models.tower import Form, Inputs, Planned, VisionTower
from infoprune_export.models.vlm import VisualTokens
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.selector import METHODS, Candidates, Shrink

FEATURES, KEPT = boundaries.FEATURES, boundaries.KEPT
Outputs = Mapping[str, Tensor]


def selecting(tokens: TokensSpec | None) -> bool:
    """Whether a recipe's tokens section asks for selection at all."""
    return tokens is not None and tokens.method != "none"


def shrinking(tokens: TokensSpec | None) -> Shrink | None:
    """What makes the images smaller, if the method acts in front of the tower; the encoder then selects nothing."""
    method = METHODS.get(tokens.method) if tokens is not None else None
    return method.load_shrink() if method is not None and method.before else None


def form_of(tower: VisionTower, tokens: TokensSpec | None, several: bool | None = None) -> Form:
    """The graph for a selection; `several` None means several images wherever that costs nothing.

    It does where images differ in size and are selected from: the smaller ones are padded.
    """
    select = selecting(tokens) and shrinking(tokens) is None
    return Form(not (select and tower.ragged) if several is None else several, select)


def check_selection(tower: VisionTower, tokens: TokensSpec | None) -> None:
    """Refuse a tokens section that this tower cannot serve, before any work is done."""
    if tokens is None or not selecting(tokens):
        return
    if tokens.method not in METHODS:
        raise InfopruneError(f"tokens.method = {tokens.method!r}: there are {', '.join(METHODS)}")
    if tokens.prior not in tower.priors:
        raise InfopruneError(
            f"tokens.prior = {tokens.prior!r}: this tower has no [CLS] token; use {', '.join(tower.priors)}"
        )
    if tokens.positions == "contiguous" and tower.position_axes > 1:
        raise InfopruneError(
            "tokens.positions = 'contiguous': this model numbers visual tokens by row and column (M-RoPE), which has "
            "no contiguous form; use original"
        )
    if (shrink := shrinking(tokens)) is not None:
        # Refused where images of this family cannot be made smaller.
        shrink(tower, tower.example_inputs(1, torch.Generator()), tokens)


class VisionEncoder(nn.Module):
    """Planned tensors to image_features [B, T, D_llm] and, with selection, kept_indices int64 [B, T].

    Where images differ in size, kept_indices are -1 behind the last token of a smaller one; without selection the
    tokens of all images follow each other and B is 1.
    """

    def __init__(self, tower: VisionTower, tokens: TokensSpec | None, several: bool | None = None) -> None:
        super().__init__()
        check_selection(tower, tokens)
        self.form = form_of(tower, tokens, several)
        self.model = tower.model
        self._tower = tower
        self._tokens = tokens

    @property
    def output_names(self) -> list[str]:
        return [FEATURES, KEPT] if self.form.selecting else [FEATURES]

    def forward(self, planned: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        tower = self._tower
        if self._tokens is None or not self.form.selecting:
            stream, context = tower.embed(planned)
            return mark(self._narrow(tower.assemble(tower.run_blocks(stream, context), planned)), FEATURES)
        selection = METHODS[self._tokens.method].load()(self.candidates(planned), self._tokens)
        features = mark(self._narrow(tower.project(mark(selection.tokens, SELECTED))), FEATURES)
        return features, self._positions(selection.kept, planned)

    def _narrow(self, features: Tensor) -> Tensor:
        """What the language model takes has the model's type, whatever the stream has."""
        return features.to(self._tower.dtype) if self._tower.wide_stream else features

    def candidates(self, planned: Planned) -> Candidates:
        """What the recipe's selector sees; for encoders that select."""
        assert self._tokens is not None
        stream, context = self._tower.embed(planned)
        observed = METHODS[self._tokens.method].observes(self._tower)
        return Candidates(self._tower, self._tower.run_blocks(stream, context, observed), context, planned)

    def _positions(self, kept: Tensor, planned: Planned) -> Tensor:
        places = self._tower.kept_positions(kept.clamp_min(0), planned)
        return torch.where(kept < 0, kept, places)

    def run(self, planned: dict[str, Tensor]) -> dict[str, Tensor]:
        """`forward` with its outputs named."""
        outputs = self(planned)
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self.output_names, values, strict=True))

    def encode(self, inputs: Inputs) -> VisualTokens:
        """What the language model sees of a processor's outputs."""
        return encode(self._tower, self.form, self._tokens, self.run, inputs)


def encode(
    tower: VisionTower,
    form: Form,
    tokens: TokensSpec | None,
    run: Callable[[dict[str, Tensor]], Outputs],
    inputs: Inputs,
) -> VisualTokens:
    """Images through an encoder of named outputs from planned tensors, in as many calls as its form needs."""
    contiguous = tokens is not None and tokens.positions == "contiguous"
    layouts = tower.layouts(inputs)
    if tokens is not None and (shrink := shrinking(tokens)) is not None:
        smaller, places = shrink(tower, inputs, tokens)
        visual = encode(tower, form, None, run, smaller)
        return VisualTokens.of(visual.features, layouts, places, contiguous=contiguous)
    features: list[Tensor] = []
    kept: list[Tensor] = []
    for planned in tower.calls(inputs, form):
        outputs = run(planned)
        if tower.ragged and form.several and not form.selecting:
            features += outputs[FEATURES][0].split([layout.ids.shape[1] for layout in layouts])
        else:
            features += outputs[FEATURES].unbind(0)
        if form.selecting:
            kept += outputs[KEPT].unbind(0)
    if form.selecting:
        # Images that kept fewer tokens than the largest end in padding.
        features = [feature[: int((k >= 0).sum())] for feature, k in zip(features, kept, strict=True)]
        kept = [k[k >= 0] for k in kept]
    return VisualTokens.of(features, layouts, kept if form.selecting else None, contiguous=contiguous)
