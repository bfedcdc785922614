"""Scores of neurons against loops, and the policy of PruneNet on weights whose best rows are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import build
from problems import ffn_data, small_vlm

from infoprune_export.ffn import scores
from infoprune_export.ffn.prunenet import Policy, choose, log_likelihood, noisy_keep, reward, spectrum, train_policy
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import FfnSpec


@pytest.fixture(scope="module")
def vlm():
    return small_vlm()


# ── Scores ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_magnitude_is_rows_times_column(family):
    tower = tower_of(build(family, blocks=3))
    score = scores.magnitude(VLM(tower.model, None, tower), [], 0)[1]
    layers = tower.blocks[1].ffn_projections
    for j in (0, 7, 31):
        rows = sum(float(layers[role].weight[j].square().sum()) for role in layers if role != "ffn_out")
        column = float(layers["ffn_out"].weight[:, j].square().sum())
        assert float(score[j]) == pytest.approx(math.sqrt(rows * column), rel=1e-6)


def test_activation_is_the_size_of_what_a_neuron_adds(vlm, scene_split):
    samples = scene_split.calibration[:3]
    score = scores.activation(vlm, samples, 0)[1]
    _, hidden, _ = ffn_data(vlm, samples, 1)
    weight = vlm.tower.blocks[1].ffn_out.weight.double()
    for j in (0, 5, 99):
        added = hidden[:, j, None] * weight[:, j]
        assert float(score[j]) == pytest.approx(float(added.square().sum(1).mean().sqrt()), rel=1e-5)


def test_random_is_another_one_in_every_block_and_seed(vlm):
    first, second, _ = scores.random(vlm, [], 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, scores.random(vlm, [], 1)[0])
    assert torch.equal(first, scores.random(vlm, [], 0)[0])


def test_top_is_ascending_and_takes_the_lowest_of_equals():
    assert scores.top(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2) == [1, 2]
    assert scores.top(torch.tensor([1.0, 3.0, 2.0]), 3) == [0, 1, 2]


# ── Policy ───────────────────────────────────────────────────────────────────


def planted(rows=48, features=12, seed=0):
    """Half of the rows carry the spectrum and lean to one side, the others are faint and lean to the other."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, features)) * np.linspace(1, 3, features)
    weight[: rows // 2] *= 0.05
    weight[: rows // 2, 0] = -1.0
    weight[rows // 2 :, 0] += 3.0
    return torch.from_numpy(weight).float()


PLANTED = FfnSpec(method="prunenet", prunenet_episodes=150, prunenet_rate=0.02)


def test_policy_logits_are_those_of_the_formula():
    policy, weight = Policy(6, 4, torch.Generator().manual_seed(0)), torch.randn(6, 4)
    with torch.no_grad():
        policy.c.normal_()
        expected = torch.stack([(policy.a @ row + policy.c) @ policy.v for row in weight])
        torch.testing.assert_close(policy(weight), expected)


def test_noisy_keep_is_the_keep_probability_at_the_median():
    logits = torch.tensor([-3.0, 0.0, 2.0])
    draws = torch.stack([noisy_keep(logits, torch.Generator().manual_seed(seed)) for seed in range(801)])
    torch.testing.assert_close(draws.median(0).values, torch.sigmoid(logits), rtol=0, atol=0.08)


def test_likelihoods_of_all_draws_sum_to_one():
    keep = torch.tensor([0.2, 0.9, 0.5, 0.05]).double()
    draws = [(i, j) for i in range(4) for j in range(4) if i != j]
    total = sum(float(log_likelihood(keep, torch.tensor(draw)).exp()) for draw in draws)
    assert total == pytest.approx(1)
    first = float(log_likelihood(keep, torch.tensor([1, 0])).exp())
    assert first == pytest.approx(0.9 / 1.65 * 0.2 / 0.75)


def test_reward_is_one_over_ks_of_spectra():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    reference = spectrum(weight)
    np.testing.assert_allclose(reference.numpy(), [1, 2, 3, 4], rtol=1e-6)
    # Rows 0 and 1 have singular values 3 and 4 (and no more): at 2 the distributions are .5 apart.
    assert reward(weight, reference, torch.tensor([0, 1])) == pytest.approx(2)
    assert reward(weight, reference, torch.arange(4)) == pytest.approx(4)


def test_spectrum_is_that_of_the_matrix_either_way():
    for shape in ((7, 3), (3, 7), (4, 4)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = torch.linalg.svdvals(matrix).flip(0)
        torch.testing.assert_close(spectrum(matrix), expected, rtol=1e-6, atol=1e-8)


def test_policy_learns_the_rows_that_carry_the_spectrum():
    weight = planted()
    logits, history = train_policy([weight, planted(seed=1)], 24, PLANTED, seed=0)
    assert np.mean(history[-20:]) > 1.25 * np.mean(history[:20])
    for one in logits:
        assert sum(index >= 24 for index in scores.top(one, 24)) >= 20


def test_policy_does_not_depend_on_the_scale_of_the_weights():
    spec = FfnSpec(prunenet_episodes=3)
    small, large = (train_policy([factor * planted()], 24, spec, seed=0)[0][0] for factor in (1e-3, 10))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)


def test_policy_is_one_for_all_blocks_and_seeded():
    spec = FfnSpec(prunenet_episodes=3)
    (a, b), _ = train_policy([planted(), planted()], 24, spec, seed=0)
    assert torch.equal(a, b)
    (again, _), _ = train_policy([planted(), planted()], 24, spec, seed=0)
    (other, _), _ = train_policy([planted(), planted()], 24, spec, seed=1)
    assert torch.equal(a, again)
    assert not torch.equal(a, other)


def test_later_blocks_count_less():
    """With almost no weight on the second block, only what the first one gains is learnt."""
    mirrored = planted() * torch.tensor([-1.0, *[1.0] * 11])  # the same rows are good, on the other side
    spec = PLANTED.model_copy(update={"prunenet_discount": 1e-3})
    (first, second), _ = train_policy([planted(), mirrored], 24, spec, seed=0)
    assert sum(index >= 24 for index in scores.top(first, 24)) >= 20
    assert sum(index >= 24 for index in scores.top(second, 24)) <= 12


def test_final_choice_is_the_likeliest_unless_drawn():
    logits = torch.linspace(-1, 1, 40)
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 10, sample=False, generator=generator) == list(range(30, 40))
    drawn = choose(logits, 10, sample=True, generator=generator)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != list(range(30, 40))
