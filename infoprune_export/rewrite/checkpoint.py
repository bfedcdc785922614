"""Pruned checkpoints that ``from_pretrained`` gives back exactly, or refuses.

The pruned model stays an instance of its Hugging Face class. Its ``config.json`` records the tower's structure, and the
language model's where that is pruned too, in ``quantization_config`` with ``quant_method: infoprune``; importing
`infoprune_export` registers that method, and transformers then calls `_PrunedStructure` after building the skeleton
and before reading weights:

1. The skeleton, still on the meta device, gets the recorded heads and FFN shapes.
2. The ordinary loader fills it from safetensors, one file or shards.
3. Missing, unknown or mismatched tensors raise; stock transformers would fill them with random numbers.
4. The model is handed out as an ordinary one: ``half()``, ``save_pretrained`` and training are not restricted.

Without `infoprune_export` imported, transformers stops at the first shape it does not expect: every removed part
leaves a smaller (possibly empty) tensor behind. Nothing is ever initialised at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin

    from infoprune_export.models.tower import Block, FfnShape, VisionTower

METHOD = "infoprune"
SCHEMA_VERSION = 2
_READABLE = (1, 2)
"""Version 2 records a pruned language model too. A checkpoint without one is written as 1, for older readers."""


# ── Structure record ─────────────────────────────────────────────────────────


def structure_of(tower: VisionTower) -> list[dict[str, Any]]:
    """Heads, head_dim, FFN kind, size and ranks of every block, as it is written to ``config.json``."""
    return [
        {"num_heads": block.num_heads, "head_dim": block.head_dim, "ffn": _ffn_record(block.ffn_shape)}
        for block in tower.blocks
    ]


def _ffn_record(shape: FfnShape) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": shape.kind, "size": shape.size}
    return record | {"ranks": list(shape.ranks)} if shape.ranks else record


def shape_like(tower: VisionTower, structure: list[dict[str, Any]] | None) -> None:
    """Give a full tower the recorded shapes, in place; which heads are kept does not matter before weights are read.

    Raises:
        InfopruneError: the record does not fit the tower.
    """
    if not isinstance(structure, list):
        raise InfopruneError(f"config.json records {structure!r:.60} where a list of pruned blocks should be")
    if len(structure) != len(tower.blocks):
        raise InfopruneError(f"config.json records {len(structure)} pruned blocks, the tower has {len(tower.blocks)}")
    for number, (block, record) in enumerate(zip(tower.blocks, structure, strict=True)):
        try:
            heads, head_dim = record["num_heads"], record["head_dim"]
            kind, size, ranks = record["ffn"]["kind"], record["ffn"]["size"], record["ffn"].get("ranks", [])
        except (KeyError, TypeError, AttributeError):
            raise InfopruneError(f"config.json, block {number}: {record} records no structure") from None
        if head_dim != block.head_dim or not _within(heads, range(block.num_heads + 1)):
            raise InfopruneError(f"config.json, block {number}: {heads} heads of {head_dim} do not fit the tower")
        if not _fits(block, kind, size, ranks):
            with_ranks = f" and ranks {ranks}" if ranks else ""
            raise InfopruneError(
                f"config.json, block {number}: {kind} FFN of size {size}{with_ranks} does not fit the tower"
            )
        if heads < block.num_heads:
            block.keep_heads(range(heads))
        if kind == "linear":
            block.make_ffn_linear(size)
            continue
        if size < block.ffn_shape.size:
            block.keep_neurons(range(size))
        if kind == "factored":
            block.make_ffn_factored(ranks)
        elif kind == "bypass":
            block.make_ffn_bypass(ranks[0])


def _fits(block: Block, kind: Any, size: Any, ranks: Any) -> bool:
    """Whether a whole block's FFN can be given this shape; see `FfnPlan` for the limits."""
    width, projections = block.ffn_shape.size, len(block.ffn_projections)
    # A linear replacement has any rank, but is never there without one.
    sizes = {
        "mlp": range(1, width + 1),
        "linear": range(1, 2**31),
        "constant": range(1),
        "factored": range(1, width + 1),
        "bypass": range(1, width),
    }
    if not isinstance(kind, str) or not isinstance(ranks, list) or not _within(size, sizes.get(kind, range(0))):
        return False
    most = min(block.ffn_out.out_features, size)
    counts = {"factored": (projections, range(1, most)), "bypass": (1, range(1, 2**31))}
    count, allowed = counts.get(kind, (0, range(0)))
    return len(ranks) == count and all(_within(rank, allowed) for rank in ranks)


def _within(value: Any, allowed: range) -> bool:
    """Whether it is a whole number of a range; for anything else, ``in`` would compare with each of them."""
    return type(value) is int and value in allowed


def save(model: PreTrainedModel, processor: ProcessorMixin, tower: VisionTower, folder: Path) -> None:
    """Write an ordinary checkpoint: safetensors, configuration with the structure record, processor."""
    from infoprune_export.language.record import language_record

    language = language_record(model)
    model.config.quantization_config = InfopruneConfig(
        blocks=structure_of(tower), language=language, schema_version=1 if language is None else SCHEMA_VERSION
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ── transformers hook ────────────────────────────────────────────────────────


class InfopruneConfig(QuantizationConfigMixin):
    """The structure record, under the name transformers looks for."""

    language: list[dict[str, int]] | None = None

    def __init__(
        self,
        blocks: list[dict[str, Any]] | None = None,
        quant_method: str = METHOD,
        schema_version: int = SCHEMA_VERSION,
        language: list[dict[str, int]] | None = None,
        **_: Any,
    ) -> None:
        if schema_version not in _READABLE:
            raise InfopruneError(
                f"pruned checkpoint has schema_version {schema_version}, this version reads up to {SCHEMA_VERSION}; "
                "install the infoprune-export that wrote it"
            )
        self.quant_method = quant_method
        self.schema_version = schema_version
        self.blocks = blocks
        # What is no attribute of the instance is not written.
        if language is not None:
            self.language = language


class _PrunedStructure(HfQuantizer):
    """Shapes the skeleton before loading and holds the loader to its own findings afterwards."""

    quantization_config: InfopruneConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        shape_like(tower_of(model), self.quantization_config.blocks)
        if self.quantization_config.language is not None:
            # Here, because importing this module must stay as light as importing the transformers it hooks into.
            from infoprune_export.language.record import shape_language_like
            from infoprune_export.models.language import language_layers

            shape_language_like(language_layers(model), self.quantization_config.language)
        self._wanted = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        # The loader tells these methods of the instance what it could not find, and otherwise only warns: the first
        # before it initialises what is missing, which fails on a tensor that is empty by right, the second when it
        # knows which tied weights are there after all.
        mark, adjust = model.mark_tied_weights_as_initialized, model._adjust_missing_and_unexpected_keys
        self._checked = False

        def mark_and_refuse(loading_info: Any) -> None:
            mark(loading_info)
            adjust(loading_info)
            _refuse(loading_info, tied=model.all_tied_weights_keys)

        def adjust_and_refuse(loading_info: Any) -> None:
            adjust(loading_info)
            _refuse(loading_info)
            self._checked = True

        model.mark_tied_weights_as_initialized = mark_and_refuse
        model._adjust_missing_and_unexpected_keys = adjust_and_refuse

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if not self._checked:
            raise InfopruneError(
                "this transformers version loads weights by a route on which a missing tensor cannot be noticed; "
                "install a version the constraints file names"
            )
        del model.mark_tied_weights_as_initialized, model._adjust_missing_and_unexpected_keys
        # Some versions neither compare shapes nor convert to the dtype asked for when a quantizer is at work.
        for name, parameter in model.named_parameters():
            shape, dtype = self._wanted[name]
            if parameter.shape != shape:
                raise InfopruneError(
                    f"pruned checkpoint has mismatched tensors: {name} is {list(parameter.shape)}, "
                    f"its config.json says {list(shape)}"
                )
            parameter.data = parameter.data.to(dtype)
        # From here on it is an ordinary model; the record in its configuration is what save_pretrained writes.
        del model.hf_quantizer
        del model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            _forget_quantized(module)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


# Not by the decorators of transformers, which refuse to take the place of `_registration`'s entry.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = InfopruneConfig
AUTO_QUANTIZER_MAPPING[METHOD] = _PrunedStructure


def _refuse(loading_info: Any, tied: Container[str] = ()) -> None:
    """Raise if the loader found anything missing, other than `tied` weights, of another shape, or unknown."""
    missing = sorted(name for name in loading_info.missing_keys if name not in tied)
    mismatched = [
        f"{name} is {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(loading_info.mismatched_keys)
    ]
    unexpected = sorted(loading_info.unexpected_keys)
    for what, found in (("missing", missing), ("mismatched", mismatched), ("unexpected", unexpected)):
        if found:
            # Or the loader's own error about shapes, which names no tensor, would take the place of this one.
            loading_info.mismatched_keys = set()
            raise InfopruneError(
                f"pruned checkpoint has {what} tensors: {', '.join(found[:3])}"
                f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}; "
                "its weights do not belong to its config.json"
            )


def _forget_quantized(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    if config is not None and getattr(config, "_is_quantized", False):
        config._is_quantized = False
