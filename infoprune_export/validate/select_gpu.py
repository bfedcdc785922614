"""Token selection on a GPU: the package's kernel against the same choice in PyTorch's operators on the same device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import interleaved
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens import cuda
from infoprune_export.tokens.kernel import Settings
from infoprune_export.tokens.select import EPSILON, select_by_pytorch, weighting
from infoprune_export.validate.select_bench import SIZES, WIDTH, picture

BATCHES = (1, 8)
"""Images a call; the kernel computes them side by side, one on each multiprocessor."""
WARMUP = 3


def select_gpu(
    rounds: int,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    batches: Sequence[int] = BATCHES,
    dtype: torch.dtype = torch.float16,
    on_row: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row for each size and number of images: median milliseconds of both, and how many choices they share.

    Every token is in the pool. ``overlap`` is the share of the kernel's kept tokens that PyTorch keeps too.

    Raises:
        InfopruneError: there is no CUDA device, or its driver does not take the kernel.
    """
    if not torch.cuda.is_available():
        raise InfopruneError("device cuda: torch finds no CUDA device; run this on a machine with an NVIDIA GPU")
    rows = []
    for tokens, kept in sizes:
        for batch in batches:
            rows.append(measure(tokens, kept, batch, dtype, rounds))
            on_row()
    return rows


def measure(tokens: int, kept: int, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row."""
    spec = TokensSpec()
    pictures = [picture(tokens, seed) for seed in range(batch)]
    features = torch.from_numpy(np.stack([x for x, _ in pictures])).to("cuda", dtype)
    attention = torch.from_numpy(np.stack([a for _, a in pictures])).cuda()
    prior, temperature = weighting(attention, spec)
    counts = torch.full((batch,), tokens, device="cuda")
    settings = Settings(kept, tokens, float(tokens), temperature, spec.exponent, EPSILON)
    by_kernel = cuda.token_select(features, prior, counts, settings)
    if by_kernel is None:
        name = torch.cuda.get_device_name()
        raise InfopruneError(f"{name}: its driver does not take the kernel; it needs compute capability 7.5, CUDA 11.0")

    def by_pytorch() -> torch.Tensor:
        return select_by_pytorch(features, prior, counts, *vars(settings).values())

    def finished(call: Callable[[], object]) -> Callable[[], object]:
        def wait() -> None:
            call()
            torch.cuda.synchronize()

        return wait

    calls = {
        "kernel": finished(lambda: cuda.token_select(features, prior, counts, settings)),
        "pytorch": finished(by_pytorch),
    }
    with torch.inference_mode():
        times = interleaved(calls, rounds=rounds, warmup=WARMUP)
        shared = (by_kernel[:, :, None] == by_pytorch()[:, None, :]).any(2).float().mean().item()
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {"tokens": tokens, "kept": kept, "width": WIDTH, "images": batch, "overlap": shared, **medians}


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per row; the last column is how many times longer PyTorch takes."""
    table = Table("tokens", "kept", "images", "kernel ms", "PyTorch ms", "PyTorch / kernel", "overlap")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("tokens", "kept", "images")),
            *(f"{row[name]:.2f}" for name in ("kernel", "pytorch")),
            f"{row['pytorch'] / row['kernel']:.1f}",
            f"{100 * row['overlap']:.1f}%",
        )
    return table
