"""Second moments of the language model's heads, neurons and gradients over real tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from infoprune_export.language.asking import Asked
from infoprune_export.models.calibration import captured_input
from infoprune_export.models.language import language_layers
from infoprune_export.models.least_squares import AffineFit
from infoprune_export.models.moments import Moments
from infoprune_export.models.vlm import VLM, Prompt


class LinearFit:
    """`AffineFit` without intercept: nothing is centred, and the bias is None."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._count = 0
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._xy = torch.zeros(inputs, outputs, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [n, p], y [n, q]."""
        x, y = x.double(), y.double()
        self._count += len(x)
        self._xx += (x.T @ x).cpu()
        self._xy += (x.T @ y).cpu()

    def covariance(self) -> Tensor:
        """Second moment of X, [p, p]; as compensation sees it, the mean is variation too."""
        return self._xx / self._count

    def solve(self, ridge: float) -> tuple[Tensor, None]:
        """Weight [q, p] of least ``|Y - X W^T|^2 / n + ridge * mean(diag(X^T X / n)) * |W|^2``, float64."""
        moment = self.covariance()
        # The floor keeps inputs that are never there solvable: their weight is zero.
        moment.diagonal().add_((ridge * moment.diagonal().mean()).clamp_min(1e-30))
        return torch.cholesky_solve(self._xy / self._count, torch.linalg.cholesky(moment)).T, None


def fit_of(projection: nn.Linear, outputs: int = 0) -> AffineFit | LinearFit:
    """A fit on the projection's inputs, with an intercept only where it has a bias to take it up."""
    kind = LinearFit if projection.bias is None else AffineFit
    return kind(projection.in_features, outputs)


def collect_moments(
    vlm: VLM, asked: Sequence[Asked], on_batch: Callable[[int], None] = lambda images: None
) -> tuple[list[Moments], list[Moments]]:
    """Of every layer's output projection and down projection, from the answers' cross-entropy; float64.

    Means are over real tokens, padding is left out. The inputs' moment is centred only where the projection has a bias
    that can take up their mean.
    """
    layers = language_layers(vlm.model)
    sites = [layer.attention_out for layer in layers] + [layer.ffn_out for layer in layers]
    fits = [fit_of(site) for site in sites]
    gradients = [torch.zeros(site.out_features, site.out_features, dtype=torch.float64) for site in sites]
    outputs: dict[int, Tensor] = {}
    prompts: list[Prompt] = []

    def watch(index: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            # The weights are frozen: the graph starts where it is first asked to.
            output = output if output.requires_grad else output.requires_grad_()
            output.retain_grad()
            outputs[index] = output
            return output

        return keep

    tokens = 0
    with contextlib.ExitStack() as stack:
        inputs = [stack.enter_context(captured_input(site)) for site in sites]
        for index, site in enumerate(sites):
            stack.callback(site.register_forward_hook(watch(index)).remove)
        for batch in asked:
            prompts.clear()
            batch.loss(vlm, prompts.append).backward()
            real = prompts[0].mask.bool()
            for index, last_input in enumerate(inputs):
                hidden = last_input().detach()[real]
                fits[index].update(hidden, hidden.new_zeros(len(hidden), 0))
                gradient = outputs[index].grad
                assert gradient is not None
                flat = gradient[real].double().cpu()
                gradients[index] += flat.T @ flat
            tokens += int(real.sum())
            on_batch(len(batch.samples))
    moments = [Moments(fit.covariance().cpu(), g / tokens) for fit, g in zip(fits, gradients, strict=True)]
    return moments[: len(layers)], moments[len(layers) :]
