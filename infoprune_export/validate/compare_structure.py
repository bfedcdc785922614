"""Head criteria and FFN methods side by side: the same images, questions and model, one table.

Each row prunes heads or compresses FFNs of the model as it came, the other part and the tokens left alone. All methods
are refitted as the recipe says; ``paper``'s gates and SVD are not, because its text does not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from infoprune_export.data import dataset
from infoprune_export.data.dataset import Split
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.methods import METHODS, compress_ffn
from infoprune_export.heads.criteria import Evidence, score_heads
from infoprune_export.heads.prune import prune_heads
from infoprune_export.heads.train import train_gates
from infoprune_export.measure.flops import count_flops
from infoprune_export.models.calibration import TaskLoss, inputs_of
from infoprune_export.models.tower import Form
from infoprune_export.models.vlm import VLM, check_model, writable_copy
from infoprune_export.recipe import FfnSpec, HeadsSpec, Recipe
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate.accuracy import estimate, split_answers, split_scores

Track = Callable[[str, int], Callable[[int], None]]
"""A progress line's title and total to the function that advances it."""
Part = Literal["heads", "ffn"]
REFERENCE: dict[str, str] = {"heads": "budgeted", "ffn": "obs"}
"""The default of each part."""
UNPRUNED, DRAWN = "none", "random"
HEAD_METHODS = tuple(name for name in get_args(HeadsSpec.model_fields["method"].annotation) if name != UNPRUNED)
FFN_METHODS = tuple(METHODS)
THRESHOLDS = (0.45, 0.5, 0.55)
"""The paper's z, and what a little less and more of it does to the number of heads."""


@dataclass(frozen=True)
class _Asked:
    """One row to be: a method with its settings, drawn `seed`."""

    part: Part
    method: str
    setting: str
    heads: HeadsSpec
    ffn: FfnSpec


def compare_structure(
    recipe: Recipe,
    heads: Sequence[str],
    removed: Sequence[float],
    ffn: Sequence[str],
    kept: Sequence[float],
    track: Track,
    *,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """One row per method and share, behind a row of the unpruned model; `compare` says what is in it.

    Raises:
        InfopruneError: see `compare`; also what the recipe's model or data lack.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.pipeline import load_vlm

    check_model(recipe.model)
    dataset.check(recipe.data)
    _checked(heads, removed, ffn, kept, seeds)
    with drawn_split(recipe) as split:
        vlm = load_vlm(recipe.model, resolve_device(recipe.device))
        return compare(vlm, split, recipe, heads, removed, ffn, kept, track, seeds=seeds)


@contextmanager
def drawn_split(recipe: Recipe) -> Iterator[Split]:
    """The recipe's data; what it brings itself is written into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        dataset.make(Path(folder), recipe.data, recipe.seed)
        yield dataset.read(recipe.data, Path(folder))


def compare(
    vlm: VLM,
    split: Split,
    recipe: Recipe,
    heads: Sequence[str],
    removed: Sequence[float],
    ffn: Sequence[str],
    kept: Sequence[float],
    track: Track,
    *,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """`compare_structure` of a model and data that are there; the validation images are used.

    The default (``budgeted`` for heads, ``obs`` for FFNs) comes first for every share asked for. A row holds

    - ``part`` (``heads``, ``ffn``; ``none`` for the unpruned model), ``method`` and ``setting``: what was asked for, as
      text. Gates of ``paper`` are cut at thresholds around its own, not at shares, and its SVD and ``taylor`` follow
      the recipe's ``ffn.rank_by``;
    - ``left``: the share of heads, or of FFN multiply-accumulates, that is really left; ``flops``: that of the tower's
      FLOPs, counted on the rewritten model, one image, no token selection;
    - ``accuracy``, and its paired differences ``to_unpruned`` and ``to_default`` (same part and share): `Estimate`, in
      percent, standard errors clustered by image. Where no answers are known, agreement with the unpruned model;
    - ``seconds``: for scores or gates, choice and refit;
    - ``refused``: None, or why this model cannot be served, and then nothing else.

    What is drawn at random is drawn `seeds` times, and a question's score is the mean.

    Raises:
        InfopruneError: unknown method; share out of range; no seed.
    """
    heads, ffn = _checked(heads, removed, ffn, kept, seeds)
    samples = split.validation
    encode = VisionEncoder(vlm.tower, None).encode
    baseline = split_answers(vlm, split, encode, on_batch=track(UNPRUNED, len(samples)))

    def scores_of(towers: Iterable[VLM], title: str) -> NDArray[np.float64]:
        scores = []
        for tower in towers:
            see = VisionEncoder(tower.tower, None).encode
            answers = split_answers(tower, split, see, on_batch=track(title, len(samples)))
            scores.append(split_scores(split, answers, baseline))
        return np.mean(scores, axis=0)

    unpruned = split_scores(split, baseline, baseline)
    whole = _flops(vlm, split)
    rows: list[dict[str, Any]] = [
        {"part": UNPRUNED, "method": UNPRUNED, "setting": "", "left": 1.0, "flops": 1.0, "refused": None}
        | {"accuracy": estimate(samples, unpruned).to_dict(), "to_unpruned": None, "to_default": None, "seconds": 0.0}
    ]
    reference: dict[tuple[Part, str], NDArray[np.float64]] = {}
    scored: dict[tuple[object, ...], tuple[dict[str, Tensor], float]] = {}
    for asked in _asked(recipe, heads, removed, ffn, kept):
        title = f"{asked.part} {asked.method} {asked.setting}"
        row: dict[str, Any] = {"part": asked.part, "method": asked.method, "setting": asked.setting}
        started = time.perf_counter()
        try:
            draws = range(recipe.seed, recipe.seed + (seeds if asked.method == DRAWN else 1))
            made = [_make(vlm, split, recipe, asked, seed, scored) for seed in draws]
        except InfopruneError as error:
            rows.append({**row, "refused": str(error)})
            continue
        seconds = (time.perf_counter() - started) / len(made) + made[0][2]
        scores = scores_of((tower for tower, *_ in made), title)
        reference.setdefault((asked.part, asked.setting), scores)
        beside = reference[asked.part, asked.setting] if asked.method != REFERENCE[asked.part] else None
        rows.append(
            row
            | {
                "left": float(np.mean([left for _, left, _ in made])),
                "flops": float(np.mean([_flops(tower, split) for tower, *_ in made])) / whole,
                "accuracy": estimate(samples, scores).to_dict(),
                "to_unpruned": estimate(samples, scores - unpruned).to_dict(),
                "to_default": estimate(samples, scores - beside).to_dict() if beside is not None else None,
                "seconds": seconds,
                "refused": None,
            }
        )
        if asked.method == "paper" and asked.part == "heads":
            rows[-1]["to_default"] = None  # another number of heads
    return rows


# ── Rows ─────────────────────────────────────────────────────────────────────


def _asked(
    recipe: Recipe, heads: Sequence[str], removed: Sequence[float], ffn: Sequence[str], kept: Sequence[float]
) -> Iterator[_Asked]:
    untouched = recipe.ffn.model_copy(update={"method": UNPRUNED})
    for share in removed:
        for name in heads:
            if name != "paper":
                spec = _head_section(recipe, name, {"remove": share})
                yield _Asked("heads", name, f"{share:g} removed", spec, untouched)
    if "paper" in heads:
        for threshold in THRESHOLDS:
            spec = _head_section(recipe, "paper", {"threshold": threshold})
            yield _Asked("heads", "paper", f"z = {threshold:g}", spec, untouched)
    whole = recipe.heads.model_copy(update={"method": UNPRUNED})
    for share in kept:
        for name in ffn:
            section = recipe.ffn.model_copy(update={"method": name, "keep_macs": share})
            yield _Asked("ffn", name, f"{share:g} kept", whole, section)


def _head_section(recipe: Recipe, method: str, settings: Mapping[str, float]) -> HeadsSpec:
    """The recipe's section with another method, every choice of the method's own."""
    own = {"choose": "auto", "penalty": "auto", "distance": "auto", "survivors": "one"}
    return HeadsSpec(**{**recipe.heads.model_dump(), **own, "method": method, **settings})


def _make(
    vlm: VLM,
    split: Split,
    recipe: Recipe,
    asked: _Asked,
    seed: int,
    scored: dict[tuple[object, ...], tuple[dict[str, Tensor], float]],
) -> tuple[VLM, float, float]:
    """The pruned model, what is left, and the seconds that scores cost which were made for a row before."""
    ridge = recipe.refit.ridge if recipe.refit.enabled else None
    if asked.part == "ffn":
        pruned = writable_copy(vlm)
        loss = TaskLoss(split.calibration_labelled, vlm.tower)
        plan, _ = compress_ffn(FfnJob(vlm, pruned, split.calibration, loss, asked.ffn, ridge=ridge, seed=seed))
        return pruned, plan.kept_fraction, 0.0
    # Scores do not depend on how many heads go, unless gates are trained to meet that number.
    key = (asked.method, seed, asked.heads.remove if asked.method == "hard_concrete" else None)
    known = key in scored
    if not known:
        started = time.perf_counter()
        scored[key] = (_score(vlm, split, asked.heads, seed), time.perf_counter() - started)
    scores, seconds = scored[key]
    pruned, heads, _ = prune_heads(vlm, scores, asked.heads, split.calibration, ridge)
    return pruned, 1 - heads.removed_fraction, seconds if known else 0.0


def _score(vlm: VLM, split: Split, spec: HeadsSpec, seed: int) -> dict[str, Tensor]:
    if not spec.trains_gates:
        loss = TaskLoss(split.calibration_labelled, vlm.tower, spec.questions_per_image)
        return {"scores": score_heads(Evidence(vlm, split.calibration, loss, spec, seed))}
    with tempfile.TemporaryDirectory() as scratch:
        trained = train_gates(
            writable_copy(vlm),
            vlm.tower,
            split.calibration,
            spec,
            labelled=split.calibration_labelled,
            seed=seed,
            scratch=Path(scratch),
        )
    return {"scores": trained.scores, "gates": trained.gates}


@torch.no_grad()
def _flops(vlm: VLM, split: Split) -> float:
    inputs = inputs_of(vlm, split.validation[:1])
    encoder = VisionEncoder(vlm.tower, None, several=False)
    return float(count_flops(encoder, vlm.tower.calls(inputs, Form(several=False))[0]))


def _checked(
    heads: Sequence[str], removed: Sequence[float], ffn: Sequence[str], kept: Sequence[float], seeds: int
) -> tuple[list[str], list[str]]:
    """Both lists of methods, each once, behind the reference where anything of its part is asked for."""
    chosen = []
    for part, names, known in (("heads", heads, HEAD_METHODS), ("ffn", ffn, FFN_METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise InfopruneError(f"{part} method {unknown[0]!r}: there are {', '.join(known)}")
        chosen.append(list(dict.fromkeys([REFERENCE[part], *names])) if names else [])
    for what, shares, fits in (
        ("removed heads", removed, lambda share: 0 <= share < 1),
        ("kept FFN", kept, lambda share: 0 < share <= 1),
    ):
        if outside := [share for share in shares if not fits(share)]:
            raise InfopruneError(f"share {outside[0]:g} of {what} is out of range; take one between 0 and 1")
    if seeds < 1:
        raise InfopruneError(f"seeds = {seeds}: at least 1 is needed")
    return chosen[0], chosen[1]


# ── Table ────────────────────────────────────────────────────────────────────


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `compare`'s rows."""
    table = Table("part", "method", "asked", "left", "tower FLOPs", "accuracy", "to original", "to default", "seconds")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and (previous["part"], previous["setting"]) != (row["part"], row["setting"]):
            table.add_section()
        if row["refused"]:
            table.add_row(row["part"], row["method"], row["setting"], "", "", f"[dim]{row['refused']}[/dim]")
            continue
        table.add_row(
            row["part"],
            row["method"],
            row["setting"],
            f"{row['left']:.0%}",
            f"{row['flops']:.0%}",
            f"{row['accuracy']['percent']:.1f}",
            *(_difference(row[name]) for name in ("to_unpruned", "to_default")),
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        )
    return table


def _difference(value: Mapping[str, float] | None) -> str:
    return f"{value['percent']:+.1f} ± {value['standard_error']:.1f}" if value is not None else ""
