"""One ONNX file per family and form: equal to PyTorch on sizes the trace never saw, portable, typed, reproducible."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from infoprune_export.errors import InfopruneError
from infoprune_export.export import operator
from infoprune_export.export.onnx import MODEL, WEIGHTS, export_onnx, golden_io, typed
from infoprune_export.models import tower_of
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.reference import literal_selection

SELECT = TokensSpec(keep_ratio="2/9")
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FAMILIES = ("llava", "llava-siglip", "llava-next", *QWEN)
PRUNED = ("llava", "qwen2.5-vl")
# PyTorch's fp16 and ONNX Runtime's differ as much from fp32 as from each other: rounding, a few times 2^-10.
FP16_TOLERANCE = 1e-2


@cache
def tower(family, dtype=torch.float32, pruned=False):
    made = tower_of(random_model(family, 3).to(dtype))
    if pruned:
        torch.manual_seed(0)
        made.blocks[0].keep_heads([])
        made.blocks[0].keep_neurons(list(range(40)))
        made.blocks[1].make_ffn_linear(8)
        torch.nn.init.normal_(made.blocks[1].ffn_in.weight, std=0.1)
        torch.nn.init.normal_(made.blocks[1].ffn_out.weight, std=0.1)
        made.blocks[-1].keep_heads([1, 3])
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


# ── Every family ──


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_equal_pytorch_for_several_images(exported, family):
    path, made = exported(family), tower(family)
    assert_equal(path, made, None, None, inputs_of(family, made))
    if family in QWEN:
        video = made.grid_inputs([(3, 4, 6), (1, 8, 8), (2, 10, 4)], torch.Generator().manual_seed(1))
        assert_equal(path, made, None, None, video)


@pytest.mark.parametrize(("family", "pruned"), [(family, family in PRUNED) for family in FAMILIES])
def test_selected_tokens_equal_pytorch(exported, family, pruned):
    """Some towers pruned: no heads, fewer heads, fewer neurons, a linear FFN. Two images, then one.

    A graph for one image of a ragged family needs no segments for full attention.
    """
    path, made = exported(family, SELECT, pruned=pruned), tower(family, pruned=pruned)
    assert "frame_index" not in {value.name for value in session_of(path).get_inputs()}
    inputs = inputs_of(family, made)
    assert_equal(path, made, SELECT, None, inputs)
    assert_equal(path, made, SELECT, None, made.split(inputs)[0])


def test_several_images_with_selection_are_refused_in_a_ragged_family(tmp_path):
    with pytest.raises(InfopruneError, match="several"):
        export_onnx(tower("qwen2-vl"), SELECT, tmp_path, opset=20, several=True)
    assert not list(tmp_path.iterdir())


# ── The file ──


def test_graph_has_one_operator_node_with_its_body(exported):
    path = exported("llava", SELECT, pruned=True)
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == operator.DOMAIN]
    assert [node.op_type for node in nodes] == ["TokenSelect"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert (attributes["keep_numerator"], attributes["keep_denominator"]) == (2, 9)
    assert [function.name for function in model.functions] == ["TokenSelect"]
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, operator.DOMAIN: 1}
    onnx.checker.check_model(path, full_check=True)


def test_graph_without_its_body_does_not_load(exported, tmp_path):
    """The body, and nothing else, is what makes the file portable."""
    model = onnx.load(exported("llava", SELECT, pruned=True))
    del model.functions[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(Exception, match="TokenSelect"):
        session_of(tmp_path / "bare.onnx")


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
    [("qwen2.5-vl", torch.float16), ("llava-siglip", torch.bfloat16)],
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
    """What the operator sees in an fp16 file is fp32, and the file agrees with the fp32 tower in PyTorch."""
    family = "llava"
    path, made, half = exported(family, SELECT, None, torch.float16), tower(family), tower(family, torch.float16)
    model, types = types_of(path)
    node = next(node for node in model.graph.node if node.domain == operator.DOMAIN)
    assert [types[name] for name in node.input] == [onnx.TensorProto.FLOAT] * 2
    encoder = VisionEncoder(made, SELECT)
    planned = made.calls(inputs_of(family, made), encoder.form)[0]
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in encoder.run(planned).items()}
    outputs = run(session_of(path), typed(half, planned))
    np.testing.assert_array_equal(outputs["kept_indices"], expected["kept_indices"])
    error = np.abs(outputs["image_features"].astype(np.float32) - expected["image_features"]).max()
    assert 0 < error <= FP16_TOLERANCE * np.abs(expected["image_features"]).max()


# ── The operator alone ──


def operator_model(numerator, denominator, pool_factor):
    """A graph with nothing but the node; N and D are dynamic."""
    operator.register_schema()
    node = onnx.helper.make_node(
        "TokenSelect",
        ["features", "prior"],
        ["indices"],
        domain=operator.DOMAIN,
        keep_numerator=numerator,
        keep_denominator=denominator,
        pool_factor=pool_factor,
    )
    graph = onnx.helper.make_graph(
        [node],
        "operator",
        [
            onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["B", "N", "D"]),
            onnx.helper.make_tensor_value_info("prior", onnx.TensorProto.FLOAT, ["B", "N"]),
        ],
        [onnx.helper.make_tensor_value_info("indices", onnx.TensorProto.INT64, ["B", "T"])],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(operator.DOMAIN, 1)]
    import onnx_ir as ir

    model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    operator.attach_body(model)
    return ir.serde.serialize_model(model).SerializeToString()


@pytest.mark.parametrize(
    ("tokens", "dim", "numerator", "denominator", "pool_factor"),
    [(50, 80, 2, 5, 2.0), (200, 256, 3, 4, 1.25), (1, 4, 1, 9, 2.0), (64, 100, 1, 1, 1.0), (130, 140, 1, 1, 1.5)],
)
def test_operator_body_equals_algorithm_1(tokens, dim, numerator, denominator, pool_factor):
    """Including more pivots than one block of 64, a pool as large as the image, and N = 1."""
    session = onnxruntime.InferenceSession(operator_model(numerator, denominator, pool_factor))
    rng = np.random.default_rng(tokens)
    features = rng.normal(size=(3, tokens, dim)).astype(np.float32)
    prior = rng.dirichlet(np.ones(tokens), 3).astype(np.float32)
    (kept,) = session.run(None, {"features": features, "prior": prior})
    for row in range(3):
        expected = literal_selection(features[row], prior[row], numerator, denominator, pool_factor)
        assert kept[row].tolist() == sorted(expected)


@pytest.mark.parametrize("fault", ["zero", "duplicates", "nan features", "nan prior", "constant prior"])
def test_operator_body_equals_pytorch_on_degenerate_input(fault):
    from infoprune_export.tokens.select import token_select

    rng = np.random.default_rng(0)
    features, prior = rng.normal(size=(2, 40, 16)).astype(np.float32), rng.random((2, 40), np.float32)
    if fault == "zero":
        features[:] = 0
    elif fault == "duplicates":
        features[:] = features[:, :1]
    elif fault == "nan features":
        features[0, 3] = np.nan
    elif fault == "nan prior":
        prior[1, :5] = np.nan
    else:
        prior[:] = 0.5
    (kept,) = onnxruntime.InferenceSession(operator_model(1, 2, 2.0)).run(None, {"features": features, "prior": prior})
    expected = token_select(torch.from_numpy(features), torch.from_numpy(prior), 1, 2)
    np.testing.assert_array_equal(kept, expected.numpy())
    assert all(len(set(row)) == 20 for row in kept.tolist())
