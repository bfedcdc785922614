"""Prepared files: valid ONNX, the same answers as the exported file on every route, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import CASES, SELECT, calls_of, exported, feed_of, tower

from infoprune_export.engine.tensorrt.prepare import PLUGIN_DOMAIN, prepare
from infoprune_export.errors import InfopruneError
from infoprune_export.export import operator
from infoprune_export.export.onnx import MODEL, WEIGHTS, typed

ROUTES = ("function", "plugin", "aot")
KEEP = ("keep_numerator", "keep_denominator")
TensorProto = onnx.TensorProto


@pytest.fixture
def source(tmp_path_factory):
    """The exported file that most tests prepare."""
    return exported(tmp_path_factory, *CASES[0])


def run(path, planned):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, feed_of(one)), strict=True)) for one in planned]


def node_types(model):
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


# ── The same answers ─────────────────────────────────────────────────────────


def with_plugin_body(path, folder, aot):
    """The prepared file with a definition of its plugin: the exported operator between casts."""
    helper, model = onnx.helper, onnx.load(path)
    names = [*KEEP, "pool_factor", "temperature", "exponent", "epsilon"]
    inner = helper.make_node("TokenSelect", ["features", "prior", "wide"], ["indices"], domain=operator.DOMAIN)
    inner.attribute.extend(
        onnx.AttributeProto(name=name, ref_attr_name=name, type="INT" if name in KEEP else "FLOAT") for name in names
    )
    nodes = [
        helper.make_node("Cast", ["counts"], ["wide"], to=TensorProto.INT64),
        inner,
        helper.make_node("Cast", ["indices"], ["kept"], to=TensorProto.INT32),
    ]
    if aot:
        nodes.append(helper.make_node("Identity", ["prior"], ["work"]))
    versions = [helper.make_opsetid("", 20), helper.make_opsetid(operator.DOMAIN, operator.VERSION)]
    body = helper.make_function(
        PLUGIN_DOMAIN,
        "TokenSelect",
        ["features", "prior", "counts"],
        ["kept", "work"] if aot else ["kept"],
        nodes,
        versions,
        [*names, "plugin_namespace", "plugin_version", *(["aot"] if aot else [])],
    )
    model.functions.extend([body, operator.function_bodies()[0]])
    model.opset_import.append(versions[1])
    onnx.save(model, folder / "with-body.onnx")
    return folder / "with-body.onnx"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("family", "selecting", "precision", "several"), CASES)
def test_every_route_gives_the_answers_of_the_exported_file(
    tmp_path_factory, tmp_path, family, selecting, precision, several, route
):
    source = exported(tmp_path_factory, family, selecting, precision, several)
    prepared = prepare(source, tmp_path / "out", route, opset=(9, 20))
    model = onnx.load(prepared, load_external_data=False)
    assert not model.functions
    plugins = [node for node in model.graph.node if node.domain]
    assert len(plugins) == (selecting and route != "function")
    runnable = with_plugin_body(prepared, tmp_path, route == "aot") if plugins else prepared
    planned = [typed(tower(family, precision), one) for one in calls_of(family, selecting, several)]
    for ours, theirs in zip(run(runnable, planned), run(source, planned), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_array_equal(ours["image_features"].shape, theirs["image_features"].shape)
        scale = np.abs(theirs["image_features"]).max()
        assert np.abs(ours["image_features"] - theirs["image_features"]).max() <= 1e-6 * scale
        if selecting:
            np.testing.assert_array_equal(ours["kept_indices"], theirs["kept_indices"])
            assert ours["kept_indices"].dtype == np.int64


# ── The plugin's node ────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", ["plugin", "aot"])
def test_plugin_node_has_the_types_and_attributes_of_a_plugin(source, tmp_path, route):
    prepared = prepare(source, tmp_path, route)
    model = onnx.load(prepared, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "TokenSelect")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes.pop("aot", None) == (1 if route == "aot" else None)
    assert (attributes.pop("plugin_namespace"), attributes.pop("plugin_version")) == (b"infoprune", b"1")
    assert attributes == {
        "keep_numerator": 2,
        "keep_denominator": 9,
        "pool_factor": pytest.approx(SELECT.pool_factor),
        # The recipe's default quality is a power of the prior, see tokens.select.weighting.
        "temperature": pytest.approx(1.0),
        "exponent": pytest.approx(SELECT.exponent),
        "epsilon": pytest.approx(1e-5),
    }
    types = node_types(model)
    assert [types[name] for name in node.input] == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32]
    producers = {name: producer for producer in model.graph.node for name in producer.output}
    assert producers[node.input[2]].op_type == "Cast"
    assert [types[name] for name in node.output] == [TensorProto.INT32, TensorProto.FLOAT][: len(node.output)]
    readers = {name: [user for user in model.graph.node if name in user.input] for name in node.output}
    assert [(user.op_type, user.attribute[0].i) for user in readers[node.output[0]]] == [("Cast", TensorProto.INT64)]
    if route == "aot":
        assert readers[node.output[1]] == []
        (work,) = (value for value in model.graph.value_info if value.name == node.output[1])
        extents = work.type.tensor_type.shape.dim
        assert len(extents) == 2
        assert not extents[1].HasField("dim_value")
    assert len(node.output) == (2 if route == "aot" else 1)


def small(tmp_path, text, name="small.onnx"):
    """A file from ONNX's own text form, in a folder of its own."""
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    model = onnx.parser.parse_model(text)
    onnx.save(model, folder / name)
    return folder / name


HALF_PRIOR = """
<ir_version: 10, opset_import: ["" : 20, "infoprune" : 1]>
g (float16[B, N, 8] features, float16[B, N] prior, int64[B] counts) => (int64[B, T] kept) {
  [chooser] kept = infoprune.TokenSelect <keep_numerator: int = 1, keep_denominator: int = 2> (features, prior, counts)
}
"""


def test_attributes_left_out_get_their_defaults_and_a_half_prior_becomes_fp32(tmp_path):
    model = onnx.parser.parse_model(HALF_PRIOR)
    model.functions.append(operator.function_bodies()[0])
    (tmp_path / "source").mkdir()
    onnx.save(model, tmp_path / "source" / MODEL)
    prepared = prepare(tmp_path / "source" / MODEL, tmp_path / "out", "plugin")
    model = onnx.load(prepared)
    (node,) = (node for node in model.graph.node if node.op_type == "TokenSelect")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["pool_factor"] == 2.0
    assert attributes["temperature"] == pytest.approx(0.7)
    assert attributes["exponent"] == 0.5
    types = node_types(model)
    assert [types[name] for name in node.input] == [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT32]
    assert [(value.name, value.type.tensor_type.elem_type) for value in model.graph.output] == [
        ("kept", TensorProto.INT64)
    ]


# ── The file ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", ROUTES)
def test_weights_stay_external_the_source_stays_as_it_is_and_bytes_repeat(source, tmp_path, route):
    before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
    written = [prepare(source, tmp_path / name, route) for name in ("first", "second")]
    assert {path.name: path.read_bytes() for path in source.parent.iterdir()} == before
    for path in written:
        assert sorted(file.name for file in path.parent.iterdir()) == [MODEL, WEIGHTS]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    assert (tmp_path / "first" / WEIGHTS).stat().st_size >= 0.95 * (source.parent / WEIGHTS).stat().st_size
    onnx.checker.check_model(written[0], full_check=True)


def test_names_say_where_a_node_comes_from_and_are_unique(tmp_path_factory, tmp_path):
    qwen = exported(tmp_path_factory, "qwen2.5-vl", True, "fp16", True)
    model = onnx.load(prepare(qwen, tmp_path, "function"))

    def walk(graph):
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from walk(attribute.g)

    nodes = list(walk(model.graph))
    assert len({node.name for node in nodes}) == len(nodes)
    assert all(node.name for node in nodes)
    defined = [name for node in nodes for name in node.output if name]
    assert len(set(defined)) == len(defined)
    prefixes = {node.name.split("/")[0] for node in nodes if node.op_type == "Loop"}
    assert prefixes == {"TokenSelect", "ReceivedAttention"}


def test_integer_clips_become_comparisons_that_give_the_same(tmp_path):
    source = small(
        tmp_path,
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[N] x, float[N] f) => (int64[N] both, int64[N] low, int64[N] high, float[N] floats)
        <int64 three = {3}, int64 seven = {7}, float one = {1.0}>
        {
          [a] both = Clip (x, three, seven)
          [b] low = Clip (x, three)
          [c] high = Clip (x, , seven)
          [d] floats = Clip (f, one)
        }
        """,
    )
    prepared = prepare(source, tmp_path / "out", "function")
    kinds = [node.op_type for node in onnx.load(prepared).graph.node]
    assert sorted(kinds) == ["Clip", "Max", "Max", "Min", "Min"]
    values = {"x": torch.arange(-2, 12), "f": torch.linspace(-2, 3, 14)}
    for ours, theirs in zip(run(prepared, [values]), run(source, [values]), strict=True):
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)


# ── Opset ────────────────────────────────────────────────────────────────────

PLAIN = """
<ir_version: 10, opset_import: ["" : {opset}]>
g ({dtype}[N, 3, 8, 8] x) => ({dtype}[N, 3, 7, 7] y)
<{dtype}[3, 3, 2, 2] w = {{{weights}}}> {{ [patches] y = {body} (x, w) }}
"""


def plain(tmp_path, opset, dtype="float", body="Conv"):
    text = PLAIN.format(opset=opset, dtype="float", body=body, weights=", ".join(["0.5"] * 36))
    source = small(tmp_path, text)
    if dtype == "bfloat16":
        model = onnx.load(source)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
        model.graph.initializer[0].CopyFrom(
            onnx.helper.make_tensor("w", TensorProto.BFLOAT16, weight.shape, weight.reshape(-1))
        )
        onnx.save(model, source)
    return source


def test_a_newer_graph_is_lowered_and_its_bf16_convolutions_widened(tmp_path):
    prepared = prepare(plain(tmp_path, 22, "bfloat16"), tmp_path / "out", "function", opset=(9, 20))
    model = onnx.load(prepared)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert [node.op_type for node in model.graph.node] == ["Cast", "Cast", "Conv", "Cast"]


@pytest.mark.parametrize(("opset", "allowed"), [(20, (9, 20)), (22, (9, 24)), (18, (9, 20)), (22, None)])
def test_a_graph_that_the_parser_reads_keeps_its_opset(tmp_path, opset, allowed):
    prepared = prepare(plain(tmp_path, opset), tmp_path / "out", "function", opset=allowed)
    assert onnx.load(prepared).opset_import[0].version == opset


@pytest.mark.parametrize(
    ("opset", "allowed", "fix"),
    [(23, (9, 20), 20), (22, (9, 19), 19), (8, (9, 20), 20), (23, (9, 22), 22)],
)
def test_an_opset_that_cannot_be_met_is_refused(tmp_path, opset, allowed, fix):
    with pytest.raises(InfopruneError, match=rf"opset {opset}.*{allowed[0]} to {allowed[1]}.*export\.opset={fix}"):
        prepare(plain(tmp_path, opset), tmp_path / "out", "function", opset=allowed)
    assert not (tmp_path / "out").exists()


def test_what_means_something_else_at_a_lower_opset_is_refused(tmp_path):
    group = small(
        tmp_path,
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4, 6] x) => (float[N, 4, 6] y) <float[4] s = {1, 2, 3, 4}, float[4] b = {0, 0, 0, 0}>
        { y = GroupNormalization <num_groups: int = 2> (x, s, b) }
        """,
    )
    with pytest.raises(InfopruneError, match="opset 21"):
        prepare(group, tmp_path / "out", "function", opset=(9, 20))
    blocked = small(
        tmp_path,
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4, 6] x) => (int8[4, 6] y) <float[4, 2] s = {1, 1, 1, 1, 1, 1, 1, 1}>
        { y = QuantizeLinear <axis: int = 1, block_size: int = 3, output_dtype: int = 3> (x, s) }
        """,
    )
    with pytest.raises(InfopruneError, match="no valid ONNX.*block_size"):
        prepare(blocked, tmp_path / "out", "function", opset=(9, 20))
    assert list((tmp_path / "out").iterdir()) == []


# ── Mistakes ─────────────────────────────────────────────────────────────────


def assert_refused(source: Path, folder: Path, words: str, route="function") -> None:
    with pytest.raises(InfopruneError, match=words) as caught:
        prepare(source, folder, route)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing(source, tmp_path):
    out = tmp_path / "out"
    assert_refused(source, source.parent, "would replace its source")
    assert_refused(tmp_path / "nowhere.onnx", out, "no such file")
    assert_refused(tmp_path, out, "no such file")
    (tmp_path / "text.onnx").write_text("not a model " * 50)
    assert_refused(tmp_path / "text.onnx", out, "not an ONNX file")
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert_refused(tmp_path / "empty.onnx", out, "not an ONNX file")
    (tmp_path / "alone.onnx").write_bytes(source.read_bytes())
    assert_refused(tmp_path / "alone.onnx", out, "weights of alone.onnx are missing")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / MODEL).write_bytes(source.read_bytes())
    (tmp_path / "short" / WEIGHTS).write_bytes((source.parent / WEIGHTS).read_bytes()[:-100])
    assert_refused(tmp_path / "short" / MODEL, out, "ends before the weights of model.onnx do")
    bare = onnx.load(source)
    del bare.functions[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    for route in ROUTES:
        assert_refused(tmp_path / "bare.onnx", out, "has no body in this file", route)
    assert not out.exists()


def test_functions_that_call_each_other_for_ever_are_refused(tmp_path):
    text = """
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[N] x) => (float[N] y) { y = local.one (x) }
        <domain: "local", opset_import: ["" : 20, "local" : 1]> one (a) => (b) { b = local.two (a) }
        <domain: "local", opset_import: ["" : 20, "local" : 1]> two (a) => (b) { b = local.one (a) }
    """
    assert_refused(small(tmp_path, text), tmp_path / "out", "cannot be inlined")


def test_a_folder_that_cannot_be_made_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InfopruneError, match="no folder can be made here"):
        prepare(source, tmp_path / "file" / "out", "function")
