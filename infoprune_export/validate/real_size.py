"""The bench at the size users deploy: CLIP-L/336 as in LLaVA-1.5, random weights, the recipe's budgets.

Weights decide accuracy, not speed: heads, neurons and tokens are dropped at the recipe's ratios, evenly over blocks,
and the real export and engine do the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from infoprune_export.engine.onnxruntime import feed_of
from infoprune_export.export.onnx import MODEL, export_module, export_onnx
from infoprune_export.export.quantize import quantize_int8
from infoprune_export.measure.flops import count_flops
from infoprune_export.measure.statistics import paired_ratio
from infoprune_export.models import tower_of
from infoprune_export.models.qwen import QwenTower
from infoprune_export.models.tower import Form, VisionTower
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import BenchSpec, ExportSpec, Recipe, Target, TokensSpec
from infoprune_export.tokens.encoder import FEATURES, VisionEncoder
from infoprune_export.tokens.select import keep_count
from infoprune_export.validate.bench import Track, time_sessions
from infoprune_export.validate.bench_case import SIDES, BenchCase, Side, case_of
from infoprune_export.validate.bench_running import Graph, graph_of
from infoprune_export.validate.parity import compare

_TOWER = "clip-l-336"
_OPSET = 20


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

    def forward(self, planned: dict[str, Tensor]) -> Tensor:
        activations = self._tower.run_blocks(*self._tower.embed(planned))
        return self._tower.project(self._tower.visual_tokens(activations, planned)[:, : self._keep])


def export_real_size(recipe: Recipe, folder: Path, blocks: int = 24) -> None:
    """Write both encoders that `case_of_real_size` compares."""
    tokens = _selection(recipe)
    for side, tower in _towers(recipe, blocks).items():
        (folder / side).mkdir()
        export_onnx(tower, tokens if side == "compressed" else None, folder / side, opset=recipe.export.opset)


def case_of_real_size(recipe: Recipe, folder: Path, blocks: int = 24) -> BenchCase:
    """CLIP-L/336 and what the recipe's budgets make of it, fp32, one image; `folder` is `export_real_size`'s."""
    settings = {"export": ExportSpec(), "bench": recipe.bench.model_copy(update={"batch_sizes": (1,)})}
    fp32 = recipe.model_copy(update=settings)
    return case_of(fp32, folder, _towers(recipe, blocks), _selection(recipe), None)


def _towers(recipe: Recipe, blocks: int) -> dict[Side, VisionTower]:
    towers: dict[Side, VisionTower] = {side: tower_of(random_model(_TOWER, blocks)) for side in SIDES}
    prune_evenly(towers["compressed"], recipe.heads.remove, recipe.ffn.keep_macs, recipe.ffn.round_to)
    return towers


def _selection(recipe: Recipe) -> TokensSpec:
    return recipe.tokens if recipe.tokens.method != "none" else TokensSpec()


def selection_cost(case: BenchCase, track: Track) -> dict[str, Any]:
    """What prior, selection and merge add to the unpruned encoder of `case_of_real_size`, at batch 1.

    ``fraction`` is the median over rounds of (with - without) / without, both graphs interleaved in one run, with a 95%
    interval. The graph without selection projects its first T tokens, so that the projector has the same work in both
    and its saving does not hide the cost.
    """
    original, tokens, spec = case.towers["original"], case.tokens, case.spec
    keep = keep_count(576, tokens.keep_ratio.numerator, tokens.keep_ratio.denominator)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("selecting", "first"):
            (root / name).mkdir()
        export_onnx(original, tokens, root / "selecting", opset=_OPSET)
        export_module(_FirstTokens(original, keep), original, Form(), [FEATURES], root / "first", opset=_OPSET)
        calls = original.calls(original.example_inputs(1, torch.Generator().manual_seed(0)), Form())
        graphs = {
            name: (graph_of(root / name / MODEL, case.target, spec.threads), calls) for name in ("first", "selecting")
        }
        advance = track("rounds with and without selection", spec.rounds + spec.warmup)
        times = time_sessions(graphs, spec, lambda index: advance(1))
    ratio = paired_ratio(times["selecting"], times["first"])
    return {
        "tokens": 576,
        "kept": keep,
        "milliseconds": float(np.median(times["selecting"] - times["first"])),
        "fraction": ratio["median"] - 1,
        "low": ratio["low"] - 1,
        "high": ratio["high"] - 1,
    }


# ── What pruning buys, tower by tower ────────────────────────────────────────

_HEADS_REMOVED, _NEURONS_KEPT, _ROUND_TO = 0.69, 0.5, 64
VARIANTS = {
    "dense": (0.0, 1.0),
    "heads": (_HEADS_REMOVED, 1.0),
    "neurons": (0.0, _NEURONS_KEPT),
    "both": (_HEADS_REMOVED, _NEURONS_KEPT),
}
# Tower -> blocks (CLIP's last is never executed), images of how many patches per side (None: the tower's own size).
SPEED_TOWERS: dict[str, tuple[int, int | None]] = {"clip-l-336": (9, None), "qwen2-vl-7b": (6, 40)}


def speed_table(
    name: str, target: Target, spec: BenchSpec, *, on_round: Callable[[int], None] = lambda index: None
) -> list[dict[str, Any]]:
    """One interleaved run of a random tower: dense, 69% of heads gone, half the neurons, both, both in INT8.

    `efficiency` is the measured speed-up over the FLOP ratio; INT8 has none, because its operations are counted the
    same. Its ``cosine`` and ``over_pruned`` compare it with ``both`` in fp32.
    """
    blocks, side = SPEED_TOWERS[name]
    form = Form(several=side is None)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        root, flops = Path(scratch), dict[str, int]()
        graphs: dict[str, Graph] = {}
        for variant, (heads, neurons) in VARIANTS.items():
            tower = tower_of(random_model(name, blocks))
            prune_evenly(tower, heads, neurons, _ROUND_TO)
            if not graphs:
                images = _images(tower, side, 5, generator)
                planned = tower.plan(images[0], form)
            (root / variant).mkdir()
            export_onnx(tower, None, root / variant, opset=20, several=form.several)
            flops[variant] = count_flops(VisionEncoder(tower, None, form.several), planned)
            graphs[variant] = graph_of(root / variant / MODEL, target, spec.threads)
        (root / "int8").mkdir()
        feeds = ({k: v.numpy() for k, v in tower.plan(image, form).items()} for image in images[1:])
        quantize_int8(root / "both", root / "int8", feeds)
        graphs["int8"] = graph_of(root / "int8" / MODEL, target, spec.threads)
        times = time_sessions({key: (graph, [planned]) for key, graph in graphs.items()}, spec, on_round)
        outputs = {}
        for key in ("both", "int8"):
            session = graphs[key].open()
            outputs[key] = session.run([FEATURES], feed_of(session, planned))[0]
    rows = []
    for variant in graphs:
        speedup = paired_ratio(times["dense"], times[variant])
        row: dict[str, Any] = {
            "tower": name,
            "variant": variant,
            "milliseconds": float(np.median(times[variant])),
            "speedup": speedup,
        }
        if variant in flops:
            ratio = flops["dense"] / flops[variant]
            row |= {"flop_ratio": ratio, "efficiency": speedup["median"] / ratio}
        else:
            parity = compare(outputs["both"], outputs["int8"], step="int8", case=name, tolerance=np.inf)
            row |= {"over_pruned": paired_ratio(times["both"], times["int8"]), "cosine": parity.cosine}
        rows.append(row)
    return rows


def _images(tower: VisionTower, side: int | None, count: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Inputs of one image each."""
    if isinstance(tower, QwenTower) and side is not None:
        return [tower.grid_inputs([(1, side, side)], generator) for _ in range(count)]
    return [tower.example_inputs(1, generator) for _ in range(count)]


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per tower and variant of `speed_table`."""
    table = Table("tower", "variant", "ms", "speed-up (95%)", "FLOPs", "efficiency", "INT8 over pruned", "cosine")
    for row in rows:
        speedup = row["speedup"]
        table.add_row(
            row["tower"],
            row["variant"],
            f"{row['milliseconds']:.0f}",
            f"{speedup['median']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})",
            f"{row['flop_ratio']:.2f}" if "flop_ratio" in row else "",
            f"{row['efficiency']:.2f}" if "efficiency" in row else "",
            f"{row['over_pruned']['median']:.2f}" if "over_pruned" in row else "",
            f"{row['cosine']:.5f}" if "cosine" in row else "",
        )
    return table
