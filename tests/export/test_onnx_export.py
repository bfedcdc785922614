import numpy as np
import onnx
import pytest
import torch

from infoprune_export.engine.onnxruntime import OnnxRuntimeEngine, open_session
from infoprune_export.export import operator
from infoprune_export.export.onnx import MODEL, WEIGHTS, VisionEncoder, export_onnx, golden_io
from infoprune_export.recipe import Target, TokensSpec
from infoprune_export.tokens.reference import literal_selection
from infoprune_export.validate.parity import encoder_parity

CPU = Target(name="test", description="", backend="onnxruntime", providers=("CPUExecutionProvider",))
SPECS = {
    "ours": TokensSpec(),
    "paper": TokensSpec(keep_ratio="2/9", prior="cls", normalize=False, pool_factor=2.0),
    "drop": TokensSpec(keep_ratio="1/9", merge=False),
    "all": TokensSpec(keep_ratio=1),
    "one": TokensSpec(keep_ratio="1/64"),
    "none": TokensSpec(method="none"),
}


@pytest.fixture
def exported(random_vlm, tmp_path):
    def export(tokens, prune=True):
        if prune:
            random_vlm.tower.blocks[0].keep_heads([])
            random_vlm.tower.blocks[1].keep_heads([1, 3])
            random_vlm.tower.blocks[2].keep_neurons([])
            random_vlm.tower.blocks[3].make_ffn_linear(8)
            random_vlm.tower.blocks[4].keep_heads([2])
        export_onnx(random_vlm.tower, tokens, tmp_path, opset=20)
        return tmp_path / MODEL

    return export


def engine_of(path):
    return OnnxRuntimeEngine(open_session(path, CPU), {})


@pytest.mark.parametrize("name", SPECS)
def test_onnx_equals_pytorch_over_batch_sizes(exported, random_vlm, name):
    engine = engine_of(exported(SPECS[name]))
    for batch in (1, 2, 5):
        inputs = random_vlm.tower.example_inputs(batch, torch.Generator().manual_seed(batch))
        result = encoder_parity(
            "onnx", random_vlm.tower, SPECS[name], engine, inputs, case="", tolerance=1e-4, replay_tolerance=1e-2
        )
        assert result.passed, result


def test_graph_has_one_operator_node_with_its_body(exported):
    path = exported(SPECS["paper"])
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
    path = exported(SPECS["paper"])
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(Exception, match="TokenSelect"):
        open_session(tmp_path / "bare.onnx", CPU)


def test_graph_holds_no_path_of_this_machine(exported, tmp_path):
    exported(SPECS["ours"])
    content = (tmp_path / MODEL).read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content


def test_batch_is_dynamic_and_weights_are_external(exported, tmp_path):
    model = onnx.load(exported(SPECS["ours"]), load_external_data=False)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [d.dim_value for d in shape[1:]] == [3, 112, 112]
    assert (tmp_path / WEIGHTS).stat().st_size > 100_000


def test_export_is_reproducible(exported, random_vlm, tmp_path):
    exported(SPECS["ours"])
    first = (tmp_path / MODEL).read_bytes(), (tmp_path / WEIGHTS).read_bytes()
    exported(SPECS["ours"], prune=False)
    assert first == ((tmp_path / MODEL).read_bytes(), (tmp_path / WEIGHTS).read_bytes())


def test_golden_outputs_are_pytorchs(random_vlm):
    golden = golden_io(random_vlm.tower, SPECS["ours"], batch_size=2, seed=1)
    assert golden["image_features"].shape == (2, 32, 128)
    assert golden["kept_indices"].dtype == np.int64
    with torch.no_grad():
        features, kept = VisionEncoder(random_vlm.tower, SPECS["ours"])(torch.from_numpy(golden["pixel_values"]))
    np.testing.assert_allclose(golden["image_features"], features.numpy(), atol=1e-6)
    np.testing.assert_array_equal(golden["kept_indices"], kept.numpy())


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
    import onnxruntime as ort

    session = ort.InferenceSession(operator_model(numerator, denominator, pool_factor))
    rng = np.random.default_rng(tokens)
    features = rng.normal(size=(3, tokens, dim)).astype(np.float32)
    prior = rng.dirichlet(np.ones(tokens), 3).astype(np.float32)
    (kept,) = session.run(None, {"features": features, "prior": prior})
    for row in range(3):
        expected = literal_selection(features[row], prior[row], numerator, denominator, pool_factor)
        assert kept[row].tolist() == sorted(expected)


@pytest.mark.parametrize("fault", ["zero", "duplicates", "nan features", "nan prior", "constant prior"])
def test_operator_body_equals_pytorch_on_degenerate_input(fault):
    import onnxruntime as ort

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
    (kept,) = ort.InferenceSession(operator_model(1, 2, 2.0)).run(None, {"features": features, "prior": prior})
    expected = token_select(torch.from_numpy(features), torch.from_numpy(prior), 1, 2)
    np.testing.assert_array_equal(kept, expected.numpy())
    assert all(len(set(row)) == 20 for row in kept.tolist())
