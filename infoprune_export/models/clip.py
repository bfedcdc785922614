"""LLaVA-1.5 with a CLIP or SigLIP tower: one square size, a batch of images.

Features come from ``hidden_states[vision_feature_layer]``, -2 in LLaVA-1.5: the last block exists in the checkpoint
and is never used, so it is no part of the tower and stays as it is. CLIP's [CLS] takes part in attention and is dropped
before the projector (``vision_feature_select_strategy: default``); SigLIP has none (``full``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.attention import Context, received_attention
from infoprune_export.models.tower import (
    Activations,
    Block,
    BlockNames,
    Form,
    Inputs,
    Layout,
    Planned,
    Prior,
    VisionTower,
    image_noise,
    require,
)

_NAMES = BlockNames(
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
    ffn="mlp",
    ffn_in=("fc1",),
    ffn_out="fc2",
    attention_norm="layer_norm1",
    ffn_norm="layer_norm2",
    returns_weights=True,
)
# Vision tower type -> leading special tokens, and the select strategy under which they are left out.
_TOWERS = {"clip_vision_model": (1, "default"), "siglip_vision_model": (0, "full")}


class LlavaTower(VisionTower):
    """Vision transformer and LLaVA's projector."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        vision = config.vision_config
        if vision.model_type not in _TOWERS:
            raise InfopruneError(
                f"LLaVA with vision tower {vision.model_type!r} is not supported; supported: {', '.join(_TOWERS)}"
            )
        self._special, strategy = _TOWERS[vision.model_type]
        if config.vision_feature_select_strategy != strategy:
            raise InfopruneError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} with {vision.model_type} "
                f"does not give one visual token per patch, which selection needs; supported: {strategy}"
            )
        if self._special:
            self.priors = ("received", "value", "cls")
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise InfopruneError(
                f"vision_feature_layer {layer!r}: features of several layers are not supported; use one"
            )
        transformer = model.model.vision_tower
        # Some transformers versions nest the transformer once more.
        self._transformer = getattr(transformer, "vision_model", transformer)
        self._projector = model.model.multi_modal_projector
        depth = len(self._transformer.encoder.layers)
        executed = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= executed <= depth:
            raise InfopruneError(f"vision_feature_layer {layer} is outside the tower's {depth} blocks")
        self.image_size = int(vision.image_size)
        self.side = self.image_size // int(vision.patch_size)
        head_dim = vision.hidden_size // vision.num_attention_heads
        self.blocks = [Block(module, _NAMES, head_dim) for module in self._transformer.encoder.layers[:executed]]

    # ── Planning ──

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        require(inputs, "pixel_values")
        shape = tuple(inputs["pixel_values"].shape)
        expected = (3, self.image_size, self.image_size)
        if len(shape) != 4 or shape[1:] != expected:
            raise InfopruneError(
                f"pixel_values {list(shape)}: this tower takes [batch, {', '.join(map(str, expected))}]; "
                "let the model's own processor resize the images"
            )

    def layouts(self, inputs: Inputs) -> list[Layout]:
        tokens = self.side**2
        return [Layout(torch.arange(tokens)[None], tokens)] * len(inputs["pixel_values"])

    def dynamic_shapes(self, form: Form) -> dict[str, dict[int, Any]]:
        return {"pixel_values": {0: torch.export.Dim("batch", min=1)}}

    def example_inputs(self, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": image_noise(images, self.image_size, self.image_size, generator)}

    def pictures(self, inputs: Inputs) -> list[tuple[Tensor, int, int]]:
        return [(pixels, self.side, self.side) for pixels in inputs["pixel_values"]]

    def of_pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs of normalised images [3, H, W] of one size, which need not be the processor's."""
        return {"pixel_values": torch.stack(list(pictures))}

    # ── Running ──

    def embed(self, planned: Planned) -> tuple[Tensor, Context]:
        pixels = planned["pixel_values"]
        resized = tuple(pixels.shape[2:]) != (self.image_size, self.image_size)
        stream = self._transformer.embeddings(pixels, interpolate_pos_encoding=resized)
        if hasattr(self._transformer, "pre_layrnorm"):
            stream = self._transformer.pre_layrnorm(stream)
        return stream, Context()

    def visual_tokens(self, activations: Activations, planned: Planned) -> Tensor:
        return activations.last[:, self._special :] if self._special else activations.last

    def attention_prior(
        self, activations: Activations, context: Context, planned: Planned, kind: Prior, block: int = -1
    ) -> Tensor:
        chosen, query, key, value = self._attending(activations, context, block)
        rows = query[:, :1] if kind == "cls" else query[:, self._special :]
        weight = torch.ones_like(rows[..., 0, 0], dtype=torch.float32) / rows.shape[1]
        bias = torch.zeros_like(key[..., 0, 0], dtype=torch.float32)
        received = received_attention(rows, key, weight, bias, chosen.head_dim**-0.5)
        if kind == "value":
            received = received * value.float().flatten(2).norm(dim=-1)
        return received[:, self._special :] if self._special else received

    def attention_keys(self, activations: Activations, context: Context, planned: Planned) -> Tensor:
        _, _, key, _ = self._attending(activations, context, -1)
        return key.mean(dim=2)[:, self._special :]

    def token_grids(self, planned: Planned) -> list[tuple[int, int]]:
        return [(self.side, self.side)] * len(planned["pixel_values"])

    def readers(self) -> list[nn.Module]:
        return [self._projector]

    def project(self, tokens: Tensor) -> Tensor:
        return self._projector(tokens)
