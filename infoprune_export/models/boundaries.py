"""Boundaries: the values between the parts of an encoder, by name, wherever it is computed.

=====================  ==========================================  ====================
boundary               value                                       made by the part
=====================  ==========================================  ====================
``embedding``          the first residual stream                   ``embedding``
``blocks.3.attention`` the stream behind block 3's attention       ``blocks.3.attention``
``blocks.3``           the stream behind block 3's FFN             ``blocks.3.ffn``
``visual_tokens``      what is selected from, or projected         ``visual_tokens``
``prior``              attention that each token receives          ``prior``
``kept``               indices of the kept tokens                  ``selection``
``selected_tokens``    kept tokens, dropped ones merged in         ``merging``
``image_features``     what the language model takes               ``projector``
=====================  ==========================================  ====================

The encoder says `mark(value, name)` at each. That does nothing, unless somebody is `visiting`: an export names the
value in its graph, attribution records it or puts another implementation's value in its place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

from torch import Tensor

Visitor = Callable[[Tensor, str], Tensor]
"""Given a boundary's value and name; what it returns is what the encoder goes on with."""

EMBEDDING, TOKENS, PRIOR, SELECTED = "embedding", "visual_tokens", "prior", "selected_tokens"
# The last two are the names of the encoder's outputs.
CHOSEN, KEPT, FEATURES = "kept", "kept_indices", "image_features"
_PARTS = {CHOSEN: "selection", KEPT: "selection", SELECTED: "merging", FEATURES: "projector"}
_BLOCK = re.compile(r"blocks\.(\d+)(\.attention)?")

_visitor: ContextVar[Visitor | None] = ContextVar("boundary_visitor", default=None)


def mark(value: Tensor, name: str) -> Tensor:
    """The value of a boundary, which is itself unless a visitor replaces it."""
    visitor = _visitor.get()
    return value if visitor is None else visitor(value, name)


@contextlib.contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """Show every boundary that is computed within the block to the visitor."""
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)


def behind_attention(block: int) -> str:
    return f"blocks.{block}.attention"


def behind_block(block: int) -> str:
    return f"blocks.{block}"


def block_of(name: str) -> int | None:
    """The block whose attention or FFN ends in this boundary, or which this part belongs to."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


def is_boundary(name: str) -> bool:
    return name in (EMBEDDING, TOKENS, PRIOR, *_PARTS) or _BLOCK.fullmatch(name) is not None


def part_of(boundary: str, present: Collection[str]) -> str:
    """The part that ends in a boundary, given which ones an implementation has.

    A tower whose projector does nothing gives its selected (or all) tokens as they are: one value, named as the output.
    """
    if boundary == FEATURES and SELECTED not in present:
        if CHOSEN in present:
            return _PARTS[SELECTED]
        if TOKENS not in present:
            return TOKENS
    if _BLOCK.fullmatch(boundary) and not boundary.endswith("attention"):
        return f"{boundary}.ffn"
    return _PARTS.get(boundary, boundary)


def order_of(boundary: str) -> tuple[int, int]:
    """Sorts boundaries as they are computed."""
    if (block := block_of(boundary)) is not None:
        return (1, 2 * block + (not boundary.endswith("attention")))
    behind = (TOKENS, PRIOR, CHOSEN, KEPT, SELECTED, FEATURES)
    return (0, 0) if boundary == EMBEDDING else (2, behind.index(boundary))
