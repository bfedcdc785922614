"""What a tower costs by heads and neurons: FLOPs as counted, or milliseconds as measured in ONNX Runtime.

A tower's cost is the sum of its parts: each block's attention, a function of its heads; each block's FFN, a function of
its neurons; and the rest, embedding and projector, which nothing here makes smaller. Blocks of equal structure share
their measurements. Each part is measured at a few sizes and interpolated between them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infoprune_export.engine.onnxruntime import open_session
from infoprune_export.measure.flops import count_flops
from infoprune_export.measure.latency import interleaved
from infoprune_export.models.attention import Context
from infoprune_export.models.block import Block
from infoprune_export.models.tower import Activations, Form, Planned, VisionTower
from infoprune_export.recipe import Target

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROUNDS, _WARMUP = 20, 3

Meter = Callable[[Sequence[nn.Module], Sequence[Tensor]], list[float]]
"""What each of some modules costs on its input."""


@dataclass(frozen=True)
class CostTable:
    """Costs of a tower's parts in one unit."""

    unit: str
    """``FLOP`` or ``ms``, for one call."""
    attention: tuple[tuple[float, ...], ...]
    """``[l][h]``: block l's attention with h heads, h from 0 to all; it never falls with h."""
    ffn: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    """Block l's widths measured, ascending, and what they cost."""
    rest: float

    def ffn_cost(self, block: int, width: int) -> float:
        """Block's FFN with this width, interpolated."""
        return float(np.interp(width, *self.ffn[block]))

    @property
    def total(self) -> float:
        """The tower as it is."""
        return self.rest + sum(costs[-1] for costs in self.attention) + sum(costs[-1] for _, costs in self.ffn)

    def cost_of(self, heads: Sequence[int], widths: Sequence[int]) -> float:
        """A tower with so many heads and neurons per block."""
        attention = sum(costs[count] for costs, count in zip(self.attention, heads, strict=True))
        return self.rest + attention + sum(self.ffn_cost(i, width) for i, width in enumerate(widths))


# ── Meters ───────────────────────────────────────────────────────────────────


def flops(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[float]:
    """FLOPs of each, by torch's own counter."""
    return [float(count_flops(_Called(module), {"x": x})) for module, x in zip(modules, inputs, strict=True)]


def milliseconds(target: Target, threads: int, opset: int) -> Meter:
    """Least latency of each in ONNX Runtime on a target's providers, all taking turns."""

    def measure(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            calls = {}
            for i, (module, x) in enumerate(zip(modules, inputs, strict=True)):
                path = Path(folder) / f"{i}.onnx"
                program = torch.onnx.export(
                    module.eval(), (x,), input_names=["x"], opset_version=opset, dynamo=True, verbose=False
                )
                assert program is not None
                program.save(path, external_data=True)
                calls[str(i)] = _call(open_session(path, target, threads), x)
            times = interleaved(calls, rounds=_ROUNDS, warmup=_WARMUP)
        # The least, because whatever else the machine does only adds.
        return [float(times[str(i)].min()) for i in range(len(calls))]

    return measure


def _call(session: Any, x: Tensor) -> Callable[[], object]:
    feed: dict[str, NDArray[Any]] = {"x": x.cpu().numpy()}
    return lambda: session.run(None, feed)


# ── Parts ────────────────────────────────────────────────────────────────────


class _Called(nn.Module):
    """A module of one tensor as `count_flops` calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, planned: Mapping[str, Tensor]) -> Tensor:
        return self.inner(planned["x"])


class _Part(nn.Module):
    """Attention or FFN of one block, from stream to stream."""

    def __init__(self, block: Block, context: Context | None) -> None:
        super().__init__()
        self.module = block.module
        self._block, self._context = block, context

    def forward(self, stream: Tensor) -> Tensor:
        return self._block.feed(stream) if self._context is None else self._block.attend(stream, self._context)


class _Rest(nn.Module):
    """The tower without its blocks."""

    def __init__(self, tower: VisionTower, planned: Planned) -> None:
        super().__init__()
        self.model = tower.model
        self._tower, self._planned = tower, dict(planned)

    def forward(self, pixels: Tensor) -> Tensor:
        planned = {**self._planned, "pixel_values": pixels}
        stream, _ = self._tower.embed(planned)
        taps = dict.fromkeys(self._tower.tapped, stream)
        return self._tower.assemble(Activations(stream, stream, taps), planned)


@torch.no_grad()
def measure(tower: VisionTower, inputs: Mapping[str, Tensor], meter: Meter, unit: str, round_to: int = 1) -> CostTable:
    """Costs of an unpruned tower on one call, for the images in its processor's outputs `inputs`.

    Widths are measured at multiples of `round_to`.
    """
    planned = tower.calls(inputs, Form(several=len(tower.split(inputs)) > 1))[0]
    stream, context = tower.embed(planned)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, block in enumerate(tower.blocks):
        kinds.setdefault((block.windowed, block.num_heads, block.head_dim, block.ffn_shape), []).append(i)
    modules: list[nn.Module] = [_Rest(tower, planned)]
    sizes: dict[tuple[str, int], list[int]] = {}
    for members in kinds.values():
        first = tower.blocks[members[0]]
        heads = sorted({round(share * first.num_heads) for share in _SHARES})
        full = first.ffn_shape.size
        widths = sorted({*(int(share * full) // round_to * round_to for share in _SHARES), full})
        sizes["attention", members[0]], sizes["ffn", members[0]] = heads, widths
        for count in heads:
            shrunk = first.copy()
            shrunk.keep_heads(range(count))
            modules.append(_Part(shrunk, context))
        for width in widths:
            shrunk = first.copy()
            shrunk.keep_neurons(range(width))
            modules.append(_Part(shrunk, None))
    costs = iter(meter(modules, [planned["pixel_values"], *([stream] * (len(modules) - 1))]))
    rest = next(costs)
    attention: list[tuple[float, ...]] = [()] * len(tower.blocks)
    ffn: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())] * len(tower.blocks)
    for members in kinds.values():
        heads, widths = sizes["attention", members[0]], sizes["ffn", members[0]]
        by_heads = _rising([next(costs) for _ in heads])
        by_width = _rising([next(costs) for _ in widths])
        every = tuple(float(cost) for cost in np.interp(range(heads[-1] + 1), heads, by_heads))
        for i in members:
            attention[i], ffn[i] = every, (tuple(widths), by_width)
    return CostTable(unit, tuple(attention), tuple(ffn), rest)


def _rising(costs: Sequence[float]) -> tuple[float, ...]:
    """Noise must not make the smaller part look dearer."""
    return tuple(float(cost) for cost in np.maximum.accumulate(costs))
