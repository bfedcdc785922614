"""Shapes that engines are built for: from recipes, to JSON and back, and smaller for want of memory."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.engine.tensorrt.profiles import Profile, profile_of
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form
from infoprune_export.models.zoo import TINY
from infoprune_export.recipe import EngineSpec

FORMS = [Form(several, selecting) for several in (True, False) for selecting in (True, False)]
RAGGED = [family for family in FAMILIES if not family.startswith("llava") or family == "llava-next"]
SPEC = EngineSpec(images=(1, 2, 5), image_sizes=((56, 56), (112, 168), (168, 252)))
LARGE = EngineSpec(images=(1, 2, 5), image_sizes=((420, 420), (420, 448), (448, 448)))
"""No example input is of these sizes."""


@pytest.fixture(scope="module")
def towers():
    return {family: tower_of(build(family, blocks=2)) for family in TINY}


def shapes_of(planned):
    return {name: tuple(value.shape) for name, value in planned.items()}


triples = st.lists(st.integers(1, 500), min_size=3, max_size=3).map(lambda extents: tuple(sorted(extents)))
profiles = st.dictionaries(
    st.text("abc_", min_size=1, max_size=5), st.lists(triples, max_size=4), min_size=1, max_size=3
).map(lambda inputs: Profile({name: tuple(zip(*t, strict=True)) or ((), (), ()) for name, t in inputs.items()}))


# ── The type ─────────────────────────────────────────────────────────────────


@settings(derandomize=True, deadline=None)
@given(profiles)
def test_json_gives_the_profile_back(profile):
    assert Profile.from_dict(profile.to_dict()) == profile


@settings(derandomize=True, deadline=None)
@given(profiles)
def test_a_profile_covers_its_corners_and_nothing_beyond(profile):
    for corner in range(3):
        assert profile.covers({name: shapes[corner] for name, shapes in profile.shapes.items()}) is None
    for name, shapes in profile.shapes.items():
        for axis in range(len(shapes[0])):
            for corner, step in ((0, -1), (2, 1)):
                shape = list(shapes[corner])
                shape[axis] += step
                inputs = {other: kept[1] for other, kept in profile.shapes.items()} | {name: tuple(shape)}
                assert str(shape) in profile.covers(inputs)


def test_other_inputs_and_ranks_are_not_covered():
    profile = Profile({"x": ((1, 4), (2, 4), (3, 4))})
    assert profile.covers({"x": (2, 4)}) is None
    assert profile.covers({"y": (2, 4)}) == "inputs are x, got y"
    assert profile.covers({}) == "inputs are x, got none"
    assert "x is [2]" in profile.covers({"x": (2,)})


@settings(derandomize=True, deadline=None)
@given(profiles)
def test_shrinking_halves_the_way_to_the_least_and_ends_there(profile):
    least = {name: shapes[0] for name, shapes in profile.shapes.items()}
    steps = 0
    while (smaller := profile.shrunk()) is not None:
        for name, (low, usual, high) in smaller.shapes.items():
            before = profile.shapes[name]
            assert low == before[0]
            assert usual == tuple(map(min, before[1], high))
            assert all(a <= b for a, b in zip(high, before[2], strict=True))
        profile, steps = smaller, steps + 1
    assert profile.shapes == {name: (shape,) * 3 for name, shape in least.items()}
    assert steps <= 10


def test_shrinking_keeps_groups_whole_and_equal_extents_equal():
    """Patches come in fours; what one symbol of the graph ties together must stay equal."""
    profile = Profile(
        {"patches": ((4, 7), (12, 7), (44, 7)), "index": ((4,), (12,), (44,)), "images": ((1,), (3,), (11,))}
    )
    while (profile := profile.shrunk()) is not None:
        for corner in range(3):
            assert profile.shapes["patches"][corner][0] == profile.shapes["index"][corner][0]
            assert profile.shapes["patches"][corner][0] % 4 == 0


@pytest.mark.parametrize(
    "tree",
    [
        {"x": None},
        {"x": {"min": [1], "opt": [2]}},
        {"x": {"min": [1], "opt": [2], "max": [3], "more": []}},
        {"x": {"min": [1], "opt": [2], "max": 3}},
        {"x": {"min": [1], "opt": [2], "max": ["3"]}},
        {"x": {"min": [1], "opt": [True], "max": [3]}},
        {"x": {"min": [1], "opt": [2, 2], "max": [3]}},
        {"x": {"min": [3], "opt": [2], "max": [1]}},
        {"x": {"min": [0], "opt": [2], "max": [3]}},
    ],
)
def test_what_is_no_profile_is_refused(tree):
    with pytest.raises(ValueError, match="profile of x"):
        Profile.from_dict(tree)


# ── From towers ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TINY)
def test_what_the_toolkit_checks_engines_with_is_covered(towers, family, form):
    tower = towers[family]
    profile = profile_of(tower, form, LARGE)
    for images in (1, 2, 3, 5):
        for call in tower.calls(tower.example_inputs(images, seeded()), form):
            assert profile.covers(shapes_of(call)) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", RAGGED)
def test_images_between_the_smallest_and_the_largest_are_covered_and_larger_ones_not(towers, family, form):
    tower, generator = towers[family], seeded(1)
    profile = profile_of(tower, form, SPEC)

    def planned(sizes):
        return tower.calls(_inputs(tower, sizes), form)

    for count in (1, 3, 5):
        sizes = [
            (int(torch.randint(56, 169, (), generator=generator)), int(torch.randint(56, 253, (), generator=generator)))
            for _ in range(count)
        ]
        for call in planned(sizes):
            assert profile.covers(shapes_of(call)) is None, sizes
    if "qwen" in family:
        assert profile.covers(shapes_of(planned([(1024, 1024)])[0])) is not None
    if form.several:
        assert profile.covers(shapes_of(planned([(168, 252)] * 6)[0])) is not None


def _inputs(tower, sizes):
    if hasattr(tower, "grid_inputs"):
        unit = tower.patch_size * tower.merge
        grids = [(1, *(max(1, round(side / unit)) * tower.merge for side in size)) for size in sizes]
        return tower.grid_inputs(grids, seeded())
    tiles = 1 + max(map(tower._tiles, map(list, sizes)))
    side = tower.image_size
    return {"pixel_values": torch.zeros(len(sizes), tiles, 3, side, side), "image_sizes": torch.tensor(sizes)}


@pytest.mark.parametrize("family", TINY)
def test_extents_that_the_graph_ties_together_are_equal_in_each_corner(towers, family):
    for form in FORMS:
        tower = towers[family]
        profile = profile_of(tower, form, SPEC)
        symbols = {}
        for name, axes in tower.dynamic_shapes(form).items():
            for axis, symbol in axes.items():
                symbols.setdefault(str(symbol), set()).add(tuple(shape[axis] for shape in profile.shapes[name]))
        assert all(len(extents) == 1 for extents in symbols.values()), symbols


def test_one_image_per_call_leaves_no_choice_of_images(towers):
    one = profile_of(towers["qwen2-vl"], Form(several=False), SPEC)
    same = profile_of(towers["qwen2-vl"], Form(several=False), SPEC.model_copy(update={"images": (2, 3, 4)}))
    assert one == same
    # A tower of fixed size takes batches in either form.
    assert profile_of(towers["llava"], Form(several=False), SPEC).shapes["pixel_values"][2][0] == 5
