"""LLaVA with a CLIP tower (LLaVA-1.5 and the testbed).

Features come from ``hidden_states[vision_feature_layer]``, -2 in LLaVA-1.5: the last block exists in the checkpoint
and is never used, so it is no part of the tower and stays as it is. [CLS] takes part in attention and is dropped
before the projector (``vision_feature_select_strategy: default``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import prune_linear_layer

from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import Block, FfnShape, Prior, VisionTower


def _select(layer: nn.Linear, index: Sequence[int], dim: int) -> nn.Linear:
    """Keep these outputs (dim 0) or inputs (dim 1), in the layer's own dtype."""
    return prune_linear_layer(layer, torch.as_tensor(index), dim).to(layer.weight.dtype)


def _empty_linear(inputs: int, outputs: int, **factory: Any) -> nn.Linear:
    """A Linear without weights, and without torch's warning that there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(inputs, outputs, **factory)


class ConstantAttention(nn.Module):
    """Attention without heads: the output projection's bias at every position.

    The projection stays as a Linear(0, D), so that its empty weight is in the checkpoint and a loader that does not
    know about pruning stops at its shape instead of filling in random heads.
    """

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.out_proj = _empty_linear(0, hidden_size, **factory)
        self.num_heads = 0

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.out_proj.bias.expand_as(hidden_states), None


class ConstantFfn(nn.Module):
    """FFN without neurons: the down projection's bias; see `ConstantAttention` for the empty weights."""

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = _empty_linear(hidden_size, 0, **factory)
        self.fc2 = _empty_linear(0, hidden_size, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2.bias.expand_as(hidden_states)


class ClipBlock(Block):
    """A ``CLIPEncoderLayer``: split q, k, v with biases; fc1, activation, fc2."""

    module: Any

    def __init__(self, module: nn.Module, head_dim: int) -> None:
        self.module = module
        self.head_dim = head_dim

    def run(self, stream: Tensor) -> Tensor:
        return self.module(stream, attention_mask=None)

    @property
    def num_heads(self) -> int:
        return int(self.module.self_attn.num_heads)

    @property
    def ffn_shape(self) -> FfnShape:
        mlp = self.module.mlp
        if isinstance(mlp, ConstantFfn):
            return FfnShape("constant", 0)
        return FfnShape("linear" if isinstance(mlp.activation_fn, nn.Identity) else "mlp", mlp.fc1.out_features)

    @property
    def attention_out(self) -> nn.Linear:
        return self.module.self_attn.out_proj

    @property
    def ffn_in(self) -> nn.Linear:
        return self.module.mlp.fc1

    @property
    def ffn_out(self) -> nn.Linear:
        return self.module.mlp.fc2

    @property
    def ffn_norm(self) -> nn.Module:
        return self.module.layer_norm2

    def keep_heads(self, heads: Sequence[int]) -> None:
        attention = self.module.self_attn
        if not heads:
            bias = attention.out_proj.bias
            constant = ConstantAttention(len(bias), device=bias.device, dtype=bias.dtype)
            constant.out_proj.bias = bias
            self.module.self_attn = constant
            return
        channels = [head * self.head_dim + channel for head in heads for channel in range(self.head_dim)]
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, _select(getattr(attention, name), channels, dim=0))
        attention.out_proj = _select(attention.out_proj, channels, dim=1)
        attention.num_heads = len(heads)

    def keep_neurons(self, neurons: Sequence[int]) -> None:
        mlp = self.module.mlp
        if not neurons:
            bias = mlp.fc2.bias
            constant = ConstantFfn(len(bias), device=bias.device, dtype=bias.dtype)
            constant.fc2.bias = bias
            self.module.mlp = constant
            return
        mlp.fc1, mlp.fc2 = _select(mlp.fc1, neurons, dim=0), _select(mlp.fc2, neurons, dim=1)

    def make_ffn_linear(self, rank: int) -> None:
        mlp, old = self.module.mlp, self.module.mlp.fc2
        factory: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        mlp.fc1 = nn.Linear(mlp.fc1.in_features, rank, bias=False, **factory)
        mlp.fc2 = nn.Linear(rank, old.out_features, **factory)
        mlp.activation_fn = nn.Identity()
        if old.weight.device.type != "meta":
            for parameter in (mlp.fc1.weight, mlp.fc2.weight, mlp.fc2.bias):
                nn.init.zeros_(parameter)


class LlavaClipTower(VisionTower):
    """CLIP vision transformer and LLaVA's projector."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise InfopruneError(
                f"LLaVA with vision tower {vision.model_type!r} is not supported; supported: clip_vision_model"
            )
        if config.vision_feature_select_strategy != "default":
            raise InfopruneError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} keeps [CLS] as a visual "
                "token, which selection cannot rank; supported: default"
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise InfopruneError(
                f"vision_feature_layer {layer!r}: features of several layers are not supported; use one"
            )
        clip = model.model.vision_tower
        # Some transformers versions nest the transformer once more.
        self._clip = getattr(clip, "vision_model", clip)
        self._projector = model.model.multi_modal_projector
        depth = len(self._clip.encoder.layers)
        executed = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= executed <= depth:
            raise InfopruneError(f"vision_feature_layer {layer} is outside the tower's {depth} blocks")
        self.image_size = vision.image_size
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2
        head_dim = vision.hidden_size // vision.num_attention_heads
        self.blocks = [ClipBlock(module, head_dim) for module in self._clip.encoder.layers[:executed]]

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._clip.pre_layrnorm(self._clip.embeddings(inputs["pixel_values"]))

    def visual_tokens(self, stream: Tensor) -> Tensor:
        return stream[:, 1:]

    def attention_prior(self, stream: Tensor, kind: Prior) -> Tensor:
        layer: Any = self.blocks[-1].module
        attention = layer.self_attn
        if not attention.num_heads:
            raise InfopruneError("the last block has no attention head left, so it gives no token prior; keep one")
        hidden = layer.layer_norm1(stream)
        shape = (hidden.shape[0], -1, attention.num_heads, attention.head_dim)
        keys = attention.k_proj(hidden).view(shape).transpose(1, 2).float()
        queries = hidden[:, :1] if kind == "cls" else hidden[:, 1:]
        queries = attention.q_proj(queries).view(shape).transpose(1, 2).float()
        scores = torch.softmax(queries @ keys.transpose(2, 3) * attention.scale, dim=-1)
        return scores.mean(dim=(1, 2))[:, 1:]

    def project(self, tokens: Tensor) -> Tensor:
        return self._projector(tokens)

    def example_inputs(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Coarse noise enlarged: smooth like a photograph, so that attention is not uniform.
        coarse = torch.randn(batch_size, 3, 8, 8, generator=generator)
        pixels = F.interpolate(coarse, size=(self.image_size, self.image_size), mode="bilinear")
        return {"pixel_values": pixels}

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        shape = tuple(inputs["pixel_values"].shape)
        expected = (3, self.image_size, self.image_size)
        if len(shape) != 4 or shape[1:] != expected:
            raise InfopruneError(
                f"pixel_values {list(shape)}: this tower takes [batch, {', '.join(map(str, expected))}]; "
                "let the model's own processor resize the images"
            )
