"""The structural paper's looks at a vision encoder as it came, and what this package's pruning sees of it.

``heads``: importance of every attention head by negative entropy (Fig. 1), and what optimal brain surgeon would pay for
it. ``density``: rows of the FFN's matrices that are not sparse (Fig. 2). ``ranks``: ranks that the paper's epsilon
keeps (Fig. 6). ``damage``: what removing heads and neurons costs, block by block, from which budgets are allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infoprune_export.analysis import structure_figures as figures
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.obs import eliminate_neurons
from infoprune_export.ffn.svd import smallest_rank
from infoprune_export.heads.attention_mass import attention_weights
from infoprune_export.heads.obs import eliminate_heads, scores_of
from infoprune_export.models.calibration import TaskLoss, inputs_of
from infoprune_export.models.tower import Form

if TYPE_CHECKING:
    from infoprune_export.data.dataset import Split
    from infoprune_export.data.samples import Sample
    from infoprune_export.models.attention import Context
    from infoprune_export.models.block import Block
    from infoprune_export.models.elimination import Elimination
    from infoprune_export.models.tower import VisionTower
    from infoprune_export.models.vlm import VLM

WHAT = ("heads", "density", "ranks", "damage")
EPSILONS = (0.05, 0.01, 0.005, 0.001)
"""Of Theorem 3, as in Fig. 6 and Table 4."""
SPARSE = 0.05
"""A row is sparse if its L1 norm is below this times the FFN's input dimension (caption of Fig. 2)."""
POINTS = 64
"""Most points of a damage curve."""

Track = Callable[[str, int], Callable[[int], None]]


def check_structure(tower: VisionTower) -> None:
    """Refuse a tower that is pruned already: these analyses are of whole heads and plain FFNs.

    Raises:
        InfopruneError: blocks differ in their heads, or an FFN is no plain one.
    """
    counts, kinds = tower.head_counts(), [block.ffn_shape.kind for block in tower.blocks]
    if len(set(counts)) != 1 or set(kinds) != {"mlp"}:
        raise InfopruneError(
            f"{', '.join(WHAT)} look at an unpruned encoder; this one has {counts} heads per block and "
            f"{' and '.join(sorted(set(kinds)))} FFNs; name the original model"
        )


def analyse_structure(
    vlm: VLM, split: Split, images: int, seed: int, what: Collection[str], track: Track
) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers and figure of each analysis in `what`; entropies on `images` validation images, damage on calibration.

    Damage is that of a run of the same recipe, so it needs the recipe's calibration data.
    """
    results: dict[str, Any] = {}
    drawn: dict[str, str] = {}
    blocks = vlm.tower.blocks
    if {"heads", "damage"} & set(what):
        samples, loss = split.calibration, TaskLoss(split.calibration_labelled, vlm.tower)
        advance = track("damage of removing heads", len(samples))
        heads = eliminate_heads(vlm, samples, loss, seed, on_batch=advance)
        if "heads" in what:
            shown = split.validation[:images]
            entropy = attention_entropy(vlm, shown, track("attention entropy", len(shown)))
            results["heads"] = numbers = compare_heads(entropy, scores_of(heads))
            drawn["heads"] = figures.head_maps(numbers["importance"], numbers["damage"])
        if "damage" in what:
            advance = track("damage of removing neurons", len(blocks))
            neurons = eliminate_neurons(vlm, samples, loss, seed, on_block=lambda block: advance(1))
            found = {"heads": damage_curves(heads), "neurons": damage_curves(neurons)}
            results["damage"] = {"images": len(samples), **found}
            drawn["damage"] = figures.damage_panels(found)
    if "density" in what:
        results["density"] = densities(blocks)
        drawn["density"] = figures.density_lines(results["density"])
    if "ranks" in what:
        results["ranks"] = retained_ranks(blocks, EPSILONS)
        drawn["ranks"] = figures.rank_lines(results["ranks"])
    return results, drawn


# ── Heads ────────────────────────────────────────────────────────────────────


@torch.no_grad()
def attention_entropy(
    vlm: VLM, samples: Sequence[Sample], advance: Callable[[int], None] = lambda images: None
) -> Tensor:
    """How widely each head spreads its attention, float64 [L, H] in [0, 1].

    The mean over all queries of all images of ``-sum_k a_k log a_k / log n``, a the softmax weights on the n keys that
    the query's block lets it see (its window's, or its image's); 1 is attention to all of them alike. The caption of
    Fig. 1 does not say whose entropy it takes. Where n is the same everywhere, log n drops out of its normalisation.
    """
    blocks = vlm.tower.blocks
    summed = torch.zeros(len(blocks), blocks[0].num_heads, dtype=torch.float64)
    queries = 0
    for sample in samples:
        stream, context = vlm.tower.embed(vlm.tower.plan(inputs_of(vlm, [sample]), Form()))
        for number, block in enumerate(blocks):
            weights = attention_weights(block, stream, context)[0].double()
            widest = _visible_keys(block, stream, context).double().log()
            summed[number] += (torch.special.entr(weights).sum(-1) / widest).sum(-1).cpu()
            stream = block.run(stream, context)
        queries += stream.shape[-2]
        advance(1)
    return summed / queries


def _visible_keys(block: Block, stream: Tensor, context: Context) -> Tensor:
    """Keys that each query may attend to, int64 [S]."""
    segments = context.segments(block.windowed)
    size = stream.shape[-2]
    if segments is None:
        return torch.full((size,), size, device=stream.device)
    segment = segments.inverse // segments.index.shape[1]
    return segment.bincount()[segment]


def compare_heads(entropy: Tensor, damage: Tensor) -> dict[str, Any]:
    """Figure 1 beside optimal brain surgeon; both inputs [L, H].

    ``importance`` is the negative entropy, min-max normalised over all heads: 1 is the most concentrated. ``damage`` is
    what `heads.obs` ranks heads by: a head's cost when its block's elimination comes to it, at least that of the one
    before. ``lower_half_shared``: of the half of all heads that is least important, the share that is also in the half
    of least damage; .5 is chance.
    """
    low, high = entropy.min(), entropy.max()
    importance = (high - entropy) / (high - low) if high > low else torch.zeros_like(entropy)
    half = entropy.numel() // 2
    least, cheapest = (set(values.flatten().argsort(stable=True)[:half].tolist()) for values in (importance, damage))
    return {
        "entropy": entropy.tolist(),
        "importance": importance.tolist(),
        "damage": damage.tolist(),
        "lower_half_shared": len(least & cheapest) / max(half, 1),
    }


# ── Feed-forward networks ────────────────────────────────────────────────────


def row_density(matrix: Tensor, dimension: int) -> float:
    """Share of rows whose L1 norm is at least 5% of `dimension`."""
    return float((matrix.double().abs().sum(1) >= SPARSE * dimension).double().mean())


def densities(blocks: Sequence[Block]) -> dict[str, list[float]]:
    """Row density of W1 [D, m], W2 [m, D] and W1 W2 [D, D] per block, in the paper's layout (x W1 W2).

    A row of W1 or the product belongs to an input feature, one of W2 to a neuron. D, the FFN's input dimension, is the
    dimension for all three. Of a gated FFN W1 is the projection that the gate multiplies.
    """
    found: dict[str, list[float]] = {"W1": [], "W2": [], "W1W2": []}
    for block in blocks:
        first, second = (layer.weight.detach().double().T for layer in (block.ffn_in, block.ffn_out))
        for name, matrix in (("W1", first), ("W2", second), ("W1W2", first @ second)):
            found[name].append(row_density(matrix, len(first)))
    return found


def retained_ranks(blocks: Sequence[Block], epsilons: Sequence[float]) -> dict[str, Any]:
    """Ranks that Theorem 3 keeps of every block's W1 W2 [D, D], by epsilon.

    ``break_even`` is D / 2: two factors of that rank cost as much as one dense [D, D].
    """
    spectra = [
        torch.linalg.svdvals(block.ffn_out.weight.detach().double() @ block.ffn_in.weight.detach().double())
        for block in blocks
    ]
    return {
        "features": len(spectra[0]),
        "break_even": len(spectra[0]) / 2,
        "by_epsilon": {f"{e:g}": [smallest_rank(sigma, e) for sigma in spectra] for e in epsilons},
    }


# ── Damage ───────────────────────────────────────────────────────────────────


def damage_curves(eliminations: Sequence[Elimination]) -> list[dict[str, list[float]]]:
    """Per block the summed cost of its cheapest removals: ``removed`` counts, from 1, and their ``damage``.

    At most 64 counts, evenly spaced, all of them included. See `models.elimination` for the cost.
    """
    rows = []
    for elimination in eliminations:
        total = len(elimination.order)
        counts = sorted({math.ceil(total * step / POINTS) for step in range(1, POINTS + 1)})
        rows.append({"removed": counts, "damage": elimination.cost[counts].tolist()})
    return rows
