"""How far heads look: attention on distant patches over attention on neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.models.attention import Context
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Block, Form
from infoprune_export.models.vlm import VLM

# A ratio of means is settled long before a training set is through.
_IMAGES = 64


@torch.no_grad()
def nonlocal_ratio(vlm: VLM, samples: Sequence[Sample]) -> Tensor:
    """Attention mass on all other keys over that on a patch's 3 x 3 neighbourhood (itself included), float64 [L, H].

    Summed over the patches of the first 64 images. Special tokens are no neighbours of any patch, and their own rows
    are left out. Windowed blocks are measured within their windows.
    """
    blocks = vlm.tower.blocks
    near, total = torch.zeros(2, len(blocks), blocks[0].num_heads, dtype=torch.float64)
    for sample in samples[:_IMAGES]:
        planned = vlm.tower.plan(inputs_of(vlm, [sample]), Form())
        stream, context = vlm.tower.embed(planned)
        neighbours = _neighbours(stream, planned)
        patches = neighbours.any(dim=1)
        for number, block in enumerate(blocks):
            attention = attention_weights(block, stream, context)[:, :, patches].double()
            near[number] += (attention * neighbours[patches]).sum((0, 2, 3)).cpu()
            total[number] += attention.sum((0, 2, 3)).cpu()
            stream = block.run(stream, context)
    return (total - near) / near.clamp_min(torch.finfo(torch.float64).tiny)


def _neighbours(stream: Tensor, planned: Mapping[str, Tensor]) -> Tensor:
    """Which keys are neighbours of which queries, bool [S, S]; special tokens have none and are none's."""
    size = stream.shape[-2]
    if "position_ids" in planned:
        places = planned["position_ids"]
    else:
        side = math.isqrt(size)
        patch = torch.arange(side**2, device=stream.device)
        places = torch.stack([patch // side, patch % side], dim=1)
    near = (places[:, None] - places).abs().amax(dim=-1) <= 1
    special = size - len(places)
    return torch.nn.functional.pad(near, (special, 0, special, 0))


def attention_weights(block: Block, stream: Tensor, context: Context) -> Tensor:
    """Softmax weights of all heads of a block with this stream before it, fp32 [B, H, S, S]; B is 1 where packed."""
    query, key, _ = block.query_key_value(block.normalised(stream), context)
    if query.ndim == 3:
        query, key = query[None], key[None]
    scores = torch.einsum("bqhc,bkhc->bhqk", query.float(), key.float()) * block.head_dim**-0.5
    segments = context.segments(block.windowed)
    if segments is not None:
        segment = segments.inverse // segments.index.shape[1]
        scores = scores.masked_fill(segment[:, None] != segment, -torch.inf)
    return scores.softmax(dim=-1)
