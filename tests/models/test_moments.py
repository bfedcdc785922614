"""Moments of projections against direct ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infoprune_export.models.calibration import TaskLoss, batches, captured_input, inputs_of, projection_of
from infoprune_export.models.moments import collect_moments
from infoprune_export.models.vlm import writable_copy

SITES = ("attention", "ffn")


@pytest.mark.parametrize("site", SITES)
def test_covariances_equal_direct_ones_over_uneven_batches(trained_vlm, scene_split, site):
    changed = writable_copy(trained_vlm)
    changed.tower.blocks[0].keep_heads([0, 1, 2])
    samples = scene_split.calibration[:5]
    moments = collect_moments(changed, samples, TaskLoss(False, trained_vlm.tower), SITES, seed=0, batch_size=2)
    for i in (0, 2):
        with torch.no_grad(), captured_input(projection_of(changed.tower.blocks[i], site)) as last:
            changed.tower.features_of(inputs_of(changed, samples))
            hidden = last().flatten(0, -2).double()
        covariance = moments[site][i].covariance.double()
        torch.testing.assert_close(covariance, torch.cov(hidden.T, correction=0), rtol=1e-4, atol=1e-6)


def test_metric_is_the_mean_outer_product_of_the_loss_gradient(trained_vlm, scene_split):
    """Seen once more through a bias added to every token's output."""
    samples, loss = scene_split.calibration[:4], TaskLoss(True, trained_vlm.tower)
    moments = collect_moments(trained_vlm, samples, loss, ("ffn",), seed=3, batch_size=2)["ffn"][1]
    projection = trained_vlm.tower.blocks[1].ffn_out
    rng, rows = np.random.default_rng([3, 0]), []
    for batch in batches(samples, 2):
        offsets = []

        def add(_, __, output, offsets=offsets):
            offsets.append(torch.zeros_like(output, requires_grad=True))
            return output + offsets[0]

        handle = projection.register_forward_hook(add)
        loss(trained_vlm, batch, rng).backward()
        handle.remove()
        rows.append(offsets[0].grad.flatten(0, -2))
    gradients = torch.cat(rows)
    torch.testing.assert_close(moments.metric, gradients.T @ gradients / len(gradients), rtol=1e-4, atol=1e-9)


def test_metric_without_labels_is_not_zero_on_an_unchanged_tower(trained_vlm, scene_split):
    """A distance to the original has no gradient there; the metric must not be blind because of it."""
    loss = TaskLoss(False, trained_vlm.tower)
    moments = collect_moments(trained_vlm, scene_split.calibration[:4], loss, SITES, seed=0)
    assert all(one.metric.trace() > 0 for site in SITES for one in moments[site])


def test_a_block_without_heads_has_no_moments_there(trained_vlm, scene_split):
    changed = writable_copy(trained_vlm)
    changed.tower.blocks[1].keep_heads([])
    loss = TaskLoss(True, trained_vlm.tower)
    moments = collect_moments(changed, scene_split.calibration[:2], loss, SITES, seed=0)
    assert moments["attention"][1].covariance.numel() == 0
    assert moments["ffn"][1].covariance.trace() > 0
