"""Models of every family with random weights: tiny ones for tests and sweeps, and towers of the published sizes.

Random weights say nothing about accuracy, but everything about whether an export is right, how large it is and how fast
it runs. The language model of a real-size entry is a stub of one narrow layer behind the true width of the projector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from infoprune_export.errors import InfopruneError

IMAGE_TOKEN = 4
# At the usual initial scale a tiny model's attention is uniform, and a wrong window or mask would hardly show.
# SigLIP has neither [CLS] nor a norm in front; at 4 its own rounding in fp32 would pass for an error.
_TINY_GAIN = {"llava-siglip": 2.0}
_SPECIAL = {"image_token_id": IMAGE_TOKEN, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}


def _decoder(hidden_size: int, mrope: tuple[int, int, int] | None = None, **overrides: Any) -> dict[str, Any]:
    """A language model of one or two small layers."""
    head_dim = 16
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if mrope is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope)}
    return settings | overrides


# ── Configurations ───────────────────────────────────────────────────────────


def _llava(vision: dict[str, Any], text: dict[str, Any], tower: str = "clip") -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

    siglip = tower == "siglip"
    return LlavaConfig(
        vision_config=(SiglipVisionConfig if siglip else CLIPVisionConfig)(**vision),
        text_config=LlamaConfig(**text),
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


def _llava_next(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    side = vision["image_size"]
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in grids],
        image_token_index=IMAGE_TOKEN,
    )


def _clip(width: int, blocks: int, heads: int, side: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": 14,
    }


def _qwen2(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(vision_config=vision, text_config=text, **_SPECIAL)


def _qwen2_5(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_SPECIAL)


def _qwen3(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(vision_config=vision, text_config=text, **_SPECIAL)


_TINY_QWEN = {"num_heads": 4, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
_REAL_QWEN = {"num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = (2, 3, 3)

TINY: dict[str, Callable[[int], Any]] = {
    "llava": lambda blocks: _llava(_clip(64, blocks, 4, 56), _decoder(64)),
    "llava-siglip": lambda blocks: _llava(_clip(64, blocks, 4, 56), _decoder(64), "siglip"),
    "llava-next": lambda blocks: _llava_next(_clip(64, blocks, 4, 56), _decoder(64)),
    "qwen2-vl": lambda blocks: _qwen2(
        {**_TINY_QWEN, "depth": blocks, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64}, _decoder(64, _MROPE)
    ),
    "qwen2.5-vl": lambda blocks: _qwen2_5(
        {
            **_TINY_QWEN,
            "depth": blocks,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1, blocks - 1],
        },
        _decoder(64, _MROPE),
    ),
    "qwen3-vl": lambda blocks: _qwen3(
        {
            **_TINY_QWEN,
            "depth": blocks,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [1, 2],
        },
        _decoder(64, _MROPE),
    ),
}
"""Tiny models by name; the argument is the number of vision blocks, at least 3."""

REAL: dict[str, Callable[[int], Any]] = {
    "clip-l-336": lambda blocks: _llava(_clip(1024, blocks, 16, 336), _decoder(1024, num_hidden_layers=1)),
    "qwen2-vl-7b": lambda blocks: _qwen2(
        {**_REAL_QWEN, "depth": blocks, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584},
        _decoder(3584, _MROPE, num_hidden_layers=1),
    ),
    "qwen2.5-vl-7b": lambda blocks: _qwen2_5(
        {
            **_REAL_QWEN,
            "depth": blocks,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [block for block in (7, 15, 23, 31) if block < blocks] or [blocks - 1],
        },
        _decoder(3584, _MROPE, num_hidden_layers=1),
    ),
}
"""Towers of published models by name; the argument is the number of vision blocks, `DEPTH` in the original."""

WHOLE: dict[str, Callable[[int], Any]] = {
    "llava-0.5b": lambda blocks: _llava(
        _clip(1024, blocks, 16, 336),
        _decoder(
            896,
            vocab_size=32064,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            head_dim=64,
        ),
    ),
}
"""Whole models that a CPU can time: LLaVA-1.5's tower before a language model of the size of Qwen2-0.5B."""

DEPTH = {"clip-l-336": 24, "qwen2-vl-7b": 32, "qwen2.5-vl-7b": 32, "llava-0.5b": 24}


# ── Models ───────────────────────────────────────────────────────────────────


def random_model(name: str, blocks: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `TINY` (4 blocks), `REAL` or `WHOLE` (their true depth) with random weights, in evaluation mode.

    Raises:
        InfopruneError: no such name.
    """
    from transformers import AutoModelForImageTextToText

    known = TINY | REAL | WHOLE
    if name not in known:
        raise InfopruneError(f"no model {name!r}; there are: {', '.join(known)}")
    config = known[name](blocks or DEPTH.get(name, 4))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if name in TINY:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(_TINY_GAIN.get(name, 4.0))
                else:
                    # Biases start at 0 and norms at 1, where a lost or misplaced one would not show.
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)
