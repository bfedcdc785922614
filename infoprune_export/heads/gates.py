"""Gates on attention heads while a tower runs, and the Gram matrices of what they multiply.

A gate multiplies head h's channels of the concatenated attention output of block l, before the output projection
(paper A, section 4.1). All weights are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.models.calibration import batches, captured_input, inputs_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM
from infoprune_export.rewrite.surgery import ATTENTION_OUT


@contextlib.contextmanager
def gated(tower: VisionTower, gates: Sequence[Tensor]) -> Iterator[None]:
    """Multiply every head's output by its gate; ``gates[l]`` is [num_heads] and may require gradients."""
    handles = []
    for block, gate in zip(tower.blocks, gates, strict=True):

        def scale(
            _: nn.Module, arguments: tuple[Tensor], gate: Tensor = gate, width: int = block.head_dim
        ) -> tuple[Tensor]:
            return (arguments[0] * gate.repeat_interleave(width).to(arguments[0].dtype),)

        if block.num_heads:
            handles.append(block.attention_out.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold_gates(tower: VisionTower, gates: Tensor) -> None:
    """Multiply gates [L, H] into the columns of an unpruned tower's output projections, in place."""
    for block, gate in zip(tower.blocks, gates, strict=True):
        block.attention_out.weight.mul_(gate.to(block.attention_out.weight).repeat_interleave(block.head_dim))


def output_projections(tower: VisionTower) -> dict[str, Tensor]:
    """Weights and biases of every output projection, under `surgery`'s names."""
    return {
        f"{number}.{ATTENTION_OUT}.{kind}": getattr(block.attention_out, kind).detach()
        for number, block in enumerate(tower.blocks)
        for kind in ("weight", "bias")
    }


@torch.no_grad()
def head_grams(
    vlm: VLM,
    samples: Sequence[Sample],
    batch_size: int = 32,
    *,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor]:
    """Per block the mean Gram of the concatenated head outputs over all tokens, float64 [H head_dim, H head_dim].

    They stay on the tower's device. Process `share` = (index, count) runs every count-th batch, and `reduce` sums a
    tensor over the processes.
    """
    blocks = vlm.tower.blocks
    widths = [block.num_heads * block.head_dim for block in blocks]
    grams = [torch.zeros(width, width, dtype=torch.float64, device=vlm.device) for width in widths]
    tokens = torch.zeros((), dtype=torch.float64, device=vlm.device)
    index, count = share
    with contextlib.ExitStack() as stack:
        inputs = [stack.enter_context(captured_input(block.attention_out)) for block in blocks]
        for batch in list(batches(samples, batch_size))[index::count]:
            vlm.tower.features_of(inputs_of(vlm, batch))
            for gram, last_input in zip(grams, inputs, strict=True):
                z = last_input().flatten(0, -2).double()
                gram += z.T @ z
            tokens += len(z)
    total = reduce(tokens)
    return [reduce(gram) / total for gram in grams]
