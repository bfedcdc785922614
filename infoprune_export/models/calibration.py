"""What calibration data tells about a tower: losses, residual streams, least-squares refits against the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.vqa import Sample, open_image
from infoprune_export.models.tower import Block, Context, Form, VisionTower
from infoprune_export.models.vlm import VLM, VisualTokens, answer_loss, preprocess

Site = Literal["attention", "ffn"]


# ── Losses ───────────────────────────────────────────────────────────────────


def batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Consecutive batches; the last may be smaller."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def inputs_of(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The samples' images as tower inputs."""
    return preprocess(vlm, [open_image(sample.image) for sample in samples])


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


# ── Streams ──────────────────────────────────────────────────────────────────


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


Start = tuple[Tensor, Context]


def embed_all(vlm: VLM, samples: Sequence[Sample], batch_size: int = 32) -> list[Start]:
    """First residual stream of every batch with its context, on the CPU."""
    starts = []
    for batch in batches(samples, batch_size):
        with torch.no_grad():
            stream, context = vlm.tower.embed(vlm.tower.plan(inputs_of(vlm, batch), Form()))
        starts.append((stream.cpu(), context.to("cpu")))
    return starts


class Streams:
    """The residual streams of an original tower and a changed one, advanced block by block over the same images.

    Costs one pass over each block and the memory of one stream per image and tower.
    """

    def __init__(self, start: Sequence[Start], device: torch.device) -> None:
        self.original = [stream for stream, _ in start]
        self.changed = list(self.original)
        self._contexts = [context for _, context in start]
        self._device = device

    def _run(self, block: Block, stream: Tensor, context: Context) -> Tensor:
        return block.run(stream.to(self._device), context.to(self._device))

    @torch.no_grad()
    def refit(self, site: Site, original: Block, changed: Block, ridge: float) -> tuple[Tensor, Tensor]:
        """New weight and bias for `changed`'s projection at `site`, which is left as it is.

        The projection's input H and the difference D of the two streams behind it give the correction of least
        ``|D - H dW^T - db|^2 + ridge * |dW|^2``. It absorbs both what was removed here and what went wrong upstream.
        Falls back to the bias alone where nothing is left to fit.
        """
        projection = changed.attention_out if site == "attention" else changed.ffn_out
        fit = AffineFit(projection.in_features, projection.out_features)
        with (
            captured_input(projection) as hidden,
            captured_input(original.ffn_norm) as middle_original,
            captured_input(changed.ffn_norm) as middle_changed,
        ):
            for before, after, context in zip(self.original, self.changed, self._contexts, strict=True):
                end_original = self._run(original, before, context)
                end_changed = self._run(changed, after, context)
                middle = site == "attention"
                difference = middle_original() - middle_changed() if middle else end_original - end_changed
                if projection.in_features:
                    fit.update(hidden().flatten(0, -2), difference.flatten(0, -2))
                else:
                    flat = difference.flatten(0, -2)
                    fit.update(flat.new_zeros(len(flat), 0), flat)
        weight, bias = fit.solve(ridge)
        device, dtype = projection.bias.device, projection.bias.dtype
        return (
            (projection.weight.double() + weight.to(device)).to(dtype),
            (projection.bias.double() + bias.to(device)).to(dtype),
        )

    @torch.no_grad()
    def advance(self, original: Block, changed: Block) -> None:
        """Move both streams behind this block."""
        pairs = list(zip(self.original, self.changed, self._contexts, strict=True))
        self.original = [self._run(original, stream, context).cpu() for stream, _, context in pairs]
        self.changed = [self._run(changed, stream, context).cpu() for _, stream, context in pairs]


class AffineFit:
    """Streaming least squares of Y [n, q] on X [n, p]: only moments are kept, float64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._count = 0
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._x = torch.zeros(inputs, dtype=torch.float64)
        self._y = torch.zeros(outputs, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [n, p], y [n, q]."""
        x, y = x.double().cpu(), y.double().cpu()
        self._count += len(x)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._x += x.sum(0)
        self._y += y.sum(0)

    def covariance(self) -> Tensor:
        """Centred second moment of X, [p, p]."""
        mean = self._x / self._count
        return self._xx / self._count - torch.outer(mean, mean)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight [q, p] and bias [q] of least ``|Y - X W^T - b|^2 / n + ridge * mean(diag(cov X)) * |W|^2``."""
        mean_x, mean_y = self._x / self._count, self._y / self._count
        covariance = self.covariance()
        cross = self._xy / self._count - torch.outer(mean_x, mean_y)
        if not len(covariance):
            return cross.T, mean_y
        # The floor keeps inputs that never vary solvable: their weight is zero.
        damping = (ridge * covariance.diagonal().mean()).clamp_min(1e-30)
        weight = torch.linalg.solve(covariance + damping * torch.eye(len(covariance), dtype=torch.float64), cross).T
        return weight, mean_y - weight @ mean_x
