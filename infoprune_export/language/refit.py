"""Refit output and down projections of a pruned language model to the original's residual stream, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from infoprune_export.language.asking import Start, move
from infoprune_export.language.moments import LinearFit, fit_of
from infoprune_export.language.plan import ATTENTION_OUT, FFN_OUT
from infoprune_export.models.calibration import captured_input
from infoprune_export.models.language import LanguageLayer, replace_weights
from infoprune_export.models.least_squares import AffineFit


class LanguageStreams:
    """The residual streams of an original language model and a pruned one, advanced layer by layer over the same rows.

    Costs one pass over each layer of the original and two over the pruned one, and the memory of a few streams.
    """

    def __init__(self, original: Sequence[Start], changed: Sequence[Start], device: torch.device) -> None:
        self.original = [start.stream for start in original]
        self.changed = [start.stream for start in changed]
        self._starts, self._device = list(zip(original, changed, strict=True)), device

    @torch.no_grad()
    def refit(self, number: int, original: LanguageLayer, changed: LanguageLayer, ridge: float) -> None:
        """Replace both projections of `changed`, layer `number`, in place, and move both streams behind the layer.

        A projection's input H and the difference D of the two streams behind it, at real tokens, give the correction of
        least ``|D - H dW^T|^2 + ridge * |dW|^2``; with a bias where the projection has one. It absorbs both what was
        removed here and what went wrong upstream.
        """
        targets = [(middle.cpu(), end.cpu()) for middle, _, end in self._passes(original, self.original)]
        fit = fit_of(changed.attention_out, changed.attention_out.out_features)
        with captured_input(changed.attention_out) as hidden:
            for row, (middle, _, _) in enumerate(self._passes(changed, self.changed)):
                self._update(fit, row, hidden(), targets[row][0].to(self._device) - middle)
        _correct(changed.attention_out, fit, ridge)
        fit, parts = fit_of(changed.ffn_out, changed.ffn_out.out_features), []
        for row, (middle, neurons, end) in enumerate(self._passes(changed, self.changed)):
            self._update(fit, row, neurons, targets[row][1].to(self._device) - end)
            parts.append((middle.cpu(), neurons.cpu()))
        _correct(changed.ffn_out, fit, ridge)
        self.original = [end for _, end in targets]
        self.changed = [middle + changed.ffn_out(neurons.to(self._device)).cpu() for middle, neurons in parts]
        self._deepen(number)

    def _passes(self, layer: LanguageLayer, streams: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per batch: the stream between attention and FFN, the neurons, and the stream behind the layer."""
        with captured_input(layer.ffn_norm) as middle, captured_input(layer.ffn_out) as neurons:
            for stream, (start, _) in zip(streams, self._starts, strict=True):
                end = layer.run(stream.to(self._device), move(start.arguments, self._device))
                yield middle(), neurons(), end

    def _update(self, fit: AffineFit | LinearFit, row: int, hidden: Tensor, difference: Tensor) -> None:
        real = self._starts[row][0].real.to(self._device)
        fit.update(hidden[real], difference[real])

    def _deepen(self, number: int) -> None:
        """What the text model adds to visual tokens behind this layer."""
        for row, starts in enumerate(self._starts):
            for start, streams in zip(starts, (self.original, self.changed), strict=True):
                if number < len(start.deeper):
                    streams[row][start.visual] += start.deeper[number].to(streams[row])


def _correct(projection: nn.Linear, fit: AffineFit | LinearFit, ridge: float) -> None:
    weight, bias = fit.solve(ridge)
    if projection.bias is not None and bias is not None:
        bias = projection.bias.double().cpu() + bias.cpu()
    replace_weights(projection, projection.weight.double().cpu() + weight.cpu(), bias)


def refit_language(
    original: Sequence[LanguageLayer],
    pruned: Sequence[LanguageLayer],
    streams: LanguageStreams,
    ridge: float,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> dict[str, Tensor]:
    """Refit every layer of `pruned` in place, each behind its already refitted predecessors.

    Returns the new projections under `plan`'s names.
    """
    weights: dict[str, Tensor] = {}
    for number, (before, after) in enumerate(zip(original, pruned, strict=True)):
        streams.refit(number, before, after, ridge)
        for role in (ATTENTION_OUT, FFN_OUT):
            for name, value in getattr(after, role).named_parameters():
                weights[f"{number}.{role}.{name}"] = value.detach()
        on_layer(number)
    return weights
