"""INT8: close to the fp32 file, the operator kept, the layers that cannot bear it left alone, the same bytes again."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from infoprune_export.errors import InfopruneError
from infoprune_export.export import quantize
from infoprune_export.export.onnx import MODEL, WEIGHTS, export_onnx
from infoprune_export.export.quantize import quantize_int8
from infoprune_export.models import tower_of
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import form_of

# Without merging: a token that moves to another anchor would change the features of tokens that were kept alike.
SELECT = TokensSpec(keep_ratio="1/4", merge=False)


@pytest.fixture(scope="module", params=["llava", "qwen2.5-vl"])
def source(request, tmp_path_factory):
    """An fp32 export, and a generator of calibration data for it."""
    made, folder = tower_of(random_model(request.param, 3)), tmp_path_factory.mktemp("fp32")
    tokens = SELECT if request.param == "llava" else None
    export_onnx(made, tokens, folder, opset=20)
    form = form_of(made, tokens)

    def data(seeds):
        for seed in seeds:
            planned = made.example_planned(1 + seed % 2, torch.Generator().manual_seed(seed), form)
            yield {name: value.numpy() for name, value in planned.items()}

    return folder, data


def run(path, feed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


def cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("scheme", ["cpu", "tensorrt"])
def test_int8_is_close_and_keeps_everything_else(source, tmp_path, scheme):
    folder, data = source
    result = quantize_int8(folder, tmp_path, data(range(4)), scheme=scheme)
    before, after = (onnx.load(path / MODEL) for path in (folder, tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [MODEL, WEIGHTS]
    assert after.functions == before.functions
    assert list(after.opset_import) == list(before.opset_import)
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    names = [node.op_type for node in before.graph.node]
    for kind in ("TokenSelect", "Softmax", "LayerNormalization", "Conv"):
        assert names.count(kind) == [node.op_type for node in after.graph.node].count(kind)
    onnx.checker.check_model(tmp_path / MODEL, full_check=True)
    text = (tmp_path / MODEL).read_bytes()
    assert b".py" not in text
    assert str(tmp_path).encode() not in text
    assert str(folder).encode() not in text

    weights = {tensor.name: tensor for tensor in after.graph.initializer}
    producers = {node.output[0]: node for node in after.graph.node}
    assert result.int8
    assert result.float32 == {}
    for node in after.graph.node:
        if node.name in result.int8:
            activation, weight = (producers[name] for name in node.input[:2])
            assert weight.op_type == activation.op_type == "DequantizeLinear"
            values, scales, zeros = (numpy_helper.to_array(weights[name]) for name in weight.input)
            axis = next(a.i for a in weight.attribute if a.name == "axis")
            assert values.dtype == np.int8
            assert scales.shape == (values.shape[axis],)
            assert not zeros.any()
            zero = numpy_helper.to_array(weights[activation.input[2]])
            assert zero.dtype == (np.uint8 if scheme == "cpu" else np.int8)
            assert scheme == "cpu" or not zero.any()
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in after.graph.initializer)

    for feed in data(range(10, 13)):
        expected, actual = run(folder / MODEL, feed), run(tmp_path / MODEL, feed)
        if "kept_indices" in expected:
            same = (expected["kept_indices"] == actual["kept_indices"]).all(1)
            if not same.any():
                continue
            expected, actual = ({"image_features": o["image_features"][same]} for o in (expected, actual))
        assert 0.99 < cosine(expected["image_features"], actual["image_features"]) < 1 - 1e-9


def test_patch_embedding_stays_float_and_the_projector_on_request(source, tmp_path):
    folder, data = source
    blocks = quantize_int8(folder, tmp_path, data([0]), projector=False).int8
    model = onnx.load(folder / MODEL, load_external_data=False)
    initializers = {tensor.name for tensor in model.graph.initializer}
    linear = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in initializers]
    outside = [node.name for node in linear if node.name not in blocks]
    assert blocks
    assert outside[-2:] == [node.name for node in linear[-2:]]
    pixels = model.graph.input[0].name
    assert not any(node.name in blocks for node in model.graph.node if pixels in node.input)
    everything = quantize_int8(folder, tmp_path, data([0])).int8
    assert everything == [node.name for node in linear]


def test_calibration_covers_every_call(source):
    """Ranges are extremes over all calls, in whatever order; squares are means."""
    folder, data = source
    model = onnx.load(folder / MODEL, load_external_data=False)
    names = list(quantize._linear_layers(model, folder).values())[:3]

    def ranges(feeds):
        fresh = onnx.load(folder / MODEL, load_external_data=False)
        return quantize._activation_ranges(fresh, names, folder, feeds, 1)

    first, second, both = (ranges(list(data(seeds))) for seeds in ([0], [1], [1, 0]))
    for name in names:
        assert both[name].low == min(first[name].low, second[name].low)
        assert both[name].high == max(first[name].high, second[name].high)
        np.testing.assert_allclose(
            both[name].mean_square, (first[name].mean_square + second[name].mean_square) / 2, rtol=1e-6
        )


def test_layers_with_outliers_stay_float(source, tmp_path):
    """The stated limit is the noise that rounding to 8 bits measurably makes."""
    folder, data = source
    values = np.random.default_rng(0).normal(size=100_000)
    for scheme, low in (("cpu", -4.0), ("tensorrt", -7.0)):
        step = (7 - low) / 255 if scheme == "cpu" else 7 / 127
        rounded = np.round(values / step) * step
        limits = quantize._Range(low, 7.0, float((values**2).mean()))
        assert limits.noise(scheme) == pytest.approx(((rounded - values) ** 2).mean() / (values**2).mean(), rel=0.02)
        assert replace(limits, high=70.0).noise(scheme) > quantize.MAX_NOISE > limits.noise(scheme)
    every = quantize_int8(folder, tmp_path, data([0]), max_noise=1.0)
    noises = sorted(quantize_int8(folder, tmp_path, data([0]), max_noise=0.0).float32.values())
    assert len(noises) == len(every.int8)
    some = quantize_int8(folder, tmp_path, data([0]), max_noise=noises[len(noises) // 2])
    assert 0 < len(some.float32) < len(every.int8)
    assert min(some.float32.values()) > noises[len(noises) // 2]
    chosen = some.int8[0]
    assert chosen in quantize_int8(folder, tmp_path, data([0]), keep_float=[chosen], max_noise=1.0).float32


_AGAIN = """
import sys, numpy as np
from pathlib import Path
from infoprune_export.export.quantize import quantize_int8
feeds = [dict(np.load(path)) for path in sys.argv[3:]]
quantize_int8(Path(sys.argv[1]), Path(sys.argv[2]), feeds, threads=1)
"""


@pytest.mark.parametrize(
    "source", ["llava", pytest.param("qwen2.5-vl", marks=pytest.mark.exhaustive)], indirect=True, scope="module"
)
def test_same_bytes_in_every_process(source, tmp_path):
    folder, data = source
    for number, feed in enumerate(data(range(2))):
        np.savez(tmp_path / f"{number}.npz", **feed)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    quantize_int8(folder, here, data(range(2)), threads=1)
    # Any fixed seed but 0 is as good as the random one of this process.
    subprocess.run(
        [sys.executable, "-c", _AGAIN, str(folder), str(there), *sorted(map(str, tmp_path.glob("*.npz")))],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    for name in (MODEL, WEIGHTS):
        assert (here / name).read_bytes() == (there / name).read_bytes()


# ── Mistakes ──


def test_mistakes_are_one_line(source, tmp_path):
    folder, data = source
    target = tmp_path / "int8"
    target.mkdir()
    feed = next(data([0]))
    wrong_extent = {**feed, "pixel_values": feed["pixel_values"][..., :-1]}
    wrong_type = {**feed, "pixel_values": feed["pixel_values"].astype(np.float64)}
    infinite = {**feed, "pixel_values": np.full_like(feed["pixel_values"], np.inf)}
    for feeds, message in (
        ([], "no calibration data"),
        ([{"pixels": feed["pixel_values"]}], "pixel_values"),
        ([feed, wrong_extent], "calibration data 1 does not fit"),
        ([wrong_type], "calibration data 0 does not fit"),
        ([infinite], "infinite or NaN"),
    ):
        with pytest.raises(InfopruneError, match=message):
            quantize_int8(folder, target, feeds)
    with pytest.raises(InfopruneError, match="'nothing' is no Linear layer"):
        quantize_int8(folder, target, data([0]), keep_float=["nothing"])
    with pytest.raises(InfopruneError, match="another folder"):
        quantize_int8(folder, folder, data([0]))
    with pytest.raises(InfopruneError, match=r"no model\.onnx"):
        quantize_int8(target, tmp_path, data([0]))
    assert not list(target.iterdir())
    quantize_int8(folder, target, data([0]))
    with pytest.raises(InfopruneError, match="quantized already"):
        quantize_int8(target, tmp_path, data([0]))


def test_half_precision_source_is_refused(tmp_path):
    source, target = tmp_path / "fp16", tmp_path / "int8"
    source.mkdir()
    target.mkdir()
    half = onnx.TensorProto.FLOAT16
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_node("MatMul", ["y", "w"], ["z"], name="m")]
    values = [onnx.helper.make_tensor_value_info(name, half, [2, 2]) for name in "xz"]
    weight = numpy_helper.from_array(np.ones((2, 2), np.float16), "w")
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [weight])), source / MODEL
    )
    with pytest.raises(InfopruneError, match="float16"):
        quantize_int8(source, target, [])
