"""Sections about what is delivered: export, engine, validation, latency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from infoprune_export.recipe.base import Sizes, Spec, tuple_of_list

if TYPE_CHECKING:
    import torch


class ExportSpec(Spec):
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of weights and activations; the module is exported as it is typed, the graph is never converted."""
    keep_fp32: Annotated[tuple[str, ...], BeforeValidator(tuple_of_list)] = ()
    """Parts that compute in fp32 inside an fp16 or bf16 graph: ``blocks.3``, ``blocks.3.attention``,
    ``blocks.3.ffn``, or ``stream`` for the residual stream itself. The attribute command says which overflow."""
    quantization: Literal["none", "int8"] = "none"
    """INT8 weights and activations of linear layers (QDQ), calibrated on the calibration images; needs fp32."""
    int8_scheme: Literal["auto", "cpu", "tensorrt"] = "auto"
    """``cpu``: unsigned asymmetric activations, faster in ONNX Runtime on x86. ``tensorrt``: signed symmetric ones, all
    that TensorRT takes. Auto: what ``engine.target`` needs."""
    images: Literal["auto", "one", "several"] = "auto"
    """Images per call where the family allows any size (Qwen, LLaVA-NeXT). One is faster, and all that token selection
    takes there. Auto: several without selection, one with it."""
    opset: int = Field(20, ge=18, le=22)
    """20 is the newest every supported TensorRT reads (10.3 on Jetson included)."""

    @model_validator(mode="after")
    def _types_fit(self) -> ExportSpec:
        if self.quantization == "int8" and self.precision != "fp32":
            raise ValueError(f"quantization int8 with precision {self.precision}: INT8 is made from fp32; use fp32")
        if self.keep_fp32 and self.precision == "fp32":
            raise ValueError("keep_fp32 with precision fp32: everything is fp32 already; use fp16 or bf16")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as torch names it."""
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]

    @property
    def several(self) -> bool | None:
        """`images` as the exporter takes it."""
        return None if self.images == "auto" else self.images == "several"

    @property
    def numerics(self) -> str:
        """What tolerances go by: fp32, fp16, bf16 or int8."""
        return "int8" if self.quantization == "int8" else self.precision


_Count = Annotated[int, Field(ge=1)]
_Size = Annotated[tuple[_Count, _Count], BeforeValidator(tuple_of_list)]


class EngineSpec(Spec):
    target: str = "onnxruntime-cpu"
    """A file of ``engines/targets`` without its suffix, or a path to one."""
    images: Annotated[tuple[_Count, _Count, _Count], BeforeValidator(tuple_of_list)] = (1, 4, 16)
    """Least, usual and most images a call of a TensorRT engine, where the export takes several."""
    image_sizes: Annotated[tuple[_Size, _Size, _Size], BeforeValidator(tuple_of_list)] = (
        (224, 224),
        (448, 672),
        (896, 1344),
    )
    """Smallest, usual and largest image of a TensorRT engine, height and width in pixels as they reach the processor;
    only where the family takes any size."""
    plugin_library: str | None = None
    """The compiled token-selection plugin, for TensorRT targets that select tokens with one; overrides the target's."""

    @model_validator(mode="after")
    def _ascending(self) -> EngineSpec:
        if list(self.images) != sorted(self.images):
            raise ValueError(f"images {list(self.images)}: least, usual, most must not fall")
        for axis, name in enumerate(("heights", "widths")):
            extents = [size[axis] for size in self.image_sizes]
            if extents != sorted(extents):
                raise ValueError(f"image_sizes: the {name} {extents} must not fall")
        return self


class ValidateSpec(Spec):
    """What the verdict demands. Scales are relative to the largest absolute output."""

    max_accuracy_drop: float = Field(4.0, ge=0)
    """Points, original to engine; the standard error of the difference is printed beside it, not added to it."""
    min_agreement: float = Field(0.8, ge=0, le=1)
    """Without annotations: fraction of questions both models answer alike."""
    rewrite_tolerance: float = Field(1e-5, gt=0)
    """Largest error of the rewritten model against the masked original, relative."""
    onnx_tolerance: float | None = Field(None, gt=0)
    """Largest error, relative. By default 1e-4 in fp32, 3e-2 in fp16, 0.2 in bf16, 0.5 in INT8."""
    min_cosine: float | None = Field(None, ge=0, le=1)
    """By default 0.999999 in fp32, 0.9995 in fp16, 0.99 in bf16, 0.99 in INT8."""
    replay_tolerance: float = Field(1e-2, gt=0)
    """Worst step of the kept indices when replayed in float64: 1 - residual / best residual. Judged in fp32 only: in
    lower precision the features themselves differ by more, and accuracy judges."""
    parity_batches: Sizes = (1, 3, 8)
    """Numbers of images that outputs are compared on."""
    processes: int = Field(1, ge=1)
    """That answer the questions, each with a share of them; one GPU each on ``cuda``. No result depends on it."""

    @field_validator("parity_batches", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


PeerName = Literal["eager", "compile", "transformers", "openvino"]
"""Names of `validate.peers.PEERS`."""


class BenchSpec(Spec):
    """Latency, original against compressed, interleaved in one process."""

    batch_sizes: Sizes = (1, 16)
    """Images per call; one table row each."""
    rounds: int = Field(30, ge=3)
    """That are made in any case; a round runs everything once."""
    max_interval: float = Field(0.05, gt=0)
    """Rounds go on until the 95% interval of every ratio is at most this wide, relative to the ratio."""
    max_rounds: int | None = Field(None, ge=3)
    """At most so many. Twenty times ``rounds`` by default."""
    max_seconds: float = Field(120.0, gt=0)
    """At most so long for a batch size, once ``rounds`` are made."""
    warmup: int = Field(3, ge=0)
    """Rounds that are run first and not counted."""
    threads: int = Field(1, ge=1)
    """CPU threads inside an operator. One, because small pruned GEMMs scale worse than large ones."""
    against: Annotated[tuple[PeerName, ...], BeforeValidator(tuple_of_list)] = ()
    """Other ways to run the encoder, timed in the same rounds, their outputs checked against PyTorch first."""
    memory: bool = False
    """Also measure the memory of every side, each in a process of its own."""

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _limits_fit(self) -> BenchSpec:
        if self.max_rounds is not None and self.max_rounds < self.rounds:
            raise ValueError(f"max_rounds {self.max_rounds} is less than rounds {self.rounds}; raise it")
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"against {list(self.against)}: name each once")
        return self

    @property
    def most_rounds(self) -> int:
        """`max_rounds`, or its default."""
        return 20 * self.rounds if self.max_rounds is None else self.max_rounds
