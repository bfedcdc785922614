"""What a build has to know of an exported ONNX file, read without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.engine.tensorrt.profiles import Profile

_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class Source:
    """One exported file."""

    precision: str
    """fp32, fp16, bf16, or int8 where linear layers are quantised."""
    selects: bool
    """Whether it selects tokens."""
    inputs: dict[str, tuple[int | None, ...]]
    """Shapes of the inputs; None where an extent varies."""


def inspect(model: Path) -> Source:
    """Read the graph of a file that `export_onnx` or `quantize_int8` wrote.

    Raises:
        InfopruneError: it is no such file.
    """
    from infoprune_export.engine.tensorrt.prepare import TOKEN_SELECT, read_graph
    from infoprune_export.export.functions import DOMAIN

    graph = read_graph(model).graph
    pixels = next((value for value in graph.inputs if value.name == "pixel_values"), None)
    kind = pixels.dtype.name if pixels is not None and pixels.dtype is not None else "none"
    if kind not in _PRECISIONS:
        raise InfopruneError(
            f"{model}: pixel_values is of type {kind}, expected {', '.join(_PRECISIONS)}; export it with "
            "infoprune-export export"
        )
    quantised = any(node.op_type == "QuantizeLinear" for node in graph)
    shapes = {
        str(value.name): tuple(extent if isinstance(extent, int) else None for extent in value.shape or ())
        for value in graph.inputs
    }
    selects = any((node.domain, node.op_type) == (DOMAIN, TOKEN_SELECT) for node in graph)
    return Source("int8" if quantised else _PRECISIONS[kind], selects, shapes)


def check_profile(source: Source, profile: Profile, model: Path) -> None:
    """Refuse a profile for other inputs, or with other extents than the file fixes.

    Raises:
        InfopruneError: one input's name, rank or extent.
    """
    if profile.shapes.keys() != source.inputs.keys():
        raise InfopruneError(
            f"{model}: inputs are {', '.join(source.inputs)}, the profile is for {', '.join(profile.shapes)}; make it "
            "from the same recipe"
        )
    for name, fixed in source.inputs.items():
        for shape in profile.shapes[name]:
            fits = len(shape) == len(fixed) and all(
                want in (None, have) for want, have in zip(fixed, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if extent is None else str(extent) for extent in fixed)
                raise InfopruneError(
                    f"{model}: {name} is [{wanted}], the profile has {list(shape)}; make it from the same recipe"
                )
