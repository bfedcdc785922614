"""The paper's truncated SVD on a small tower, and the plan it is written down in."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infoprune_export.data.testbed import build_model
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.ffn.svd import smallest_rank, truncated_products
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import FfnSpec

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture
def tower() -> VisionTower:
    model = build_model(layers=3, hidden_size=32, heads=4).eval().requires_grad_(False)
    view = tower_of(model)
    generator = torch.Generator().manual_seed(1)
    for block in view.blocks:  # freshly built biases are zero, which would hide the bias formula
        block.ffn_in.bias.normal_(generator=generator)
        block.ffn_out.bias.normal_(generator=generator)
    return view


# ── Rank ─────────────────────────────────────────────────────────────────────


@REPEATABLE
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 99))
def test_smallest_rank_equals_exact_search(values: list[int], percent: int):
    values.sort(reverse=True)
    assume(values[0] > 0)
    total, epsilon = sum(v * v for v in values), Fraction(percent, 100)
    tails = [Fraction(sum(v * v for v in values[k:]), total) for k in range(1, len(values) + 1)]
    assume(all(abs(tail - epsilon**2) > Fraction(1, 10**9) for tail in tails))  # a tie is rounding's to decide
    expected = 1 + next(k for k, tail in enumerate(tails) if tail < epsilon**2)
    assert smallest_rank(torch.tensor(values, dtype=torch.float64), percent / 100) == expected


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.02, 0.95))
def test_smallest_rank_is_the_least_that_meets_equation_8(seed: int, size: int, epsilon: float):
    """Brute force: truncate the matrix itself at every rank and measure |W - W_k| / |W|."""
    matrix = np.random.default_rng(seed).normal(size=(size, size)) * np.logspace(0, -2, size)
    u, sigma, vt = np.linalg.svd(matrix)
    errors = [
        np.linalg.norm(matrix - (u[:, :k] * sigma[:k]) @ vt[:k]) / np.linalg.norm(matrix) for k in range(1, size + 1)
    ]
    assume(min(abs(error - epsilon) for error in errors) > 1e-9)
    expected = 1 + next(k for k, error in enumerate(errors) if error <= epsilon)
    assert smallest_rank(torch.from_numpy(sigma), epsilon) == expected


@pytest.mark.parametrize("size", [1, 7, 59])
def test_smallest_rank_without_tolerance_is_everything(size: int):
    assert smallest_rank(torch.full((size,), 0.1), 0.0) == size


def test_smallest_rank_at_exact_energy_keeps_no_more():
    # 16 of 16 + 9 is 1 - .6^2: representable without rounding as .75 of 4 equal ones is
    assert smallest_rank(torch.ones(4), 0.5) == 3


def test_smallest_rank_of_nothing_is_one():
    assert smallest_rank(torch.zeros(4), 0.05) == 1


# ── Compression ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 0.8])
def test_truncated_products_error_is_the_eckart_young_tail(tower: VisionTower, epsilon: float):
    plan, weights = truncated_products(tower, FfnSpec(epsilon=epsilon))
    for i, block in enumerate(tower.blocks):
        product = (block.ffn_out.weight.double() @ block.ffn_in.weight.double()).numpy()
        sigma = np.linalg.svd(product, compute_uv=False)
        rank = plan.choices[i].rank
        factors = weights[f"{i}.ffn_out.weight"].double() @ weights[f"{i}.ffn_in.weight"].double()
        error = np.linalg.norm(product - factors.numpy())
        assert error == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), rel=1e-4)
        assert error <= epsilon * np.linalg.norm(product) * (1 + 1e-6)
        if rank > 1:
            assert np.sqrt((sigma[rank - 1 :] ** 2).sum()) > epsilon * np.linalg.norm(product)


def test_truncated_products_factors_multiply_to_the_truncated_product(tower: VisionTower):
    plan, weights = truncated_products(tower, FfnSpec(epsilon=0.5))
    for i, block in enumerate(tower.blocks):
        u, sigma, vt = np.linalg.svd((block.ffn_out.weight.double() @ block.ffn_in.weight.double()).numpy())
        rank = plan.choices[i].rank
        assert 1 < rank < 32
        down, up = weights[f"{i}.ffn_out.weight"].numpy(), weights[f"{i}.ffn_in.weight"].numpy()
        assert (down.shape, up.shape) == ((32, rank), (rank, 32))
        np.testing.assert_allclose(down @ up, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-6)
        # S^1/2 on either side
        np.testing.assert_allclose(np.linalg.norm(down, axis=0), np.sqrt(sigma[:rank]), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(up, axis=1), np.sqrt(sigma[:rank]), rtol=1e-5)


def test_truncated_products_bias_carries_the_first_bias_through(tower: VisionTower):
    _, weights = truncated_products(tower, FfnSpec(epsilon=0.05))
    for i, block in enumerate(tower.blocks):
        first, second = block.ffn_in, block.ffn_out
        linear = torch.nn.functional.linear(first.bias, second.weight, second.bias)
        assert (linear - second.bias).abs().max() > 0.1
        torch.testing.assert_close(weights[f"{i}.ffn_out.bias"], linear, rtol=1e-5, atol=1e-6)


def test_truncated_products_describes_every_executed_block_and_leaves_the_tower(tower: VisionTower):
    before = {name: value.clone() for name, value in tower.model.state_dict().items()}
    plan, weights = truncated_products(tower, FfnSpec(epsilon=0.05))
    assert plan.widths == (128,) * len(tower.blocks)
    assert [choice.kind for choice in plan.choices] == ["linear"] * len(tower.blocks)
    roles = ("ffn_in.weight", "ffn_out.weight", "ffn_out.bias")
    assert set(weights) == {f"{i}.{role}" for i in range(len(tower.blocks)) for role in roles}
    assert all(torch.equal(value, before[name]) for name, value in tower.model.state_dict().items())


def test_truncated_products_of_a_compressed_tower_is_refused(tower: VisionTower):
    tower.blocks[1].make_ffn_linear(4)
    with pytest.raises(InfopruneError, match=r"^block 1: the FFN is linear already.*original model$"):
        truncated_products(tower, FfnSpec(epsilon=0.05))


@pytest.mark.parametrize(("keep", "rank"), [(0.1, 8), (0.15, 16), (0.9, 32)])
def test_truncated_products_by_budget(tower: VisionTower, keep: float, rank: int):
    """.1 of 128 neurons is rank 12, down to a multiple of 8; never more than the 32 features."""
    plan, _ = truncated_products(tower, FfnSpec(rank_by="keep_macs", keep_macs=keep))
    assert [choice.rank for choice in plan.choices] == [rank] * len(tower.blocks)
    assert plan.kept_fraction == pytest.approx(rank / 128)


def test_truncated_products_of_a_budget_below_one_rank_are_refused(tower: VisionTower):
    with pytest.raises(InfopruneError, match=r"^ffn.keep_macs = 0.05 pays for rank 6, less than .*rank_round_to = 8"):
        truncated_products(tower, FfnSpec(rank_by="keep_macs", keep_macs=0.05))


# ── Plan ─────────────────────────────────────────────────────────────────────


def test_ffn_plan_survives_json():
    plan = FfnPlan((8, 8, 8), (FfnChoice("mlp", (0, 7)), FfnChoice("linear", rank=3), FfnChoice("mlp")))
    assert FfnPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_ffn_plan_kept_fraction_counts_neurons_and_rank():
    plan = FfnPlan((8, 12), (FfnChoice("mlp", (0, 1, 2)), FfnChoice("linear", rank=2)))
    assert plan.kept_fraction == pytest.approx(5 / 20)
    assert FfnPlan.full([8, 12]).kept_fraction == 1.0
    assert FfnPlan.full([3]).choices[0].neurons == (0, 1, 2)


@pytest.mark.parametrize("neurons", [(1, 0), (0, 0)])
def test_ffn_choice_with_disordered_neurons_is_refused(neurons: tuple[int, ...]):
    with pytest.raises(InfopruneError, match="ascending"):
        FfnChoice("mlp", neurons)


def test_ffn_choice_of_rank_zero_is_refused():
    with pytest.raises(InfopruneError, match="rank 0"):
        FfnChoice("linear")


@pytest.mark.parametrize("neurons", [(0, 8), (-1, 2)])
def test_ffn_plan_with_neurons_outside_is_refused(neurons: tuple[int, ...]):
    with pytest.raises(InfopruneError, match=r"block 1: neurons outside 0\.\.7"):
        FfnPlan((8, 8), (FfnChoice("mlp", (0,)), FfnChoice("mlp", neurons)))


def test_ffn_plan_of_wrong_length_is_refused():
    with pytest.raises(InfopruneError, match="1 choices for 2 blocks"):
        FfnPlan((8, 8), (FfnChoice("mlp", (0,)),))
