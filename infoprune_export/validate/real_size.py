"""The bench at the size users deploy: CLIP-L/336 as in LLaVA-1.5, random weights, the recipe's budgets.

Weights decide accuracy, not speed: heads, neurons and tokens are dropped at the recipe's ratios, evenly over blocks,
and the real export and engine do the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.engine.onnxruntime import open_session
from infoprune_export.export.onnx import MODEL, export_module, export_onnx
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import Recipe, Target, TokensSpec
from infoprune_export.tokens.select import keep_count
from infoprune_export.validate.bench import bench_onnx, time_sessions
from infoprune_export.validate.latency import paired_ratio


def clip_large_tower(blocks: int = 24, seed: int = 0) -> VisionTower:
    """LLaVA-1.5's tower and projector with random weights: 576 tokens, D 1024, 16 heads, features of block 23.

    The projector's output is 1024 wide instead of the language model's 4096, which is no part of the encoder.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, head_dim=128
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    torch.manual_seed(seed)
    return tower_of(LlavaForConditionalGeneration(config).eval().requires_grad_(False))


def prune_evenly(tower: VisionTower, heads_removed: float, ffn_kept: float, round_to: int, seed: int = 0) -> None:
    """Drop random heads and neurons, the same share in every block, in place."""
    rng = np.random.default_rng(seed)
    for block in tower.blocks:
        heads = max(1, round(block.num_heads * (1 - heads_removed)))
        width = max(round_to, int(block.ffn_shape.size * ffn_kept) // round_to * round_to)
        if heads < block.num_heads:
            block.keep_heads(sorted(rng.choice(block.num_heads, heads, replace=False).tolist()))
        if width < block.ffn_shape.size:
            block.keep_neurons(sorted(rng.choice(block.ffn_shape.size, width, replace=False).tolist()))


class _FirstTokens(nn.Module):
    """The encoder with the first T visual tokens taken instead of chosen ones: what selection costs comes on top."""

    def __init__(self, tower: VisionTower, keep: int) -> None:
        super().__init__()
        self.model = tower.model
        self._tower = tower
        self._keep = keep

    def forward(self, pixel_values: Tensor) -> Tensor:
        stream = self._tower.run_blocks(self._tower.embed({"pixel_values": pixel_values}))[1]
        return self._tower.project(self._tower.visual_tokens(stream)[:, : self._keep])


def bench_real_size(
    recipe: Recipe, target: Target, *, blocks: int = 24, on_round: Callable[[int], None] = lambda index: None
) -> dict[str, Any]:
    """`bench_onnx`'s figures at batch 1, and what prior, selection and merge add to the unpruned encoder.

    ``selection.fraction`` is the median over rounds of (with - without) / without, both graphs interleaved in one run,
    with a 95% bootstrap interval. The graph without selection projects its first T tokens, so that the projector has
    the same work in both and its saving does not hide the cost.
    """
    spec = recipe.bench.model_copy(update={"batch_sizes": (1,)})
    original = clip_large_tower(blocks)
    tokens = recipe.tokens if recipe.tokens.method != "none" else TokensSpec()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        keep = keep_count(576, tokens.keep_ratio.numerator, tokens.keep_ratio.denominator)
        for name, selection in (("original", None), ("selecting", tokens)):
            (root / name).mkdir()
            export_onnx(original, selection, root / name, opset=recipe.export.opset)
        (root / "first").mkdir()
        example = original.example_inputs(2, torch.Generator().manual_seed(0))["pixel_values"]
        export_module(
            _FirstTokens(original, keep), example, ["image_features"], root / "first", opset=recipe.export.opset
        )
        compressed = clip_large_tower(blocks)
        prune_evenly(compressed, recipe.heads.remove, recipe.ffn.keep_macs, recipe.ffn.round_to)
        (root / "compressed").mkdir()
        export_onnx(compressed, tokens, root / "compressed", opset=recipe.export.opset)
        result = bench_onnx(root, compressed, original, tokens, target, spec, on_round=on_round)
        sessions = {
            name: open_session(root / name / MODEL, target, threads=spec.threads) for name in ("first", "selecting")
        }
        inputs = original.example_inputs(1, torch.Generator().manual_seed(0))
        times = time_sessions(sessions, inputs, spec, on_round)
    added = {name: ratio - 1 for name, ratio in paired_ratio(times["selecting"], times["first"]).items()}
    result["selection"] = {
        "tokens": 576,
        "kept": keep,
        "milliseconds": float(np.median(times["selecting"] - times["first"])),
        "fraction": added["median"],
        "low": added["low"],
        "high": added["high"],
    }
    return result
