"""Parts of a narrow tower that compute in fp32, because their values do not fit fp16.

Only modules change their type; the blocks cast what goes into a part and what comes out of it, so an exported graph has
its casts where the types meet and is strongly typed as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import VisionTower

STREAM = "stream"
_PART = re.compile(r"blocks\.(\d+)(?:\.(attention|ffn))?")


def check_keep_fp32(parts: Collection[str], blocks: int) -> None:
    """Refuse parts that a tower of so many blocks does not have.

    Raises:
        InfopruneError: an unknown part; the message lists them.
    """
    for part in parts:
        found = _PART.fullmatch(part)
        if part != STREAM and (found is None or int(found[1]) >= blocks):
            known = f"{STREAM}, and blocks.N, blocks.N.attention, blocks.N.ffn for N from 0 to {blocks - 1}"
            raise InfopruneError(f"export.keep_fp32: {part!r:.60} is no part of this encoder; there are {known}")


def keep_fp32(tower: VisionTower, source: VisionTower, parts: Collection[str]) -> None:
    """Give these parts of a narrow tower the fp32 weights that they have in `source`.

    ``blocks.3`` is both its attention and its FFN, each with its norm. ``stream`` is the residual stream: every norm
    and what is behind the blocks read it in fp32, all other products stay narrow.

    Raises:
        InfopruneError: an unknown part.
    """
    check_keep_fp32(parts, len(tower.blocks))
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for number, (narrow, wide) in enumerate(zip(tower.blocks, source.blocks, strict=True)):
        for part in ("attention", "ffn"):
            if {f"blocks.{number}", f"blocks.{number}.{part}"} & set(parts):
                pairs += zip(narrow.part(part), wide.part(part), strict=True)
        if STREAM in parts:
            pairs += zip(narrow.part("norms"), wide.part("norms"), strict=True)
    if STREAM in parts:
        tower.wide_stream = True
        pairs += zip(tower.readers(), source.readers(), strict=True)
    for module, original in pairs:
        module.to(torch.float32).load_state_dict(original.state_dict())
