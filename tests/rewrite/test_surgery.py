import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.rewrite.surgery import apply_ffn, apply_heads
from infoprune_export.validate.parity import compare, masked

BLOCKS, HEADS, WIDTH = 3, 4, 64
MODEL = testbed.build_model(layers=BLOCKS + 1, hidden_size=16, heads=HEADS, seed=1).eval().requires_grad_(False)


def choices(limit):
    """Ascending subsets of 0..limit-1, the empty and the full one included."""
    return st.sets(st.integers(0, limit - 1)).map(lambda s: tuple(sorted(s))) | st.just(tuple(range(limit)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.tuples(*[choices(HEADS)] * BLOCKS),
    neurons=st.tuples(*[choices(WIDTH)] * BLOCKS),
    linear=st.integers(-1, BLOCKS - 1),
    seed=st.integers(0, 1000),
)
def test_masked_equals_rewritten_for_any_plan(heads, neurons, linear, seed):
    """Spec C's bar, 1e-5 of the output scale in fp32, for any counts per block, refitted weights and a linear FFN."""
    generator = torch.Generator().manual_seed(seed)
    head_plan = HeadPlan((HEADS,) * BLOCKS, heads)
    ffn = [FfnChoice("mlp", kept) for kept in neurons]
    weights = {}
    for i, kept in enumerate(heads):
        weights[f"{i}.attention_out.weight"] = torch.randn(16, 4 * len(kept), generator=generator)
        weights[f"{i}.attention_out.bias"] = torch.randn(16, generator=generator)
    if linear >= 0:
        ffn[linear] = FfnChoice("linear", rank=6)
        weights[f"{linear}.ffn_in.weight"] = torch.randn(6, 16, generator=generator)
        weights[f"{linear}.ffn_out.weight"] = torch.randn(16, 6, generator=generator)
        weights[f"{linear}.ffn_out.bias"] = torch.randn(16, generator=generator)
    ffn_plan = FfnPlan((WIDTH,) * BLOCKS, tuple(ffn))
    full, small = tower_of(copy.deepcopy(MODEL)), tower_of(copy.deepcopy(MODEL))
    inputs = {"pixel_values": torch.randn(2, 3, 112, 112, generator=generator)}
    with torch.no_grad():
        with masked(full, head_plan, ffn_plan, weights):
            expected = full.features(inputs)
        apply_heads(small, head_plan, {k: v for k, v in weights.items() if "attention" in k})
        apply_ffn(small, ffn_plan, {k: v for k, v in weights.items() if "ffn" in k})
        actual = small.features(inputs)
    result = compare(expected.numpy(), actual.numpy(), step="rewrite", case="", tolerance=1e-5)
    assert result.passed, result
    assert small.head_counts() == [len(kept) for kept in heads]


def test_masked_notices_a_wrongly_sliced_head():
    """The parity that the verdict rests on must see a fault."""
    full, small = tower_of(copy.deepcopy(MODEL)), tower_of(copy.deepcopy(MODEL))
    plan = HeadPlan((HEADS,) * BLOCKS, ((0, 1), (0, 1, 2, 3), (0, 1, 2, 3)))
    wrong = HeadPlan((HEADS,) * BLOCKS, ((0, 2), (0, 1, 2, 3), (0, 1, 2, 3)))
    ffn = FfnPlan.full([WIDTH] * BLOCKS)
    inputs = {"pixel_values": torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad(), masked(full, plan, ffn, {}):
        apply_heads(small, wrong, {})
        result = compare(
            full.features(inputs).numpy(), small.features(inputs).numpy(), step="", case="", tolerance=1e-5
        )
    assert not result.passed


def test_plans_for_another_tower_are_refused():
    tower = tower_of(copy.deepcopy(MODEL))
    with pytest.raises(InfopruneError, match="the tower has"):
        apply_heads(tower, HeadPlan.full([8] * BLOCKS), {})
    with pytest.raises(InfopruneError, match="the tower has"):
        apply_ffn(tower, FfnPlan.full([WIDTH] * 7), {})


def test_weights_of_the_wrong_shape_are_refused():
    tower = tower_of(copy.deepcopy(MODEL))
    with pytest.raises(InfopruneError, match="needs"):
        apply_heads(tower, HeadPlan.full([HEADS] * BLOCKS), {"0.attention_out.weight": torch.zeros(3, 3)})
