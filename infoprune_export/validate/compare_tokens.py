"""Selectors of visual tokens side by side: the same images, questions and language model, one table.

A method is a name of `tokens.selector.METHODS`, which acts in front of the language model, ``decoder:`` and a method
of a recipe's decoder section, which acts inside it, or ``two-stage``, this package's two together. The model is as it
came: no head and no neuron is removed.

Methods are matched by the mean number of visual tokens over the language model's layers, and their peak is shown. Where
a method inside it cannot come down to the mean, because layers in front of its first drop see all tokens, it keeps
the share behind its layers instead: more tokens than the others, and marked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from infoprune_export.data import dataset
from infoprune_export.data.dataset import Split
from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM, VisualTokens, check_model
from infoprune_export.recipe import DecoderSpec, Recipe, TokensSpec
from infoprune_export.tokens.baselines import spatial
from infoprune_export.tokens.decoder import Trace
from infoprune_export.tokens.decoder_methods import decoding_of, steps_of
from infoprune_export.tokens.encoder import FEATURES, KEPT, VisionEncoder, check_selection, encode
from infoprune_export.tokens.saturation import find_layer, measure_samples
from infoprune_export.tokens.selector import METHODS
from infoprune_export.tokens.steps import tokens_per_layer
from infoprune_export.tokens.watch import text_model
from infoprune_export.validate.accuracy import Encode, estimate, split_answers, split_scores

Track = Callable[[str, int], Callable[[int], None]]
"""A progress line's title and total to the function that advances it."""
UNPRUNED, REFERENCE, DECODER, TWO_STAGE = "none", "infoprune", "decoder:", "two-stage"
ALL = (
    *METHODS,
    TWO_STAGE,
    *(DECODER + name for name in get_args(DecoderSpec.model_fields["method"].annotation) if name != UNPRUNED),
)
_DRAWN = ("random", DECODER + "random")
_LAYERED = (DECODER + "infoprune", DECODER + "random", TWO_STAGE)
"""They drop behind the recipe's layer; the published ones have layers of their own."""
_SATURATION_IMAGES = 64


@dataclass(frozen=True)
class _Trial:
    """One method at one share, with one seed."""

    answers: list[list[str]]
    peak: float
    mean: float
    milliseconds: list[float]


def compare_tokens(
    recipe: Recipe, methods: Sequence[str], ratios: Sequence[Fraction], track: Track, *, seeds: int = 3
) -> list[dict[str, Any]]:
    """One row per method and kept share, behind a row of the unpruned model; `compare` says what is in it.

    Model, data, seed of the drawn scenes, device, decoder layer and the settings of ``infoprune`` are the recipe's.

    Raises:
        InfopruneError: see `compare`; also what the recipe's model or data lack.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.pipeline import load_vlm

    check_model(recipe.model)
    dataset.check(recipe.data)
    vlm = load_vlm(recipe.model, resolve_device(recipe.device))
    _checked(vlm, recipe, methods, ratios, seeds)
    with tempfile.TemporaryDirectory() as folder:
        dataset.make(Path(folder), recipe.data, recipe.seed)
        split = dataset.read(recipe.data, Path(folder))
        return compare(vlm, split, recipe, methods, ratios, track, seeds=seeds)


def compare(
    vlm: VLM,
    split: Split,
    recipe: Recipe,
    methods: Sequence[str],
    ratios: Sequence[Fraction],
    track: Track,
    *,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """`compare_tokens` of a model and data that are there; the validation images are used.

    A row holds

    - ``method`` and ``keep``, its share as text;
    - ``accuracy``, and its paired differences ``to_unpruned`` and ``to_infoprune`` (at the same share): `Estimate`, in
      percent, standard errors clustered by image. Where no answers are known, agreement with the unpruned model;
    - ``tokens_peak`` and ``tokens_mean``: visual tokens in the language model's fullest layer, and on average over its
      layers; means over the questions;
    - ``matched``: whether that average is the share, as far as whole tokens allow;
    - ``selection_ms``: median milliseconds per image from finished visual tokens to the choice, attention and merge
      included, in the encoder's own calls; None where nothing is chosen behind the tower;
    - ``refused``: None, or why this model cannot be served at this share, and then nothing else.

    ``infoprune`` is always there. What is drawn at random is drawn `seeds` times, and a question's score is the mean.
    ``decoder:infoprune``, ``decoder:random`` and ``two-stage`` use the recipe's layer, or find one on calibration
    images; ``two-stage`` drops to the recipe's ``decoder.keep_ratio`` there.

    Raises:
        InfopruneError: unknown method; ratio outside (0, 1]; no seed; ``infoprune`` does not fit this model.
    """
    samples, names = split.validation, _checked(vlm, recipe, methods, ratios, seeds)
    layer = _found_layer(vlm, split, recipe, track) if set(names) & set(_LAYERED) else None
    plans = [(name, keep, _sections(vlm, recipe, name, keep, layer)) for keep in ratios for name in names]
    baseline = _trial(vlm, split, TokensSpec(method="none"), DecoderSpec(), 0, track(UNPRUNED, len(samples)))

    def scores_of(trials: Sequence[_Trial]) -> NDArray[np.float64]:
        """The mean over the trials of every question's score."""
        scores: NDArray[np.float64] = np.mean(
            [split_scores(split, trial.answers, baseline.answers) for trial in trials], axis=0
        )
        return scores

    unpruned = scores_of([baseline])
    reference: dict[Fraction, NDArray[np.float64]] = {}
    first = _row(samples, UNPRUNED, Fraction(1), [baseline], unpruned, unpruned)
    rows = [{**first, "to_infoprune": None, "matched": True}]
    for name, keep, sections in plans:
        if isinstance(sections, str):
            rows.append({"method": name, "keep": str(keep), "refused": sections})
            continue
        tokens, decoder, matched = sections
        draws = seeds if name in _DRAWN else 1
        advance = track(f"{name} {keep}", draws * len(samples))
        trials = [_trial(vlm, split, tokens, decoder, seed, advance) for seed in range(draws)]
        scores = scores_of(trials)
        lead = estimate(samples, scores - reference.setdefault(keep, scores))
        row = _row(samples, name, keep, trials, scores, unpruned)
        rows.append({**row, "to_infoprune": lead.to_dict(), "matched": matched})
    return rows


def _row(
    samples: Sequence[Sample],
    method: str,
    keep: Fraction,
    trials: Sequence[_Trial],
    scores: NDArray[np.float64],
    unpruned: NDArray[np.float64],
) -> dict[str, Any]:
    clock = [value for trial in trials for value in trial.milliseconds]
    return {
        "method": method,
        "keep": str(keep),
        "accuracy": estimate(samples, scores).to_dict(),
        "to_unpruned": estimate(samples, scores - unpruned).to_dict(),
        "tokens_peak": trials[0].peak,
        "tokens_mean": trials[0].mean,
        "selection_ms": median(clock) if clock else None,
        "refused": None,
    }


# ── For a command ────────────────────────────────────────────────────────────


def share(text: str) -> Fraction:
    """A kept share as a recipe has it, ``0.5`` or ``64/576``.

    Raises:
        InfopruneError: it is no number, or outside (0, 1].
    """
    try:
        return TokensSpec.model_validate({"keep_ratio": text}).keep_ratio
    except pydantic.ValidationError as error:
        raise InfopruneError(f"--keep: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of `compare` as a table: percent with standard errors, visual tokens, milliseconds; below it, refusals."""
    table = Table(
        "method", "keep", "accuracy", "to unpruned", "to infoprune", "tokens by layer", "peak", "ms per image"
    )
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before["keep"] != row["keep"]:
            table.add_section()
        if row["refused"] is not None:
            table.add_row(row["method"], row["keep"], "refused")
            continue
        differences = [_percent(row[name], "+.1f") if row[name] else "" for name in ("to_unpruned", "to_infoprune")]
        table.add_row(
            row["method"],
            row["keep"],
            _percent(row["accuracy"], ".1f"),
            *differences,
            f"{row['tokens_mean']:.1f}{'' if row['matched'] else ' *'}",
            f"{row['tokens_peak']:.1f}",
            "" if row["selection_ms"] is None else f"{row['selection_ms']:.2f}",
        )
    refused = [f"{row['method']} {row['keep']}: {row['refused']}" for row in rows if row["refused"] is not None]
    if not all(row["refused"] or row["matched"] for row in rows):
        refused.append("* cannot come down to the mean; the share is what stays behind its layers")
    table.caption = "\n".join(refused) or None
    return table


def _percent(estimated: dict[str, Any], form: str) -> str:
    return f"{estimated['percent']:{form}} ± {estimated['standard_error']:.1f}"


# ── What is compared ─────────────────────────────────────────────────────────


def _checked(vlm: VLM, recipe: Recipe, methods: Sequence[str], ratios: Sequence[Fraction], seeds: int) -> list[str]:
    """The methods in their order, each once, behind the one that all are compared with."""
    names = [REFERENCE, *(name for name in dict.fromkeys(methods) if name not in (REFERENCE, UNPRUNED))]
    if unknown := [name for name in names if name not in ALL]:
        raise InfopruneError(f"method {unknown[0]!r}: there are {', '.join(ALL)}")
    if outside := [keep for keep in ratios if not 0 < keep <= 1]:
        raise InfopruneError(f"keep ratio {outside[0]} is outside (0, 1]: keep at least one token and at most all")
    if seeds < 1:
        raise InfopruneError(f"seeds = {seeds}: at least 1 is needed")
    check_selection(vlm.tower, recipe.tokens.model_copy(update={"method": REFERENCE}))
    return names


def _found_layer(vlm: VLM, split: Split, recipe: Recipe, track: Track) -> int:
    """K of the recipe's own method: its number, or where the unpruned model's signals saturate."""
    if recipe.decoder.layer != "auto":
        return recipe.decoder.layer
    samples = split.calibration[:_SATURATION_IMAGES]
    encoder, advance = VisionEncoder(vlm.tower, None), track("saturation signals", len(samples))
    return find_layer(
        measure_samples(vlm, samples, encoder.encode, labelled=split.calibration_labelled, on_batch=advance)
    )


def _sections(
    vlm: VLM, recipe: Recipe, method: str, keep: Fraction, layer: int | None
) -> tuple[TokensSpec, DecoderSpec, bool] | str:
    """The recipe's sections with one method at work, and whether its mean is `keep`; or why it fits not this model."""
    tokens, decoder, matched = TokensSpec(method="none"), DecoderSpec(), True
    try:
        if method == TWO_STAGE:
            decoder = recipe.decoder.model_copy(update={"method": REFERENCE, "layer": layer})
            first = keep / Fraction(_mean_share(decoder, vlm)).limit_denominator(10_000)
            tokens = recipe.tokens.model_copy(update={"method": REFERENCE, "keep_ratio": min(first, Fraction(1))})
        elif method.startswith(DECODER):
            settings = {"method": method.removeprefix(DECODER), "layer": layer if method in _LAYERED else "auto"}
            decoder = recipe.decoder.model_copy(update={**settings, "keep_ratio": keep})
            decoding_of(decoder, vlm.model)
            decoder, matched = _matched(decoder, vlm)
        else:
            tokens = recipe.tokens.model_copy(update={"method": method, "keep_ratio": keep})
        check_selection(vlm.tower, tokens)
    except InfopruneError as error:
        return str(error)
    return tokens, decoder, matched


_MANY = 10_000
"""Tokens that a mean over layers is computed with, so that rounding to whole ones does not show."""


def _mean_share(decoder: DecoderSpec, vlm: VLM) -> float:
    """Share of the visual tokens that a layer of the language model sees on average."""
    depth = len(text_model(vlm.model).layers)
    return sum(tokens_per_layer(steps_of(decoder, depth), depth, _MANY)) / (depth * _MANY)


def _matched(decoder: DecoderSpec, vlm: VLM) -> tuple[DecoderSpec, bool]:
    """The section with the ratio at which its mean share is its `keep_ratio`; as it is if no ratio reaches that."""
    if decoder.method == "sparsevlm":
        return decoder, True  # the mean is what its ratio means
    low, high = Fraction(1, _MANY), Fraction(1)
    if _mean_share(decoder.model_copy(update={"keep_ratio": low}), vlm) > decoder.keep_ratio:
        return decoder, False
    while high - low > Fraction(1, _MANY):
        middle = (low + high) / 2
        below = _mean_share(decoder.model_copy(update={"keep_ratio": middle}), vlm) < decoder.keep_ratio
        low, high = (middle, high) if below else (low, middle)
    return decoder.model_copy(update={"keep_ratio": high.limit_denominator(_MANY)}), True


# ── One trial ────────────────────────────────────────────────────────────────


def _trial(
    vlm: VLM,
    split: Split,
    tokens: TokensSpec,
    decoder: DecoderSpec,
    seed: int,
    on_batch: Callable[[int], None],
) -> _Trial:
    clock: list[float] = []
    lengths: list[int] = []
    traces: list[Trace] = []
    see = _encoder(vlm.tower, tokens, seed, clock)

    def counted(inputs: dict[str, Tensor]) -> VisualTokens:
        visual = see(inputs)
        lengths.extend(len(features) for features in visual.features)
        return visual

    inside = decoding_of(decoder, vlm.model, seed=seed, on_trace=traces.append)
    answers = split_answers(vlm, split, counted, on_batch=on_batch, decoder=inside)
    peak = mean = float(np.average(lengths, weights=[len(sample.questions) for sample in split.validation]))
    if traces:
        peak, mean = (
            float(torch.cat(v).double().mean()) for v in zip(*((t.peak, t.average) for t in traces), strict=True)
        )
    return _Trial(answers, peak, mean, clock)


def _encoder(tower: VisionTower, tokens: TokensSpec, seed: int, clock: list[float]) -> Encode:
    """What `VisionEncoder` does, with `seed` where something is drawn, and the milliseconds of each selection noted."""
    encoder = VisionEncoder(tower, tokens)
    if not encoder.form.selecting:
        return encoder.encode
    select = partial(spatial.random, seed=seed) if tokens.method == "random" else METHODS[tokens.method].load()

    def run(planned: dict[str, Tensor]) -> dict[str, Tensor]:
        candidates = encoder.candidates(planned)
        images = len(candidates.tokens)  # made in front of the clock, because the unpruned model makes them too
        started = _now(candidates.tokens)
        selection = select(candidates, tokens)
        clock.append(1e3 * (_now(selection.tokens) - started) / images)
        places = tower.kept_positions(selection.kept.clamp_min(0), planned)
        return {
            FEATURES: tower.project(selection.tokens),
            KEPT: torch.where(selection.kept < 0, selection.kept, places),
        }

    return partial(encode, tower, encoder.form, tokens, run)


def _now(tensor: Tensor) -> float:
    """Seconds, once the tensor's device has nothing left to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
