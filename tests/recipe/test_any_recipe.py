"""Whatever a recipe's file or overrides hold, it loads or is refused in one line."""

from __future__ import annotations

import copy
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_recipes import SMALLEST, refusal

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    Recipe,
    load_recipe,
)

_FUZZ = settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_KEYS = sorted({*Recipe.model_json_schema()["properties"], "remove", "keep_ratio", "images", "odd", "heads.remove"})
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["1/2", "paper", "testbed/tiny-llava", "auto"])
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | _scalars, inner, max_size=3),
    max_leaves=8,
)


def loads_or_is_refused(path: Path, overrides: tuple[str, ...] = ()) -> None:
    try:
        recipe = load_recipe(path, overrides)
    except InfopruneError:
        refusal(path, overrides)
    else:
        assert Recipe.model_validate(recipe.to_dict()) == recipe


@_FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(write, content):
    loads_or_is_refused(write(content))


_YAML_BITS = [
    *"[]{}&*!|>%@`'\"#,?:-\n \t=~",
    "name: ",
    "model: ",
    "<<: ",
    "!!int ",
    "!!set ",
    "0x",
    "1e9",
    ".inf",
    "2001-1-1",
]


@_FUZZ
@given(st.lists(st.sampled_from([*_YAML_BITS, *_KEYS]) | st.text(max_size=3), max_size=25).map("".join))
@example("seed: 2020-13-45")
@example("&a [*a]")
def test_any_text_loads_or_is_refused(write, text):
    loads_or_is_refused(write(text))
    loads_or_is_refused(write(SMALLEST), (text, f"description={text}"))


@_FUZZ
@given(st.dictionaries(st.sampled_from(_KEYS), _values, max_size=4))
@example({"variants": {"odd": {"description": b"\xff"}}})
@example({"variants": {"odd": {"seed": 2**70}}})
def test_any_tree_loads_or_is_refused(write, tree):
    loads_or_is_refused(write({**copy.deepcopy(SMALLEST), **tree}))
