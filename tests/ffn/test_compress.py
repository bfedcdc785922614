import torch

from infoprune_export.ffn.obs import collect_moments, compress_obs
from infoprune_export.models.calibration import TaskLoss, captured_input, inputs_of
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec
from infoprune_export.rewrite.surgery import apply_ffn


def test_moments_equal_direct_ones(trained_vlm, scene_split):
    changed = writable_copy(trained_vlm)
    changed.tower.blocks[0].keep_heads([0, 1, 2])
    samples = scene_split.calibration[:5]
    loss = TaskLoss(False, trained_vlm.tower)
    covariances, metrics = collect_moments(changed, samples, loss, seed=0, batch_size=2)
    block = changed.tower.blocks[2]
    with torch.no_grad(), captured_input(block.ffn_out) as last:
        changed.tower.features_of(inputs_of(changed, samples))
        hidden = last().flatten(0, -2).double()
    torch.testing.assert_close(covariances[2], torch.cov(hidden.T, correction=0), rtol=1e-4, atol=1e-7)
    assert metrics[2].shape == (128, 128)
    assert torch.linalg.eigvalsh(metrics[2]).min() > -1e-12 * metrics[2].trace()
    assert metrics[2].trace() > 0


def test_metric_without_labels_is_not_zero_on_an_unchanged_tower(trained_vlm, scene_split):
    """A distance to the original has no gradient there; the metric must not be blind because of it."""
    loss = TaskLoss(False, trained_vlm.tower)
    _, metrics = collect_moments(trained_vlm, scene_split.calibration[:4], loss, seed=0)
    assert all(metric.trace() > 0 for metric in metrics)


def test_compress_obs_respects_the_budget_and_beats_plain_slicing(trained_vlm, scene_split):
    spec = FfnSpec(keep_macs=0.5, round_to=64)
    loss = TaskLoss(True, trained_vlm.tower)
    refitted, plain = writable_copy(trained_vlm), writable_copy(trained_vlm)
    plan, weights = compress_obs(trained_vlm, refitted, scene_split.calibration, loss, spec, ridge=1e-3, seed=0)
    assert 0.3 < plan.kept_fraction <= 0.5
    assert all(choice.size % 64 == 0 for choice in plan.choices)
    same, none = compress_obs(trained_vlm, plain, scene_split.calibration, loss, spec, ridge=None, seed=0)
    assert same == plan
    assert none == {}
    inputs = inputs_of(trained_vlm, scene_split.validation)
    with torch.no_grad():
        target = trained_vlm.tower.features_of(inputs)
        errors = [float((vlm.tower.features_of(inputs) - target).square().mean()) for vlm in (refitted, plain)]
        assert errors[0] < 0.7 * errors[1]
        again = writable_copy(trained_vlm)
        apply_ffn(again.tower, plan, weights)
        assert torch.equal(again.tower.features_of(inputs), refitted.tower.features_of(inputs))


def test_compress_obs_without_budget_keeps_everything(trained_vlm, scene_split):
    copy = writable_copy(trained_vlm)
    plan, _ = compress_obs(
        trained_vlm,
        copy,
        scene_split.calibration[:8],
        TaskLoss(True, trained_vlm.tower),
        FfnSpec(keep_macs=1.0),
        ridge=1e-3,
        seed=0,
    )
    assert plan.kept_fraction == 1
