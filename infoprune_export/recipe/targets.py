"""Machines that engines are built for: one file of ``engines/targets`` each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from infoprune_export.recipe.base import Spec, tuple_of_list

GIB = 2**30
Route = Literal["function", "plugin", "aot"]
"""How ``infoprune::TokenSelect`` gets into a TensorRT engine: as standard operators, as a compiled C++ plugin, or as a
Python plugin compiled ahead of time into the engine."""


class Target(Spec):
    """What every target file has; `read_target` makes the subclass that its backend asks for."""

    name: str
    """What the engine and its files are named after."""
    description: str
    """One line, for lists."""
    backend: str
    """Which program runs the engine."""


class OnnxRuntimeTarget(Target):
    """ONNX Runtime on one of its execution providers."""

    backend: Literal["onnxruntime"]
    """ONNX Runtime."""
    providers: Annotated[tuple[str, ...], BeforeValidator(tuple_of_list), Field(min_length=1)]
    """ONNX Runtime execution providers, most wanted first; the first must be available."""
    graph_optimization: Literal["basic", "extended", "all"] = "all"
    """ONNX Runtime's level of graph rewriting."""
    threads: int = Field(0, ge=0)
    """Threads inside an operator; 0 lets ONNX Runtime decide."""


class KnownBug(Spec):
    """A defect of a target's software that users of an engine should know."""

    reference: str = Field(pattern=r"^https://\S+$")
    """Where it is described."""
    affects: str
    """Who is hit by it, a sentence."""
    advice: str
    """What to do, a sentence."""


class TensorRtTarget(Target):
    """TensorRT on one kind of GPU. Engines are built on the machine itself; TensorRT has no cross-compiler for it."""

    backend: Literal["tensorrt"]
    """TensorRT."""
    software: str
    """What a user installs, such as "JetPack 6.2"."""
    tensorrt: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    """Its release of TensorRT. Another one of the same series (first two numbers) will do."""
    cuda: str = Field(pattern=r"^\d+\.\d+$")
    """The CUDA release of that software. The driver must offer its major version."""
    sm: int = Field(ge=75, le=199)
    """Compute capability: 87 is 8.7, 120 is 12.0."""
    memory_gib: float = Field(gt=0)
    """The device's memory as its maker states it."""
    shared_memory: bool
    """CPU and GPU use one memory (Jetson), so the builder must leave some to the system."""
    precisions: Annotated[
        tuple[Literal["fp32", "fp16", "bf16", "int8"], ...], BeforeValidator(tuple_of_list), Field(min_length=1)
    ]
    """Types that its engines may be exported in."""
    opset: Annotated[tuple[int, int], BeforeValidator(tuple_of_list)]
    """Lowest and highest ONNX opset that the parser reads."""
    token_select: Route
    """How token selection gets in: as standard operators, as a C++ plugin, or as a Python plugin compiled ahead of time
    into the engine."""
    plugin_library: str | None = None
    """The compiled token-selection plugin; only the route "plugin" reads it."""
    workspace_gib: float | None = Field(None, gt=0)
    """Memory that layers of the engine may use for themselves; None takes a quarter of the device's."""
    optimization_level: int = Field(3, ge=0, le=5)
    """TensorRT's builder optimization level: higher searches longer."""
    version_compatible: bool = False
    """Build an engine that later releases of TensorRT load too."""
    hardware_compatible: bool = False
    """Build an engine that other GPUs load too (Ampere and later)."""
    strip_weights: bool = False
    """Build an engine without weights, which are refitted from the ONNX file."""
    known_bugs: Annotated[tuple[KnownBug, ...], BeforeValidator(tuple_of_list)] = ()
    """Printed in the kit's README."""

    @model_validator(mode="after")
    def _consistent(self) -> TensorRtTarget:
        if self.opset[0] > self.opset[1]:
            raise ValueError(f"opset {list(self.opset)}: the lowest comes first")
        if self.workspace_gib is not None and self.workspace_gib > self.memory_gib:
            raise ValueError(f"workspace_gib {self.workspace_gib} is more than memory_gib {self.memory_gib}")
        return self

    @property
    def series(self) -> str:
        """First two numbers of `tensorrt`: releases that share them share one API."""
        return ".".join(self.tensorrt.split(".")[:2])


_SPECS: Mapping[str, type[Target]] = {"onnxruntime": OnnxRuntimeTarget, "tensorrt": TensorRtTarget}


def target_spec(tree: Mapping[str, Any]) -> type[Target]:
    """The class a mapping with this ``backend`` is checked against.

    Raises:
        ValueError: there is no such backend.
    """
    backend = tree.get("backend")
    if not isinstance(backend, str) or backend not in _SPECS:
        raise ValueError(f"backend = {backend!r:.60}: there are {', '.join(_SPECS)}")
    return _SPECS[backend]


def read_target(tree: Mapping[str, Any]) -> Target:
    """A target from plain values, as a target file or `Target.model_dump` holds them.

    Raises:
        ValueError: no such backend, an unknown or missing key, a value out of range (pydantic's error is one too).
    """
    return target_spec(tree).model_validate(tree)
