"""Calibration: losses of a changed tower, and what is seen of it while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample, open_image
from infoprune_export.models.tower import Block, Form, VisionTower
from infoprune_export.models.vlm import VLM, VisualTokens, answer_loss, preprocess

Site = Literal["attention", "ffn"]


def projection_of(block: Block, site: Site) -> nn.Linear:
    """The projection at `site`: its input is the concatenated heads, or the neurons."""
    return block.attention_out if site == "attention" else block.ffn_out


# ── Losses ───────────────────────────────────────────────────────────────────


def batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Consecutive batches; the last may be smaller."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def inputs_of(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The samples' images as tower inputs."""
    return preprocess(vlm, [open_image(sample.image) for sample in samples])


_KEPT_BYTES = 2**31
"""What a pass may keep of the blocks it is in at once."""


def images_per_pass(
    vlm: VLM, samples: Sequence[Sample], blocks: Sequence[Block] | None = None, *, most: int = 32
) -> int:
    """As many images as fit into about 2 GiB, by the first one's size; at least 1.

    A backward pass keeps what all blocks computed, which is the default; `blocks` are given where only theirs is kept.
    """
    with torch.no_grad():
        stream, _ = vlm.tower.embed(vlm.tower.plan(inputs_of(vlm, samples[:1]), Form()))
    # Norms, queries, keys, values, heads and two residual sums; the neurons before, behind and beside the activation.
    width = sum(10 * stream.shape[-1] + 3 * block.ffn_shape.size for block in blocks or vlm.tower.blocks)
    return max(1, min(most, _KEPT_BYTES // (stream[..., 0].numel() * width * stream.element_size())))


class TaskLoss:
    """How far a changed tower is from doing its job, differentiable in the tower's parameters.

    With labels: cross-entropy of the answers to `questions_per_image` random questions per image. Without: mean squared
    distance of the language model's visual tokens to those of `original`, relative to their variance; `original` must
    be a tower that nothing is done to, gates included.
    """

    def __init__(self, labelled: bool, original: VisionTower, questions_per_image: int = 1) -> None:
        self._labelled = labelled
        self._original = original
        self._per_image = questions_per_image

    def __call__(self, vlm: VLM, samples: Sequence[Sample], rng: np.random.Generator) -> Tensor:
        """Scalar loss of `vlm`'s tower on these samples; `rng` chooses the questions."""
        inputs = inputs_of(vlm, samples)
        features = vlm.tower.features_of(inputs)
        if not self._labelled:
            with torch.no_grad():
                target = self._original.features_of(inputs)
            return (features - target).square().mean() / target.var(dim=(0, 1)).mean()
        layouts = vlm.tower.layouts(inputs)
        split = features[0].split([layout.ids.shape[1] for layout in layouts]) if vlm.tower.ragged else features
        return self._answers(vlm, VisualTokens.of(list(split), layouts), samples, rng)

    def probe(self, vlm: VLM, samples: Sequence[Sample], rng: np.random.Generator) -> Tensor:
        """A scalar whose gradient g has the loss's curvature as second moment E[g g^T].

        With labels the loss itself (empirical Fisher). A distance to the original has gradient zero where nothing is
        changed yet, so without labels the features are projected on noise instead (Gauss-Newton).
        """
        if self._labelled:
            return self(vlm, samples, rng)
        features = vlm.tower.features_of(inputs_of(vlm, samples))
        noise = torch.from_numpy(rng.standard_normal(features.shape)).to(features)
        return (features * noise).sum() / features.detach().std()

    def _answers(self, vlm: VLM, visual: VisualTokens, samples: Sequence[Sample], rng: np.random.Generator) -> Tensor:
        rows, questions, answers = [], [], []
        for row, sample in enumerate(samples):
            count = min(self._per_image, len(sample.questions))
            for pick in rng.choice(len(sample.questions), count, replace=False):
                question = sample.questions[int(pick)]
                rows.append(row)
                questions.append(question.text)
                answers.append(max(question.answers, key=question.answers.count))
        return answer_loss(vlm, visual.rows(rows), questions, answers)


# ── Hooks ────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def captured_input(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Within the block, the returned function gives the module's most recent first argument."""
    seen: list[Tensor] = []

    def remember(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[:] = [arguments[0]]

    handle = module.register_forward_pre_hook(remember)
    try:
        yield lambda: seen[0]
    finally:
        handle.remove()
