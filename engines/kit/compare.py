"""An engine's outputs against the golden ones. NumPy only.

Kept tokens are judged by worth, not by name: near-ties swap tokens that are as good. Where the engine's choice differs
from the golden one, the greedy rule is replayed in float64, confined to the engine's choice, and features are compared
for the tokens that stand for the same in both choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TINY = float(np.finfo(np.float64).tiny)
FEATURES, KEPT = "image_features", "kept_indices"


def judge(
    golden: dict[str, dict[str, np.ndarray]],
    outputs: dict[str, np.ndarray],
    selection: dict[str, Any] | None,
    tolerances: dict[str, float],
) -> tuple[dict[str, Any], list[str]]:
    """Figures of every output of one case, and what is wrong with them; nothing wrong is a pass.

    `golden` is what `read_case` gives, `outputs` the engine's, float32 or integers.
    """
    expected, figures, problems = golden["output"], {}, []
    for name in sorted(expected):
        if outputs[name].shape != expected[name].shape:
            return {}, [f"{name} is {list(outputs[name].shape)}, golden is {list(expected[name].shape)}"]
    rows = None
    if selection is not None:
        kept = judge_kept(golden["replay"], expected[KEPT], outputs[KEPT], selection)
        figures[KEPT] = {key: value for key, value in kept.items() if key != "rows"}
        limit = tolerances["kept_suboptimality"]
        if kept["suboptimality"] > limit:
            problems.append(f"{KEPT}: a step is worse than the best by {kept['suboptimality']:.3g}, limit {limit:.3g}")
        rows = kept["rows"]
    values, found = judge_values(expected[FEATURES], outputs[FEATURES], rows, tolerances)
    figures[FEATURES] = values
    return figures, problems + [f"{FEATURES}: {problem}" for problem in found]


# ── Values ───────────────────────────────────────────────────────────────────


def judge_values(
    expected: np.ndarray, actual: np.ndarray, rows: np.ndarray | None, tolerances: dict[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """Error figures of features [B, T, D], and what breaks a tolerance.

    `rows` int64 [R, 3] pairs image, golden row and engine row that are to be equal; None compares everything. Figures
    that are not finite are None.
    """
    total = expected.shape[0] * expected.shape[1]
    figures: dict[str, Any] = {"max_error": None, "cosine": None, "norm_ratio": None, "rows": total, "compared": 0}
    if not np.isfinite(actual).all():
        return figures, ["not finite"]
    if rows is not None:
        expected, actual = expected[rows[:, 0], rows[:, 1]], actual[rows[:, 0], rows[:, 2]]
        total = len(rows)
    if not total:
        return figures, ["no row can be compared, because the engine keeps other tokens than PyTorch"]
    a, b = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    figures["compared"] = total
    figures["max_error"] = float(np.abs(a - b).max() / max(np.abs(a).max(), TINY))
    figures["cosine"] = float(a @ b / max(norms[0] * norms[1], TINY))
    figures["norm_ratio"] = norms[1] / max(norms[0], TINY)
    problems = []
    limit, least = tolerances["max_error"], tolerances["min_cosine"]
    if figures["max_error"] > limit:
        problems.append(f"largest error {figures['max_error']:.3g} of scale, limit {limit:.3g}")
    if figures["cosine"] < least:
        problems.append(f"cosine {figures['cosine']:.7f}, limit {least:.7f}")
    if abs(figures["norm_ratio"] - 1) > limit:
        problems.append(f"norm ratio {figures['norm_ratio']:.4f}, limit 1 +- {limit:.3g}")
    return figures, problems


# ── Kept tokens ──────────────────────────────────────────────────────────────


def judge_kept(
    replay: dict[str, np.ndarray], expected: np.ndarray, actual: np.ndarray, selection: dict[str, Any]
) -> dict[str, Any]:
    """How good the engine's kept tokens int64 [B, T] are: equal, overlap with golden, worst replayed step.

    ``rows`` int64 [R, 3] says which rows of the features are to be equal: image, golden row, engine row.
    """
    equal, worst, shared, kept, rows = True, 0.0, 0, 0, []
    for image, count in enumerate(replay["counts"].tolist()):
        positions, tokens = replay["positions"][image, :count], replay["tokens"][image, :count].astype(np.float64)
        ours = places(positions, expected[image])
        theirs = places(positions, actual[image])
        kept += len(ours)
        if theirs is None or len(theirs) != len(ours):
            # Not ascending, no tokens of this image, or the wrong number: as bad as can be.
            equal, worst = False, 1.0
            continue
        shared += len(np.intersect1d(ours, theirs))
        if not np.array_equal(ours, theirs):
            equal = False
            worst = max(worst, replayed(tokens, replay["prior"][image, :count], theirs, selection))
        rows += [(image, a, b) for a, b in common_rows(tokens, ours, theirs, selection)]
    return {
        "equal": equal,
        "overlap": shared / max(kept, 1),
        "suboptimality": worst,
        "rows": np.array(rows, np.int64).reshape(-1, 3),
    }


def places(positions: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
    """Kept positions [T], filled with -1 behind the last, as places in `positions`; None unless ascending and there."""
    number = int((kept >= 0).sum())
    own = kept[:number]
    if (kept[number:] != -1).any() or (own < 0).any() or (np.diff(own) <= 0).any():
        return None
    found = np.minimum(np.searchsorted(positions, own), len(positions) - 1)
    return found if np.array_equal(positions[found], own) else None


def replayed(tokens: np.ndarray, prior: np.ndarray, kept: np.ndarray, selection: dict[str, Any]) -> float:
    """Worst step of a choice [T] of one image's tokens [N, E], in [0, 1]: 1 - best residual inside it / best of all.

    The greedy rule is pivoted Cholesky on the Gram matrix of the weighted tokens. A token outside the pool counts as
    the worst possible step; what is below the saturation threshold is a free choice.
    """
    features = tokens[:, : selection["width"]]
    if selection["normalize"]:
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    a = np.nan_to_num(prior.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    scores = np.exp((a - a.max()) / selection["temperature"])
    quality = (scores / scores.sum()) ** selection["exponent"]
    size = min(len(a), int(np.ceil(np.float32(selection["pool_factor"]) * np.float32(len(kept)))))
    pool = np.argsort(-a, kind="stable")[:size]
    z = np.sqrt(quality[pool])[:, None] * np.nan_to_num(features[pool], nan=0.0, posinf=0.0, neginf=0.0)
    place = {int(token): i for i, token in enumerate(pool)}
    if any(int(token) not in place for token in kept):
        return 1.0
    inside = np.array([place[int(token)] for token in kept], np.int64)
    residual = (z**2).sum(1)
    floor = selection["epsilon"] * residual.max()
    gram = z @ z[inside].T
    factor = np.zeros((len(z), len(inside)))
    left, worst = np.ones(len(inside), bool), 0.0
    for step in range(len(inside)):
        best = float(residual.max())
        if best <= floor:
            break
        column = int(np.where(left, residual[inside], -np.inf).argmax())
        pivot = int(inside[column])
        worst = max(worst, 1 - residual[pivot] / best)
        if residual[pivot] > 0:
            row = gram[:, column] - factor[:, :step] @ factor[pivot, :step]
            factor[:, step] = row / np.sqrt(residual[pivot])
            residual = np.maximum(residual - factor[:, step] ** 2, 0)
        left[column], residual[pivot] = False, -np.inf
    return float(min(max(worst, 0.0), 1.0))


def common_rows(
    tokens: np.ndarray, ours: np.ndarray, theirs: np.ndarray, selection: dict[str, Any]
) -> list[tuple[int, int]]:
    """Rows of two choices of one image's tokens [N, E] whose features are to be equal.

    The same token is kept, and the same dropped tokens are merged into it in both. Left out are rows with a merge that
    is decided by a hair's breadth: in another precision it may go elsewhere, which is as right.
    """
    pairs = [(int(np.flatnonzero(ours == token)[0]), row) for row, token in enumerate(theirs) if token in ours]
    if not selection["merge"]:
        return pairs
    (sure_a, merged_a), (sure_b, merged_b) = (merges(tokens, kept, selection) for kept in (ours, theirs))
    return [(a, b) for a, b in pairs if sure_a[a] and sure_b[b] and np.array_equal(merged_a[:, a], merged_b[:, b])]


def merges(tokens: np.ndarray, kept: np.ndarray, selection: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of a choice [T] have no doubtful merge, bool [T], and which tokens merge into which, bool [N, T]."""
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    similar = unit @ unit[kept].T
    best = similar.max(1, keepdims=True)
    dropped = np.ones((len(tokens), 1), bool)
    dropped[kept] = False
    margin, above = selection["merge_margin"], selection["merge_above"]
    possible = dropped & (similar > best - margin) & (best > above - margin)
    certain = possible & (possible.sum(1, keepdims=True) == 1) & (best > above + margin)
    return (possible == certain).all(0), certain
