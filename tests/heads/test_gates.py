import numpy as np
import torch

from infoprune_export.heads.gates import fold_gates, gated, head_grams, output_projections
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.heads.refit import refit_heads
from infoprune_export.models.calibration import TaskLoss, captured_input, inputs_of
from infoprune_export.models.vlm import writable_copy
from infoprune_export.rewrite.surgery import apply_heads


def test_gates_of_one_change_nothing_and_zero_gates_remove_heads(random_vlm, pixels):
    tower = random_vlm.tower
    ones = [torch.ones(4) for _ in tower.blocks]
    closed = [torch.tensor([1.0, 0.0, 1.0, 1.0]), *ones[1:]]
    with torch.no_grad():
        plain = tower.features_of(pixels)
        with gated(tower, ones):
            assert torch.equal(tower.features_of(pixels), plain)
        with gated(tower, closed):
            masked = tower.features_of(pixels)
        assert torch.equal(tower.features_of(pixels), plain), "the hooks must be gone"
        tower.blocks[0].keep_heads([0, 2, 3])
        removed = tower.features_of(pixels)
    assert not torch.equal(masked, plain)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-6)


def test_gates_receive_gradients_and_weights_do_not(random_vlm, scene_split):
    gates = [torch.ones(4, requires_grad=True) for _ in random_vlm.tower.blocks]
    loss = TaskLoss(True, random_vlm.tower)
    with gated(random_vlm.tower, gates):
        loss(random_vlm, scene_split.calibration[:4], np.random.default_rng(0)).backward()
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
    assert all(p.grad is None for p in random_vlm.model.parameters())


def test_head_grams_equal_the_direct_product_over_uneven_batches(random_vlm, scene_split):
    samples = scene_split.calibration[:7]
    grams = head_grams(random_vlm, samples, batch_size=3)
    block = random_vlm.tower.blocks[3]
    with torch.no_grad(), captured_input(block.attention_out) as last:
        random_vlm.tower.features_of(inputs_of(random_vlm, samples))
        z = last().flatten(0, -2).double()
    torch.testing.assert_close(grams[3], z.T @ z / len(z), rtol=1e-5, atol=1e-9)


def test_shares_of_the_grams_sum_to_the_whole(random_vlm, scene_split):
    samples = scene_split.calibration[:7]
    whole = head_grams(random_vlm, samples, 2)
    sums: list[list[torch.Tensor]] = []
    for index in range(2):
        parts: list[torch.Tensor] = []
        head_grams(random_vlm, samples, 2, share=(index, 2), reduce=lambda t, parts=parts: parts.append(t.clone()) or t)
        sums.append(parts)
    tokens, *grams = [a + b for a, b in zip(*sums, strict=True)]
    assert tokens == 7 * 65
    for gram, expected in zip(grams, whole, strict=True):
        torch.testing.assert_close(gram / tokens, expected, rtol=1e-6, atol=1e-9)


def test_folded_gates_compute_what_gates_at_work_compute(random_vlm, pixels):
    gates = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    folded = writable_copy(random_vlm)
    fold_gates(folded.tower, gates)
    with torch.no_grad(), gated(random_vlm.tower, list(gates)):
        expected = random_vlm.tower.features_of(pixels)
    with torch.no_grad():
        torch.testing.assert_close(folded.tower.features_of(pixels), expected, rtol=0, atol=1e-5)


def test_output_projections_are_named_as_surgery_reads_them(random_vlm, pixels):
    plan = HeadPlan((4,) * 5, ((0, 2), (), (0, 1, 2, 3), (3,), (1,)))
    source, target = writable_copy(random_vlm), writable_copy(random_vlm)
    fold_gates(source.tower, torch.full((5, 4), 0.5))
    apply_heads(source.tower, plan, {})
    apply_heads(target.tower, plan, output_projections(source.tower))
    with torch.no_grad():
        assert torch.equal(target.tower.features_of(pixels), source.tower.features_of(pixels))


def distance(a, b, vlm, samples):
    inputs = inputs_of(vlm, samples)
    with torch.no_grad():
        return float((a.tower.features_of(inputs) - b.tower.features_of(inputs)).square().mean())


def test_refit_brings_features_closer_to_the_original_on_fresh_images(trained_vlm, scene_split):
    everything = tuple(range(8))
    plan = HeadPlan((8,) * 5, (everything, everything, everything, (1, 2, 5, 7), (0, 2, 5)))
    plain, refitted = writable_copy(trained_vlm), writable_copy(trained_vlm)
    apply_heads(plain.tower, plan, {})
    weights = refit_heads(trained_vlm, refitted, plan, scene_split.calibration, 0.1)
    fresh = scene_split.validation
    errors = [distance(trained_vlm, vlm, trained_vlm, fresh) for vlm in (refitted, plain)]
    assert errors[0] < 0.9 * errors[1]
    again = writable_copy(trained_vlm)
    apply_heads(again.tower, plan, weights)
    assert distance(again, refitted, trained_vlm, fresh[:2]) == 0


def test_refit_of_an_unpruned_tower_changes_nothing(trained_vlm, scene_split):
    copy = writable_copy(trained_vlm)
    refit_heads(trained_vlm, copy, HeadPlan.full([8] * 5), scene_split.calibration[:8], 1e-3)
    assert distance(trained_vlm, copy, trained_vlm, scene_split.validation[:4]) < 1e-10


def test_writable_copy_shares_everything_but_the_blocks(trained_vlm):
    copy = writable_copy(trained_vlm)
    assert copy.model.lm_head.weight is trained_vlm.model.lm_head.weight
    before = trained_vlm.tower.blocks[0].attention_out.weight.clone()
    copy.tower.blocks[0].keep_heads([0])
    with torch.no_grad():
        copy.tower.blocks[1].attention_out.weight.zero_()
    assert torch.equal(trained_vlm.tower.blocks[0].attention_out.weight, before)
    assert trained_vlm.tower.blocks[1].attention_out.weight.abs().sum() > 0
