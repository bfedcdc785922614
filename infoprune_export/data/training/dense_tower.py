"""The Qwen2.5-VL vision tower on a batch of images of one size, for training speed.

The model's own forward runs all images of a batch as one sequence and cuts it into windows, an attention call each:
1,000 calls a step. Images of one size have the same windows, so that the batch can stay a dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionAttention,
    )


@dataclass(frozen=True)
class _Layout:
    """Of an image with N patches, which the processor delivers merge group by merge group."""

    order: Tensor
    """int64 [N]: patches in window order."""
    restore: Tensor
    """int64 [N / merge²]: merged tokens back in image order."""
    windows: list[int]
    """Patches per window."""
    cos: Tensor
    """float32 [N, head_dim], in window order, as `sin`."""
    sin: Tensor


class DenseTower:
    """Computes what ``tower(patches, grid_thw).pooler_output`` is, from pixels."""

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel) -> None:
        self._tower = tower
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised pixels, float32 [B, 3, H, W], to visual tokens in image order [B, N / merge², D]."""
        from torch.nn import functional as F

        tower, (batch, channels, height, width) = self._tower, pixels.shape
        patch, merge = tower.patch_size, tower.spatial_merge_size
        rows, columns = height // patch, width // patch
        layout = self._layout(rows, columns)
        grid = pixels.view(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
        patches = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * columns, -1)[:, layout.order]
        # A still image is one frame shown temporal_patch_size times: its kernel is the sum over time.
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
        # Autocast would carry the residual stream in bf16 without this.
        hidden = F.linear(patches, kernel).float()
        for number, block in enumerate(tower.blocks):
            windows = [rows * columns] if number in tower.fullatt_block_indexes else layout.windows
            hidden = hidden + _attend(block.attn, block.norm1(hidden), layout, windows)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return tower.merger(hidden).view(batch, rows * columns // merge**2, -1)[:, layout.restore]

    def _layout(self, rows: int, columns: int) -> _Layout:
        if (rows, columns) not in self._layouts:
            self._layouts[rows, columns] = self._make_layout(rows, columns)
        return self._layouts[rows, columns]

    def _make_layout(self, rows: int, columns: int) -> _Layout:
        import torch
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        tower, grid = self._tower, torch.tensor([[1, rows, columns]])
        merge = tower.spatial_merge_size
        groups, boundaries = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        order = (groups[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, merge))
        return _Layout(order, groups.argsort(), boundaries.diff().tolist(), cos[order], sin[order])


def _attend(attention: Qwen2_5_VLVisionAttention, hidden: Tensor, layout: _Layout, windows: list[int]) -> Tensor:
    """Attention of [B, N, D] inside consecutive windows of the given lengths."""
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    batch, patches, width = hidden.shape
    query, key, value = attention.qkv(hidden).view(batch, patches, 3, attention.num_heads, -1).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query * attention.scaling, key, layout.cos, layout.sin)
    attended = []
    for q, k, v in zip(*(t.transpose(1, 2).split(windows, dim=2) for t in (query, key, value)), strict=True):
        # Spelled out: the gradient of the CPU's fused kernel takes longer than the rest of the tower.
        attended.append(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)
    return attention.proj(torch.cat(attended, dim=2).transpose(1, 2).reshape(batch, patches, width))
