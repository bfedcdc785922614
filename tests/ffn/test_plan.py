"""What a plan counts, against torch's own FLOP counter; and plans that make no sense."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, build, ffn_plan, refitted, seeded
from torch.utils.flop_counter import FlopCounterMode

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.measure.flops import count_flops
from infoprune_export.models import tower_of
from infoprune_export.rewrite.surgery import apply_ffn
from infoprune_export.tokens.encoder import VisionEncoder

TOKENS = 5


def ffn_macs(block) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block.ffn(torch.zeros(TOKENS, block.ffn_out.out_features))
    flops = counter.get_total_flops()
    assert flops % (2 * TOKENS) == 0
    return flops // (2 * TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_of_every_kind_are_those_that_run(family: str):
    tower = tower_of(build(family, blocks=8))
    plan = ffn_plan(tower)
    full = [ffn_macs(block) for block in tower.blocks]
    weights = refitted(tower, HeadPlan.full(tower.head_counts()), plan, seeded())
    apply_ffn(tower, plan, {name: value for name, value in weights.items() if "ffn" in name})
    left = [ffn_macs(block) for block in tower.blocks]
    assert {choice.kind for choice in plan.choices} == {"mlp", "linear", "factored", "bypass"}
    assert [plan.macs(choice) for choice in plan.choices] == left
    assert plan.kept_fraction == pytest.approx(sum(left) / sum(full), rel=1e-12)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_the_encoder_loses_as_many_flops_as_the_plan_says(family: str):
    tower = tower_of(build(family, blocks=8))
    plan, inputs = ffn_plan(tower), tower.example_planned(1, seeded(), VisionEncoder(tower, None).form)
    before = count_flops(VisionEncoder(tower, None), inputs)
    stream, _ = tower.embed(inputs)
    tokens = stream.flatten(0, -2).shape[0]
    full = sum(plan.macs(choice) for choice in FfnPlan.full(list(plan.widths)).choices)
    apply_ffn(tower, plan, {})
    after = count_flops(VisionEncoder(tower, None), inputs)
    assert before - after == 2 * tokens * (full - sum(map(plan.macs, plan.choices)))


def test_neurons_alone_need_no_features_to_be_counted():
    plan = FfnPlan((8, 12), (FfnChoice("mlp", (0, 1, 2)), FfnChoice("mlp")))
    assert plan.kept_fraction == pytest.approx(3 / 20)
    assert FfnPlan(plan.widths, plan.choices, features=4, projections=3).kept_fraction == pytest.approx(3 / 20)


def test_gate_makes_a_linear_replacement_cheaper_by_comparison():
    plan = FfnPlan((12,), (FfnChoice("linear", rank=6),), features=8, projections=3)
    assert plan.kept_fraction == pytest.approx(2 * 8 * 6 / (3 * 8 * 12))


def test_plan_of_every_kind_survives_json():
    plan = FfnPlan(
        (8, 8, 8),
        (
            FfnChoice("factored", (0, 1, 5, 7), ranks=(1, 2, 3)),
            FfnChoice("bypass", (3,), rank=2),
            FfnChoice("linear", rank=9),
        ),
        features=6,
        projections=3,
    )
    assert FfnPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plan_written_before_there_were_other_kinds_is_read():
    written = {"widths": [4], "choices": [{"kind": "mlp", "neurons": [0, 3], "rank": 0}]}
    assert FfnPlan.from_dict(written).kept_fraction == 0.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "bypass", "neurons": (0,), "rank": 0}, "bypass of rank 0 around 1 neurons"),
        ({"kind": "bypass", "rank": 3}, "bypass of rank 3 around 0 neurons"),
        ({"kind": "factored", "neurons": (0, 1), "ranks": (1, 0)}, r"ranks \[1, 0\]; each needs at least 1"),
        ({"kind": "factored", "neurons": (0, 1)}, r"ranks \[\]"),
        ({"kind": "factored", "ranks": (1, 1)}, r"ranks \[1, 1\]"),
        ({"kind": "bypass", "neurons": (2, 1), "rank": 1}, "ascending"),
    ],
)
def test_choice_that_makes_no_sense_is_refused(options, match):
    with pytest.raises(InfopruneError, match=match):
        FfnChoice(**options)


@pytest.mark.parametrize(
    ("choice", "features", "match"),
    [
        (FfnChoice("bypass", tuple(range(8)), rank=1), 6, "block 0: a bypass around all 8 neurons saves nothing"),
        (FfnChoice("factored", tuple(range(8)), ranks=(6, 2)), 6, r"ranks \[6, 2\] .* at most 5$"),
        (FfnChoice("factored", (0, 1, 2), ranks=(1, 3)), 6, r"ranks \[1, 3\] .* at most 2$"),
        (FfnChoice("factored", tuple(range(8)), ranks=(1, 2, 3)), 6, "for 2 projections"),
        (FfnChoice("factored", tuple(range(8)), ranks=(1, 2)), 0, "of 0 features"),
    ],
)
def test_plan_that_a_loader_could_mistake_for_the_original_is_refused(choice, features, match):
    with pytest.raises(InfopruneError, match=match):
        FfnPlan((8,), (choice,), features=features)
