"""Both papers' analyses of a recipe's model, as one folder; all look at the model as it came.

Of the visual-token paper (B, section 2), on validation images. ``increments``: what each token adds to those chosen
before it (Fig. 2). ``flows``: how much visual tokens give to text and to each other, by decoder layer (Fig. 3).
``maturity``: from which layer on the next token is settled (Fig. 15). ``kept``: what Stage 1 keeps of the first images.
Of the structural paper: see `structure`.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from torch.nn import functional as F

from infoprune_export import __version__
from infoprune_export.analysis import figures, structure
from infoprune_export.analysis.figures import Band
from infoprune_export.analysis.information import (
    Floats,
    Order,
    increments,
    kept_count,
    late_advantage,
    orders,
    resample,
    unit_energy,
)
from infoprune_export.artifacts import canonical_json, library_versions, staged, write_text
from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.tokens.encoder import VisionEncoder, check_selection
from infoprune_export.tokens.saturation import Signals, find_layer, measure_samples
from infoprune_export.tokens.select import weighting
from infoprune_export.tokens.steps import Step, check_steps
from infoprune_export.tokens.watch import text_model
from infoprune_export.validate.accuracy import by_kind
from infoprune_export.validate.report import pictures_of
from infoprune_export.validate.report_page import figure, style

if TYPE_CHECKING:
    from infoprune_export.data.samples import Sample
    from infoprune_export.models.vlm import VLM
    from infoprune_export.recipe import Recipe

WHAT = ("increments", "flows", "maturity", "kept", *structure.WHAT)
RESULT, PAGE = "analysis.json", "index.html"
PICTURES = 6
EPSILON = 1e-3
"""Of equation 3, relative to the mean squared token length; the paper leaves it open."""
POINTS = 72
"""Most points of a curve over an image's tokens; as many as the paper's."""

_ALTERNATIVES = {
    "increments": "Curves of MFI and MGI over the share of an image's tokens chosen so far, one for each order.",
    "flows": "Curves of attention flows to text and among visual tokens over decoder layers; values in the table.",
    "maturity": "Curves of agreement and probability over decoder layers; values in the table.",
    "kept": "Validation images with the tokens that each order keeps; what it drops is dimmed.",
    "heads": "Two maps of blocks by heads: negative entropy, and cost of removal.",
    "density": "Row density of every block's FFN for W1, W2 and their product; values in the table.",
    "ranks": "Ranks kept by epsilon for every block; values in the table.",
    "damage": "Curves of the cost of removing a block's cheapest heads and neurons.",
}
"""What figures show, for who cannot see them."""
_TEMPLATE = Path(__file__).with_name("analysis.html.j2")
Track = Callable[[str, int], Callable[[int], None]]
"""A progress line's title and total to the function that advances it."""


def analyse(recipe: Recipe, folder: Path, what: Collection[str], images: int, track: Track) -> dict[str, Any]:
    """Write ``analysis.json``, one SVG per analysis and ``index.html`` into `folder`; returns what the JSON holds.

    An earlier analysis in `folder` is replaced when the new one is whole. `images` is how many of the recipe's
    validation images are looked at, at most all.

    Raises:
        InfopruneError: unknown analysis, no image asked for, `folder` holds something else; what the recipe's model or
            data lack; Stage 1 is asked about in a recipe without token selection.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.models.vlm import check_model
    from infoprune_export.pipeline import load_vlm

    folder = folder.resolve()
    _check(recipe, folder, what, images)
    check_model(recipe.model)
    dataset.check(recipe.data)
    vlm = load_vlm(recipe.model, resolve_device(recipe.device))
    if {"increments", "kept"} & set(what):
        check_selection(vlm.tower, recipe.tokens)
    if set(structure.WHAT) & set(what):
        structure.check_structure(vlm.tower)
    if isinstance(recipe.decoder.layer, int):
        check_steps([Step(recipe.decoder.layer, recipe.decoder.keep_ratio)], len(text_model(vlm.model).layers))
    with _validation(recipe) as split, staged(folder) as staging:
        samples = split.validation[:images]
        results, drawn = _results(vlm, recipe, samples, split.labelled, what, track)
        more, more_drawn = structure.analyse_structure(vlm, split, images, recipe.seed, what, track)
        result = {
            "model": recipe.model.name_or_path,
            "recipe": recipe.to_dict(),
            "images": len(samples),
            "questions": sum(len(sample.questions) for sample in samples),
            "libraries": library_versions(),
            **results,
            **more,
        }
        drawn |= more_drawn
        for name, svg in drawn.items():
            write_text(staging / f"{name}.svg", svg)
        write_text(staging / RESULT, canonical_json(result))
        write_text(staging / PAGE, render(recipe.name, result, drawn))
    return result


def _results(
    vlm: VLM, recipe: Recipe, samples: Sequence[Sample], labelled: bool, what: Collection[str], track: Track
) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers and figure of each token analysis that is asked for, and K where layers are looked at."""
    results: dict[str, Any] = {}
    drawn: dict[str, str] = {}
    if "increments" in what:
        results["increments"], drawn["increments"] = _increments(vlm, recipe, samples, track)
    if {"flows", "maturity"} & set(what):
        signals = _signals(vlm, samples, labelled, track)
        layer = find_layer(signals) if recipe.decoder.layer == "auto" else recipe.decoder.layer
        results["layer"] = {"K": layer, "found": recipe.decoder.layer == "auto"}
        if "flows" in what:
            results["flows"], drawn["flows"] = _flows(signals, layer)
        if "maturity" in what:
            results["maturity"], drawn["maturity"] = _maturity(signals, samples, layer)
    if "kept" in what:
        results["kept"], drawn["kept"] = _kept(vlm, recipe, samples, track)
    return results, drawn


def render(name: str, result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page as text, with nothing outside it: results of `analyse` and its figures."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    figures_of = {key: figure(key, svg, _ALTERNATIVES[key]) for key, svg in drawn.items()}
    return template.render(
        name=name, result=result, figures=figures_of, orders=figures.ORDERS, style=style(), version=__version__
    )


def _check(recipe: Recipe, folder: Path, what: Collection[str], images: int) -> None:
    """Refuse what needs no model to be seen."""
    if unknown := [name for name in what if name not in WHAT] or ([] if what else [""]):
        raise InfopruneError(f"--what {unknown[0]!r}: no such analysis; there are {', '.join(WHAT)}")
    if images < 1:
        raise InfopruneError(f"--images {images}: at least 1 is needed")
    if {"increments", "kept"} & set(what) and recipe.tokens.method != "infoprune":
        raise InfopruneError(
            f"tokens.method = {recipe.tokens.method!r}: increments and kept look at Algorithm 1; leave them out of "
            "--what, or --set tokens.method=infoprune"
        )
    if folder.exists() and not (folder.is_dir() and ((folder / RESULT).is_file() or not any(folder.iterdir()))):
        raise InfopruneError(f"{folder}: holds something else than an analysis; choose another --output")


@contextlib.contextmanager
def _validation(recipe: Recipe) -> Iterator[dataset.Split]:
    """The recipe's data; what it brings itself is there within the block only."""
    with tempfile.TemporaryDirectory() as scratch:
        dataset.make(Path(scratch), recipe.data, recipe.seed)
        yield dataset.read(recipe.data, Path(scratch))


# ── Stage 1 ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Image:
    """One image's tokens in the three orders, and which of them each keeps."""

    features: Floats
    """What Algorithm 1 compares, [N, D], of unit energy."""
    orders: Mapping[Order, list[int]]
    kept: Mapping[Order, list[int]]
    """Ascending places among the image's visual tokens."""


@torch.inference_mode()
def _image(vlm: VLM, recipe: Recipe, sample: Sample, number: int) -> _Image:
    spec = recipe.tokens
    encoder = VisionEncoder(vlm.tower, spec, several=False)
    (planned,) = vlm.tower.calls(inputs_of(vlm, [sample]), encoder.form)
    candidates = encoder.candidates(planned)
    compared = candidates.compared[0].float()
    compared = F.normalize(compared, dim=-1) if spec.normalize else compared
    features = unit_energy(compared.double().cpu().numpy())
    prior, temperature = weighting(candidates.prior(spec.prior), spec)
    rng = np.random.default_rng([recipe.seed, number])
    chosen = orders(features, prior[0].double().cpu().numpy(), temperature, spec, rng)
    count = kept_count(len(features), spec)
    kept = {
        order: vlm.tower.kept_positions(torch.tensor([sorted(tokens[:count])], device=vlm.device), planned)[0].tolist()
        for order, tokens in chosen.items()
    }
    return _Image(features, chosen, kept)


Increments = tuple[Floats, Floats]
"""MFI and MGI of one image's tokens, [N] each."""


def _increments(vlm: VLM, recipe: Recipe, samples: Sequence[Sample], track: Track) -> tuple[dict[str, Any], str]:
    advance = track("marginal information", len(samples))
    curves: dict[Order, list[Increments]] = {order: [] for order in figures.ORDERS}
    for number, sample in enumerate(samples):
        image = _image(vlm, recipe, sample, number)
        for order, tokens in image.orders.items():
            curves[order].append(increments(image.features, tokens, EPSILON))
        advance(1)
    counts = [len(mfi) for mfi, _ in curves["attention"]]
    kept = [kept_count(count, recipe.tokens) for count in counts]
    share = float(np.mean(np.divide(kept, counts)))
    points = min(POINTS, max(counts))
    mfi, mgi = (
        {order: Band.of([resample(pair[place], points) for pair in pairs]) for order, pairs in curves.items()}
        for place in (0, 1)
    )
    rows = {
        order: {
            "mfi": mfi[order].to_dict(),
            "mgi": mgi[order].to_dict(),
            **_summary(pairs, curves["attention"], kept),
        }
        for order, pairs in curves.items()
    }
    numbers = {"epsilon": EPSILON, "kept_share": share, "tokens": sorted(set(counts)), "orders": rows}
    return numbers, figures.increment_curves(mfi, mgi, share)


def _summary(pairs: Sequence[Increments], attention: Sequence[Increments], kept: Sequence[int]) -> dict[str, Any]:
    """An order's curves in numbers, the first `kept` tokens of each image being its choice."""
    gains, reference = (
        np.array([mgi[:count].sum() for (_, mgi), count in zip(each, kept, strict=True)]) for each in (pairs, attention)
    )
    return {
        "late_advantage": _mean([late_advantage(mfi) for mfi, _ in pairs]),
        "late_advantage_kept": _mean(
            [late_advantage(mfi[:count]) for (mfi, _), count in zip(pairs, kept, strict=True)]
        ),
        "gain_of_kept": _mean(gains),
        "gain_over_attention": _mean(gains - reference),
    }


def _mean(values: Sequence[float] | Floats) -> dict[str, float | None]:
    """Mean over images with its standard error, which one image does not have."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return {"mean": float(array.mean()), "standard_error": error}


def _kept(vlm: VLM, recipe: Recipe, samples: Sequence[Sample], track: Track) -> tuple[dict[str, Any], str]:
    shown = samples[:PICTURES]
    advance = track("kept tokens", len(shown))
    images = []
    for number, sample in enumerate(shown):
        images.append(_image(vlm, recipe, sample, number))
        advance(1)
    pictures = {
        order: pictures_of(vlm, shown, {"kept_tokens": [{"kept": image.kept[order]} for image in images]})
        for order in figures.ORDERS
    }
    numbers = {
        "images": [
            {"image": sample.image.name, "tokens": len(image.features), "kept": dict(image.kept)}
            for sample, image in zip(shown, images, strict=True)
        ]
    }
    return numbers, figures.kept_grid(pictures)


# ── Stage 2 ──────────────────────────────────────────────────────────────────


def _signals(vlm: VLM, samples: Sequence[Sample], labelled: bool, track: Track) -> Signals:
    """On the unpruned model, as in the paper's figures."""
    advance = track("saturation", len(samples))
    see = VisionEncoder(vlm.tower, None).encode
    return measure_samples(vlm, samples, see, labelled=labelled, on_batch=advance)


def _flows(signals: Signals, layer: int) -> tuple[dict[str, Any], str]:
    # One unit for both, in which every question weighs the same.
    peak = signals.visual_to_text.max(axis=1, keepdims=True)
    among = np.divide(signals.within_visual, peak, out=np.zeros_like(signals.within_visual), where=peak > 0)
    numbers = {"visual_to_text": signals.flow.tolist(), "within_visual": among.mean(axis=0).tolist()}
    return numbers, figures.layer_flows(signals.flow, among.mean(axis=0), layer)


def _maturity(signals: Signals, samples: Sequence[Sample], layer: int) -> tuple[dict[str, Any], str]:
    probability = signals.probability.mean(axis=0)
    per_layer = [by_kind(samples, settled.astype(np.float64)) for settled in signals.settled.T]
    numbers = {
        "agreement": signals.agreement.tolist(),
        "probability": probability.tolist(),
        "percent_by_kind": {kind: [shares[kind] for shares in per_layer] for kind in per_layer[0]},
    }
    return numbers, figures.maturity(signals.agreement, probability, layer)
