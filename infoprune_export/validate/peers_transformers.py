"""The exporter that comes with transformers: its ONNX of encoder and projector, in ONNX Runtime, within the model.

Called as its guide shows, the graphs stand in for the modules and what is between them is the model's own code, which
is therefore part of the figures.
"""

from __future__ import annotations

import torch

from infoprune_export.engine.onnxruntime import load_runtime, runtime_target, session_options
from infoprune_export.models.qwen import QwenTower
from infoprune_export.validate.bench_case import BenchCase, Side
from infoprune_export.validate.bench_running import module_running
from infoprune_export.validate.peers import Peer, Start
from infoprune_export.validate.peers_torch import own_features, vision_weights
from infoprune_export.validate.sweep_peer import examine_peer, replace_modules


def _missing(case: BenchCase) -> str | None:
    reason: str | None = examine_peer("transformers")["not_available"]
    return reason


def _prepare(case: BenchCase, side: Side) -> Start:
    tower = case.placed(side)
    generator = torch.Generator().manual_seed(0)
    inputs = (
        tower.grid_inputs([(1, 16, 24)] * 2, generator)
        if isinstance(tower, QwenTower)
        else tower.example_inputs(2, generator)
    )
    placed = {name: value.to(case.device) for name, value in case.typed(inputs).items()}
    options = session_options(runtime_target(case.target), case.spec.threads)
    replace_modules(tower.model, placed, options, case.device)
    own = own_features(tower.model)
    return lambda load: module_running(own, [case.typed(load.inputs)], case.device)


def _load(case: BenchCase) -> None:
    load_runtime(case.target)


# Exporting leaves a hundred megabytes behind that no call needs.
TRANSFORMERS = Peer("transformers", ("original",), _missing, _prepare, vision_weights, load=_load)
