"""What all FFN methods have in common: budget, plan, weights, refusals."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from problems import BLOCKS, NEURONS, features, small_vlm, unlabelled

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.methods import METHODS, compress_ffn
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec
from infoprune_export.recipe.structure import FfnMethod
from infoprune_export.rewrite.surgery import apply_ffn
from infoprune_export.validate.parity import masked

FITTED = [name for name in METHODS if name not in ("paper", "taylor")]
SHAPED = [name for name in FITTED if name != "rrr"]
WIDTHS = ("obs", "prunenet", "activation", "magnitude", "random")


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


def spec_of(method, **options):
    return FfnSpec(**{"method": method, "keep_macs": 0.4, "round_to": 16, "bypass_rank": 4, "epsilon": 0.5, **options})


def compress(vlm, samples, spec, *, ridge=0.1, seed=0):
    pruned = writable_copy(vlm)
    plan, weights = compress_ffn(FfnJob(vlm, pruned, samples, unlabelled(vlm), spec, ridge=ridge, seed=seed))
    return pruned, plan, weights


def test_every_recipe_method_has_a_function():
    assert {*METHODS, "none"} == set(get_args(FfnMethod))


@pytest.mark.parametrize("ridge", [0.1, None], ids=["refitted", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_plan_and_weights_make_the_same_of_another_copy_and_of_a_masked_one(vlm, scene_split, method, ridge):
    """On images without labels. What was done in place, carried out anew, and by masking all agree."""
    samples = scene_split.calibration[:6]
    pruned, plan, weights = compress(vlm, samples, spec_of(method), ridge=ridge)
    assert plan.widths == (NEURONS,) * BLOCKS
    if method not in ("paper", "taylor"):
        assert 0.2 < plan.kept_fraction <= 0.4
    expected = features(pruned, scene_split.validation[:2])
    assert not torch.allclose(expected, features(vlm, scene_split.validation[:2]))
    again, full = writable_copy(vlm), writable_copy(vlm)
    apply_ffn(again.tower, plan, weights)
    assert torch.equal(features(again, scene_split.validation[:2]), expected)
    with masked(full.tower, HeadPlan.full(full.tower.head_counts()), plan, weights):
        actual = features(full, scene_split.validation[:2])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("method", SHAPED)
def test_full_budget_gives_the_original_back(vlm, scene_split, method):
    for ridge in (0.1, None):
        pruned, plan, _ = compress(vlm, scene_split.calibration[:4], spec_of(method, keep_macs=1.0), ridge=ridge)
        assert plan.kept_fraction == 1
        expected = features(vlm, scene_split.validation[:2])
        assert (features(pruned, scene_split.validation[:2]) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", FITTED)
def test_refit_comes_nearer_to_the_original(vlm, scene_split, method):
    """On the images it is fitted to: what a random network makes of others hardly depends on it."""
    samples = scene_split.calibration[:8]
    target, errors = features(vlm, samples), []
    for ridge in (1e-2, None):
        pruned, _, _ = compress(vlm, samples, spec_of(method), ridge=ridge)
        errors.append(float((features(pruned, samples) - target).square().mean()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("method", [*WIDTHS, "bypass"])
def test_without_refit_what_is_kept_is_exact(vlm, scene_split, method):
    pruned, plan, _ = compress(vlm, scene_split.calibration[:4], spec_of(method), ridge=None)
    assert plan.kept_fraction < 1
    for before, after, choice in zip(vlm.tower.blocks, pruned.tower.blocks, plan.choices, strict=True):
        kept = list(choice.neurons)
        if not kept:
            continue
        assert torch.equal(after.ffn_in.weight, before.ffn_in.weight[kept])
        assert torch.equal(after.ffn_in.bias, before.ffn_in.bias[kept])
        assert torch.equal(after.ffn_out.weight[:, : len(kept)], before.ffn_out.weight[:, kept])


@pytest.mark.parametrize("method", METHODS)
def test_result_depends_on_the_seed_alone(vlm, scene_split, method):
    runs = [compress(vlm, scene_split.calibration[:3], spec_of(method), seed=seed) for seed in (0, 0, 1)]
    assert runs[0][1] == runs[1][1]
    assert runs[0][2].keys() == runs[1][2].keys()
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())
    if method == "random":
        assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("method", WIDTHS[1:])
def test_simple_scores_keep_one_width_in_all_blocks(vlm, scene_split, method):
    _, plan, _ = compress(vlm, scene_split.calibration[:2], spec_of(method, keep_macs=0.47), ridge=None)
    assert [choice.size for choice in plan.choices] == [48] * BLOCKS  # .47 of 128 is 60


# ── Refusals ──


@pytest.mark.parametrize(
    ("method", "kind"),
    [("obs", "linear"), ("paper", "constant"), ("rrr", "factored"), ("random", "bypass"), ("bypass", "bypass")],
)
def test_compressed_block_is_refused(vlm, scene_split, method, kind):
    pruned = writable_copy(vlm)
    block = pruned.tower.blocks[1]
    {
        "linear": lambda: block.make_ffn_linear(3),
        "constant": lambda: block.keep_neurons([]),
        "factored": lambda: block.make_ffn_factored((3, 3)),
        "bypass": lambda: block.make_ffn_bypass(3),
    }[kind]()
    with pytest.raises(InfopruneError, match=rf"^block 1: the FFN is {kind} already; compress the original model$"):
        compress_ffn(FfnJob(vlm, pruned, scene_split.calibration[:1], unlabelled(vlm), spec_of(method), 0.1, 0))


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("random", {"keep_macs": 0.1}, r"leaves 12 of a block's 128 neurons, fewer than ffn\.round_to = 16; raise"),
        ("prunenet", {"keep_macs": 0.1}, "leaves 12 of a block's 128 neurons"),
        ("rrr", {"keep_macs": 0.05}, r"pays for rank 6, less than ffn\.rank_round_to = 8; raise the one or lower"),
        ("taylor", {"keep_macs": 0.05, "rank_by": "keep_macs"}, "pays for rank 6"),
        ("paper", {"keep_macs": 0.05, "rank_by": "keep_macs"}, "pays for rank 6"),
        ("whitened_svd", {"keep_macs": 0.2}, r"pays for rank 5, less than ffn\.rank_round_to = 8"),
        ("bypass", {"bypass_rank": 33}, r"bypass_rank = 33 is too large.* 32 features at most 32; lower it"),
        ("bypass", {"bypass_rank": 20, "keep_macs": 0.1}, r"bypass_rank = 20 is too large.*at most 7; lower it"),
        ("obs", {"keep_macs": 0.01}, r"ffn\.keep_macs leaves \d neurons for all blocks"),
    ],
)
def test_budget_that_is_too_small_is_refused_with_the_limit(vlm, scene_split, method, options, match):
    with pytest.raises(InfopruneError, match=match) as refused:
        compress(vlm, scene_split.calibration[:1], spec_of(method, **options))
    assert "\n" not in str(refused.value)


def test_bypass_rank_at_the_limit_is_taken(vlm, scene_split):
    """.1 of 3 x 128 neurons is 38.4, of which 16 are left when three bypasses of 7 have taken their part."""
    _, plan, _ = compress(vlm, scene_split.calibration[:2], spec_of("bypass", keep_macs=0.1, bypass_rank=7))
    assert sum(len(choice.neurons) for choice in plan.choices) == 16
    assert plan.kept_fraction <= 0.1


def test_policy_for_blocks_of_different_widths_is_refused(vlm, scene_split):
    pruned = writable_copy(vlm)
    pruned.tower.blocks[0].keep_neurons(range(100))
    with pytest.raises(InfopruneError, match=r"one policy for all blocks, these have widths \[100, 128\]; use obs"):
        compress_ffn(FfnJob(vlm, pruned, scene_split.calibration[:1], unlabelled(vlm), spec_of("prunenet"), None, 0))


# ── With a gate ──


@pytest.mark.parametrize("method", ["whitened_svd", "taylor", "paper", "magnitude", "prunenet"])
def test_gated_ffns_are_compressed_alike(qwen, scene_split, method):
    spec = spec_of(method, keep_macs=0.3, rank_by="keep_macs", prunenet_episodes=2)
    samples = scene_split.calibration[:2]
    pruned, plan, weights = compress(qwen, samples, spec)
    assert 0.2 < plan.kept_fraction <= 0.3
    expected = features(pruned, samples)
    full = writable_copy(qwen)
    with masked(full.tower, HeadPlan.full(full.tower.head_counts()), plan, weights):
        actual = features(full, samples)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def qwen():
    from infoprune_export.models.vlm import load
    from infoprune_export.recipe import ModelSpec

    return load(ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl"))
