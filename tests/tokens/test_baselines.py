"""Each baseline against its published rule, written out for one image in NumPy; and what all of them promise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from candidates import SELECTORS, alone, draw, given, kept, select, spec
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from infoprune_export.tokens.baselines.diversity import determinant_order, farthest_first
from infoprune_export.tokens.baselines.vscan import windowed, windows

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=20)
GRIDS = [(4, 6), (3, 3), (1, 1), (5, 2)]
Floats = np.ndarray


def ceiling(tokens: int, keep: str) -> int:
    return math.ceil(tokens * Fraction(keep))


def ranked(scores: Floats, among: list[int]) -> list[int]:
    """Highest first; Python's sort leaves ties in order."""
    return sorted(among, key=lambda i: -scores[i])


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))


def arrays(images: dict, row: int = 0) -> dict[str, Floats]:
    """One image of `draw` in float64."""
    one = alone(images, row)
    return {name: v[0].double().numpy() for name, v in one.items() if isinstance(v, torch.Tensor)}


def assert_is(selection, row: int, expected: dict[int, Floats]) -> None:
    """These tokens with these values, in ascending order."""
    assert kept(selection, row) == sorted(expected)
    values = selection.tokens[row, : len(expected)].double().numpy()
    np.testing.assert_allclose(values, [expected[i] for i in sorted(expected)], rtol=1e-5, atol=1e-5)


# ── FasterVLM ────────────────────────────────────────────────────────────────


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/2", "3/4"]), st.booleans())
def test_fastervlm_keeps_what_has_most_attention(seed: int, keep: str, cls: bool):
    images = draw(seed, GRIDS)
    selection = select(given(**images, priors=("received", "cls") if cls else ("received",)), spec("fastervlm", keep))
    for row, count in enumerate(images["counts"]):
        image = arrays(images, row)
        chosen = ranked(image["last"], range(count))[: ceiling(count, keep)]
        assert_is(selection, row, {i: image["tokens"][i] for i in chosen})


# ── VisionZip ────────────────────────────────────────────────────────────────


def zipped(tokens: Floats, keys: Floats, attention: Floats, keep: int) -> dict[int, Floats]:
    """Dominant tokens, then the rest in strides, each target with the mean of what is nearest to it added."""
    contextual = math.floor(10 * keep / 64)
    dominant = ranked(attention, range(len(tokens)))[: keep - contextual]
    answer = {i: tokens[i] for i in dominant}
    rest = [i for i in range(len(tokens)) if i not in dominant]
    if contextual:
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        assigned: dict[int, list[Floats]] = {t: [] for t in targets}
        for i in (i for i in rest if i not in targets):
            assigned[targets[int(np.argmax([cosine(keys[i], keys[t]) for t in targets]))]].append(tokens[i])
        for target, others in assigned.items():
            answer[target] = tokens[target] + (np.mean(others, axis=0) if others else 0)
    return answer


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/2", "7/8"]))
def test_visionzip_adds_the_mean_of_what_is_near_to_targets_in_strides(seed: int, keep: str):
    images = draw(seed, [(8, 8), (3, 3), (1, 1), (7, 5)])
    selection = select(given(**images), spec("visionzip", keep))
    for row, count in enumerate(images["counts"]):
        image = arrays(images, row)
        assert_is(selection, row, zipped(image["tokens"], image["keys"], image["last"], ceiling(count, keep)))


@pytest.mark.parametrize(("tokens", "dominant"), [(64, 54), (128, 108), (192, 162), (63, 54), (6, 6), (7, 6)])
def test_visionzip_splits_its_budget_as_published(tokens: int, dominant: int):
    # Attention falls along the raster, so the dominant tokens are the first ones and keep their values.
    x = torch.randn(1, 576, 4, generator=torch.Generator().manual_seed(0))
    selection = select(given(x, last=-torch.arange(576.0)[None]), spec("visionzip", Fraction(tokens, 576)))
    same = (selection.tokens[0] == x[0, selection.kept[0]]).all(1)
    assert same.tolist() == [True] * dominant + [False] * (tokens - dominant)
    assert kept(selection)[:dominant] == list(range(dominant))


# ── DivPrune ─────────────────────────────────────────────────────────────────


def spread_out(x: Floats, keep: int) -> list[int]:
    """Max-min cosine distance, greedily, in the order of choice."""
    distance = [[1 - cosine(a, b) for b in x] for a in x]
    everyone = range(len(x))
    nearest = [min((distance[i][j] for j in everyone if j != i), default=math.inf) for i in everyone]
    chosen = [int(np.argmax(nearest))]
    while len(chosen) < keep:
        left = [i for i in everyone if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    return chosen


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/2", "3/4"]))
def test_divprune_spreads_the_embeddings_out(seed: int, keep: str):
    images = draw(seed, GRIDS)
    candidates = given(**images)
    selection = select(candidates, spec("divprune", keep))
    order = farthest_first(candidates.embeddings, torch.arange(24) < candidates.counts[:, None], ceiling(24, keep))
    for row, count in enumerate(images["counts"]):
        image = arrays(images, row)
        chosen = spread_out(image["embeddings"], ceiling(count, keep))
        assert order[row, : len(chosen)].tolist() == chosen
        assert_is(selection, row, {i: image["tokens"][i] for i in chosen})


def test_divprune_takes_copies_last_and_from_the_lowest_index():
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(5, 16, generator=generator)[torch.arange(40) % 5]
    lengths = 2.0 ** torch.randint(-3, 4, (40, 1), generator=generator)  # exact, so copies have one direction
    order = farthest_first((lengths * directions)[None], torch.ones(1, 40, dtype=torch.bool), 40)[0].tolist()
    assert sorted(order[:5]) == [0, 1, 2, 3, 4]
    assert order[5:] == list(range(5, 40))


def test_divprune_tells_tokens_apart_that_are_nearly_the_same():
    # Cosine distances of 4e-8 to 4e-7, at which fp32 cannot count.
    x = np.concatenate([np.ones((12, 1)), np.diag(2e-4 * (1 + 0.1 * np.arange(12)))], axis=1).astype(np.float32)
    order = farthest_first(torch.from_numpy(x)[None], torch.ones(1, 12, dtype=torch.bool), 12)[0].tolist()
    assert order == spread_out(x.astype(np.float64), 12) == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


# ── CDPruner ─────────────────────────────────────────────────────────────────


def largest_determinant(x: Floats, keep: int) -> list[int]:
    """Always the token with which the determinant of all cosines is largest, in the order of choice."""
    kernel = np.array([[cosine(a, b) for b in x] for a in x])
    chosen = [0]
    while len(chosen) < keep:
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    return chosen


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/3", "2/5"]))
def test_cdpruner_maximises_the_determinant_of_cosines(seed: int, keep: str):
    images = draw(seed, GRIDS)
    candidates = given(**images)
    selection = select(candidates, spec("cdpruner", keep))
    order = determinant_order(candidates.embeddings, torch.arange(24) < candidates.counts[:, None], ceiling(24, keep))
    for row, count in enumerate(images["counts"]):
        image = arrays(images, row)
        chosen = largest_determinant(image["embeddings"], ceiling(count, keep))
        assert order[row, : len(chosen)].tolist() == chosen
        assert_is(selection, row, {i: image["tokens"][i] for i in chosen})


def test_cdpruner_fills_from_the_lowest_index_where_the_rank_is_spent():
    x = torch.zeros(1, 8, 4)
    x[0, [1, 4], 0], x[0, [3, 6], 2] = 2.0, 5.0
    order = determinant_order(x, torch.ones(1, 8, dtype=torch.bool), 8)
    assert order[0].tolist() == [1, 3, 0, 2, 4, 5, 6, 7]


# ── VScan ────────────────────────────────────────────────────────────────────


def scanned(tokens: Floats, shallow: Floats, last: Floats, window: list[int], keep: int) -> dict[int, Floats]:
    """Windows take turns for the local half; the global half takes the best of the rest; the others are merged."""
    queues = {w: ranked(shallow, [i for i in range(len(tokens)) if window[i] == w]) for w in sorted(set(window))}
    local: list[int] = []
    while len(local) < keep // 2:
        local += ranked(shallow, sorted(queue.pop(0) for queue in queues.values() if queue))
    local = local[: keep // 2]
    rest = [i for i in range(len(tokens)) if i not in local]
    chosen = sorted(local + ranked(last, rest)[: keep - len(local)])
    groups = {i: [tokens[i]] for i in chosen}
    for i in (i for i in range(len(tokens)) if i not in chosen):
        groups[chosen[int(np.argmax([cosine(tokens[i], tokens[k]) for k in chosen]))]].append(tokens[i])
    return {i: np.mean(group, axis=0) for i, group in groups.items()}


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/2", "7/8"]))
def test_vscan_lets_windows_take_turns_and_merges_the_rest(seed: int, keep: str):
    images = draw(seed, [(8, 8), (3, 3), (1, 1), (9, 7), (1, 20)])
    selection = select(given(**images), spec("vscan", keep))
    for row, count in enumerate(images["counts"]):
        image, window = arrays(images, row), windows(*images["grids"][row]).tolist()
        expected = scanned(image["tokens"], image["shallow"], image["last"], window, ceiling(count, keep))
        assert_is(selection, row, expected)


def test_vscan_never_takes_padding_for_a_windows_next_token():
    scores = torch.tensor([[5.0, 4, 3, 2, -math.inf]])
    chosen = windowed(scores, torch.tensor([[0, 1, 1, 1, 0]]), torch.tensor([4]))
    assert chosen.tolist() == [[True, True, True, True, False]]


def test_vscan_windows_of_the_published_grid_are_six_by_six():
    window = windows(24, 24).view(24, 24)
    assert all((window[6 * i : 6 * i + 6, 6 * j : 6 * j + 6] == 4 * i + j).all() for i in range(4) for j in range(4))


@pytest.mark.parametrize(("grid", "number"), [((8, 8), 16), ((5, 9), 16), ((3, 3), 9), ((2, 30), 16), ((1, 76), 16)])
def test_vscan_windows_are_rectangles_of_nearly_one_size(grid: tuple[int, int], number: int):
    window = windows(*grid).view(grid)
    assert window.unique().tolist() == list(range(number))
    sides = []
    for w in range(number):
        cells = (window == w).nonzero()
        height, width = (cells.amax(0) - cells.amin(0) + 1).tolist()
        assert height * width == len(cells)
        sides.append((height, width))
    assert all(max(s[axis] for s in sides) - min(s[axis] for s in sides) <= 1 for axis in (0, 1))


def test_vscan_gives_every_window_as_many_local_tokens_as_published():
    images = draw(3, [(24, 24)])
    # The last block likes one corner only, so the rest of what is kept is the local half.
    images["last"] = -torch.arange(576.0)[None]
    selection = select(given(**images), spec("vscan", "96/576"))
    local = [i for i in kept(selection) if i >= 96]
    assert np.bincount(windows(24, 24)[local].tolist(), minlength=16)[4:].tolist() == [3] * 12


# ── What all of them promise ─────────────────────────────────────────────────


@pytest.mark.parametrize("method", SELECTORS)
@REPEATABLE
@drawn(st.integers(0, 10**6), st.fractions(Fraction(1, 40), 1, max_denominator=60))
def test_every_image_keeps_exactly_its_share_and_nothing_depends_on_its_company(method, seed, keep):
    images = draw(seed, [(6, 4), (2, 7), (1, 1)])
    together = select(given(**images), spec(method, keep))
    assert together.kept.dtype == torch.int64
    assert together.kept.shape == together.tokens.shape[:2] == (3, math.ceil(24 * keep))
    for row, count in enumerate(images["counts"]):
        budget = math.ceil(count * keep)
        indices = together.kept[row].tolist()
        assert indices[budget:] == [-1] * (len(indices) - budget)
        assert all(0 <= a < count for a in indices[:budget])
        assert indices[:budget] == sorted(set(indices[:budget]))
        single = select(given(**alone(images, row)), spec(method, keep))
        assert kept(single) == indices[:budget]
        torch.testing.assert_close(single.tokens[0], together.tokens[row, :budget])


@pytest.mark.parametrize("method", SELECTORS)
def test_keeping_everything_changes_nothing(method: str):
    images = draw(4, GRIDS)
    selection = select(given(**images), spec(method, 1))
    for row, count in enumerate(images["counts"]):
        assert kept(selection, row) == list(range(count))
        torch.testing.assert_close(selection.tokens[row, :count], images["tokens"][row, :count])


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", SELECTORS)
def test_degenerate_images_keep_their_share_and_stay_finite(method: str, value: float):
    images = draw(5, [(4, 4), (3, 2)])
    everything = {name: v.clone() for name, v in images.items() if isinstance(v, torch.Tensor)}
    for values in everything.values():
        for row, count in enumerate(images["counts"]):
            values[row, :count] = value
    for name in [*everything, None]:
        bad = {**images, **(everything if name is None else {name: everything[name]})}
        selection = select(given(**bad), spec(method, "1/2"))
        assert [len(kept(selection, row)) for row in (0, 1)] == [8, 3]
        assert max(kept(selection, 1)) < 6
        assert selection.tokens.isfinite().all()


@pytest.mark.parametrize("method", SELECTORS)
def test_one_bad_value_does_not_spread(method: str):
    images = draw(6, [(5, 5)])
    images["tokens"][0, 7, 2] = images["embeddings"][0, 7, 2] = images["keys"][0, 7, 1] = math.nan
    clean = {name: torch.nan_to_num(v) if isinstance(v, torch.Tensor) else v for name, v in images.items()}
    bad, good = (select(given(**i), spec(method, "1/2")) for i in (images, clean))
    assert kept(bad) == kept(good)
    torch.testing.assert_close(bad.tokens, good.tokens)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fastervlm", [0, 1, 2, 3]),
        ("visionzip", [0, 1, 2, 3]),
        ("vscan", [0, 1, 2, 8]),  # 0 and 8 are the first tokens of the first two windows
        ("divprune", [0, 1, 2, 3]),
        ("cdpruner", [0, 1, 2, 3]),
    ],
)
def test_ties_go_to_the_lowest_index(method: str, expected: list[int]):
    candidates = given(torch.ones(1, 600, 4), grids=[(20, 30)])  # a sort this long shows if it is unstable
    assert kept(select(candidates, spec(method, "4/600"))) == expected


@pytest.mark.parametrize("method", SELECTORS)
def test_inputs_are_left_alone_and_the_dtype_is_kept(method: str):
    images = draw(7, [(4, 4), (2, 3)])
    images["tokens"] = images["tokens"].half()
    before = {name: v.clone() for name, v in images.items() if isinstance(v, torch.Tensor)}
    selection = select(given(**images), spec(method, "1/3"))
    assert selection.tokens.dtype == torch.float16
    assert all(torch.equal(images[name].nan_to_num(), v.nan_to_num()) for name, v in before.items())
