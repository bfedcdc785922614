"""Factored projections and bypasses against their own optimality: dropped spectrum, least squares, no better path."""

from __future__ import annotations

import pytest
import torch
from problems import FEATURES, NEURONS, ffn_data, small_vlm, unlabelled

from infoprune_export.ffn.bypass import compress_bypass, fit_block
from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.observe import Observer
from infoprune_export.ffn.plan import FfnChoice
from infoprune_export.ffn.whitened import compress_whitened, factor_block
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Form
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


def double(weights):
    return {name: value.double() for name, value in weights.items()}


# ── Whitened SVD ─────────────────────────────────────────────────────────────


def test_whitened_error_is_the_dropped_spectrum(vlm, scene_split):
    """Of W1 in the metric of what it reads, as measured on its outputs, biases included."""
    samples, changed = scene_split.calibration[:6], writable_copy(vlm)
    parts = factor_block(
        Observer(vlm, samples, to_original=False), vlm.tower.blocks[0], changed.tower.blocks[0], 8, None
    )
    x, _, _ = ffn_data(vlm, samples, 0)
    layer = vlm.tower.blocks[0].ffn_in
    centred = x - x.mean(0)
    sigma = torch.linalg.svdvals(layer.weight.double() @ (centred.T / len(x) ** 0.5))
    wanted = x @ layer.weight.double().T + layer.bias.double()
    actual = x @ parts["ffn_in_factor.weight"].T @ parts["ffn_in.weight"].T + parts["ffn_in.bias"]
    error = float((wanted - actual).square().sum(1).mean())
    assert error == pytest.approx(float(sigma[8:].square().sum()), rel=1e-4)
    # A bias that knew nothing of the mean would leave more.
    assert float((wanted - actual + parts["ffn_in.bias"] - layer.bias.double()).square().sum(1).mean()) > 1.05 * error


def test_whitened_down_projection_error_is_the_dropped_spectrum_too(vlm, scene_split):
    """In the metric of the neurons behind the factored first projection, which `factor_block` leaves in place."""
    samples, changed = scene_split.calibration[:6], writable_copy(vlm)
    block = changed.tower.blocks[0]
    weight, bias = block.ffn_out.weight.clone().double(), block.ffn_out.bias.clone().double()
    parts = factor_block(Observer(vlm, samples, to_original=False), vlm.tower.blocks[0], block, 8, None)
    _, hidden, output = ffn_data(changed, samples, 0)
    sigma = torch.linalg.svdvals(weight @ ((hidden - hidden.mean(0)).T / len(hidden) ** 0.5))
    error = float((hidden @ weight.T + bias - output).square().sum(1).mean())
    assert error == pytest.approx(float(sigma[8:].square().sum()), rel=1e-3)
    assert parts["ffn_out_factor.weight"].shape == (8, NEURONS)


def test_whitened_ranks_are_one_fraction_of_every_matrix(vlm, scene_split):
    pruned = writable_copy(vlm)
    spec = FfnSpec(method="whitened_svd", keep_macs=0.5, rank_round_to=1)
    plan, _ = compress_whitened(FfnJob(vlm, pruned, scene_split.calibration[:2], unlabelled(vlm), spec, None, 0))
    rank = FEATURES * NEURONS // (FEATURES + NEURONS) // 2
    assert {choice.ranks for choice in plan.choices} == {(rank, rank)}
    assert plan.kept_fraction == pytest.approx(rank * (FEATURES + NEURONS) / (FEATURES * NEURONS))


# ── Bypass ───────────────────────────────────────────────────────────────────

KEPT = tuple(range(0, NEURONS, 4))


def residual_on(columns, y):
    columns = torch.cat((columns, torch.ones(len(columns), 1, dtype=columns.dtype)), dim=1)
    return y - columns @ torch.linalg.lstsq(columns, y, driver="gelsd").solution


@pytest.mark.parametrize("to_original", [True, False])
def test_no_other_path_of_its_rank_leaves_less(vlm, scene_split, to_original):
    """With a refit beside freely fitted neurons, without one beside neurons as they are."""
    samples, changed = scene_split.calibration[:8], writable_copy(vlm)
    x, hidden, y = ffn_data(vlm, samples, 0)
    h = hidden[:, list(KEPT)]
    out = vlm.tower.blocks[0].ffn_out
    if not to_original:
        y = y - h @ out.weight[:, list(KEPT)].double().T
        h = h[:, :0]
    choice = FfnChoice("bypass", KEPT, rank=3)
    observer = Observer(vlm, samples, to_original=to_original)
    parts = fit_block(observer, vlm.tower.blocks[0], changed.tower.blocks[0], choice, 1e-3 if to_original else None)
    path = parts["ffn_bypass.weight"]

    def left(up):
        return float(residual_on(torch.cat((h, x @ up.T), dim=1), y).square().mean())

    best, generator = left(path), torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(8):
            noise = torch.randn(path.shape, generator=generator, dtype=torch.float64)
            assert left(path + scale * path.abs().mean() * noise) > best * (1 - 1e-5)
    leading = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    assert left(leading) > best
    assert best < left(path[:0])
    if not to_original:
        # What is written is the fit itself, not its direction alone.
        block = changed.tower.blocks[0]
        product = parts["ffn_out.weight"][:, len(KEPT) :] @ path
        written = float((y - x @ product.T - parts["ffn_out.bias"]).square().mean())
        assert written == pytest.approx(best, rel=1e-2)
        assert torch.equal(parts["ffn_out.weight"][:, : len(KEPT)], out.weight[:, list(KEPT)].double())
        assert block.ffn_shape.kind == "bypass"


def test_block_without_neurons_becomes_its_bypass(vlm, scene_split):
    samples, changed = scene_split.calibration[:4], writable_copy(vlm)
    parts = fit_block(
        Observer(vlm, samples, to_original=False),
        vlm.tower.blocks[0],
        changed.tower.blocks[0],
        FfnChoice("linear", rank=5),
        None,
    )
    x, _, y = ffn_data(vlm, samples, 0)
    output = x @ parts["ffn_in.weight"].T @ parts["ffn_out.weight"].T + parts["ffn_out.bias"]
    assert changed.tower.blocks[0].ffn_shape.kind == "linear"
    torch.testing.assert_close(output.mean(0), y.mean(0), rtol=1e-4, atol=1e-4)
    assert (y - output).square().mean() < 0.9 * (y - y.mean(0)).square().mean()


def test_bypass_pays_for_itself_out_of_the_budget(vlm, scene_split):
    samples, plans = scene_split.calibration[:4], []
    for rank in (1, 8):
        spec = FfnSpec(method="bypass", keep_macs=0.25, round_to=8, bypass_rank=rank)
        plan, weights = compress_bypass(FfnJob(vlm, writable_copy(vlm), samples, unlabelled(vlm), spec, 0.1, 0))
        assert plan.kept_fraction <= 0.25
        assert {value.dtype for value in weights.values()} == {torch.float32}
        plans.append(sum(len(choice.neurons) for choice in plan.choices))
    assert plans == [88, 72]  # of 96 less 3 and 24, in eights


# ── Targets ──────────────────────────────────────────────────────────────────


def test_observer_wants_what_the_original_stream_lacks(vlm, scene_split):
    """Behind a block that was damaged, the original's end less the changed tower's middle."""
    samples, changed = scene_split.calibration[:3], writable_copy(vlm)
    with torch.no_grad():
        changed.tower.blocks[0].ffn_out.weight.zero_()
    ends = []
    for one in (vlm, changed):
        with torch.no_grad():
            stream, context = one.tower.embed(one.tower.plan(inputs_of(one, samples), Form()))
            ends.append(one.tower.run_blocks(stream, context, observed=[1]).taps[1].flatten(0, -2))
    gap = ends[0] - ends[1]
    assert gap.abs().max() > 0.1
    for to_original in (True, False):
        observer = Observer(vlm, samples, to_original=to_original)
        for _ in observer.watch(vlm.tower.blocks[0], changed.tower.blocks[0]):
            pass
        observer.streams.advance(vlm.tower.blocks[0], changed.tower.blocks[0])
        (seen,) = observer.watch(vlm.tower.blocks[1], changed.tower.blocks[1])
        x, _, output = ffn_data(changed, samples, 1)
        torch.testing.assert_close(seen.inputs.double(), x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.output.double(), output, rtol=1e-3, atol=1e-4)
        expected = gap if to_original else torch.zeros_like(gap)
        torch.testing.assert_close(seen.wanted - seen.output, expected, rtol=1e-3, atol=1e-4)
