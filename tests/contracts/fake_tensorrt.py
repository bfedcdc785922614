"""A ``tensorrt`` module made from a digest: it has what the release has, takes what the release takes, and notes calls.

A name that the release lacks is an AttributeError, an argument of another number, name or type a TypeError, as the real
bindings raise them. Where the bindings would convert silently (an enum to an integer, a number to a bool) this refuses:
integers behind enums differ between releases. What a build or an engine does is added by `fake_behaviour`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

API = Path(__file__).parent / "api"
VERSIONS = sorted((path.stem for path in API.glob("*.json")), key=lambda name: [int(part) for part in name.split(".")])
Behaviour = dict[str, Callable[..., Any]]
"""``Class.method``, ``Class.property`` or ``Class.__init__`` to what it does with the object and bound arguments."""


class FakeEnum:
    """A member of an enum: no integer, but ``int()`` gives its number, as with pybind11."""

    __members__: dict[str, FakeEnum]

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"


class FakeObject:
    """Base of every class that is no enum."""

    _module: FakeTensorRt
    _entry: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = _property(type(self), name)
        if kinds is None:
            if name.startswith("_") or _is_python(type(self)):
                object.__setattr__(self, name, value)
                return
            raise AttributeError(
                f"{_lineage(type(self))[0]._name} has no {name} in TensorRT {self._module.__version__}"
            )
        if kinds[1] is None:
            raise AttributeError(f"{name} cannot be set in TensorRT {self._module.__version__}")
        self._module.check(value, kinds[1], f"{type(self).__name__}.{name}")
        self._module.calls.append((f"{_owner(type(self), name)._name}.{name}=", value))
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        kind = type(self)
        if _property(kind, name) is None:
            raise AttributeError(f"{kind.__name__} has no {name} in TensorRT {kind._module.__version__}")
        key = f"{_owner(kind, name)._name}.{name}"
        self._module.calls.append((key, None))
        if key in self._module.behaviour:
            return self._module.behaviour[key](self)
        return self._module.default(_property(kind, name)[0])


def _lineage(kind: type) -> list[Any]:
    return [base for base in kind.__mro__ if "_entry" in vars(base)]


def _is_python(kind: type) -> bool:
    """Whether it is a class of ours that inherits from the module's."""
    return "_entry" not in vars(kind)


def _owner(kind: type, name: str) -> Any:
    return next(base for base in _lineage(kind) if name in base._entry.get("properties", {}))


def _property(kind: type, name: str) -> Any:
    return next((b._entry["properties"][name] for b in _lineage(kind) if name in b._entry.get("properties", {})), None)


class FakeTensorRt(ModuleType):
    """The module. `calls` holds ``(dotted name, bound arguments)`` in order."""

    def __init__(self, version: str, behaviour: Behaviour | None = None) -> None:
        super().__init__("tensorrt")
        content = json.loads((API / f"{version}.json").read_text(encoding="utf-8"))
        self.__version__ = content["version"]
        self.behaviour = behaviour or {}
        self.calls: list[tuple[str, Any]] = []
        self._classes: dict[str, Any] = {}
        self._build(self, content, "")
        if "plugin classes" in content:
            self.plugin = ModuleType("tensorrt.plugin")
            self._build(self.plugin, content, "plugin ")

    # ── Making ──

    def _build(self, module: ModuleType, content: dict[str, Any], prefix: str) -> None:
        entries = content[f"{prefix}classes"]
        made: dict[str, Any] = {}

        def make(name: str) -> Any:
            if name in made:
                return made[name]
            if name not in entries:  # a base that is not public
                return FakeObject
            entry = entries[name]
            if "enum" in entry:
                made[name] = self._enum(name, entry["enum"])
                return made[name]
            bases = tuple(dict.fromkeys(make(base) for base in entry["bases"])) or (FakeObject,)
            made[name] = type(name.rpartition(".")[2], bases, self._namespace(name, entry))
            return made[name]

        for name in entries:
            make(name)
        self._classes.update(made)

        def find(dotted: str) -> Any:
            if dotted in made:
                return made[dotted]
            owner, _, member = dotted.rpartition(".")
            return made[owner].__members__[member]

        for name, kind in made.items():
            if "." not in name:
                setattr(module, name, kind)
            for member, dotted in entries[name].get("members", {}).items():
                setattr(kind, member, find(dotted))
        for name, dotted in content[f"{prefix}members"].items():
            setattr(module, name, find(dotted))
        for name, ways in content[f"{prefix}functions"].items():
            setattr(module, name, self._function(f"{prefix.replace(' ', '.')}{name}", ways))

    def _enum(self, name: str, values: dict[str, int]) -> type[FakeEnum]:
        kind = type(name.rpartition(".")[2], (FakeEnum,), {"__module__": "tensorrt"})
        numbered: dict[int, FakeEnum] = {}
        kind.__members__ = {key: numbered.setdefault(value, kind(key, value)) for key, value in values.items()}
        for key, member in kind.__members__.items():
            setattr(kind, key, member)
        return kind

    def _namespace(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        space: dict[str, Any] = {"_module": self, "_entry": entry, "_name": name, "__module__": "tensorrt"}
        for method, ways in entry.get("methods", {}).items():
            space[method] = self._method(f"{name}.{method}", ways)
        space["__init__"] = self._constructor(name, entry.get("init"))
        return space

    def _constructor(self, name: str, ways: list[Any] | None) -> Callable[..., None]:
        def construct(this: Any, *args: Any, **kwargs: Any) -> None:
            if ways is None:
                raise TypeError(f"{name}: No constructor defined!")
            bound = self._bind(name, ways, args, kwargs)[0] if ways else {}
            object.__setattr__(this, "_constructed", True)
            self.calls.append((name, bound))
            if (key := f"{name}.__init__") in self.behaviour:
                self.behaviour[key](this, **bound)

        return construct

    def _method(self, name: str, ways: list[Any]) -> Callable[..., Any]:
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            bound, result = self._bind(name, ways, args, kwargs)
            self.calls.append((name, bound))
            return self.behaviour[name](this, **bound) if name in self.behaviour else self.default(result)

        return method

    def _function(self, name: str, ways: list[Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            bound, result = self._bind(name, ways, args, kwargs)
            self.calls.append((name, bound))
            return self.behaviour[name](**bound) if name in self.behaviour else self.default(result)

        return function

    def make(self, name: str) -> Any:
        """An object of a class that only TensorRT itself makes."""
        made = object.__new__(self._classes[name])
        object.__setattr__(made, "_constructed", True)
        return made

    # ── Checking ──

    def _bind(
        self, name: str, ways: list[Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        problems = []
        for parameters, result in ways:
            try:
                return self._fit(name, parameters, args, kwargs), result
            except TypeError as error:
                problems.append(str(error))
        raise TypeError(f"TensorRT {self.__version__}: {'; or '.join(dict.fromkeys(problems))}")

    def _fit(self, name: str, parameters: list[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(parameters):
            raise TypeError(f"{name} takes {len(parameters)} arguments, got {len(args)}")
        bound = dict(zip((parameter[0] for parameter in parameters), args, strict=False))
        kinds = {parameter[0]: parameter[1] for parameter in parameters}
        for key, value in kwargs.items():
            if key not in kinds or key in bound:
                raise TypeError(f"{name} takes no {key}")
            bound[key] = value
        if missing := [p[0] for p in parameters if len(p) < 3 and p[0] not in bound]:
            raise TypeError(f"{name} lacks {', '.join(missing)}")
        defaults = {parameter[0]: parameter[2] for parameter in parameters if len(parameter) > 2}
        for key, value in bound.items():
            if not (value is None and defaults.get(key) == "None"):
                self.check(value, kinds[key], f"{name}({key})")
        return bound

    def check(self, value: Any, kind: str, where: str) -> None:
        """Raise TypeError unless the value is what pybind11 calls `kind`, and no enum or bool in a number's place."""
        if not self._is(value, kind):
            raise TypeError(f"{where} must be {kind}, got {value!r:.80}")

    def _is(self, value: Any, kind: str) -> bool:
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if match := re.fullmatch(r"(?:List|Sequence)\[(.*)\]", kind):
            return isinstance(value, (list, tuple)) and all(self._is(part, match[1]) for part in value)
        if kind == "Dims" and _PLAIN["tuple"](value) | _PLAIN["list"](value):
            return all(_PLAIN["int"](extent) for extent in value)
        if kind in ("buffer", "Buffer"):
            return isinstance(value, (bytes, bytearray, memoryview))
        known = self._classes[self._public(kind)]
        if not isinstance(value, known):
            return False
        if isinstance(value, FakeObject) and "_constructed" not in vars(value):
            raise TypeError(f"{kind}.__init__() must be called when overriding __init__")
        return True

    def _public(self, kind: str) -> str:
        """The bindings name a class that is registered after its use by its C++ name."""
        name = kind.rpartition("::")[2]
        return name if name in self._classes else name.removeprefix("I")

    def default(self, kind: str) -> Any:
        """A value of a result's type, for what has no behaviour."""
        if kind in _DEFAULTS:
            return _DEFAULTS[kind]
        if kind.lower().startswith(("list[", "tuple[")):
            return []
        known = self._classes[self._public(kind)]
        return next(iter(known.__members__.values())) if issubclass(known, FakeEnum) else self.make(self._public(kind))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: True,
    "capsule": lambda value: True,
    "CapsuleType": lambda value: True,
    "Callable": callable,
    "int": _is_int,
    "SupportsInt": _is_int,
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "SupportsFloat": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
}
_DEFAULTS: dict[str, Any] = {
    "None": None, "object": None, "bool": True, "int": 0, "float": 0.0, "str": "", "list": [], "tuple": (),
    "capsule": object(), "CapsuleType": object(), "bytes": b"", "Dims": (), "buffer": b"", "Buffer": b"",
}  # fmt: skip
