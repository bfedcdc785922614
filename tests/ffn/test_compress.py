import torch

from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.obs import compress_obs
from infoprune_export.models.calibration import TaskLoss, inputs_of
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec
from infoprune_export.rewrite.surgery import apply_ffn


def test_compress_obs_respects_the_budget_and_beats_plain_slicing(trained_vlm, scene_split):
    spec = FfnSpec(keep_macs=0.5, round_to=64)
    loss = TaskLoss(True, trained_vlm.tower)
    refitted, plain = writable_copy(trained_vlm), writable_copy(trained_vlm)
    plan, weights = compress_obs(FfnJob(trained_vlm, refitted, scene_split.calibration, loss, spec, 1e-3, 0))
    assert 0.3 < plan.kept_fraction <= 0.5
    assert all(choice.size % 64 == 0 for choice in plan.choices)
    same, none = compress_obs(FfnJob(trained_vlm, plain, scene_split.calibration, loss, spec, None, 0))
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
    loss = TaskLoss(True, trained_vlm.tower)
    plan, _ = compress_obs(
        FfnJob(trained_vlm, copy, scene_split.calibration[:8], loss, FfnSpec(keep_macs=1.0), 1e-3, 0)
    )
    assert plan.kept_fraction == 1
