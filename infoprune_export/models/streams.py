"""The residual streams of an original tower and a changed one over the same images, and refits of one to the other.

Streams lie on the disk, so memory does not depend on the number of images. Every block of either tower is computed
once: what a refit learns from it is kept, and a refitted projection is applied to the inputs it was fitted on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.models.attention import Context
from infoprune_export.models.calibration import (
    Site,
    batches,
    captured_input,
    images_per_pass,
    inputs_of,
    projection_of,
)
from infoprune_export.models.least_squares import AffineFit
from infoprune_export.models.tower import Block, Form
from infoprune_export.models.vlm import VLM


def on_disk(value: Tensor) -> Tensor:
    """The same CPU tensor in a file of the temporary folder that is gone when the tensor is."""
    handle, name = tempfile.mkstemp(prefix="infoprune-stream-")
    os.close(handle)
    try:
        mapped = torch.from_file(name, shared=True, size=max(value.numel(), 1), dtype=value.dtype)
    finally:
        Path(name).unlink()  # the mapping keeps what it needs
    return mapped[: value.numel()].view(value.shape).copy_(value)


@dataclass
class _Batch:
    """One batch of images on its way through both towers; what lies behind a block's attention is kept until the end
    of the block.
    """

    context: Context
    original: Tensor
    changed: Tensor
    original_middle: Tensor | None = None
    heads: Tensor | None = None
    """Input of the changed block's attention projection."""
    original_end: Tensor | None = None
    middle: Tensor | None = None
    """The changed stream in front of the FFN's norm."""
    neurons: Tensor | None = None
    """Input of the changed block's down projection."""


class Streams:
    """Both towers' residual streams in front of one block, then the next; see `advance`."""

    @torch.no_grad()
    def __init__(self, original: VLM, samples: Sequence[Sample], batch_size: int | None = None) -> None:
        self._device = original.device
        # One block is computed at a time, and all of them are alike.
        batch_size = batch_size or images_per_pass(original, samples, original.tower.blocks[:1])
        self._batches = []
        for batch in batches(samples, batch_size):
            stream, context = original.tower.embed(original.tower.plan(inputs_of(original, batch), Form()))
            first = on_disk(stream.cpu())
            self._batches.append(_Batch(context.to("cpu"), first, first))

    @torch.no_grad()
    def refit(self, site: Site, original: Block, changed: Block, ridge: float) -> tuple[Tensor, Tensor]:
        """New weight and bias for `changed`'s projection at `site`, which is left as it is.

        The projection's input H and the difference D of the two streams behind it give the correction of least
        ``|D - H dW^T - db|^2 + ridge * |dW|^2``. It absorbs both what was removed here and what went wrong upstream.
        Falls back to the bias alone where nothing is left to fit. Attention comes before the FFN.
        """
        projection = projection_of(changed, site)
        fit = AffineFit(projection.in_features, projection.out_features)
        for batch in self._batches:
            if site == "attention":
                hidden, difference = self._behind_attention(batch, original, changed)
            else:
                hidden, difference = self._behind_ffn(batch, original, changed)
            fit.update(hidden.flatten(0, -2), difference.flatten(0, -2))
        weight, bias = fit.solve(ridge)
        dtype = projection.bias.dtype
        return (projection.weight.double() + weight).to(dtype), (projection.bias.double() + bias).to(dtype)

    @torch.no_grad()
    def advance(self, original: Block, changed: Block) -> None:
        """Move both streams behind this block, which may have been refitted or had its FFN replaced meanwhile."""
        for batch in self._batches:
            end = self._original_end(batch, original, changed)
            middle = self._middle(batch, changed) if batch.middle is None else batch.middle.to(self._device)
            # What else stands beside the down projection was not kept.
            if batch.neurons is None or changed.ffn_shape.kind == "bypass":
                changed_end = changed.feed(middle)
            else:
                changed_end = middle + changed.ffn_out(batch.neurons.to(self._device))
            batch.original, batch.changed = on_disk(end.cpu()), on_disk(changed_end.cpu())
            batch.original_middle = batch.heads = batch.original_end = batch.middle = batch.neurons = None

    @torch.no_grad()
    def around_ffn(self, original: Block, changed: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch the changed stream in front of the FFN's norm, and the original's behind the block, both [..., D].

        Their difference is what an FFN should add.
        """
        for batch in self._batches:
            end = self._original_end(batch, original, changed)
            yield self._middle(batch, changed), end

    def _behind_attention(self, batch: _Batch, original: Block, changed: Block) -> tuple[Tensor, Tensor]:
        context, stream = batch.context.to(self._device), batch.changed.to(self._device)
        wanted = original.attend(batch.original.to(self._device), context)
        heads = changed.heads(stream, context)
        batch.original_middle, batch.heads = on_disk(wanted.cpu()), on_disk(heads.cpu())
        return heads, wanted - stream - changed.attention_out(heads)

    def _original_end(self, batch: _Batch, original: Block, changed: Block) -> Tensor:
        if batch.original_middle is None:
            self._behind_attention(batch, original, changed)
        if batch.original_end is None:
            assert batch.original_middle is not None
            batch.original_end = on_disk(original.feed(batch.original_middle.to(self._device)).cpu())
        return batch.original_end.to(self._device)

    def _middle(self, batch: _Batch, changed: Block) -> Tensor:
        assert batch.heads is not None
        return batch.changed.to(self._device) + changed.attention_out(batch.heads.to(self._device))

    def _behind_ffn(self, batch: _Batch, original: Block, changed: Block) -> tuple[Tensor, Tensor]:
        wanted = self._original_end(batch, original, changed)
        middle = self._middle(batch, changed)
        if changed.ffn_shape.kind == "constant":
            neurons, end = middle[..., :0], changed.feed(middle)
        else:
            with captured_input(changed.ffn_out) as last:
                end = changed.feed(middle)
            neurons = last()
        batch.middle, batch.neurons = on_disk(middle.cpu()), on_disk(neurons.cpu())
        return neurons, wanted - end
