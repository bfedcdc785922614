"""Streams on the disk, and refits along them, against computing everything from the images."""

from __future__ import annotations

import pytest
import torch

from infoprune_export.models.calibration import captured_input, inputs_of, projection_of
from infoprune_export.models.least_squares import AffineFit
from infoprune_export.models.streams import Streams, on_disk
from infoprune_export.models.tower import Form
from infoprune_export.models.vlm import writable_copy

RIDGE = 0.1


def test_on_disk_is_the_same_tensor_without_a_file_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    value = torch.randn(3, 5, 7)
    stored = on_disk(value)
    assert torch.equal(stored, value)
    assert stored.data_ptr() != value.data_ptr()
    assert list(tmp_path.iterdir()) == []
    assert on_disk(torch.zeros(4, 0)).shape == (4, 0)


def behind(vlm, samples, block):
    """The residual stream behind a block, all images at once."""
    tower = vlm.tower
    stream, context = tower.embed(tower.plan(inputs_of(vlm, samples), Form()))
    for one in tower.blocks[: block + 1]:
        stream = one.run(stream, context)
    return stream


def inputs_at(vlm, samples, block, site):
    with captured_input(projection_of(vlm.tower.blocks[block], site)) as last:
        behind(vlm, samples, block)
    return last()


@torch.no_grad()
@pytest.mark.parametrize("change", ["heads", "neurons", "no heads"])
def test_refits_equal_least_squares_on_everything_at_once(trained_vlm, scene_split, change):
    samples = scene_split.calibration[:5]
    pruned = writable_copy(trained_vlm)
    for block in pruned.tower.blocks[:3]:
        if change == "neurons":
            block.keep_neurons(range(0, 512, 4))
        else:
            block.keep_heads([] if change == "no heads" else [0, 3, 6])
    streams = Streams(trained_vlm, samples, batch_size=2)
    for i in range(3):
        before, after = trained_vlm.tower.blocks[i], pruned.tower.blocks[i]
        for site in ("attention", "ffn"):
            weight, bias = streams.refit(site, before, after, RIDGE)
            projection = projection_of(after, site)
            # What the same correction is, from the images on.
            wanted = behind(trained_vlm, samples, i)
            got = behind(pruned, samples, i)
            if site == "attention":
                with captured_input(before.ffn_norm) as middle:
                    behind(trained_vlm, samples, i)
                wanted = middle()
                with captured_input(after.ffn_norm) as middle:
                    behind(pruned, samples, i)
                got = middle()
            fit = AffineFit(projection.in_features, projection.out_features)
            hidden = inputs_at(pruned, samples, i, site) if projection.in_features else got[..., :0]
            fit.update(hidden.flatten(0, -2), (wanted - got).flatten(0, -2))
            change_w, change_b = fit.solve(RIDGE)
            torch.testing.assert_close(weight, (projection.weight + change_w).float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(bias, (projection.bias + change_b).float(), rtol=1e-3, atol=1e-4)
            (after.set_attention_out if site == "attention" else after.set_ffn_out)(weight, bias)
        streams.advance(before, after)


@torch.no_grad()
def test_streams_move_with_what_was_replaced_after_a_look(trained_vlm, scene_split):
    """An FFN may be replaced between looking at its inputs and moving on."""
    samples = scene_split.calibration[:3]
    pruned = writable_copy(trained_vlm)
    streams = Streams(trained_vlm, samples, batch_size=2)
    before, after = trained_vlm.tower.blocks[0], pruned.tower.blocks[0]
    seen = list(streams.around_ffn(before, after))
    assert sum(len(middle) for middle, _ in seen) == 3
    after.keep_neurons(range(64))
    streams.advance(before, after)
    middles = torch.cat(
        [middle for middle, _ in streams.around_ffn(*(v.tower.blocks[1] for v in (trained_vlm, pruned)))]
    )
    with captured_input(pruned.tower.blocks[1].ffn_norm) as last:
        behind(pruned, samples, 1)
    torch.testing.assert_close(middles, last(), rtol=1e-5, atol=1e-5)
