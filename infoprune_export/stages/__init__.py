"""The stages of a run: each reads upstream folders, calls one room, and writes one folder.

::

    data ─► gates ─► heads ─► ffn ─► recovery ─► language ─► checkpoint ─► accuracy ─► validation ─────► report
      ├───► baseline ─────────────────────────────────────────────┼──────────►┤             ▲               ▲
      └───► decoder ──────────────────────────────────────────────┼──────────►┘             │               │
                                                                  └─► onnx ─► engine ───────┴► attribution ─┤
                                                                        └───► bench ────────────────────────┤
                                                                              variants ─────────────────────┘
"""

from __future__ import annotations

import contextlib
from importlib import metadata
from pathlib import Path
from typing import Any

from infoprune_export.pipeline import Stage
from infoprune_export.recipe import Recipe, TensorRtTarget, engine_target
from infoprune_export.stages.attribution import make_attribution
from infoprune_export.stages.budget import budget_slice, make_budget
from infoprune_export.stages.common import check_everything
from infoprune_export.stages.compress import (
    data_slice,
    make_accuracy,
    make_baseline,
    make_checkpoint,
    make_data,
    make_decoder,
    make_ffn,
    make_gates,
    make_heads,
    make_language,
)
from infoprune_export.stages.deliver import (
    int8_scheme,
    make_bench,
    make_engine,
    make_onnx,
    make_report,
    make_validation,
    make_variants,
)
from infoprune_export.stages.processes import shared_out
from infoprune_export.stages.recovery import make_recovery, recovery_slice

__all__ = ["STAGES", "check_everything"]


def _sections(*names: str) -> Any:
    def pick(recipe: Recipe) -> dict[str, Any]:
        tree = recipe.to_dict()
        return {name: tree[name] for name in names}

    return pick


def _gates_slice(recipe: Recipe) -> dict[str, Any]:
    heads = recipe.to_dict()["heads"]
    # Scores do not depend on how many heads go afterwards, unless the gates are trained to meet that number.
    later = {"choose", "threshold", "survivors", "checkpoint_steps"}
    if recipe.heads.method != "hard_concrete":
        later.add("remove")
    return {"heads": {k: v for k, v in heads.items() if k not in later}, "seed": recipe.seed}


def _decoder_slice(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.to_dict()
    # Only a layer that is looked for depends on the tokens that come in.
    return {name: tree[name] for name in ("decoder", "tokens") if name == "decoder" or recipe.decoder.finds_layer}


def _onnx_slice(recipe: Recipe) -> dict[str, Any]:
    chosen: dict[str, Any] = _sections("tokens", "export", "seed")(recipe)
    if recipe.export.quantization == "int8":
        chosen["int8_scheme"] = int8_scheme(recipe)
    return chosen


def _variants_slice(recipe: Recipe) -> dict[str, Any]:
    return {k: v for k, v in recipe.to_dict().items() if k not in ("validate", "bench", "description", "grid")}


def _target_slice(recipe: Recipe) -> dict[str, Any]:
    from infoprune_export.artifacts import sha256_file

    target = engine_target(recipe.engine)
    chosen: dict[str, Any] = {"target": target.model_dump(mode="json")}
    if isinstance(target, TensorRtTarget):
        chosen["built_for"] = {name: recipe.to_dict()["engine"][name] for name in ("images", "image_sizes")}
        if target.plugin_library is not None and Path(target.plugin_library).is_file():
            chosen["plugin"] = sha256_file(Path(target.plugin_library))
    return chosen


def _bench_slice(recipe: Recipe) -> dict[str, Any]:
    chosen: dict[str, Any] = _sections("bench", "engine")(recipe)
    chosen["target"] = engine_target(recipe.engine).model_dump(mode="json")
    chosen["limits"] = {name: recipe.to_dict()["validate"][name] for name in _LIMITS}
    if "openvino" in recipe.bench.against:
        with contextlib.suppress(metadata.PackageNotFoundError):
            chosen["openvino"] = metadata.version("openvino")
    return chosen


_LIMITS = ("onnx_tolerance", "min_cosine", "replay_tolerance")
"""Of section validate: what outputs are held to before they are timed."""


def _validation_slice(recipe: Recipe) -> dict[str, Any]:
    chosen: dict[str, Any] = _sections("validate", "tokens", "decoder", "seed")(recipe)
    # How many processes answer changes nothing.
    del chosen["validate"]["processes"]
    return chosen


MAKERS = {"baseline": make_baseline, "accuracy": make_accuracy, "validation": make_validation}
"""Stages that can be shared out between processes."""

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "calibration and validation data", (), data_slice, make_data, uses_model=False),
        Stage("baseline", "answers of the original", ("data",), _sections(), shared_out(make_baseline, "baseline")),
        Stage("decoder", "layer of Stage 2 found", ("data",), _decoder_slice, make_decoder),
        Stage("gates", "head gates trained", ("data",), _gates_slice, make_gates, resumable=True),
        Stage("budget", "heads and widths settled together", ("data",), budget_slice, make_budget),
        Stage(
            "heads",
            "heads chosen and refitted",
            ("data", "gates", "budget"),
            _sections("heads", "refit"),
            make_heads,
        ),
        Stage("ffn", "FFNs compressed", ("data", "budget", "heads"), _sections("ffn", "refit", "seed"), make_ffn),
        Stage(
            "recovery",
            "encoder recovered",
            ("data", "heads", "ffn"),
            recovery_slice,
            make_recovery,
            resumable=True,
        ),
        Stage(
            "language",
            "language model compressed",
            ("data", "heads", "ffn", "recovery"),
            _sections("language", "refit", "seed"),
            make_language,
        ),
        Stage("checkpoint", "model rewritten", ("heads", "ffn", "recovery", "language"), _sections(), make_checkpoint),
        Stage(
            "accuracy",
            "answers of the compressed",
            ("data", "baseline", "decoder", "heads", "ffn", "recovery", "language", "checkpoint"),
            _sections("tokens", "decoder", "seed"),
            shared_out(make_accuracy, "accuracy"),
        ),
        Stage("onnx", "ONNX exported", ("data", "checkpoint"), _onnx_slice, make_onnx),
        Stage("engine", "engine built", ("onnx",), _target_slice, make_engine),
        Stage(
            "validation",
            "validated",
            (
                "data",
                "baseline",
                "decoder",
                "heads",
                "ffn",
                "recovery",
                "language",
                "checkpoint",
                "accuracy",
                "onnx",
                "engine",
            ),
            _validation_slice,
            shared_out(make_validation, "validation"),
        ),
        Stage(
            "attribution",
            "errors attributed",
            ("data", "heads", "ffn", "recovery", "checkpoint", "onnx", "engine", "validation"),
            _validation_slice,
            make_attribution,
        ),
        Stage("bench", "latency measured", ("onnx", "checkpoint"), _bench_slice, make_bench),
        Stage(
            "variants",
            "variants run",
            ("data", "baseline", "gates"),
            _variants_slice,
            make_variants,
        ),
        Stage(
            "report",
            "report written",
            ("gates", "budget", "recovery", "validation", "attribution", "bench", "variants"),
            _sections("description", "name"),
            make_report,
        ),
    )
}
