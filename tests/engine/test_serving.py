"""Serving files: protobuf text of the fields that the servers' public definitions have, and of no others."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from finished import finished
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from infoprune_export.engine.serving import (
    Normalisation,
    Serving,
    TensorInfo,
    batches_of,
    deepstream_config,
    takes_batches,
    tensors_of,
    triton_config,
    write_serving,
)
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.errors import InfopruneError

FLOAT, HALF, BF16, INT64 = (onnx.TensorProto.DataType.Value(n) for n in ("FLOAT", "FLOAT16", "BFLOAT16", "INT64"))
PIXELS = TensorInfo("pixel_values", FLOAT, ("batch", 3, 56, 56))
FEATURES = TensorInfo("image_features", FLOAT, ("batch", 8, 64))
KEPT = TensorInfo("kept_indices", INT64, ("batch", 8))
LLAVA = Serving("llava", [PIXELS], [FEATURES, KEPT])
QWEN = Serving(
    "qwen",
    [TensorInfo("pixel_values", HALF, ("4*tokens", 294)), TensorInfo("position_ids", INT64, ("4*tokens", 2))],
    [TensorInfo("image_features", HALF, (1, "image_features.1", 64)), TensorInfo("kept_indices", INT64, (1, "kept"))],
)

# ── Definitions, as the servers' documentation lists them ────────────────────

# message -> field -> type; "[]" where it repeats, upper case for enums.
TRITON = {
    "ModelConfig": {
        "name": "string",
        "platform": "string",
        "default_model_filename": "string",
        "max_batch_size": "int32",
        "input": "ModelInput[]",
        "output": "ModelOutput[]",
        "dynamic_batching": "ModelDynamicBatching",
        "instance_group": "ModelInstanceGroup[]",
    },
    "ModelInput": {"name": "string", "data_type": "DATATYPE", "dims": "int64[]"},
    "ModelOutput": {"name": "string", "data_type": "DATATYPE", "dims": "int64[]"},
    "ModelDynamicBatching": {"preferred_batch_size": "int32[]", "max_queue_delay_microseconds": "uint64"},
    "ModelInstanceGroup": {"kind": "KIND", "count": "int32", "profile": "string[]"},
    "DATATYPE": ["TYPE_INVALID", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_BF16"],
    "KIND": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}
DEEPSTREAM = {
    "PluginControl": {"infer_config": "Inference", "input_control": "Input", "output_control": "Output"},
    "Inference": {
        "unique_id": "uint32",
        "gpu_ids": "int32[]",
        "max_batch_size": "uint32",
        "backend": "Backend",
        "preprocess": "Preprocess",
        "input_tensor_from_meta": "FromMeta",
        "postprocess": "Postprocess",
    },
    "Backend": {"triton": "Triton", "output_mem_type": "MEMORY"},
    "Triton": {"model_name": "string", "version": "int64", "model_repo": "Repository"},
    "Repository": {"root": "string", "strict_model_config": "bool"},
    "Preprocess": {
        "network_format": "FORMAT",
        "tensor_order": "ORDER",
        "tensor_name": "string",
        "maintain_aspect_ratio": "int32",
        "normalize": "Normalize",
    },
    "Normalize": {"scale_factor": "float", "channel_offsets": "float[]"},
    "FromMeta": {"is_first_dim_batch": "bool"},
    "Postprocess": {"other": "Other"},
    "Other": {},
    "Input": {"process_mode": "MODE", "interval": "uint32"},
    "Output": {"output_tensor_meta": "bool"},
    "MEMORY": ["MEMORY_TYPE_DEFAULT", "MEMORY_TYPE_GPU", "MEMORY_TYPE_CPU"],
    "FORMAT": ["IMAGE_FORMAT_NONE", "IMAGE_FORMAT_RGB", "IMAGE_FORMAT_BGR", "IMAGE_FORMAT_GRAY"],
    "ORDER": ["TENSOR_ORDER_NONE", "TENSOR_ORDER_LINEAR", "TENSOR_ORDER_NHWC"],
    "MODE": ["PROCESS_MODE_DEFAULT", "PROCESS_MODE_FULL_FRAME", "PROCESS_MODE_CLIP_OBJECTS"],
}


def message_of(definitions, root):
    """A protobuf class for the root message, made from the tables above."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{root}.proto", package=root.lower(), syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, content in definitions.items():
        if isinstance(content, list):
            enum = file.enum_type.add(name=name)
            for number, value in enumerate(content):
                enum.value.add(name=value, number=number)
            continue
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(content.items(), start=1):
            kind, repeated = kind.removesuffix("[]"), kind.endswith("[]")
            made = message.field.add(name=field, number=number)
            made.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in definitions:
                made.type = kinds.TYPE_ENUM if isinstance(definitions[kind], list) else kinds.TYPE_MESSAGE
                made.type_name = f".{root.lower()}.{kind}"
            else:
                made.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{root.lower()}.{root}"))


def parsed(text, definitions, root):
    return text_format.Parse(text, message_of(definitions, root)())


def triton(serving, platform="tensorrt_plan", filename="model.plan"):
    return parsed(triton_config(serving, platform, filename), TRITON, "ModelConfig")


def shapes(tensors):
    return {tensor.name: list(tensor.dims) for tensor in tensors}


# ── Triton ───────────────────────────────────────────────────────────────────


def test_a_batch_axis_is_left_to_the_server():
    config = triton(LLAVA)
    assert (config.name, config.platform, config.max_batch_size) == ("llava", "tensorrt_plan", 16)
    assert shapes(config.input) == {"pixel_values": [3, 56, 56]}
    assert shapes(config.output) == {"image_features": [8, 64], "kept_indices": [8]}
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert [list(group.profile) for group in config.instance_group] == [["0"]]
    assert [group.kind for group in config.instance_group] == [1]


def test_packed_images_are_no_batch():
    config = triton(QWEN)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert shapes(config.input) == {"pixel_values": [-1, 294], "position_ids": [-1, 2]}
    assert shapes(config.output) == {"image_features": [1, -1, 64], "kept_indices": [1, -1]}


@pytest.mark.parametrize(
    "changed",
    [
        {"outputs": [TensorInfo("image_features", FLOAT, (1, 8, 64))]},
        {"outputs": [TensorInfo("image_features", FLOAT, ("other", 8, 64))]},
        {"inputs": [PIXELS, TensorInfo("token_order", INT64, ("tokens",))]},
        {
            "inputs": [TensorInfo("pixel_values", FLOAT, (2, 3, 56, 56))],
            "outputs": [TensorInfo("f", FLOAT, (2, 8, 64))],
        },
    ],
)
def test_only_one_common_varying_extent_is_a_batch(changed):
    serving = Serving("other", changed.get("inputs", [PIXELS]), changed.get("outputs", [FEATURES]))
    assert not takes_batches(serving)
    assert triton(serving).max_batch_size == 0


def test_types_platforms_and_machines():
    for dtype, name in ((FLOAT, "TYPE_FP32"), (HALF, "TYPE_FP16"), (BF16, "TYPE_BF16"), (INT64, "TYPE_INT64")):
        serving = Serving("t", [TensorInfo("pixel_values", dtype, ("batch", 3, 2, 2))], [FEATURES])
        assert TRITON["DATATYPE"][triton(serving).input[0].data_type] == name
    config = triton(Serving("cpu", [PIXELS], [FEATURES], gpu=False), "onnxruntime_onnx", "engine.onnx")
    assert (config.platform, config.default_model_filename) == ("onnxruntime_onnx", "engine.onnx")
    assert [(group.kind, list(group.profile)) for group in config.instance_group] == [(2, [])]
    with pytest.raises(InfopruneError, match="pixel_values is double"):
        triton(Serving("t", [TensorInfo("pixel_values", onnx.TensorProto.DOUBLE, ("batch", 3))], [FEATURES]))


def test_one_image_a_call_needs_no_batcher():
    serving = Serving("one", [PIXELS], [FEATURES], batches=(1, 1))
    assert triton(serving).max_batch_size == 1
    assert not triton(serving).HasField("dynamic_batching")


def test_the_plugin_is_named_where_the_engine_needs_it():
    assert "plugins=" in triton_config(Serving("p", [PIXELS], [FEATURES], plugin=True), "tensorrt_plan", "model.plan")
    assert "plugins=" not in triton_config(LLAVA, "tensorrt_plan", "model.plan")


@given(
    st.text(st.sampled_from('a\n"\\#𐀀é'), max_size=8),
    st.lists(st.one_of(st.integers(1, 9999), st.just("n")), min_size=1, max_size=6),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_name_and_shape_is_read_back(name, extents):
    config = triton(Serving(name, [TensorInfo(name, FLOAT, (7, *extents))], [FEATURES]))
    assert (config.name, config.input[0].name) == (name, name)
    assert list(config.input[0].dims) == [7, *(-1 if extent == "n" else extent for extent in extents)]


# ── DeepStream ───────────────────────────────────────────────────────────────


def test_equal_deviations_are_a_scale_and_offsets():
    normalisation = Normalisation((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
    text = deepstream_config(Serving("siglip", [PIXELS], [FEATURES], normalisation=normalisation))
    inference = parsed(text, DEEPSTREAM, "PluginControl").infer_config
    assert inference.backend.triton.model_name == "siglip"
    assert inference.max_batch_size == 16
    assert inference.preprocess.tensor_name == "pixel_values"
    pixels = np.array([0.0, 100.0, 255.0])
    offsets = np.array(inference.preprocess.normalize.channel_offsets)
    ours = inference.preprocess.normalize.scale_factor * (pixels - offsets)
    np.testing.assert_allclose(ours, (pixels / 255 - normalisation.mean) / 0.25, rtol=1e-6)


@pytest.mark.parametrize("normalisation", [None, Normalisation((0.5, 0.4, 0.3), (0.25, 0.26, 0.25))])
def test_what_nvinferserver_cannot_normalise_comes_prepared(normalisation):
    text = deepstream_config(Serving("clip", [PIXELS], [FEATURES], normalisation=normalisation))
    config = parsed(text, DEEPSTREAM, "PluginControl")
    assert config.infer_config.input_tensor_from_meta.is_first_dim_batch
    assert not config.infer_config.HasField("preprocess")
    assert config.output_control.output_tensor_meta


@pytest.mark.parametrize(
    "serving",
    [
        QWEN,
        Serving("two", [PIXELS, TensorInfo("more", FLOAT, ("batch", 3))], [FEATURES]),
        Serving("bf16", [TensorInfo("pixel_values", BF16, ("batch", 3, 56, 56))], [FEATURES]),
        Serving("grey", [TensorInfo("pixel_values", FLOAT, ("batch", 1, 56, 56))], [FEATURES]),
        Serving("fixed", [TensorInfo("pixel_values", FLOAT, (1, 3, 56, 56))], [FEATURES]),
    ],
)
def test_encoders_that_one_tensor_a_frame_cannot_feed_get_none(serving, tmp_path):
    assert deepstream_config(serving) is None
    write_serving(tmp_path, serving, "tensorrt_plan")
    assert not (tmp_path / "deepstream.txt").exists()


# ── Files ────────────────────────────────────────────────────────────────────


def test_an_engine_is_put_where_triton_looks(tmp_path):
    for name in ("engine.onnx", "engine.onnx.data", "engine.plan"):
        (tmp_path / name).write_text(name)
    write_serving(tmp_path / "a", LLAVA, "onnxruntime_onnx", tmp_path / "engine.onnx")
    write_serving(tmp_path / "b", LLAVA, "tensorrt_plan", tmp_path / "engine.plan")
    write_serving(tmp_path / "b", LLAVA, "tensorrt_plan", tmp_path / "engine.plan")
    assert files(tmp_path / "a") == [
        "deepstream.txt",
        "triton/llava/1/engine.onnx",
        "triton/llava/1/engine.onnx.data",
        "triton/llava/config.pbtxt",
    ]
    assert files(tmp_path / "b") == ["deepstream.txt", "triton/llava/1/model.plan", "triton/llava/config.pbtxt"]
    for folder, filename in (("a", "engine.onnx"), ("b", "model.plan")):
        text = (tmp_path / folder / "triton" / "llava" / "config.pbtxt").read_text()
        assert parsed(text, TRITON, "ModelConfig").default_model_filename == filename


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_tensors_and_batches_are_read_from_the_file(tmp_path):
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixel_values"], ["image_features"])],
        "g",
        [helper.make_tensor_value_info("pixel_values", FLOAT, ["batch", 3, None])],
        [helper.make_tensor_value_info("image_features", FLOAT, ["batch", 3, None])],
    )
    path: Path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    inputs, outputs = tensors_of(path)
    assert inputs == [TensorInfo("pixel_values", FLOAT, ("batch", 3, "pixel_values.2"))]
    assert takes_batches(Serving("g", inputs, outputs))
    assert batches_of(Profile({"pixel_values": ((1, 3, 1), (2, 3, 1), (5, 3, 1))}), inputs) == (2, 5)


# ── Of a run ─────────────────────────────────────────────────────────────────


def test_a_runs_engine_lies_in_a_repository_that_answers_as_the_engine_does(tmp_path_factory):
    folder = finished(tmp_path_factory)
    (repository,) = (folder / "engine" / "serving" / "triton").iterdir()
    text = (repository / "config.pbtxt").read_text(encoding="utf-8")
    assert f'name: "{repository.name}"' in text
    assert 'platform: "onnxruntime_onnx"' in text
    assert 'default_model_filename: "engine.onnx"' in text
    assert "KIND_CPU" in text
    assert not (folder / "engine" / "serving" / "deepstream.txt").exists(), "this family takes more than pictures"
    golden = load_file(folder / "onnx" / "golden.safetensors")
    answers = []
    for path in (repository / "1" / "engine.onnx", folder / "engine" / "engine.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {value.name: golden[value.name] for value in session.get_inputs()}))
    for served, built in zip(*answers, strict=True):
        np.testing.assert_array_equal(served, built)
