"""Scores of heads without training, behind the same plan: a table of name -> function.

Every criterion gives scores [L, H], float32 on the CPU, of which the larger stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoprune_export.analysis.spectra import effective_rank, singular_values
from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.attention_mass import nonlocal_ratio
from infoprune_export.heads.gates import head_grams
from infoprune_export.heads.michel import michel, michel_iterative
from infoprune_export.heads.obs import eliminate_heads, scores_of
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import VLM, writable_copy
from infoprune_export.recipe import HeadsSpec


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at; the tower is not pruned and must be left as it is."""

    vlm: VLM
    samples: Sequence[Sample]
    loss: TaskLoss
    spec: HeadsSpec
    seed: int
    advance: Callable[[float], None] = lambda share: None
    """Told which share of the work, of 1 in all, was just done."""


def score_heads(evidence: Evidence) -> Tensor:
    """Scores [L, H] of the method that the spec names.

    Raises:
        InfopruneError: the tower is pruned already, or the method trains gates instead.
    """
    counts = evidence.vlm.tower.head_counts()
    if len(set(counts)) != 1:
        raise InfopruneError(f"heads are scored on an unpruned tower; this one has {counts} heads per block")
    if evidence.spec.method not in CRITERIA:
        raise InfopruneError(
            f"heads.method = {evidence.spec.method!r} is no criterion; there are: {', '.join(CRITERIA)}"
        )
    return CRITERIA[evidence.spec.method](evidence).float().cpu()


# ── Without data ─────────────────────────────────────────────────────────────


def score_random(evidence: Evidence) -> Tensor:
    """Uniform numbers from the seed: the control."""
    counts = evidence.vlm.tower.head_counts()
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(len(counts), counts[0], generator=generator)


def score_magnitude(evidence: Evidence) -> Tensor:
    """Frobenius norm of a head's value rows (with bias) times that of its columns of the output projection.

    The product, because scaling one up and the other down by the same factor changes nothing.
    """
    rows = []
    for block in evidence.vlm.tower.blocks:
        values = block.value_rows.double().unflatten(0, (block.num_heads, block.head_dim)).flatten(1)
        columns = _columns(block.attention_out.weight, block.num_heads).flatten(1)
        rows.append(values.norm(dim=1) * columns.norm(dim=1))
    return torch.stack(rows)


# ── From the heads' outputs ──────────────────────────────────────────────────


def score_obs(evidence: Evidence) -> Tensor:
    """Second-order loss of a head's removal after the rest has compensated; see `heads.obs`."""
    images = len(evidence.samples)
    return scores_of(
        eliminate_heads(
            writable_copy(evidence.vlm),
            evidence.samples,
            evidence.loss,
            evidence.seed,
            on_batch=lambda count: evidence.advance(count / images),
        )
    )


def score_activation(evidence: Evidence) -> Tensor:
    """Root mean square norm of what a head adds to the residual stream: sqrt tr(W_h C_h W_h^T).

    C_h is the mean Gram of the head's output over all tokens, W_h its columns of the output projection.
    """
    rows = []
    for block, gram in zip(evidence.vlm.tower.blocks, _grams(evidence), strict=True):
        columns = _columns(block.attention_out.weight, block.num_heads)
        own = _own_grams(gram, block.num_heads)
        rows.append(torch.einsum("hdi,hij,hdj->h", columns, own, columns).clamp_min(0).sqrt())
    return torch.stack(rows)


def score_erank_drop(evidence: Evidence) -> Tensor:
    """Share of a block's effective rank that goes with a head: (eRank(Z) - eRank(Z without h)) / eRank(Z).

    Z are the block's concatenated head outputs, one head is left out at a time. Heads whose loss lowers the rank most
    stay. A dominant head has a negative score: without it the remaining spectrum is flatter and its effective rank
    higher.
    """
    rows = []
    for block, gram in zip(evidence.vlm.tower.blocks, _grams(evidence), strict=True):
        whole = effective_rank(singular_values(gram))
        channels = torch.arange(len(gram), device=gram.device) // block.head_dim
        drops = []
        for head in range(block.num_heads):
            rest = channels != head
            # Without any channel there is no spectrum; its rank counts as none.
            left = effective_rank(singular_values(gram[rest][:, rest])) if rest.any() else torch.zeros_like(whole)
            drops.append((whole - left) / whole)
        rows.append(torch.stack(drops))
    return torch.stack(rows)


def score_yopo_style(evidence: Evidence) -> Tensor:
    """Non-local over local attention mass of a head, an analogue of YOPO's criterion and not that method.

    YOPO prunes heads of a language model by the ratio of attention on visual keys to that on text keys; a vision tower
    has no text keys. See `attention_mass.nonlocal_ratio` for what takes their place.
    """
    return nonlocal_ratio(evidence.vlm, evidence.samples)


# ── From gradients ───────────────────────────────────────────────────────────


def score_michel(evidence: Evidence) -> Tensor:
    """Michel, Levy and Neubig (2019), one-shot; see `michel`."""
    e = evidence
    return michel(e.vlm, e.samples, e.loss, seed=e.seed, advance=e.advance)


def score_michel_iterative(evidence: Evidence) -> Tensor:
    """The same with heads removed in rounds; see `michel_iterative`."""
    e = evidence
    return michel_iterative(e.vlm, e.samples, e.loss, rounds=e.spec.rounds, seed=e.seed, advance=e.advance)


CRITERIA: Mapping[str, Callable[[Evidence], Tensor]] = {
    "obs": score_obs,
    "random": score_random,
    "magnitude": score_magnitude,
    "activation": score_activation,
    "erank_drop": score_erank_drop,
    "yopo_style": score_yopo_style,
    "michel": score_michel,
    "michel_iterative": score_michel_iterative,
}


# ── Shared ───────────────────────────────────────────────────────────────────


def _grams(evidence: Evidence) -> list[Tensor]:
    return head_grams(evidence.vlm, evidence.samples, evidence.spec.batch_size)


def _columns(weight: Tensor, heads: int) -> Tensor:
    """Each head's columns of an output projection [D, H head_dim], float64 [H, D, head_dim]."""
    return weight.double().unflatten(1, (heads, -1)).transpose(0, 1)


def _own_grams(gram: Tensor, heads: int) -> Tensor:
    """The diagonal blocks [H, head_dim, head_dim] of a Gram [H head_dim, H head_dim]."""
    return gram.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
