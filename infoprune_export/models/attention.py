"""Attention as every family's block computes it here: dense over a batch, or within segments of a packed sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Segments:
    """A padded gather (see `packing`) with the mask that makes it exact."""

    index: Tensor
    """int64 [S, L]; padding points at some patch, whose part the mask takes away."""
    inverse: Tensor
    """int64 [P], into the flattened S x L places."""
    mask: Tensor
    """Added to scores, [S, 1, 1, L]: zero at patches, the dtype's lowest number at padding."""

    @classmethod
    def of(cls, index: Tensor, inverse: Tensor, dtype: torch.dtype) -> Segments:
        """Planned ``index`` (P where there is no patch) and ``inverse``, made ready once for all blocks."""
        patches = inverse.shape[0]
        # Not -inf: a fused kernel may subtract the row maximum before it is known to be finite.
        lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=index.device)
        missing = (index == patches)[:, None, None, :]
        mask = torch.where(missing, lowest, torch.zeros((), dtype=dtype, device=index.device))
        return cls(index.clamp_max(patches - 1), inverse, mask)

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.index.to(device), self.inverse.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Context:
    """What blocks need to know of a batch besides its residual stream.

    A family without rotary embedding leaves `cosine` and `sine` out. Segments are left out where one dense attention
    is meant: over each row of a batch, or over the one image of a packed sequence.
    """

    cosine: Tensor | None = None
    """[P, 1, 1, head_dim], fp32."""
    sine: Tensor | None = None
    """The same shape; see `rotary`."""
    frames: Segments | None = None
    windows: Segments | None = None

    def segments(self, windowed: bool) -> Segments | None:
        """What a block's attention is confined to."""
        return self.windows if windowed else self.frames

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of queries and keys [P, ..., H, head_dim], computed in fp32."""
        if self.cosine is None or self.sine is None:
            return x
        half = x.shape[-1] // 2
        wide = x.float()
        swapped = torch.cat((wide[..., half:], wide[..., :half]), dim=-1)
        return (wide * self.cosine + swapped * self.sine).to(x.dtype)

    def to(self, device: torch.device | str) -> Context:
        """The same on another device."""
        moved = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return Context(**moved)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of axial rotary embedding, fp32 [P, 1, 1, head_dim], from row and column int64 [P, 2].

    A quarter of the channels turns with the row, a quarter with the column, and the second half repeats the first. The
    sine of the first half is negated here, once, instead of the channels it multiplies, in every block.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = (positions[..., None].float() * (1.0 / theta**exponents)).flatten(1)[:, None, None]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense softmax attention of a batch, [B, S, H, head_dim] -> [B, S, H * head_dim]."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def attend_packed(fused: Tensor, segments: Segments | None) -> Tensor:
    """Attention over one packed sequence, or within segments of it: [P, 3, H, head_dim] -> [P, H * head_dim]."""
    if segments is None:
        gathered = fused.permute(1, 2, 0, 3)[:, None]
        out = F.scaled_dot_product_attention(gathered[0], gathered[1], gathered[2])
        return out[0].transpose(0, 1).flatten(1)
    # An embedding lookup is a plain Gather in ONNX; indexing with a tensor would become the slower GatherND.
    gathered = F.embedding(segments.index, fused.flatten(1)).unflatten(2, fused.shape[1:]).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(gathered[0], gathered[1], gathered[2], attn_mask=segments.mask.to(fused.dtype))
    return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, segments.inverse)


@torch.library.custom_op("infoprune::received_attention", mutates_args=())
def received_attention(query: Tensor, key: Tensor, row_weight: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    """Attention that every key receives, fp32 [B, S]: the mean over heads of sum_r w_r softmax(scale q_r k^T + bias).

    The scores of all rows together would be P x P per head, 16 GiB at 16k patches and 16 heads; they are made and
    summed a few rows at a time.

    Args:
        query: [B, R, H, head_dim], any floating dtype.
        key: [B, S, H, head_dim].
        row_weight: weight of each query, fp32 [B, R]; 1/R for a mean, zero for padding.
        key_bias: added to the scores of each key, fp32 [B, S]; the lowest number for padding.
        scale: head_dim ** -0.5.
    """
    batch, size, heads, _ = key.shape
    queries, keys = scale * query.float().transpose(1, 2), key.float().permute(0, 2, 3, 1).contiguous()
    received = torch.zeros(batch, size, dtype=torch.float32, device=key.device)
    step = max(1, (_SCORES if key.is_cpu else _SCORES_GPU) // (batch * heads * size))
    for rows, weight in zip(queries.split(step, dim=2), row_weight.split(step, dim=1), strict=True):
        attention = (rows @ keys + key_bias[:, None, None, :]).softmax(dim=-1)
        received = received + (weight[:, None, None, :] @ attention).sum((1, 2))
    return received / heads


@received_attention.register_fake
def _(query: Tensor, key: Tensor, row_weight: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    return key.new_empty(key.shape[:2], dtype=torch.float32)


# Attention scores that `received_attention` holds at a time: 8 MiB, which a CPU's cache holds too, or 256 MiB.
_SCORES = 2**21
_SCORES_GPU = 2**26
