"""Compress the language model of a VLM: choose, remove, refit.

The structural paper prunes heads and narrows FFNs of the vision encoder and leaves the language model as an open
question. Here the same two steps work on its decoder layers. Rotary embedding, norms, embeddings and the output head
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.language.asking import Asked, ask, start_of
from infoprune_export.language.choice import (
    Option,
    check_budget,
    head_options,
    neuron_options,
    plan_of,
    random_head_options,
    random_neuron_options,
)
from infoprune_export.language.moments import collect_moments
from infoprune_export.language.plan import LanguagePlan, LayerSize, apply_language, sizes_of
from infoprune_export.language.refit import LanguageStreams, refit_language
from infoprune_export.models.language import is_pruned, language_layers
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import LanguageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUESTIONS_PER_IMAGE = 2


def check_language(spec: LanguageSpec, model: PreTrainedModel) -> None:
    """Refuse a language section that this model cannot take.

    Raises:
        InfopruneError: unknown layers, layers that were pruned before, or a budget too small.
    """
    if spec.method == "none":
        return
    layers = language_layers(model)
    if is_pruned(model):
        raise InfopruneError(
            "language.method: this model's language model was pruned before; compress the original, or use none"
        )
    check_budget(sizes_of(layers), spec)


def compress_language(
    original: VLM,
    pruned: VLM,
    samples: Sequence[Sample],
    spec: LanguageSpec,
    *,
    labelled: bool,
    ridge: float | None,
    seed: int,
    track: Callable[[str, int], Callable[[int], None]] = lambda title, total: lambda done: None,
) -> tuple[LanguagePlan, dict[str, Tensor]]:
    """Prune the language model of `pruned` in place, whose tower may be compressed already, and refit it to `original`.

    Returns the plan and, unless `ridge` is None, the refitted projections under `plan`'s names.

    Raises:
        InfopruneError: see `check_language`; or there is no question to calibrate on.
    """
    check_language(spec, pruned.model)
    layers = language_layers(pruned.model)
    total = sizes_of(layers)
    asked: list[Asked] = []
    if spec.method == "obs" or ridge is not None:
        asked = ask(original, samples, labelled=labelled, per_image=_QUESTIONS_PER_IMAGE, seed=seed)
    options = _drawn(total, spec, seed) if spec.method == "random" else _measured(pruned, asked, spec, track)
    plan = plan_of(total, spec, options)
    apply_language(layers, plan, {})
    if ridge is None:
        return plan, {}
    starts = [[start_of(vlm, batch) for batch in asked] for vlm in (original, pruned)]
    streams = LanguageStreams(starts[0], starts[1], original.device)
    advance = track("language layers refitted", len(layers))
    return plan, refit_language(
        language_layers(original.model), layers, streams, ridge, on_layer=lambda layer: advance(1)
    )


def _drawn(total: Sequence[LayerSize], spec: LanguageSpec, seed: int) -> Iterator[tuple[list[Option], list[Option]]]:
    rng = np.random.default_rng([seed, 3])
    for size in total:
        yield random_head_options(size, rng), random_neuron_options(size, rng, spec.round_to)


def _measured(
    vlm: VLM, asked: Sequence[Asked], spec: LanguageSpec, track: Callable[[str, int], Callable[[int], None]]
) -> Iterator[tuple[list[Option], list[Option]]]:
    attention, ffn = collect_moments(vlm, asked, track("language moments, images", sum(len(b.samples) for b in asked)))
    advance = track("language layers weighed", len(attention))
    for layer, heads, neurons in zip(language_layers(vlm.model), attention, ffn, strict=True):
        yield head_options(layer, heads), neuron_options(layer, neurons, spec.round_to)
        advance(1)
