"""What compressing a real-size tower costs: wall time and peak memory. Random weights cost as much as others."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from infoprune_export.validate.export_cost import GIB

if TYPE_CHECKING:
    from infoprune_export.data.samples import Sample
    from infoprune_export.models.vlm import VLM

TOWER, SIDE = "qwen2-vl-7b", 224


def compress_cost(images: int = 64, blocks: int | None = None, name: str = TOWER) -> list[dict[str, Any]]:
    """Rows of a Qwen tower of the zoo, in a process of its own; fewer than its `blocks` for a quick look.

    ``ffn``: half of the FFN multiply-accumulates by ``obs``, refitted, on `images` random images of 224 x 224 pixels
    (256 patches) without labels; ``peak_bytes`` is the largest resident size the process ever had, libraries, the model
    and its copy included. ``gates``: the spectral terms of a training step of ``budgeted`` with their gradient, against
    a forward pass over the step's 32 images, after a first step that computes all blocks.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, images, blocks, name).result()


def measure(images: int, blocks: int | None, name: str) -> list[dict[str, Any]]:
    """`compress_cost` in this process."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from infoprune_export.models import tower_of
    from infoprune_export.models.vlm import VLM
    from infoprune_export.models.zoo import random_model

    model = random_model(name, blocks)
    # Nothing is asked here, so the tokenizer's half of a processor is not needed.
    patch = model.config.vision_config.patch_size
    processor: Any = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(patch_size=patch))
    vlm = VLM(model, processor, tower_of(model))
    with tempfile.TemporaryDirectory() as folder:
        samples = _noise_images(Path(folder), max(images, 32))
        return [_measure_ffn(vlm, samples[:images]), _measure_gates(vlm, samples[:32])]


def _noise_images(folder: Path, count: int) -> list[Sample]:
    import numpy as np
    from PIL import Image

    from infoprune_export.data.samples import read_images

    rng = np.random.default_rng(0)
    for number in range(count):
        # Coarse noise: what a photograph's size costs, without a photograph.
        coarse = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{number:03d}.png")
    return read_images(folder, ("",))


def _measure_ffn(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Any]:
    from infoprune_export.ffn.job import FfnJob
    from infoprune_export.ffn.methods import compress_ffn
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.recipe import FfnSpec, RefitSpec

    pruned = writable_copy(vlm)
    started = time.perf_counter()
    loss = TaskLoss(False, vlm.tower)
    plan, _ = compress_ffn(FfnJob(vlm, pruned, samples, loss, FfnSpec(), ridge=RefitSpec().ridge, seed=0))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "what": "ffn",
        "blocks": len(vlm.tower.blocks),
        "images": len(samples),
        "kept": plan.kept_fraction,
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _measure_gates(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Any]:
    import numpy as np
    import torch

    from infoprune_export.heads.objective import Place, SigmoidGates
    from infoprune_export.heads.spectral import RollingSpectra, SpectralTerms
    from infoprune_export.models.calibration import inputs_of
    from infoprune_export.recipe import HeadsSpec

    spec = HeadsSpec(method="budgeted").resolved()
    blocks = vlm.tower.blocks
    width = blocks[0].num_heads * blocks[0].head_dim
    generator = torch.Generator().manual_seed(0)
    grams = [(z := torch.randn(width, width, generator=generator, dtype=torch.float64)) @ z.T / width for _ in blocks]
    shape = (len(blocks), blocks[0].num_heads)
    terms = SpectralTerms(grams, [block.head_dim for block in blocks], "wasserstein", rank=True)
    gates = SigmoidGates(
        spec, shape, RollingSpectra(terms, shape, spec.spectral_blocks, spec.beta, spec.gamma), vlm.device
    )

    def step(number: int) -> float:
        started = time.perf_counter()
        opened = gates.draw(np.random.default_rng(number))
        total, _ = gates.regularise(opened, Place(number, 100, (0, 1), lambda tensor: tensor))
        total.backward()
        return time.perf_counter() - started

    step(0)
    spectral = min(step(number) for number in (1, 2, 3))
    inputs = inputs_of(vlm, samples)
    started = time.perf_counter()
    with torch.inference_mode():
        vlm.tower.features_of(inputs)
    forward = time.perf_counter() - started
    return {
        "what": "gates",
        "blocks": len(blocks),
        "images": len(samples),
        "seconds": spectral,
        "forward_seconds": forward,
        "share": spectral / forward,
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per measurement."""
    table = Table("what", "blocks", "images", "seconds", "peak GiB", "share of a forward pass")
    for row in rows:
        table.add_row(
            row["what"],
            str(row["blocks"]),
            str(row["images"]),
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / GIB:.1f}" if "peak_bytes" in row else "",
            f"{row['share']:.1%} of {row['forward_seconds']:.0f} s" if "share" in row else "",
        )
    return table
