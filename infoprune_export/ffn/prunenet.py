"""Neurons chosen by a policy that is trained on weights alone (PruneNet: Sengupta et al. 2025).

One policy for all blocks gives each row w of W1 the keep probability alpha = sigmoid((A w + c) v). With u uniform, the
noisy probability is sigmoid(logit u + logit alpha); rows are drawn from these without replacement. The reward is 1 / KS
of the singular values of W1 and of the drawn rows; REINFORCE, by AdamW, raises the likelihood of draws with a higher
one, later blocks discounted. Every block keeps the same number of neurons, as there.

What is changed, and why:

- Neurons kept in the end are those of highest keep probability. There they are drawn once more, so that the result
  depends on the seed; ``prunenet_sample: true`` does that.
- Gradients are clipped before the optimiser steps. There they are clipped after being set to zero, which does nothing.
- The block's running mean reward is subtracted: all rewards are positive, and would make every draw more likely.
- W1 is divided by its root mean square, so that one learning rate serves weights of any scale.
- The down projection is refitted as for every method here.

The policy sees W1 only: the first projection, of a gated FFN the one that the gate multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from infoprune_export.analysis.spectra import ks_distance, singular_values
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.budget import uniform_width
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.scores import top
from infoprune_export.ffn.widths import remove_neurons
from infoprune_export.recipe import FfnSpec

_CLIP = 1.0
_MEMORY = 0.9
"""Of the running mean reward."""


class Policy(nn.Module):
    """Logits of the keep probabilities of the rows of W1 [m, D]: (A w + c) v with A [m, D], c and v [m]."""

    def __init__(self, rows: int, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rows, features, generator=generator) / features**0.5)
        self.c = nn.Parameter(torch.zeros(rows))
        self.v = nn.Parameter(torch.randn(rows, generator=generator) / rows**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        # A^T v first: the same logits for an m-th of the work.
        return weight @ (self.a.T @ self.v) + self.c @ self.v


def noisy_keep(logits: Tensor, generator: torch.Generator) -> Tensor:
    """sigmoid(logit u + logits), u uniform."""
    u = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(torch.logit(u) + logits).clamp_min(1e-6)


def log_likelihood(keep: Tensor, drawn: Tensor) -> Tensor:
    """Of a draw without replacement, in its order: sum of log(keep_i / what was left before i) (Plackett-Luce)."""
    chosen = keep[drawn]
    left = keep.sum() - chosen.cumsum(0) + chosen
    return (chosen.log() - left.clamp_min(1e-12).log()).sum()


def reward(weight: Tensor, reference: Tensor, rows: Tensor) -> float:
    """1 / KS of the singular values of these rows of W1 against all of W1's, `reference`; at most their number."""
    distance = float(ks_distance(spectrum(weight[rows]), reference))
    return 1 / max(distance, 1 / len(reference))


def spectrum(weight: Tensor) -> Tensor:
    """Singular values of a matrix, float64, from the smaller of its two Grams."""
    wide = weight.double()
    return singular_values(wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T)


def train_policy(
    weights: Sequence[Tensor], kept: int, spec: FfnSpec, seed: int, on_block: Callable[[int], None] = lambda block: None
) -> tuple[list[Tensor], list[float]]:
    """Logits of every block's neurons under the trained policy, and each episode's mean reward.

    `weights` are W1 [m, D] of all blocks, of one shape. `on_block` is called in the last episode.
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = [
        weight.detach().float().cpu() / weight.detach().float().cpu().square().mean().sqrt() for weight in weights
    ]
    references = [spectrum(weight) for weight in scaled]
    policy = Policy(len(scaled[0]), scaled[0].shape[1], generator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=spec.prunenet_rate)
    expected: list[float | None] = [None] * len(scaled)
    history = []
    for episode in range(spec.prunenet_episodes):
        objective, rewards = torch.zeros(()), []
        for i, (weight, reference) in enumerate(zip(scaled, references, strict=True)):
            keep = noisy_keep(policy(weight), generator)
            drawn = torch.multinomial(keep.detach(), kept, generator=generator)
            gained = reward(weight, reference, drawn)
            usual = gained if (known := expected[i]) is None else known
            expected[i] = _MEMORY * usual + (1 - _MEMORY) * gained
            objective = objective - spec.prunenet_discount**i * (gained - usual) * log_likelihood(keep, drawn)
            rewards.append(gained)
            if episode == spec.prunenet_episodes - 1:
                on_block(i)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), _CLIP)
        optimizer.step()
        history.append(sum(rewards) / len(rewards))
    with torch.no_grad():
        return [policy(weight) for weight in scaled], history


def choose(logits: Tensor, kept: int, *, sample: bool, generator: torch.Generator) -> list[int]:
    """The final choice, ascending: the highest logits, or one more noisy draw."""
    if not sample:
        return top(logits, kept)
    drawn: list[int] = torch.multinomial(noisy_keep(logits, generator), kept, generator=generator).tolist()
    return sorted(drawn)


def compress_prunenet(job: FfnJob) -> Compressed:
    """Train the policy on the blocks' W1 and carry its choice out; see `FfnJob`.

    Raises:
        InfopruneError: the blocks are of different widths, so no one policy fits.
    """
    blocks = job.pruned.tower.blocks
    widths = sorted({block.ffn_shape.size for block in blocks})
    if len(widths) > 1:
        raise InfopruneError(
            f"ffn.method = prunenet has one policy for all blocks, these have widths {widths}; use obs"
        )
    width = uniform_width(widths[0], job.spec)
    if width == widths[0]:
        return remove_neurons(job, [range(width)] * len(blocks))
    logits, _ = train_policy([block.ffn_in.weight for block in blocks], width, job.spec, job.seed, job.on_block)
    generator = torch.Generator().manual_seed(job.seed + 1)
    kept = [choose(one, width, sample=job.spec.prunenet_sample, generator=generator) for one in logits]
    return remove_neurons(job, kept)
