"""Random models of every family, and what Hugging Face itself makes of them: the reference for towers and surgery."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.zoo import IMAGE_TOKEN, TINY, random_model
from infoprune_export.rewrite.surgery import apply_ffn, apply_heads

LLAVA = ("llava", "llava-siglip")
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FAMILIES = tuple(TINY)

PAD, BOS = 0, 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest reference value; infinite when the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def build(family: str, blocks: int = 4, seed: int = 1) -> Any:
    """A random model whose tower has random biases and norms too; left at zero and one, a misplaced one hides."""
    model = random_model(family, blocks, seed=seed)
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "language_model" not in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# ── Hugging Face's own answers ──


@torch.no_grad()
def own_features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """`get_image_features`, one [N, D] per image; Qwen3-VL's deepstack features follow along the last axis."""
    options = {}
    if "image_grid_thw" not in inputs:
        # The model's forward fills these in from its configuration.
        options = {
            name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")
        }
    output = model.model.get_image_features(**inputs, **options)
    images = list(output.pooler_output)
    for level in getattr(output, "deepstack_features", None) or []:
        if isinstance(level, Tensor):  # some versions leave these in one piece
            level = level.split([len(image) for image in images])
        images = [torch.cat([image, part], dim=-1) for image, part in zip(images, level, strict=True)]
    return images


def prompts(model: Any, tower: VisionTower, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt per image, of different lengths and left-padded, as the processors would make them."""
    rows = []
    for number, layout in enumerate(tower.layouts(inputs)):
        before = [BOS, *range(10, 11 + 2 * number)]
        rows.append([*before, *[IMAGE_TOKEN] * layout.ids.shape[1], 20 + number, 30])
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    prompt = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if tower.position_axes > 1:
        prompt["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return prompt


@torch.no_grad()
def own_tokens(model: Any, inputs: dict[str, Tensor], count: int = 8) -> Tensor:
    """The model's own greedy generation from pixels, new tokens only."""
    prompt = prompts(model, tower_of(model), inputs)
    generated = model.generate(
        **prompt, **inputs, do_sample=False, num_beams=1, min_new_tokens=count, max_new_tokens=count
    )
    return generated[:, prompt["input_ids"].shape[1] :]


@torch.no_grad()
def own_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the model's own forward on pixels; [B, L, V]."""
    return model(**prompts(model, tower_of(model), inputs), **inputs).logits


# ── Pruning of every kind at once ──

_HEADS: list[tuple[int, ...]] = [(), (2,), (0, 1, 2, 3), (0, 3), (1,), (1, 2, 3), (0, 1), (3,)]


def head_plan(tower: VisionTower) -> HeadPlan:
    """None, one, all and some heads."""
    return HeadPlan((4,) * len(tower.blocks), tuple(_HEADS[: len(tower.blocks)]))


def ffn_plan(tower: VisionTower) -> FfnPlan:
    """Half, no, all and one neuron, a linear replacement, factors, and a bypass."""
    width, projections = tower.blocks[0].ffn_shape.size, len(tower.blocks[0].ffn_projections)
    choices = [
        FfnChoice("mlp", tuple(range(0, width, 2))),
        FfnChoice("mlp", ()),
        FfnChoice("mlp", tuple(range(width))),
        FfnChoice("linear", rank=5),
        FfnChoice("mlp", (3,)),
        FfnChoice("factored", tuple(range(width)), ranks=(6, 7, 9)[-projections:]),
        FfnChoice("bypass", tuple(range(0, width, 3)), rank=4),
        FfnChoice("mlp", tuple(range(7, width))),
    ]
    return FfnPlan.for_blocks(tower.blocks, choices[: len(tower.blocks)])


def refitted(tower: VisionTower, heads: HeadPlan, ffn: FfnPlan, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights for every projection that a refit may overwrite, of about the original's scale."""
    weights = {}
    for i, (block, kept, choice) in enumerate(zip(tower.blocks, heads.kept, ffn.choices, strict=True)):
        width = block.attention_out.out_features
        shapes = {
            "attention_out.weight": (width, len(kept) * block.head_dim),
            "attention_out.bias": (width,),
            "ffn_out.weight": (width, choice.size + (choice.rank if choice.kind == "bypass" else 0)),
            "ffn_out.bias": (width,),
        }
        if choice.kind == "linear":
            shapes["ffn_in.weight"] = (choice.size, width)
        elif choice.kind == "bypass":
            shapes["ffn_bypass.weight"] = (choice.rank, width)
        elif choice.kind == "factored":
            roles = ["ffn_in", "ffn_gate"][: len(choice.ranks) - 1]
            for role, rank in zip([*reversed(roles), "ffn_out"], choice.ranks, strict=True):
                rows, columns = (width, choice.size) if role == "ffn_out" else (choice.size, width)
                shapes |= {f"{role}.weight": (rows, rank), f"{role}.bias": (rows,)}
                shapes[f"{role}_factor.weight"] = (rank, columns)
        for name, shape in shapes.items():
            weights[f"{i}.{name}"] = 0.1 * torch.randn(shape, generator=generator)
    return weights


def prune(tower: VisionTower, heads: HeadPlan, ffn: FfnPlan, weights: dict[str, Tensor]) -> None:
    apply_heads(tower, heads, {k: v for k, v in weights.items() if "attention" in k})
    apply_ffn(tower, ffn, {k: v for k, v in weights.items() if "ffn" in k})
