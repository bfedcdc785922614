"""From a tower to one ONNX file: vision encoder, Stage 1 selection and projector in a single graph.

Stages of `export_onnx`:

1. `VisionEncoder` puts tower, selection and projector behind one ``forward``.
2. ``torch.onnx.export`` traces it with a dynamic batch; the selection becomes one ``infoprune::TokenSelect`` node.
3. Stack traces with local paths are removed from the graph, and the operator's function body is attached.
4. The file is written, weights beside it, and checked by onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from infoprune_export.export import operator
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.select import select_and_merge

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"


class VisionEncoder(nn.Module):
    """pixel_values -> (image_features [B, T, D_llm], kept_indices [B, T]); without selection T = N and no indices."""

    def __init__(self, tower: VisionTower, tokens: TokensSpec | None) -> None:
        super().__init__()
        self.model = tower.model
        self._tower = tower
        self._tokens = tokens if tokens is not None and tokens.method != "none" else None

    @property
    def output_names(self) -> list[str]:
        return ["image_features"] if self._tokens is None else ["image_features", "kept_indices"]

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        before_last, stream = self._tower.run_blocks(self._tower.embed({"pixel_values": pixel_values}))
        if self._tokens is None:
            return self._tower.project(self._tower.visual_tokens(stream))
        kept_tokens, kept = select_and_merge(self._tower, self._tokens, before_last, stream)
        return self._tower.project(kept_tokens), kept


def export_onnx(tower: VisionTower, tokens: TokensSpec | None, folder: Path, *, opset: int) -> None:
    """Write `MODEL` and `WEIGHTS` into an existing folder. The batch is dynamic, everything else static.

    The tower must be on the CPU and in evaluation mode.
    """
    encoder = VisionEncoder(tower, tokens)
    example = tower.example_inputs(2, torch.Generator().manual_seed(0))
    export_module(encoder, example["pixel_values"], encoder.output_names, folder, opset=opset)


def export_module(module: nn.Module, pixel_values: Tensor, outputs: list[str], folder: Path, *, opset: int) -> None:
    """`export_onnx` for any module from pixel values [B, ...] to named outputs; B is at least 2 in the example."""
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (pixel_values,),
            input_names=["pixel_values"],
            output_names=outputs,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1)}},
            opset_version=opset,
            dynamo=True,
            custom_translation_table=operator.translation_table(),
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    operator.attach_body(program.model)
    program.save(folder / MODEL, external_data=True)
    onnx.checker.check_model(folder / MODEL, full_check=True)


def golden_io(tower: VisionTower, tokens: TokensSpec | None, batch_size: int, seed: int) -> dict[str, NDArray[Any]]:
    """A fixed input batch and PyTorch's outputs for it, by ONNX name, for whoever has only the file."""
    encoder = VisionEncoder(tower, tokens).eval()
    inputs = tower.example_inputs(batch_size, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        outputs = encoder(inputs["pixel_values"])
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    named: Mapping[str, Tensor] = {**inputs, **dict(zip(encoder.output_names, values, strict=True))}
    return {name: np.ascontiguousarray(value.cpu().numpy()) for name, value in named.items()}
