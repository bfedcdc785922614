"""Tower, selection and projector behind one call: what is exported, and what PyTorch compares it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import Form, Inputs, VisionTower
from infoprune_export.models.vlm import VisualTokens
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.select import select_and_merge

FEATURES, KEPT = "image_features", "kept_indices"
Outputs = Mapping[str, Tensor]


def selecting(tokens: TokensSpec | None) -> bool:
    """Whether a recipe's tokens section asks for selection at all."""
    return tokens is not None and tokens.method != "none"


def form_of(tower: VisionTower, tokens: TokensSpec | None, several: bool | None = None) -> Form:
    """The graph for a selection; `several` None means several images wherever the family allows it.

    Raises:
        InfopruneError: the family cannot do what is asked.
    """
    select = selecting(tokens)
    if select and tower.ragged and several:
        raise InfopruneError(
            "export.images = 'several' with token selection: images of this family differ in their number of tokens, "
            "so its encoder selects for one image per call; use 'one' or 'auto', or tokens.method: none"
        )
    if several is None:
        several = not (select and tower.ragged)
    return Form(several, select)


def check_selection(tower: VisionTower, tokens: TokensSpec | None) -> None:
    """Refuse a tokens section that this tower cannot serve, before any work is done."""
    if tokens is None or not selecting(tokens):
        return
    if tokens.prior not in tower.priors:
        raise InfopruneError(
            f"tokens.prior = {tokens.prior!r}: this tower has no [CLS] token; use {', '.join(tower.priors)}"
        )
    if tokens.positions == "contiguous" and tower.position_axes > 1:
        raise InfopruneError(
            "tokens.positions = 'contiguous': this model numbers visual tokens by row and column (M-RoPE), which has "
            "no contiguous form; use original"
        )


class VisionEncoder(nn.Module):
    """Planned tensors to image_features [B, T, D_llm] and, with selection, kept_indices int64 [B, T].

    In a ragged family B is 1; without selection the tokens of several images follow each other.
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
        stream, context = tower.embed(planned)
        activations = tower.run_blocks(stream, context)
        if self._tokens is None or not self.form.selecting:
            return tower.assemble(activations, planned)
        chosen, kept = select_and_merge(tower, self._tokens, activations, context, planned)
        return tower.project(chosen), tower.kept_positions(kept, planned)

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
    layouts = tower.layouts(inputs)
    features: list[Tensor] = []
    kept: list[Tensor] = []
    for planned in tower.calls(inputs, form):
        outputs = run(planned)
        if tower.ragged and form.several:
            features += outputs[FEATURES][0].split([layout.ids.shape[1] for layout in layouts])
        else:
            features += outputs[FEATURES].unbind(0)
        if form.selecting:
            kept += outputs[KEPT].unbind(0)
    positions = tokens.positions if tokens is not None else "original"
    return VisualTokens.of(features, layouts, kept if form.selecting else None, contiguous=positions == "contiguous")
