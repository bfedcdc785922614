"""Calibration data as the language model reads it: prompts with their answers, padding told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import batches, inputs_of
from infoprune_export.models.vlm import VLM, Prompt, VisualTokens, answer, answer_loss
from infoprune_export.tokens.watch import text_model

_OWN_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    """A batch of images with one question and one answer in each row; rows of an image share it."""

    samples: Sequence[Sample]
    rows: Sequence[int]
    questions: Sequence[str]
    answers: Sequence[str]

    def see(self, vlm: VLM) -> VisualTokens:
        """What `vlm`'s tower makes of the images, one entry per row."""
        return see(vlm, self.samples).rows(self.rows)

    def loss(self, vlm: VLM, on_prompt: Callable[[Prompt], None]) -> Tensor:
        """`answer_loss`; `on_prompt` is told the prompts before the language model reads them."""

        @contextlib.contextmanager
        def tell(_: VLM, prompt: Prompt) -> Iterator[None]:
            on_prompt(prompt)
            yield

        with torch.no_grad():
            visual = self.see(vlm)
        return answer_loss(vlm, visual, self.questions, self.answers, decoder=tell)


def see(vlm: VLM, samples: Sequence[Sample]) -> VisualTokens:
    """All visual tokens of the samples' images."""
    inputs = inputs_of(vlm, samples)
    features, layouts = vlm.tower.features_of(inputs), vlm.tower.layouts(inputs)
    if vlm.tower.ragged:
        return VisualTokens.of(list(features[0].split([layout.ids.shape[1] for layout in layouts])), layouts)
    return VisualTokens.of(list(features), layouts)


def ask(
    vlm: VLM, samples: Sequence[Sample], *, labelled: bool, per_image: int, seed: int, batch_size: int = 8
) -> list[Asked]:
    """Up to `per_image` questions per image, drawn by `seed`, with their most frequent annotated answers.

    Without labels `vlm`, which should be the original, answers itself.

    Raises:
        InfopruneError: no sample has a question.
    """
    rng = np.random.default_rng([seed, 2])
    asked = []
    for batch in batches([sample for sample in samples if sample.questions], batch_size):
        rows, questions = [], []
        for row, sample in enumerate(batch):
            count = min(per_image, len(sample.questions))
            for pick in sorted(rng.choice(len(sample.questions), count, replace=False).tolist()):
                rows.append(row)
                questions.append(sample.questions[pick])
        texts = [question.text for question in questions]
        if labelled:
            answers = [max(question.answers, key=question.answers.count) for question in questions]
        else:
            with torch.inference_mode():
                answers = answer(vlm, see(vlm, batch).rows(rows), texts, max_new_tokens=_OWN_ANSWER_TOKENS)
        asked.append(Asked(batch, rows, texts, answers))
    if not asked:
        raise InfopruneError("0 questions to calibrate the language model on: give calibration images with questions")
    return asked


# ── First streams ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Start:
    """What enters the first layer in one call of the language model, on the CPU, without padding counted."""

    stream: Tensor
    """[B, L, D]."""
    arguments: dict[str, Any]
    """What every layer is called with besides the stream: mask, positions and their embeddings."""
    real: Tensor
    """False at padding, bool [B, L]."""
    visual: Tensor
    """bool [B, L]."""
    deeper: Sequence[Tensor]
    """What is added to visual tokens behind the first layers (Qwen3-VL), [visual tokens, D] each."""


@torch.no_grad()
def start_of(vlm: VLM, asked: Asked) -> Start:
    """Run `vlm` on a batch once and keep what its first layer was called with."""
    prompts: list[Prompt] = []
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        calls.append((arguments[0], named))
        raise _EnoughError

    handle = text_model(vlm.model).layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        asked.loss(vlm, prompts.append)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    (stream, arguments), prompt = calls[0], prompts[0]
    return Start(
        stream.cpu(),
        move(arguments, "cpu"),
        prompt.mask.bool().cpu(),
        prompt.visual.cpu(),
        [level.cpu() for level in prompt.deeper],
    )


class _EnoughError(Exception):
    """The first layer was reached; nothing behind it is wanted."""


def move(value: Any, device: str | torch.device) -> Any:
    """Tensors in a tree of dicts and tuples, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(part, device) for name, part in value.items()}
    return tuple(move(part, device) for part in value) if isinstance(value, tuple) else value
