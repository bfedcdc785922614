"""From a tower to one ONNX file: vision encoder, Stage 1 selection and projector in a single graph.

Stages of `export_onnx`:

1. `VisionEncoder` puts tower, selection and projector behind one ``forward`` on planned tensors.
2. ``torch.onnx.export`` traces it in the dtype of its weights, with every extent dynamic that varies between images.
   Prior and selection become one ``infoprune::ReceivedAttention`` and one ``infoprune::TokenSelect`` node. Both, rotary
   angles and RMSNorm's mean square are fp32 in every dtype, because the PyTorch code says so; LayerNormalization is by
   its definition.
3. Values and nodes get names that say which part they belong to, see `names`; stack traces with local paths are removed
   from the graph, and the operators' function bodies are attached.
4. The file is written, weights beside it, and checked by onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from infoprune_export.export import names, operator
from infoprune_export.models.boundaries import visiting
from infoprune_export.models.tower import Form, VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"


def export_onnx(
    tower: VisionTower, tokens: TokensSpec | None, folder: Path, *, opset: int, several: bool | None = None
) -> Form:
    """Write `MODEL` and `WEIGHTS` into an existing folder, in the dtype of the tower's weights.

    Returns the graph's form. `several` as in `form_of`. The tower must be on the CPU and in evaluation mode.
    """
    encoder = VisionEncoder(tower, tokens, several)
    export_module(encoder, tower, encoder.form, encoder.output_names, folder, opset=opset)
    return encoder.form


def export_module(
    module: nn.Module, tower: VisionTower, form: Form, outputs: list[str], folder: Path, *, opset: int
) -> None:
    """`export_onnx` for any module from a tower's planned tensors to named outputs."""
    images = 3 if form.several else 1
    example = typed(tower, tower.example_planned(images, torch.Generator().manual_seed(0), form))
    with torch.no_grad(), visiting(names.mark):
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs={"planned": example},
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes={"planned": {name: {} for name in example} | tower.dynamic_shapes(form)},
            opset_version=opset,
            dynamo=True,
            custom_translation_table=operator.translation_table() | names.translation(),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    names.name_boundaries(program.model)
    _simplify(program.model)
    widen_convolutions(program.model)
    names.name_nodes(program.model)
    operator.attach_bodies(program.model)
    program.save(folder / MODEL, external_data=True)
    onnx.checker.check_model(folder / MODEL, full_check=True)


def _simplify(model: ir.Model) -> None:
    """What the exporter's own optimisation does, with repeated subexpressions merged first.

    Every block computes the same shapes anew, a third of all nodes. Merging them before the rewrite rules are matched
    against each node halves the time of a 32-block export.
    """
    for step in (
        passes.InlinePass(),
        optimizer.fold_constants_ir,
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        step(model)
    optimizer.optimize_ir(model, num_iterations=1)
    passes.IdentityEliminationPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)


def widen_convolutions(model: ir.Model) -> None:
    """Compute bf16 convolutions (the patch embedding) in fp32; ONNX has bf16 ones only from opset 22 on."""
    if model.opset_imports[""] >= 22:
        return

    def cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        node = ir.node("Cast", [value], {"to": dtype}, name=name)
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, value.shape
        return node

    for node in list(model.graph):
        if node.op_type != "Conv" or node.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        for place, value in enumerate(node.inputs):
            if value is not None:
                wide = cast(value, ir.DataType.FLOAT, f"{node.name}_input_{place}")
                model.graph.insert_before(node, wide)
                node.replace_input_with(place, wide.outputs[0])
        result = node.outputs[0]
        narrow = cast(result, ir.DataType.BFLOAT16, f"{node.name}_output")
        model.graph.insert_after(node, narrow)
        result.dtype = ir.DataType.FLOAT
        for user, place in list(result.uses()):
            if user is not narrow:
                user.replace_input_with(place, narrow.outputs[0])


def typed(tower: VisionTower, planned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Planned tensors with pixels in the dtype of the tower's weights; indices and fp32 interpolation weights stay."""
    dtype = tower.dtype
    return {name: value.to(dtype) if name == "pixel_values" else value for name, value in planned.items()}


def golden_io(
    tower: VisionTower, tokens: TokensSpec | None, images: int, seed: int, several: bool | None = None
) -> dict[str, NDArray[Any]]:
    """Planned tensors of one call and PyTorch's outputs for it, by ONNX name, for whoever has only the file."""
    encoder = VisionEncoder(tower, tokens, several).eval()
    inputs = tower.example_inputs(images, torch.Generator().manual_seed(seed))
    planned = typed(tower, tower.calls(inputs, encoder.form)[0])
    with torch.inference_mode():
        named: Mapping[str, Tensor] = {**planned, **encoder.run(planned)}
    return {name: np.ascontiguousarray(value.cpu().numpy()) for name, value in named.items()}
