"""The smallest recipe, with one more key, and what one is refused with."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import load_recipe

SMALLEST: dict[str, Any] = {"name": "mine", "model": {"name_or_path": "testbed/tiny-llava"}}


def with_value(dotted: str, value: Any) -> dict[str, Any]:
    """The smallest recipe with one more key."""
    tree = copy.deepcopy(SMALLEST)
    *parents, last = dotted.split(".")
    section = tree
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return tree


def refusal(name: Any, overrides: tuple[str, ...] = ()) -> str:
    """The message a recipe is refused with, which is one line."""
    with pytest.raises(InfopruneError) as caught:
        load_recipe(name, overrides)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message
