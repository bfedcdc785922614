"""Removal against masking, spec C's bar: 1e-5 of the output scale in fp32, for every family and any plan."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from families import FAMILIES, QWEN, build, ffn_plan, head_plan, own_features, prune, refitted, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.rewrite.surgery import apply_ffn, apply_heads
from infoprune_export.validate.parity import compare, masked

HEADS, HEAD_DIM = 4, 16
BAR = 1e-5
MODELS = {name: build(name) for name in FAMILIES}


def fresh(name):
    return tower_of(copy.deepcopy(MODELS[name]))


def width_of(tower):
    return tower.blocks[0].ffn_shape.size


def subsets(limit):
    """Ascending subsets of 0..limit-1: none, one, all, any."""
    some = st.sets(st.integers(0, limit - 1))
    one = st.integers(0, limit - 1).map(lambda i: {i})
    return (some | one | st.just(set()) | st.just(set(range(limit)))).map(lambda s: tuple(sorted(s)))


@st.composite
def of_another_kind(draw, block):
    """Linear, or neurons with factored projections or a bypass."""
    width, kind = block.ffn_shape.size, draw(st.sampled_from(["linear", "factored", "bypass"]))
    if kind == "linear":
        return FfnChoice("linear", rank=draw(st.sampled_from([1, 6, 64])))
    kept = draw(st.sampled_from([tuple(range(0, width, 2)), tuple(range(8, 40)), tuple(range(width - 1))]))
    if kind == "bypass":
        return FfnChoice("bypass", kept, rank=draw(st.sampled_from([1, 5])))
    rank = st.integers(1, min(63, len(kept) - 1))
    return FfnChoice("factored", kept, ranks=draw(st.tuples(*[rank] * len(block.ffn_projections))))


def parity(tower, full, heads, ffn, weights, images):
    """`tower`, already pruned, against the masked `full`."""
    inputs = full.example_inputs(images, seeded(7))
    with torch.no_grad():
        with masked(full, heads, ffn, weights):
            expected = full.features_of(inputs)
        actual = tower.features_of(inputs)
    return compare(expected.numpy(), actual.numpy(), step="rewrite", case="", tolerance=BAR)


# ── Any plan ──


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_masked_equals_rewritten_for_any_plan(name, data):
    full, small = fresh(name), fresh(name)
    blocks, width = len(full.blocks), width_of(full)
    heads = HeadPlan((HEADS,) * blocks, data.draw(st.tuples(*[subsets(HEADS)] * blocks), label="heads"))
    choices = [FfnChoice("mlp", kept) for kept in data.draw(st.tuples(*[subsets(width)] * blocks), label="neurons")]
    other = data.draw(st.integers(-1, blocks - 1), label="block of another kind")
    if other >= 0:
        choices[other] = data.draw(of_another_kind(full.blocks[other]), label="choice")
    ffn = FfnPlan.for_blocks(full.blocks, choices)
    weights = refitted(full, heads, ffn, seeded(data.draw(st.integers(0, 1000), label="seed")))
    if not data.draw(st.booleans(), label="refitted"):
        weights = {key: value for key, value in weights.items() if int(key.split(".")[0]) == other and "ffn" in key}
    prune(small, heads, ffn, weights)
    result = parity(small, full, heads, ffn, weights, data.draw(st.sampled_from([1, 2]), label="images"))
    assert result.passed, result
    assert small.head_counts() == [len(kept) for kept in heads.kept]
    assert [shape.size for shape in small.ffn_shapes()] == [choice.size for choice in choices]


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_forward_of_a_pruned_model_equals_its_tower(name):
    """What evaluates the model through its own class sees the same features: the class's code runs on what is left."""
    tower = tower_of(build(name, blocks=8))
    heads, ffn = head_plan(tower), ffn_plan(tower)
    prune(tower, heads, ffn, refitted(tower, heads, ffn, seeded()))
    inputs = tower.example_inputs(3, seeded())
    with torch.no_grad():
        features = tower.features_of(inputs).flatten(0, 1)
    assert relative_error(features, torch.cat(own_features(tower.model, inputs))) <= BAR


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_pruned_model_runs_under_every_attention_implementation(name, implementation):
    tower = fresh(name)
    tower.blocks[0].keep_heads([])
    tower.blocks[1].keep_heads([3])
    inputs = tower.example_inputs(2, seeded())
    with torch.no_grad():
        features = tower.features_of(inputs).flatten(0, 1)
    tower.model.set_attn_implementation(implementation)
    assert relative_error(torch.cat(own_features(tower.model, inputs)), features) <= BAR


# ── The comparison must see a fault ──

# What belongs to head 2, or to neuron 1 of 0, 2, 4 ..., is written where head 1, or neuron 2, should be.
ATTENTION_FAULTS = ("query", "key", "value", "value bias", "output", "another head")
FFN_FAULTS = ("input", "input bias", "output", "another neuron", "linear input", "linear output")


def attention_part(block, part):
    """Weight and bias of q, k or v, as views."""
    attention = block.module.get_submodule(block._names.attention)
    if len(block._names.qkv) == 3:
        layer = attention.get_submodule(block._names.qkv[part])
        return layer.weight, layer.bias
    layer = attention.get_submodule(block._names.qkv[0])
    return layer.weight.chunk(3)[part], layer.bias.chunk(3)[part]


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_comparison_notices_a_wrongly_sliced_head(name, fault):
    full, small, original = fresh(name), fresh(name), fresh(name)
    every = tuple(range(HEADS))
    heads = HeadPlan((HEADS,) * len(full.blocks), ((0, 1), *[every] * (len(full.blocks) - 1)))
    ffn = FfnPlan.full([width_of(full)] * len(full.blocks))
    block, source = small.blocks[0], original.blocks[0]
    apply_heads(small, heads if fault != "another head" else HeadPlan(heads.total, ((0, 2), *heads.kept[1:])), {})
    here, there = slice(HEAD_DIM, 2 * HEAD_DIM), slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    with torch.no_grad():
        if fault == "output":
            block.attention_out.weight[:, here] = source.attention_out.weight[:, there]
        elif fault != "another head":
            part = ("query", "key", "value").index(fault.split()[0])
            kind = 1 if "bias" in fault else 0
            attention_part(block, part)[kind][here] = attention_part(source, part)[kind][there]
    assert not parity(small, full, heads, ffn, {}, 1).passed


@pytest.mark.parametrize("name", QWEN)
def test_comparison_notices_fused_rows_taken_head_by_head(name):
    """The classic mistake: a fused projection read as [head, part] where it is [part, head]."""
    full, small, original = fresh(name), fresh(name), fresh(name)
    heads = HeadPlan((HEADS,) * len(full.blocks), ((0, 1), *[tuple(range(HEADS))] * (len(full.blocks) - 1)))
    apply_heads(small, heads, {})
    fused, source = (one.blocks[0].module.attn.qkv for one in (small, original))
    with torch.no_grad():
        fused.weight.copy_(source.weight[: len(fused.weight)])
        fused.bias.copy_(source.bias[: len(fused.bias)])
    assert not parity(small, full, heads, FfnPlan.full([width_of(full)] * len(full.blocks)), {}, 1).passed


@pytest.mark.parametrize(
    ("name", "fault"), [*itertools.product(FAMILIES, FFN_FAULTS), ("qwen2.5-vl", "gate"), ("qwen2.5-vl", "gate bias")]
)
def test_comparison_notices_a_wrongly_sliced_neuron(name, fault):
    full, small, original = fresh(name), fresh(name), fresh(name)
    blocks, width = len(full.blocks), width_of(full)
    kept = tuple(range(0, width, 2))
    heads = HeadPlan.full([HEADS] * blocks)
    rest = [FfnChoice("mlp", tuple(range(width)))] * (blocks - 1)
    first = FfnChoice("linear", rank=8) if "linear" in fault else FfnChoice("mlp", kept)
    ffn = FfnPlan((width,) * blocks, (first, *rest))
    weights = refitted(full, heads, ffn, seeded()) if "linear" in fault else {}
    weights = {key: value for key, value in weights.items() if key.startswith("0.ffn")}
    other = FfnPlan(ffn.widths, (FfnChoice("mlp", (*kept[:-1], width - 1)), *rest))
    apply_ffn(small, other if fault == "another neuron" else ffn, weights)
    block, source = small.blocks[0], original.blocks[0]
    with torch.no_grad():
        if fault == "input":
            block.ffn_in.weight[1] = source.ffn_in.weight[1]
        elif fault == "input bias":
            block.ffn_in.bias[1] = source.ffn_in.bias[1]
        elif fault == "gate":
            block.module.mlp.gate_proj.weight[1] = source.module.mlp.gate_proj.weight[1]
        elif fault == "gate bias":
            block.module.mlp.gate_proj.bias[1] = source.module.mlp.gate_proj.bias[1]
        elif fault == "output":
            block.ffn_out.weight[:, 1] = source.ffn_out.weight[:, 1]
        elif fault == "linear input":
            block.ffn_in.weight[1] = weights["0.ffn_in.weight"][2]
        elif fault == "linear output":
            block.ffn_out.weight[:, 1] = weights["0.ffn_out.weight"][:, 2]
    assert not parity(small, full, heads, ffn, weights, 1).passed


@pytest.mark.parametrize("role", ["ffn_in", "ffn_in_factor", "ffn_gate", "ffn_out", "ffn_out_factor", "ffn_bypass"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_comparison_notices_a_wrong_factor_or_bypass(name, role):
    full, small = fresh(name), fresh(name)
    blocks, width = len(full.blocks), width_of(full)
    projections = len(full.blocks[0].ffn_projections)
    if role == "ffn_gate" and projections == 2:
        pytest.skip("this family has no gate")
    half = tuple(range(0, width, 2))
    first = FfnChoice("factored", half, ranks=(8,) * projections)
    if role == "ffn_bypass":
        first = FfnChoice("bypass", half, rank=8)
    heads = HeadPlan.full([HEADS] * blocks)
    ffn = FfnPlan.for_blocks(full.blocks, [first, *[FfnChoice("mlp", tuple(range(width)))] * (blocks - 1)])
    weights = refitted(full, heads, ffn, seeded())
    weights = {key: value for key, value in weights.items() if key.startswith("0.ffn")}
    apply_ffn(small, ffn, weights)
    with torch.no_grad():
        small.blocks[0].ffn_projections[role].weight[:, 1] *= 1.5
    assert not parity(small, full, heads, ffn, weights, 1).passed


@pytest.mark.parametrize("name", FAMILIES)
def test_comparison_notices_a_constant_without_its_bias(name):
    """A block whose attention is gone still adds the projection's bias."""
    full, small = fresh(name), fresh(name)
    blocks = len(full.blocks)
    heads = HeadPlan((HEADS,) * blocks, ((), *[tuple(range(HEADS))] * (blocks - 1)))
    ffn = FfnPlan.full([width_of(full)] * blocks)
    apply_heads(small, heads, {})
    assert parity(small, fresh(name), heads, ffn, {}, 1).passed
    with torch.no_grad():
        small.blocks[0].attention_out.bias.zero_()
    assert not parity(small, full, heads, ffn, {}, 1).passed


# ── Refusals ──


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_for_another_tower_are_refused(name):
    tower = fresh(name)
    with pytest.raises(InfopruneError, match="the tower has"):
        apply_heads(tower, HeadPlan.full([8] * len(tower.blocks)), {})
    with pytest.raises(InfopruneError, match="the tower has"):
        apply_ffn(tower, FfnPlan.full([width_of(tower)] * 7), {})


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_the_wrong_shape_are_refused(name):
    tower = fresh(name)
    plan = HeadPlan.full([HEADS] * len(tower.blocks))
    with pytest.raises(InfopruneError, match="needs"):
        apply_heads(tower, plan, {"0.attention_out.weight": torch.zeros(3, 3)})


def test_weights_for_a_part_that_is_not_there_are_refused():
    tower = fresh("llava")
    plan = FfnPlan.full([width_of(tower)] * len(tower.blocks))
    with pytest.raises(InfopruneError, match=r"0\.ffn_bypass\.weight is for a part that an FFN of kind mlp has not"):
        apply_ffn(tower, plan, {"0.ffn_bypass.weight": torch.zeros(3, 64)})
