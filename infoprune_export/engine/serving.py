"""Files that servers read beside an engine: a model repository for Triton, and a pipeline configuration for DeepStream.

Both are protobuf text. They state what the ONNX file and the profile say; whether a server accepts them is known only
after it has loaded them on the device.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

from infoprune_export.artifacts import make_folder, write_text
from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.engine.tensorrt.profiles import Profile

Platform = Literal["tensorrt_plan", "onnxruntime_onnx"]

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
_ARTEFACTS: dict[Platform, str] = {"tensorrt_plan": "model.plan", "onnxruntime_onnx": "model.onnx"}
_DELAY = 2000
"""Microseconds that a request may wait for others to share a batch with."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an encoder."""

    name: str
    dtype: int
    """A ``TensorProto`` type."""
    shape: tuple[int | str, ...]
    """Extents; text where they vary, and equal text is an equal extent."""


@dataclass(frozen=True)
class Normalisation:
    """What a processor does to pixels scaled to 0..1: (x - mean) / std for each of red, green and blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Serving:
    """What is served."""

    name: str
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    batches: tuple[int, int] = (4, 16)
    """Usual and most images of a call, where the graph takes a batch."""
    gpu: bool = True
    plugin: bool = False
    """The engine needs the token-selection plugin's library."""
    normalisation: Normalisation | None = None


def tensors_of(model: Path) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of an ONNX file, whose weights are not read."""
    graph = onnx.load(model, load_external_data=False).graph
    return [_tensor(value) for value in graph.input], [_tensor(value) for value in graph.output]


def _tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    # An extent without a name varies by itself.
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}.{axis}"
        for axis, dim in enumerate(kind.shape.dim)
    )
    return TensorInfo(value.name, kind.elem_type, shape)


def normalisation_of(processor: Any) -> Normalisation | None:
    """As the model's processor states it; None where it does not, for each of three channels."""
    images: Any = getattr(processor, "image_processor", None)
    mean, std = (tuple(getattr(images, name, None) or ()) for name in ("image_mean", "image_std"))
    return Normalisation(mean, std) if len(mean) == len(std) == 3 else None


def batches_of(profile: Profile, inputs: Sequence[TensorInfo]) -> tuple[int, int]:
    """Usual and largest first extent of a profile's first input."""
    _, usual, most = profile.shapes[inputs[0].name]
    return usual[0], most[0]


def takes_batches(serving: Serving) -> bool:
    """Whether the first extent of every input and output is the same varying number of images.

    Only then can a server put requests of several clients into one call.
    """
    firsts = {tensor.shape[:1] for tensor in (*serving.inputs, *serving.outputs)}
    return len(firsts) == 1 and all(len(first) == 1 and isinstance(first[0], str) for first in firsts)


def write_serving(folder: Path, serving: Serving, platform: Platform, artefact: Path | None = None) -> None:
    """Write ``triton/NAME/config.pbtxt`` and, for encoders that take one batch of pictures, ``deepstream.txt``.

    Args:
        folder: made if it is not there.
        serving: what is served.
        platform: the engine's kind.
        artefact: the engine; with its external weights it becomes ``triton/NAME/1/``. None where it is not built yet.

    Raises:
        InfopruneError: a type that Triton does not know, or a file cannot be written.
    """
    model = folder / "triton" / serving.name
    make_folder(model)
    filename = _ARTEFACTS[platform] if artefact is None or platform == "tensorrt_plan" else artefact.name
    write_text(model / "config.pbtxt", triton_config(serving, platform, filename))
    if artefact is not None:
        make_folder(model / "1")
        weights = artefact.with_name(f"{artefact.name}.data")
        for source, name in ((artefact, filename), (weights, weights.name)):
            if source.is_file():
                _link_or_copy(source, model / "1" / name)
    text = deepstream_config(serving)
    if text is not None:
        write_text(folder / "deepstream.txt", text)


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are large, and two names for one file cost nothing."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ── Triton ───────────────────────────────────────────────────────────────────


def triton_config(serving: Serving, platform: Platform, filename: str) -> str:
    """``config.pbtxt``: with a batch extent, shapes leave it out and the dynamic batcher fills it."""
    batched, (usual, most) = takes_batches(serving), serving.batches
    lines = [
        f"# The encoder {_text(serving.name)}. No server has loaded it yet; it is proven when tritonserver says READY.",
        f"name: {_text(serving.name)}",
        f"platform: {_text(platform)}",
        f"default_model_filename: {_text(filename)}",
        f"max_batch_size: {most if batched else 0}",
    ]
    for kind, tensors in (("input", serving.inputs), ("output", serving.outputs)):
        for tensor in tensors:
            lines += _block(kind, _io_lines(tensor, batched))
    if batched and most > 1:
        preferred = sorted({size for size in (usual, most) if size > 1})
        lines += _block(
            "dynamic_batching",
            [f"preferred_batch_size: [ {', '.join(map(str, preferred))} ]", f"max_queue_delay_microseconds: {_DELAY}"],
        )
    group = [f"kind: {'KIND_GPU' if serving.gpu else 'KIND_CPU'}", "count: 1"]
    if platform == "tensorrt_plan":
        group.append('profile: [ "0" ]')
    lines += _block("instance_group", group)
    if serving.plugin:
        lines += [
            "# The engine needs its plugin, compiled with -DTOKEN_SELECT_REGISTER=ON:",
            "# tritonserver --backend-config=tensorrt,plugins=PATH/libtoken_select.so",
        ]
    return "\n".join(lines) + "\n"


def _io_lines(tensor: TensorInfo, batched: bool) -> list[str]:
    if tensor.dtype not in _TYPES:
        name = onnx.TensorProto.DataType.Name(tensor.dtype).lower()
        raise InfopruneError(f"{tensor.name} is {name}, which no encoder has; export the model again")
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = ", ".join(str(extent) if isinstance(extent, int) else "-1" for extent in shape)
    return [f"name: {_text(tensor.name)}", f"data_type: {_TYPES[tensor.dtype]}", f"dims: [ {dims} ]"]


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _text(value: str) -> str:
    """A quoted string. JSON's escapes are among protobuf text's, save for pairs of surrogates."""
    return json.dumps(value, ensure_ascii=False)


# ── DeepStream ───────────────────────────────────────────────────────────────


def deepstream_config(serving: Serving) -> str | None:
    """Configuration of ``Gst-nvinferserver`` on the Triton repository beside it, or None if it cannot feed the encoder.

    It makes one tensor of each frame, so it fits encoders whose only input is a batch of RGB pictures of one size.
    """
    picture = serving.inputs[0]
    if len(serving.inputs) != 1 or not takes_batches(serving) or len(picture.shape) != 4 or picture.shape[1] != 3:
        return None
    if picture.dtype not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
        return None
    preparing, why = _preparing(serving)
    backend = _block(
        "triton",
        [
            f"model_name: {_text(serving.name)}",
            "version: -1",
            *_block("model_repo", ['root: "triton"', "strict_model_config: true"]),
        ],
    )
    inference = [
        "unique_id: 1",
        "gpu_ids: [ 0 ]",
        f"max_batch_size: {serving.batches[1]}",
        *_block("backend", [*backend, "output_mem_type: MEMORY_TYPE_CPU"]),
        *(f"# {line}" for line in why),
        *preparing,
        *_block("postprocess", ["other { }"]),
    ]
    lines = [
        f"# Gst-nvinferserver for the encoder {_text(serving.name)}: its outputs are attached to frames as tensors.",
        "# Not run yet. Only the device can prove that Triton loads the engine, that frames arrive as RGB, and",
        "# that its resizing is close enough to the processor's: compare the image_features of a frame with those",
        "# of the same picture in infoprune-export.",
        *_block("infer_config", inference),
        *_block("input_control", ["process_mode: PROCESS_MODE_FULL_FRAME", "interval: 0"]),
        *_block("output_control", ["output_tensor_meta: true"]),
    ]
    return "\n".join(lines) + "\n"


def _preparing(serving: Serving) -> tuple[list[str], list[str]]:
    """How frames become the input, and why so."""
    normalisation = serving.normalisation
    if normalisation is None or len(set(normalisation.std)) > 1:
        reason = "divides channels by different numbers" if normalisation else "is not known here"
        return ["input_tensor_from_meta { is_first_dim_batch: true }"], [
            f"nvinferserver scales all channels alike, but this model's normalisation {reason}; so tensors come",
            "from Gst-nvdspreprocess in front of it, with a custom library that normalises as the processor does.",
        ]
    scale = 1 / (255 * normalisation.std[0])
    offsets = ", ".join(f"{255 * mean:.9g}" for mean in normalisation.mean)
    normalise = _block("normalize", [f"scale_factor: {scale:.9g}", f"channel_offsets: [ {offsets} ]"])
    lines = [
        "network_format: IMAGE_FORMAT_RGB",
        "tensor_order: TENSOR_ORDER_LINEAR",
        f"tensor_name: {_text(serving.inputs[0].name)}",
        "maintain_aspect_ratio: 0",
        *normalise,
    ]
    return _block("preprocess", lines), ["scale * (pixel - offset) is the processor's normalisation of 0..255 pixels."]
