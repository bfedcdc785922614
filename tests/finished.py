"""A small finished run of quickstart-qwen, which several test files look at; none may change it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress
from sharing import once, shared, top
from torch import nn

from infoprune_export.models.vlm import load
from infoprune_export.pipeline import Run, execute
from infoprune_export.recipe import ModelSpec, load_recipe
from infoprune_export.stages import STAGES

STAGE_2 = ("decoder.method=infoprune", "decoder.keep_ratio=1/60")


def small(folder: Path) -> list[str]:
    """Settings of a run that is made in seconds; its model is written into `folder` if it is not there."""
    return [
        f"model.name_or_path={two_blocks(folder)}",
        "data.calibration_images=8",
        "data.validation_questions=28",
        "heads.epochs=1",
        "heads.remove=0.25",
        "ffn.method=none",
        "validate.parity_batches=[2]",
        "validate.max_accuracy_drop=100.0",
        "bench={batch_sizes: [1], rounds: 3, warmup: 0}",
    ]


def two_blocks(folder: Path) -> Path:
    """The testbed model with its first vision block, which has windows, and its last; the export takes the time."""
    once(made := folder / "two-blocks", _two_blocks)
    return made


def _two_blocks(folder: Path) -> None:
    vlm = load(ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl"))
    visual, config = vlm.model.model.visual, vlm.model.config.vision_config
    visual.blocks = nn.ModuleList([visual.blocks[0], visual.blocks[-1]])
    config.depth, config.fullatt_block_indexes = 2, [1]
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def small_llava(folder: Path) -> None:
    """The shipped LLaVA with three of its vision blocks, of which it uses two, and a quarter of their neurons."""
    neurons, vlm = 128, load(ModelSpec(name_or_path="testbed/tiny-llava"))
    layers = vlm.model.model.vision_tower.encoder.layers
    vlm.model.model.vision_tower.encoder.layers = nn.ModuleList(list(layers[:3]))
    for layer in layers[:3]:
        layer.mlp.fc1.weight = nn.Parameter(layer.mlp.fc1.weight[:neurons].clone())
        layer.mlp.fc1.bias = nn.Parameter(layer.mlp.fc1.bias[:neurons].clone())
        layer.mlp.fc2.weight = nn.Parameter(layer.mlp.fc2.weight[:, :neurons].clone())
    vlm.model.config.vision_config.num_hidden_layers = 3
    vlm.model.config.vision_config.intermediate_size = neurons
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def execute_quickstart(folder: Path, last: str, *settings: str, donor: Path | None = None) -> Run:
    """Bring a run up to a stage; equal stages are taken from `donor`."""
    recipe = load_recipe("quickstart-qwen", settings)
    run = Run(recipe, folder, Progress(disable=True), donors=() if donor is None else (donor,))
    execute(run, STAGES, last)
    return run


def finished(factory: pytest.TempPathFactory) -> Path:
    """A run with Stage 2, K found, up to its validation; made when a test of the session first asks."""
    settings = (*small(top(factory)), *STAGE_2)
    return shared(factory, "finished", lambda folder: execute_quickstart(folder, "validation", *settings))
