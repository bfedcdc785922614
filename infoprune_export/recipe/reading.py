"""Reading recipes and targets: YAML, overrides, variants, and every refusal in one line."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.delivery import EngineSpec
from infoprune_export.recipe.targets import Target, TensorRtTarget, target_spec
from infoprune_export.recipe.whole import Recipe
from infoprune_export.shipped import shipped_folder


def load_recipe(name: str | Path, overrides: Sequence[str] = (), grid: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name and apply ``dotted.key=value`` overrides (values are YAML).

    ``dotted.key=value,value`` of `grid` join the recipe's own grid, and replace its values of the same key.

    Raises:
        InfopruneError: no such file, not YAML, unknown key, wrong type, value out of range.
    """
    path = find_asset("recipes", name)
    tree = _read_mapping(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InfopruneError(f"--set {override!r}: expected KEY=VALUE, for example --set heads.remove=0.25")
        try:
            value = _load(text)
        except _YAML_ERRORS:
            raise InfopruneError(f"--set {override!r:.80}: the value is not valid YAML; quote it") from None
        _check_plain(value, f"--set {key}")
        _assign(tree, key, value)
    if grid:
        axes = tree.get("grid", {})
        tree["grid"] = {**axes, **dict(map(_axis, grid))} if isinstance(axes, dict) else axes
    recipe: Recipe = _check(Recipe, tree, path)
    for variant in recipe.variants:
        variant_of(recipe, variant)
    points_of(recipe)
    return recipe


def read_recipe(path: Path) -> Recipe:
    """A recipe as a run's folder records it.

    Raises:
        InfopruneError: see `load_recipe`.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    except (ValueError, RecursionError):
        raise InfopruneError(f"{path}: not valid JSON; run the recipe again") from None
    # JSON can spell half a character.
    _check_plain(tree, str(path))
    recipe: Recipe = _check(Recipe, tree, path)
    return recipe


def variant_of(recipe: Recipe, variant: str) -> Recipe:
    """The recipe with one variant's overrides applied, and neither variants nor a grid of its own."""
    return _overridden(recipe, variant, recipe.variants[variant], f"variant {variant!r} of {recipe.name}")


def _overridden(recipe: Recipe, name: str, settings: Mapping[str, Any], origin: str) -> Recipe:
    tree = recipe.to_dict()
    tree.update(name=f"{recipe.name}-{name}", variants={}, grid={})
    for key, value in settings.items():
        try:
            _assign(tree, key, value)
        except InfopruneError as error:
            raise InfopruneError(f"{origin}: {error}") from None
    checked: Recipe = _check(Recipe, tree, origin)
    return checked


# ── Grids ────────────────────────────────────────────────────────────────────

MOST_POINTS = 1000
_ONE_FOR_ALL = ("name", "description", "device", "model", "variants", "grid")


@dataclass(frozen=True)
class Point:
    """One combination of a grid's values: what it is called, what it sets, and the recipe that makes."""

    name: str
    settings: Mapping[str, Any]
    recipe: Recipe


def points_of(recipe: Recipe) -> list[Point]:
    """All combinations of the recipe's grid, the last key's values changing first; none without a grid.

    A point is called after its values, such as ``remove-0.5_keep_macs-0.25``, by the last part of a key if no other key
    ends like it.

    Raises:
        InfopruneError: a key no grid may have, values that repeat, too many points, or one that is no recipe.
    """
    if not recipe.grid:
        return []
    for key, values in recipe.grid.items():
        if key.partition(".")[0] in _ONE_FOR_ALL:
            raise InfopruneError(
                f"grid: {key!r} is the same at every point; sweep each {key.partition('.')[0]} for itself"
            )
        texts = [json.dumps(value) for value in values]
        if repeated := [text for text in texts if texts.count(text) > 1]:
            raise InfopruneError(f"grid: {key} has {repeated[0]:.60} twice; leave one out")
    count = math.prod(map(len, recipe.grid.values()))
    if count > MOST_POINTS:
        raise InfopruneError(f"grid has {count} points, at most {MOST_POINTS} are taken; give fewer values")
    points: list[Point] = []
    taken: set[str] = set()
    for values in itertools.product(*recipe.grid.values()):
        settings = dict(zip(recipe.grid, values, strict=True))
        name = _unlike(_point_name(settings), taken)
        taken.add(name.lower())
        points.append(Point(name, settings, _overridden(recipe, name, settings, f"point {name!r} of {recipe.name}")))
    return points


def _point_name(settings: Mapping[str, Any]) -> str:
    tails = [key.rpartition(".")[2] for key in settings]
    parts = []
    for (key, value), tail in zip(settings.items(), tails, strict=True):
        title = tail if tails.count(tail) == 1 else key
        parts.append(f"{title}-{value if isinstance(value, str) else json.dumps(value)}")
    # What a folder and a recipe may be called.
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join(parts))
    return name.lstrip("._-")[:100].rstrip("._-") or "point"


def _unlike(name: str, taken: set[str]) -> str:
    """The name, numbered if another point has it already, on file systems that ignore case too."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate.lower() not in taken)


def _axis(text: str) -> tuple[str, Any]:
    """``KEY=VALUE,VALUE`` as key and values."""
    key, separator, values = text.partition("=")
    if not separator or not key or not values.strip():
        raise InfopruneError(f"--grid {text!r:.80}: expected KEY=VALUE,VALUE, such as --grid heads.remove=0.25,0.5")
    try:
        listed = _load(f"[{values}]")
    except _YAML_ERRORS:
        raise InfopruneError(f"--grid {text!r:.80}: the values are not valid YAML; quote them") from None
    _check_plain(listed, f"--grid {key}")
    return key, listed


def load_target(name: str) -> Target:
    """Read a target by shipped name or path.

    Raises:
        InfopruneError: no such file, not YAML, no such backend, unknown key, wrong type, value out of range.
    """
    path = find_asset("targets", name)
    tree = _read_mapping(path)
    try:
        spec = target_spec(tree)
    except ValueError as error:
        raise InfopruneError(f"{path}: {error}") from None
    target: Target = _check(spec, tree, path)
    return target


def engine_target(spec: EngineSpec) -> Target:
    """The target that a recipe's engine section names, with the section's own settings in it."""
    target = load_target(spec.target)
    if isinstance(target, TensorRtTarget) and spec.plugin_library is not None:
        return target.model_copy(update={"plugin_library": spec.plugin_library})
    return target


def assets(kind: Literal["recipes", "targets"]) -> dict[str, Path]:
    """Shipped YAML files by name."""
    files = shipped_folder(kind).glob("*.yaml")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def find_asset(kind: Literal["recipes", "targets"], name: str | Path) -> Path:
    """A file given by path, else a shipped one given by name."""
    path = Path(name)
    with contextlib.suppress(OSError):  # a name too long to be one
        if path.is_file():
            return path
    shipped = assets(kind)
    by_name = {alias: file for stem, file in shipped.items() for alias in (stem, f"{stem}.yaml", f"{kind}/{stem}.yaml")}
    if str(name) in by_name:
        return by_name[str(name)]
    what = kind.removesuffix("s")
    raise InfopruneError(
        f"no {what} at {str(name)!r:.200}; give a file or one of: {', '.join(shipped) or 'none shipped'}"
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        tree = _load(path.read_text(encoding="utf-8"))
    except _YAML_ERRORS as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise InfopruneError(f"{path}{line}: not valid YAML; check quotes and indentation") from None
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InfopruneError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}")
    _check_plain(tree, str(path))
    return tree


class _Loader(yaml.SafeLoader):
    """1e-5 is a number, as in JSON and YAML 1.2; YAML 1.1 wants a point in it and reads a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


# What yaml's constructors let through on values such as 2020-13-45, and on nesting without end.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError, RecursionError)


def _check_plain(value: Any, origin: str) -> None:
    """Refuse what YAML allows and JSON does not: aliases that contain themselves, bytes, dates."""
    try:
        _check_size(value)
        json.dumps(value, allow_nan=True, ensure_ascii=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise InfopruneError(f"{origin}: not a tree of plain values ({error}); quote the value") from None


_MOST_VALUES = 100_000


def _check_size(value: Any) -> None:
    """Aliases of aliases make gigabytes of a few lines: count what they stand for before anything is built from it."""
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen + len(waiting) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values")
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InfopruneError(
                f"{dotted}: {parent!r} is a value, not a section; see infoprune-export recipes --schema"
            )
        tree = child
    tree[last] = value


def _check(spec: type[Any], tree: dict[str, Any], origin: Path | str) -> Any:
    try:
        return spec.model_validate(tree)
    except pydantic.ValidationError as error:
        raise InfopruneError(f"{origin}: {_explain(spec, error)}") from None


def _explain(spec: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """The first problem in one line: dotted key, what is wrong, what is allowed."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        siblings = _fields(spec, location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(siblings)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    return f"{key} = {shown if len(shown) < 60 else shown[:57] + '...'}: {message[0].lower()}{message[1:]}"


def _fields(spec: type[pydantic.BaseModel], location: Sequence[str]) -> list[str]:
    names = {field.alias or name: field.annotation for name, field in spec.model_fields.items()}
    if location and isinstance(child := names.get(location[0]), type) and issubclass(child, pydantic.BaseModel):
        return _fields(child, location[1:])
    return sorted(names)
