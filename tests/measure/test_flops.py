import torch

from infoprune_export.measure.flops import count_flops
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder


def test_flops_equal_the_formula_and_drop_with_the_parts(random_vlm, pixels):
    """d 32, 65 positions, 4 heads of 8, FFN 128, batch 3; two FLOPs per multiply-accumulate."""
    tower = random_vlm.tower

    def expected(heads, neurons, tokens):
        n, d = 65, 32
        blocks = sum(
            3 * n * d * 8 * h + 2 * n * n * 8 * h + n * 8 * h * d + 2 * n * d * w
            for h, w in zip(heads, neurons, strict=True)
        )
        patches = 64 * 3 * 14 * 14 * d
        projector = tokens * (d * 128 + 128 * 128)
        return 3 * 2 * (blocks + patches + projector)

    assert count_flops(VisionEncoder(tower, None), pixels) == expected([4] * 5, [128] * 5, 64)
    tower.blocks[0].keep_heads([])
    tower.blocks[1].keep_heads([2])
    tower.blocks[2].keep_neurons(range(64))
    tower.blocks[3].keep_neurons([])
    assert count_flops(VisionEncoder(tower, None), pixels) == expected([0, 1, 4, 4, 4], [128, 128, 64, 0, 128], 64)


def test_a_mask_saves_nothing(random_vlm, pixels):
    encoder = VisionEncoder(random_vlm.tower, None)
    before = count_flops(encoder, pixels)
    with torch.no_grad():
        random_vlm.tower.blocks[0].ffn_out.weight.zero_()
    assert count_flops(encoder, pixels) == before


def test_selection_costs_what_its_formula_says(random_vlm, pixels):
    """Prior over 64 rows, 32 pivots of a pool of 40 unit features, merge of 64 tokens into 32; half the projector."""
    dense = count_flops(VisionEncoder(random_vlm.tower, None), pixels)
    selected = count_flops(VisionEncoder(random_vlm.tower, TokensSpec(keep_ratio="1/2", pool_factor=1.25)), pixels)
    projector = 2 * 32 * (32 * 128 + 128 * 128)
    keys = 3 * 2 * 65 * 32 * 32
    prior = 2 * 4 * 64 * 65 * (8 + 1)
    pivots = 2 * 40 * 40 * 32 + 32 * 31 * (40 + 32)
    merge = 2 * 2 * 64 * 32 * 32
    assert selected - dense == 3 * (keys + prior + pivots + merge - projector)
