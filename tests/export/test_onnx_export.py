"""One ONNX file per family and form: equal to PyTorch on sizes the trace never saw, portable, typed, reproducible."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from infoprune_export.export import operator
from infoprune_export.export.onnx import MODEL, WEIGHTS, export_onnx, golden_io, typed
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form, image_noise
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder

SELECT = TokensSpec(keep_ratio="2/9")
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FAMILIES = ("llava", "llava-siglip", "llava-next", *QWEN)
PRUNED = ("llava", "qwen2.5-vl")
SEVERAL = ("llava-next", "qwen2.5-vl")
# PyTorch's fp16 and ONNX Runtime's differ as much from fp32 as from each other: rounding, a few times 2^-10.
FP16_TOLERANCE = 1e-2


def rare(value, *values):
    """A parameter that is left to ``--exhaustive`` if it is one of `values`; others are of its kind."""
    return pytest.param(value, marks=pytest.mark.exhaustive) if value in values else value


@cache
def tower(family, dtype=torch.float32, pruned=False):
    made = tower_of(random_model(family, 4 if pruned else 3).to(dtype))
    if pruned:
        torch.manual_seed(0)
        made.blocks[0].keep_heads([])
        made.blocks[0].keep_neurons(list(range(40)))
        made.blocks[1].make_ffn_linear(8)
        torch.nn.init.normal_(made.blocks[1].ffn_in.weight, std=0.1)
        torch.nn.init.normal_(made.blocks[1].ffn_out.weight, std=0.1)
        made.blocks[-1].keep_heads([1, 3])
        made.blocks[0].make_ffn_bypass(4)
        made.blocks[-1].make_ffn_factored([12] * len(made.blocks[-1].ffn_projections))
        for layer in (*made.blocks[0].ffn_projections.values(), *made.blocks[-1].ffn_projections.values()):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    @cache
    def export(family, tokens=None, several=None, dtype=torch.float32, pruned=False):
        folder = tmp_path_factory.mktemp(family)
        export_onnx(tower(family, dtype, pruned), tokens, folder, opset=20, several=several)
        return folder / MODEL

    return export


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, planned: Mapping[str, torch.Tensor]):
    names = [value.name for value in session.get_outputs()]
    feed = {name: value.numpy() for name, value in planned.items()}
    return dict(zip(names, session.run(names, feed), strict=True))


def assert_equal(path, made, tokens, several, inputs, tolerance=1e-4):
    """Largest error over largest value; the same tokens kept."""
    session = session_of(path)
    encoder = VisionEncoder(made, tokens, several)
    for planned in made.calls(inputs, encoder.form):
        with torch.no_grad():
            expected = encoder.run(planned)
        assert {value.name for value in session.get_inputs()} == set(planned)
        outputs = run(session, planned)
        reference = expected["image_features"].numpy()
        assert outputs["image_features"].shape == reference.shape
        assert np.abs(outputs["image_features"] - reference).max() <= tolerance * np.abs(reference).max()
        if tokens is not None:
            np.testing.assert_array_equal(outputs["kept_indices"], expected["kept_indices"].numpy())


def inputs_of(family, made, seed=5):
    """Sizes, numbers and (for Qwen) frames that the trace did not see."""
    generator = torch.Generator().manual_seed(seed)
    if family in QWEN:
        return made.grid_inputs([(1, 4, 10), (1, 14, 6)], generator)
    return made.example_inputs(2, generator)


def unequal(family, made, images):
    """Images of as many sizes, none of which the trace saw."""
    generator = torch.Generator().manual_seed(images)
    if family in QWEN:
        return made.grid_inputs([(1, 4, 6), (1, 10, 12), (1, 16, 6), (1, 4, 22)][:images], generator)
    sizes = torch.tensor([(30, 112), (112, 112), (112, 50), (112, 80)][:images])
    noise = image_noise(5 * images, made.image_size, made.image_size, generator)
    return {"pixel_values": noise.unflatten(0, (images, 5)), "image_sizes": sizes}


# ── Every family ──


@pytest.mark.parametrize("family", [rare(family, "llava-siglip", "qwen2-vl", "qwen3-vl") for family in FAMILIES])
def test_all_tokens_equal_pytorch_for_several_images(exported, family):
    path, made = exported(family), tower(family)
    assert_equal(path, made, None, None, inputs_of(family, made))
    if family in QWEN:
        video = made.grid_inputs([(3, 4, 6), (1, 8, 8), (2, 10, 4)], torch.Generator().manual_seed(1))
        assert_equal(path, made, None, None, video)


@pytest.mark.parametrize("family", [rare(family, "llava-siglip", "qwen2-vl", "qwen3-vl") for family in FAMILIES])
def test_selected_tokens_equal_pytorch(exported, family):
    """Some towers pruned: no heads, fewer heads, fewer neurons, a linear FFN. Two images, then one.

    A graph for one image of a ragged family needs no segments for full attention.
    """
    pruned = family in PRUNED
    path, made = exported(family, SELECT, pruned=pruned), tower(family, pruned=pruned)
    assert "frame_index" not in {value.name for value in session_of(path).get_inputs()}
    inputs = inputs_of(family, made)
    assert_equal(path, made, SELECT, None, inputs)
    assert_equal(path, made, SELECT, None, made.split(inputs)[0])


@pytest.mark.parametrize("images", [1, 2, 3, 4])
@pytest.mark.parametrize("family", [rare(family, "llava-next") for family in SEVERAL])
def test_selected_tokens_of_several_unequal_images_equal_pytorch_and_one_call_each(exported, family, images):
    """Smaller images are padded to the largest one's number of tokens, and say where they end."""
    pruned = family in PRUNED
    path, made = exported(family, SELECT, True, pruned=pruned), tower(family, pruned=pruned)
    inputs = unequal(family, made, images)
    assert_equal(path, made, SELECT, True, inputs)
    outputs = run(session_of(path), made.plan(inputs, Form(several=True, selecting=True)))
    kept, features = outputs["kept_indices"], outputs["image_features"]
    numbers = (kept >= 0).sum(1)
    assert len(kept) == images
    assert images == 1 or len(set(numbers)) == images  # they are unequal
    alone = session_of(exported(family, SELECT, pruned=pruned))
    for row, planned in enumerate(made.calls(inputs, Form(several=False, selecting=True))):
        expected, own = run(alone, planned), numbers[row]
        assert (kept[row, own:] == -1).all()
        np.testing.assert_array_equal(kept[row, :own], expected["kept_indices"][0])
        error = np.abs(features[row, :own] - expected["image_features"][0]).max()
        assert error <= 1e-4 * np.abs(expected["image_features"]).max()


def test_a_video_between_images_is_selected_from_as_one(exported):
    family = "qwen2.5-vl"
    path, made = exported(family, SELECT, True, pruned=True), tower(family, pruned=True)
    video = made.grid_inputs([(1, 8, 8), (3, 6, 8), (1, 2, 4)], torch.Generator().manual_seed(2))
    assert_equal(path, made, SELECT, True, video)


# ── The file ──


def test_graph_has_one_node_of_each_operator_with_its_body(exported):
    path = exported("llava", SELECT, pruned=True)
    model = onnx.load(path, load_external_data=False)
    nodes = {node.op_type: node for node in model.graph.node if node.domain == operator.DOMAIN}
    assert sum(node.domain == operator.DOMAIN for node in model.graph.node) == 2
    select, received = (
        {a.name: onnx.helper.get_attribute_value(a) for a in nodes[name].attribute}
        for name in ("TokenSelect", "ReceivedAttention")
    )
    assert (select["keep_numerator"], select["keep_denominator"]) == (2, 9)
    assert received["scale"] == pytest.approx(tower("llava").blocks[-1].head_dim ** -0.5)
    assert sorted(function.name for function in model.functions) == ["ReceivedAttention", "TokenSelect"]
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, operator.DOMAIN: 1}
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("name", ["TokenSelect", "ReceivedAttention"])
def test_graph_without_a_body_does_not_load(exported, tmp_path, name):
    """The bodies, and nothing else, are what makes the file portable."""
    model = onnx.load(exported("llava", SELECT, pruned=True))
    bodies = [body for body in model.functions if body.name != name]
    del model.functions[:]
    model.functions.extend(bodies)
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(Exception, match=name):
        session_of(tmp_path / "bare.onnx")


def test_a_graph_without_selection_has_no_operator_of_ours(exported):
    model = onnx.load(exported("qwen2.5-vl"), load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("family", PRUNED)
def test_graph_holds_no_path_of_this_machine(exported, family):
    path = exported(family, SELECT, pruned=True)
    content = path.read_bytes()
    assert b".py" not in content
    assert str(path.parent).encode() not in content


def test_extents_are_dynamic_and_weights_are_external(exported):
    path = exported("qwen2.5-vl")
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(path, load_external_data=False).graph.input
    }
    assert shapes["pixel_values"][1] == 294
    assert shapes["window_index"][1] == 64
    dynamic = [shapes["pixel_values"][0], shapes["window_index"][0], *shapes["frame_index"]]
    assert all(isinstance(extent, str) for extent in dynamic), shapes
    assert (path.parent / WEIGHTS).stat().st_size > 100_000


def test_export_is_reproducible(exported, tmp_path):
    first = exported("llava", SELECT, pruned=True)
    export_onnx(tower.__wrapped__("llava", pruned=True), SELECT, tmp_path, opset=20)
    for name in (MODEL, WEIGHTS):
        assert (first.parent / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(("family", "images"), [("llava", 2), ("qwen3-vl", 1)])
def test_golden_outputs_are_pytorchs(family, images):
    made = tower(family)
    golden = golden_io(made, SELECT, images, seed=1)
    encoder = VisionEncoder(made, SELECT)
    with torch.no_grad():
        expected = encoder.run({k: torch.from_numpy(golden[k]) for k in golden if k not in encoder.output_names})
    assert golden["kept_indices"].dtype == np.int64
    for name in encoder.output_names:
        np.testing.assert_array_equal(golden[name], expected[name].numpy())


# ── Types ──


def types_of(path):
    """ONNX model, and the element type of every value in its graph."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return model, {value.name: value.type.tensor_type.elem_type for value in values}


# Operators that a graph of this dtype may compute in fp32 without selection: rotary embedding, RMSNorm, the weighted
# sum of position embeddings, and a bf16 patch convolution, which ONNX does not have at opset 20.
FP32 = {
    "Cast", "Mul", "Reshape", "Concat", "Unsqueeze", "Cos", "Sin", "Split", "Neg", "Add", "Pow", "ReduceMean", "Sqrt",
    "Reciprocal", "ReduceSum", "Conv", "Slice",
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen2.5-vl", torch.float16), pytest.param("llava-siglip", torch.bfloat16, marks=pytest.mark.exhaustive)],
)
def test_typed_export(exported, family, dtype):
    """Weights, features and matrix products in the model's dtype, rotary in fp32, and no storm of casts."""
    model, types = types_of(exported(family, None, None, dtype))
    kind = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert types["pixel_values"] == types["image_features"] == kind
    assert {t.data_type for t in model.graph.initializer if np.prod(t.dims) > 64} == {kind}
    for node in model.graph.node:
        if types[node.output[0]] == onnx.TensorProto.FLOAT:
            assert node.op_type in FP32, (node.op_type, node.name)
        if node.op_type in ("MatMul", "Gemm", "Softmax", "LayerNormalization"):
            assert types[node.output[0]] == kind, node.name
        if node.op_type in ("Cos", "Sin", "Pow"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
    # Each block casts query and key there and back, and what RMSNorm needs.
    assert sum(node.op_type == "Cast" for node in model.graph.node) <= 9 * 3 + 5


def test_half_precision_selects_in_fp32(exported):
    """What is chosen by in an fp16 file is fp32, and the file agrees with the fp32 tower in PyTorch."""
    family = "llava"
    path, made, half = exported(family, SELECT, None, torch.float16), tower(family), tower(family, torch.float16)
    model, types = types_of(path)
    nodes = {node.op_type: node for node in model.graph.node if node.domain == operator.DOMAIN}
    fp32, fp16, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    assert [types[name] for name in nodes["TokenSelect"].input] == [fp32, fp32, int64]
    assert [types[name] for name in nodes["ReceivedAttention"].input] == [fp16, fp16, fp32, fp32]
    encoder = VisionEncoder(made, SELECT)
    planned = made.calls(inputs_of(family, made), encoder.form)[0]
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in encoder.run(planned).items()}
    outputs = run(session_of(path), typed(half, planned))
    np.testing.assert_array_equal(outputs["kept_indices"], expected["kept_indices"])
    error = np.abs(outputs["image_features"].astype(np.float32) - expected["image_features"]).max()
    assert 0 < error <= FP16_TOLERANCE * np.abs(expected["image_features"]).max()
