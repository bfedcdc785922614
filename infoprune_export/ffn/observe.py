"""What a block's FFN reads, computes and should add to the residual stream, on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.models.calibration import batches, captured_input, inputs_of
from infoprune_export.models.least_squares import AffineFit
from infoprune_export.models.streams import Streams
from infoprune_export.models.tower import Block
from infoprune_export.models.vlm import VLM
from infoprune_export.rewrite.surgery import ATTENTION_OUT

DAMPING = 1e-4
"""Ridge of a map that is fitted from nothing. `RefitSpec.ridge` is meant for corrections and would shrink it."""


@dataclass(frozen=True)
class Observed:
    """Rows are tokens of one batch."""

    inputs: Tensor
    """x [n, D], behind the FFN's norm."""
    output: Tensor
    """What the FFN adds now, [n, D]."""
    wanted: Tensor
    """What it should add, [n, D]: the original's residual stream less what is there in front of it."""


class Observer:
    """Two towers over the same images, block by block, see `Streams`.

    With `to_original` an FFN should make good what went wrong in front of it too, otherwise compute what it does now.
    """

    def __init__(self, original: VLM, samples: Sequence[Sample], *, to_original: bool) -> None:
        self.streams = Streams(original, samples)
        self._to_original = to_original

    def refit_attention(self, number: int, before: Block, after: Block, ridge: float | None) -> dict[str, Tensor]:
        """Refitted output projection of the attention in front of FFN `number`, under `surgery`'s names, not assigned.

        As `widths.remove_neurons` does it, so that methods differ in the FFN alone; nothing without `ridge`.
        """
        if ridge is None:
            return {}
        weight, bias = self.streams.refit("attention", before, after, ridge)
        return {f"{number}.{ATTENTION_OUT}.weight": weight, f"{number}.{ATTENTION_OUT}.bias": bias}

    @torch.no_grad()
    def watch(self, before: Block, after: Block) -> Iterator[Observed]:
        """Every batch through this block of the original (`before`) and of the changed tower (`after`)."""
        for middle, end in self.streams.around_ffn(before, after):
            inputs = after.ffn_norm(middle)
            output = after.ffn(inputs)
            wanted = end - middle if self._to_original else output
            yield Observed(*(part.flatten(0, -2) for part in (inputs, output, wanted)))

    def hidden(self, before: Block, after: Block) -> Iterator[tuple[Tensor, Observed]]:
        """The same, with the input of the down projection [n, size]."""
        with captured_input(after.ffn_out) as hidden:
            for observed in self.watch(before, after):
                yield hidden().flatten(0, -2), observed


# ── Least squares ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Regression:
    """Y [n, q] on X [n, p]: weight [q, p], bias [q], and X's covariance [p, p] and mean [p]; float64, on the CPU."""

    weight: Tensor
    bias: Tensor
    covariance: Tensor
    mean: Tensor

    def bias_of(self, weight: Tensor) -> Tensor:
        """Best bias when the weight is replaced by this one [q, p]: mean(Y) - weight mean(X)."""
        return self.bias + (self.weight - weight) @ self.mean


def regress(pairs: Iterable[tuple[Tensor, Tensor]], inputs: int, outputs: int, ridge: float = DAMPING) -> Regression:
    """Ridge least squares over batches of (X [n, inputs], Y [n, outputs]); see `AffineFit.solve` for `ridge`."""
    fit = AffineFit(inputs, outputs)
    for x, y in pairs:
        fit.update(x, y)
    weight, bias = fit.solve(ridge)
    return Regression(weight.cpu(), bias.cpu(), fit.covariance().cpu(), fit.means()[0].cpu())


def damped(covariance: Tensor, ridge: float = DAMPING) -> Tensor:
    """The covariance [p, p] with what `AffineFit.solve` adds to its diagonal."""
    loading = (ridge * covariance.diagonal().mean()).clamp_min(1e-30)
    return covariance + loading * torch.eye(len(covariance), dtype=covariance.dtype)


# ── Statistics of an unchanged tower ─────────────────────────────────────────


@torch.no_grad()
def mean_over_tokens(
    vlm: VLM, samples: Sequence[Sample], where: Callable[[Block], nn.Module], power: int = 1, batch_size: int = 32
) -> list[Tensor]:
    """Per block the mean over tokens of (input of the module `where` names)^power, float64 [p], in one forward pass."""
    totals: dict[int, Tensor] = {}
    counts = [0] * len(vlm.tower.blocks)

    def add(index: int, x: Tensor) -> None:
        flat = x.flatten(0, -2).double().pow(power)
        totals[index] = totals.get(index, 0) + flat.sum(0).cpu()
        counts[index] += len(flat)

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: add(index, arguments[0])

    handles = [where(block).register_forward_pre_hook(hook(i)) for i, block in enumerate(vlm.tower.blocks)]
    try:
        for batch in batches(samples, batch_size):
            vlm.tower.features_of(inputs_of(vlm, batch))
    finally:
        for handle in handles:
            handle.remove()
    return [totals[i] / count for i, count in enumerate(counts)]
