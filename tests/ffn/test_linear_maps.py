"""Linear replacements against what they are defined by: the Jacobian, and the best map of its rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FEATURES, ffn_data, small_vlm, unlabelled

from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.lowrank import square_root, truncate
from infoprune_export.ffn.methods import compress_ffn
from infoprune_export.ffn.observe import mean_over_tokens, regress
from infoprune_export.ffn.taylor import linearise
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


def compress(vlm, samples, spec, ridge):
    pruned = writable_copy(vlm)
    plan, weights = compress_ffn(FfnJob(vlm, pruned, samples, unlabelled(vlm), spec, ridge=ridge, seed=0))
    return pruned, plan, {name: value.double() for name, value in weights.items()}


# ── Best map of a rank ───────────────────────────────────────────────────────


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_truncate_error_is_the_dropped_spectrum(seed: int, rank: int, rows: int, columns: int, singular: bool):
    rng = np.random.default_rng(seed)
    root = torch.from_numpy(rng.normal(size=(columns, max(1, columns // 2) if singular else columns + 2)))
    metric, weight = root @ root.T, torch.from_numpy(rng.normal(size=(rows, columns)))
    torch.testing.assert_close(square_root(metric) @ square_root(metric), metric, rtol=1e-7, atol=1e-9)
    down, up, sigma = truncate(weight, metric, rank)
    assert (down.shape[1], up.shape[0]) == (min(rank, rows, columns),) * 2
    rest = weight - down @ up
    error = float((rest @ metric @ rest.T).trace())
    assert error == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-6, abs=1e-8 * float(sigma[0] ** 2))


def test_truncate_beats_the_unweighted_svd_where_inputs_differ():
    rng = np.random.default_rng(0)
    weight, metric = torch.from_numpy(rng.normal(size=(6, 8))), torch.diag(torch.logspace(0, -3, 8).double())
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    plain = weight - (u[:, :3] * sigma[:3]) @ vt[:3]
    down, up, _ = truncate(weight, metric, 3)
    ours = weight - down @ up
    assert (ours @ metric @ ours.T).trace() < 0.8 * (plain @ metric @ plain.T).trace()


def test_regression_equals_numpys():
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.normal(size=(50, 4)) + 3), torch.from_numpy(rng.normal(size=(50, 2)) - 1)
    fit = regress([(x[:20], y[:20]), (x[20:], y[20:])], 4, 2, ridge=1e-12)
    design = np.hstack([x.numpy(), np.ones((50, 1))])
    solution = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.weight.numpy(), solution[:4].T, atol=1e-8)
    np.testing.assert_allclose(fit.bias.numpy(), solution[4], atol=1e-8)
    np.testing.assert_allclose(fit.mean.numpy(), x.mean(0).numpy())
    other = torch.zeros(2, 4, dtype=torch.float64)
    np.testing.assert_allclose(fit.bias_of(other).numpy(), y.mean(0).numpy(), atol=1e-8)


def test_rrr_beats_every_other_map_of_its_rank_tried(vlm, scene_split):
    """The first block, whose input no earlier replacement has changed: output MSE of neighbours, near and far."""
    samples = scene_split.calibration[:8]
    pruned, plan, weights = compress(vlm, samples, FfnSpec(method="rrr", keep_macs=0.1, rank_round_to=4), None)
    rank = plan.choices[0].rank
    assert rank == 12
    x, _, y = ffn_data(vlm, samples, 0)
    down, up, bias = (weights[f"0.{name}"] for name in ("ffn_out.weight", "ffn_in.weight", "ffn_out.bias"))

    def error(down, up, bias=None):
        output = x @ up.T @ down.T
        return float((y - output - (y.mean(0) - output.mean(0) if bias is None else bias)).square().mean())

    best = error(down, up, bias)
    sigma = torch.linalg.svdvals(down @ up)
    assert int((sigma > 1e-6 * sigma[0]).sum()) == rank
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            noise = [scale * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in (down, up)]
            others = down * (1 + noise[0]), up * (1 + noise[1])
            assert error(*others) > best * (1 - 1e-6)
    # Leading directions of the inputs, with the best map from these; and of the least-squares map without the metric.
    centred = x - x.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:rank]
    ols = torch.linalg.lstsq(centred, y - y.mean(0)).solution.T
    plain = torch.linalg.svd(ols)
    for other in (directions, plain[2][:rank]):
        fitted = torch.linalg.lstsq(centred @ other.T, y - y.mean(0)).solution.T
        assert error(fitted, other) >= best * (1 - 1e-6)
    whole = error(ols, torch.eye(FEATURES, dtype=torch.float64))
    assert whole < best < float((y - y.mean(0)).square().mean())


def test_rrr_of_full_rank_is_the_least_squares_map(vlm, scene_split):
    samples = scene_split.calibration[:8]
    _, plan, weights = compress(vlm, samples, FfnSpec(method="rrr", keep_macs=1.0), None)
    assert [choice.rank for choice in plan.choices] == [FEATURES] * 3
    x, _, y = ffn_data(vlm, samples, 0)
    ols = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    actual = x @ weights["0.ffn_in.weight"].T @ weights["0.ffn_out.weight"].T + weights["0.ffn_out.bias"]
    expected = (x - x.mean(0)) @ ols + y.mean(0)
    assert (actual - expected).square().mean() < 2e-3 * (expected - y.mean(0)).square().mean()


# ── Jacobian ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "activation"),
    [("llava", "QuickGELU"), ("llava-siglip", "GELUTanh"), ("qwen2-vl", "QuickGELU"), ("qwen2.5-vl", "SiLU")],
)
def test_jacobian_equals_automatic_differentiation(family, activation):
    block = tower_of(build(family, blocks=3)).blocks[1]
    assert type(block.activation).__name__.startswith(activation)
    point = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    jacobian, value = linearise(block, point)
    ffn = block.ffn.double()
    torch.testing.assert_close(jacobian, torch.func.jacrev(ffn)(point), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(value, ffn(point), rtol=1e-8, atol=1e-10)


def test_jacobian_of_the_exact_gelu():
    block = tower_of(build("llava", blocks=3)).blocks[0]
    block.module.mlp.activation_fn = torch.nn.GELU()
    point = torch.linspace(-2, 2, 64).double()
    jacobian, _ = linearise(block, point)
    torch.testing.assert_close(jacobian, torch.func.jacrev(block.ffn.double())(point), rtol=1e-8, atol=1e-10)


def test_taylor_touches_the_ffn_at_the_mean_input(vlm, scene_split):
    """There it has the FFN's value, and at full rank its slope."""
    samples = scene_split.calibration[:5]
    spec = FfnSpec(method="taylor", rank_by="keep_macs", keep_macs=1.0)
    for options, exact in ((spec, True), (FfnSpec(method="taylor", epsilon=0.5), False)):
        pruned, plan, weights = compress(vlm, samples, options, None)
        x, _, _ = ffn_data(vlm, samples, 1)
        point = x.mean(0)
        block = vlm.tower.blocks[1]
        product = weights["1.ffn_out.weight"] @ weights["1.ffn_in.weight"]
        value = product @ point + weights["1.ffn_out.bias"]
        jacobian, expected = linearise(block, point)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        rest = float((product - jacobian).norm() / jacobian.norm())
        assert (rest < 1e-5) if exact else (0.2 < rest <= 0.5)
        assert (plan.choices[1].rank == FEATURES) == exact


def test_mean_over_tokens_counts_every_batch_alike(vlm, scene_split):
    samples = scene_split.calibration[:5]
    together = mean_over_tokens(vlm, samples, lambda block: block.ffn_out, power=2, batch_size=5)
    apart = mean_over_tokens(vlm, samples, lambda block: block.ffn_out, power=2, batch_size=2)
    _, hidden, _ = ffn_data(vlm, samples, 2)
    torch.testing.assert_close(together[2], hidden.square().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(apart[2], together[2], rtol=1e-5, atol=1e-7)
