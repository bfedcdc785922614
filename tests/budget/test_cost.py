"""What parts cost, against the whole."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, seeded

from infoprune_export.budget.cost import CostTable, flops, measure, milliseconds
from infoprune_export.measure.flops import count_flops
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form, VisionTower
from infoprune_export.recipe import load_target
from infoprune_export.tokens.encoder import VisionEncoder


def one_image(tower: VisionTower) -> dict[str, torch.Tensor]:
    return tower.split(tower.example_inputs(1, seeded()))[0]


def counted(tower: VisionTower, inputs: dict[str, torch.Tensor]) -> int:
    """The whole encoder's FLOPs."""
    form = Form(several=False)
    return count_flops(VisionEncoder(tower, None, form.several), tower.calls(inputs, form)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_flops_of_the_whole_pruned_or_not(family):
    tower = tower_of(build(family))
    inputs = one_image(tower)
    table = measure(tower, inputs, flops, "FLOP")
    assert table.total == pytest.approx(counted(tower, inputs), rel=1e-9)
    total, full = tower.head_counts(), [block.ffn_shape.size for block in tower.blocks]
    heads = [max(1, count - 1 - i % 2) if i else count for i, count in enumerate(total)]
    widths = [width // (1 + i) for i, width in enumerate(full)]
    predicted = table.cost_of(heads, widths)
    for block, count, width in zip(tower.blocks, heads, widths, strict=True):
        block.keep_heads(range(count))
        block.keep_neurons(range(width))
    assert predicted == pytest.approx(counted(tower, inputs), rel=1e-9)


@pytest.mark.exhaustive
def test_latency_of_parts_is_positive_and_never_falls_with_size():
    tower = tower_of(build("qwen2.5-vl", blocks=1))
    meter = milliseconds(load_target("onnxruntime-cpu"), threads=1, opset=20)
    table = measure(tower, one_image(tower), meter, "ms", round_to=32)
    assert table.rest > 0
    for costs in (*table.attention, *(costs for _, costs in table.ffn)):
        assert costs[0] > 0
        assert list(costs) == sorted(costs)
    assert all(width % 32 == 0 or width == widths[-1] for widths, _ in table.ffn for width in widths)


def test_costs_between_measured_widths_are_interpolated():
    table = CostTable("ms", ((0.0, 2.0, 3.0),), (((0, 10, 40), (1.0, 3.0, 9.0)),), rest=5.0)
    assert table.ffn_cost(0, 25) == 6.0
    assert table.total == 17.0
    assert table.cost_of([1], [10]) == 10.0
