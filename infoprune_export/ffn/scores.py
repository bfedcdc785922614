"""Neurons chosen by simple scores, every block to the same width: what the better methods are compared with.

Magnitudes and activations of different blocks are on different scales, so the methods' authors rank within a layer; a
global ranking would empty whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.ffn.budget import uniform_width
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.observe import mean_over_tokens
from infoprune_export.ffn.widths import remove_neurons
from infoprune_export.models.vlm import VLM


class Score(Protocol):
    """How much each neuron of each block counts, float64 [size] per block."""

    def __call__(self, vlm: VLM, samples: Sequence[Sample], seed: int) -> list[Tensor]: ...


def random(vlm: VLM, samples: Sequence[Sample], seed: int) -> list[Tensor]:
    """Uniform noise: the control."""
    rng = np.random.default_rng([seed, 1])
    return [torch.from_numpy(rng.random(block.ffn_shape.size)) for block in vlm.tower.blocks]


def magnitude(vlm: VLM, samples: Sequence[Sample], seed: int) -> list[Tensor]:
    """|row of W1| |column of W2|, which scaling a neuron up in one and down in the other does not change.

    Of a gated FFN the row is both input rows, one behind the other.
    """
    scores = []
    for block in vlm.tower.blocks:
        layers = block.ffn_projections
        rows = [layer.weight.detach().double() for role, layer in layers.items() if role != "ffn_out"]
        scores.append((torch.cat(rows, dim=1).norm(dim=1) * _columns(layers["ffn_out"].weight)).cpu())
    return scores


def activation(vlm: VLM, samples: Sequence[Sample], seed: int) -> list[Tensor]:
    """Root mean square of the neuron times |column of W2|: the size of what it adds to the output."""
    squares = mean_over_tokens(vlm, samples, lambda block: block.ffn_out, power=2)
    columns = [_columns(block.ffn_out.weight).cpu() for block in vlm.tower.blocks]
    return [square.sqrt() * column for square, column in zip(squares, columns, strict=True)]


def _columns(weight: Tensor) -> Tensor:
    return weight.detach().double().norm(dim=0)


def top(score: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest, ascending; ties go to the lowest index."""
    return sorted(score.argsort(descending=True, stable=True)[:count].tolist())


def _compress(job: FfnJob, *, score: Score) -> Compressed:
    widths = [uniform_width(block.ffn_shape.size, job.spec) for block in job.pruned.tower.blocks]
    kept = [top(one, width) for one, width in zip(score(job.pruned, job.samples, job.seed), widths, strict=True)]
    return remove_neurons(job, kept)


compress_random = partial(_compress, score=random)
compress_magnitude = partial(_compress, score=magnitude)
compress_activation = partial(_compress, score=activation)
