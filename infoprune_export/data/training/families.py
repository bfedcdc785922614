"""What differs between the testbeds in training: schedule, computation of features, layout of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from infoprune_export.data import testbed
from infoprune_export.data.training.batches import Prefix
from infoprune_export.data.training.dense_tower import DenseTower

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Of the four stages."""

    steps: tuple[int, int, int, int]
    batch_size: int


class Family(Protocol):
    """A model under training. ``pixels`` are float32 [B, 3, height, width], normalised, all of one size."""

    schedule: Schedule
    scene_sizes: Literal["square", "mixed"]
    processor: Any
    model: Any
    """The Hugging Face model, with ``model.language_model`` and ``lm_head``."""
    tower: torch.nn.Module
    """What stage 1 trains and stages 3 and 4 leave as it is."""
    projector: torch.nn.Module | None
    """What stages 2 to 4 train at the decoder's rate and stage 1 leaves as it is."""
    feature_size: int
    """Channels of what `features` returns."""

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What stage 1 reads labels from: one vector per visual token [B, N, C] and one per image [B, C]."""

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """What the decoder sees, in image order [B, N, D]."""

    def prefix(self, rows: int, columns: int) -> Prefix:
        """Everything before the question, for an image of `rows` times `columns` visual tokens."""


class Llava:
    """CLIP tower, ``hidden_states[-2]`` without [CLS], two-layer projector, one position per token."""

    schedule = Schedule((3000, 2400, 2400, 1200), batch_size=32)
    scene_sizes: Literal["square", "mixed"] = "square"

    def __init__(self, seed: int) -> None:
        self.processor: Any = testbed.build_processor()
        self.model: Any = testbed.build_model(seed=seed)
        self.tower: torch.nn.Module = self.model.model.vision_tower
        self.projector: torch.nn.Module | None = self.model.model.multi_modal_projector
        self.feature_size: int = self.model.config.vision_config.hidden_size

    def _hidden(self, pixels: Tensor) -> Tensor:
        """``hidden_states[-2]`` [B, 1 + N, D] with [CLS], without running the unused last block."""
        tower = self.model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.model.config.vision_feature_layer + 1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self._hidden(pixels)
        return hidden[:, 1:], hidden[:, 0]

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(self._hidden(pixels)[:, 1:])

    def prefix(self, rows: int, columns: int) -> Prefix:
        tokens = rows * columns
        ids = [self.processor.tokenizer.bos_token_id] + [self.model.config.image_token_id] * tokens
        return Prefix(ids, np.arange(1 + tokens)[None], 1, tokens)


class Qwen:
    """Window-attention tower with its merger, M-RoPE.

    Other than the LLaVA's projector, the merger is part of the tower: labels are read from merged tokens, so that
    stage 1 trains it, and it is frozen with the blocks. In place of [CLS] stands the mean of the tokens.
    """

    schedule = Schedule((2300, 1300, 1900, 360), batch_size=24)
    scene_sizes: Literal["square", "mixed"] = "mixed"

    def __init__(self, seed: int) -> None:
        self.processor: Any = testbed.build_qwen_processor()
        self.model: Any = testbed.build_qwen_model(seed=seed)
        self.tower: torch.nn.Module = self.model.model.visual
        self.projector: torch.nn.Module | None = None
        self.feature_size: int = self.model.config.vision_config.out_hidden_size
        self._dense = DenseTower(self.model.model.visual)

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._dense(pixels)
        return tokens, tokens.mean(1)

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        return self._dense(pixels)

    def prefix(self, rows: int, columns: int) -> Prefix:
        config, tokens = self.model.config, rows * columns
        ids = [self.processor.tokenizer.bos_token_id, config.vision_start_token_id]
        ids += [config.image_token_id] * tokens + [config.vision_end_token_id]
        # M-RoPE: time stands still inside an image, and the text goes on behind its longer side.
        cells = np.arange(tokens)
        image = 2 + np.stack([0 * cells, cells // columns, cells % columns])
        before, after = np.tile([0, 1], (3, 1)), np.full((3, 1), 2 + max(rows, columns))
        return Prefix(ids, np.concatenate([before, image, after], 1), 2, tokens)


FAMILIES: dict[str, type[Llava] | type[Qwen]] = {"tiny-llava": Llava, "tiny-qwen2.5-vl": Qwen}
