"""The Python API of a TensorRT release as JSON: names, parameters, defaults, enum values; no text of NVIDIA's.

Usage: python tests/contracts/digest.py BINDINGS [-o FILE]

BINDINGS is a folder with ``tensorrt_bindings``; ``make tensorrt-bindings`` makes three. They are imported against
libraries that define their nine undefined symbols and nothing else (`stubs.c`), so no TensorRT and no GPU is needed.

``classes``: name to ``bases``, ``init`` (absent where Python cannot make one), ``methods``, ``properties`` (name to the
type that it has and the type that it can be set to, or null), ``members`` (name to the dotted name of an enum member or
a class), or ``enum`` (name to value). ``functions`` are like methods. ``plugin classes`` and so on are the same of
``tensorrt.plugin``. An overload is ``[[[name, type, default?], ...], result]``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infoprune_export.doctor.probes import needed_libraries

HERE = Path(__file__).parent


def import_bindings(folder: Path, libraries: Path) -> Any:
    """``tensorrt_bindings`` of a folder, as ``tensorrt`` too; its libraries are stubs compiled into `libraries`."""
    (binary,) = (folder / "tensorrt_bindings").glob("tensorrt*.so")
    for name in needed_libraries(binary):
        if name.startswith("libnv"):
            library = libraries / name
            command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, HERE / "stubs.c"]
            subprocess.run(command, check=True)
            # Found by its soname when the bindings ask for it.
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    module = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = module
    if (folder / "tensorrt_bindings" / "plugin").is_dir():
        sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return module


# ── Signatures ───────────────────────────────────────────────────────────────


def split(text: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += letter in "[({<"
        depth -= letter in "])}>"
        if letter == "," and not depth:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def overload(line: str) -> list[Any]:
    """``name(self: T, a: int = 0) -> R`` as ``[[["a", "int", "0"]], "R"]``."""
    body, _, result = line[line.index("(") + 1 :].rpartition(") -> ")
    parameters = []
    for part in split(body):
        match = re.fullmatch(r"(\*{0,2}\w+)(?:: (.*?))?(?: = (.*))?", part)
        assert match is not None, line
        name, kind, default = match.groups()
        if name != "self":
            parameters.append([name, short(kind or "object"), *([] if default is None else [short(default)])])
    return [parameters, short(result)]


def short(kind: str) -> str:
    """A type without the modules that it comes from."""
    return re.sub(
        r"\b(?:\w+\.)*(?:tensorrt|_tensor)\.(?=\w)|\b(?:collections\.abc|typing_extensions|typing)\.", "", kind
    )


def overloads(function: Any) -> list[Any]:
    """Every way to call a function: from pybind11's first lines, or from Python's own signature."""
    lines = (function.__doc__ or "").strip().splitlines()
    if lines and "(*args, **kwargs)" in lines[0]:
        numbered = [match[1] for line in lines if (match := re.fullmatch(r"\d+\. (\w+\(.*\) -> .*)", line.strip()))]
        if numbered:
            return [overload(line) for line in numbered]
    if lines and re.fullmatch(r"\w+\(.*\) -> .*", lines[0]):
        return [overload(lines[0])]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in ("self", "this", "cls"):
            star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            given = [] if parameter.default is parameter.empty else [repr(parameter.default)]
            parameters.append([star + name, "object", *given])
    return [[parameters, "object"]]


# ── Classes ──────────────────────────────────────────────────────────────────

_SPECIAL = ("__getitem__", "__setitem__", "__len__", "__iter__", "__call__", "__contains__")


def describe_class(kind: Any, name: str, known: dict[int, str], classes: dict[str, Any]) -> None:
    known[id(kind)] = name
    members = getattr(kind, "__members__", None)
    if members is not None:
        classes[name] = {"enum": {key: int(member.value) for key, member in members.items()}}
        return
    bases = [base.__name__ for base in kind.__bases__ if base.__name__ not in ("object", "pybind11_object", "ABC")]
    entry: dict[str, Any] = {"bases": bases, "init": [], "methods": {}, "properties": {}, "members": {}}
    # A class that Python cannot make has no constructor but object's own.
    if not inspect.isroutine(init := kind.__dict__.get("__init__")) or type(init).__name__ != "wrapper_descriptor":
        entry["init"] = overloads(init) if init is not None else []
    public = {key: value for key, value in kind.__dict__.items() if not key.startswith("_") or key in _SPECIAL}
    for key, value in sorted(public.items(), key=lambda pair: (not inspect.isclass(pair[1]), pair[0])):
        if inspect.isclass(value):
            if id(value) not in known:
                describe_class(value, f"{name}.{key}", known, classes)
            entry["members"][key] = known[id(value)]
        elif isinstance(value, property):
            entry["properties"][key] = [_type_got(value), _type_set(value)]
        elif callable(value) or isinstance(value, (staticmethod, classmethod)):
            entry["methods"][key] = overloads(getattr(value, "__func__", value))
        elif type(value).__name__ == "pybind11_static_property" or not hasattr(type(value), "__members__"):
            entry["properties"][key] = ["object", None]
        else:
            entry["members"][key] = f"{known.get(id(type(value)), type(value).__name__)}.{value.name}"
    classes[name] = {key: value for key, value in entry.items() if value or key == "bases"}


def _type_got(value: property) -> str:
    _, arrow, kind = (value.fget.__doc__ or "").strip().partition(" -> ")
    return short(kind.splitlines()[0]) if arrow else "object"


def _type_set(value: property) -> str | None:
    if value.fset is None:
        return None
    match = re.search(r"\(\w+: [^,]+, \w+: (.*)\) -> ", value.fset.__doc__ or "")
    return short(match[1]) if match else "object"


def describe(module: Any) -> dict[str, Any]:
    classes: dict[str, Any] = {}
    functions: dict[str, Any] = {}
    members: dict[str, str] = {}
    known: dict[int, str] = {}
    public = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    # Enums first, then classes: members and constants refer to them.
    ordered = sorted(public.items(), key=lambda p: (not inspect.isclass(p[1]), not hasattr(p[1], "__members__")))
    for name, value in ordered:
        if inspect.isclass(value) and id(value) not in known:
            describe_class(value, name, known, classes)
        elif inspect.isclass(value):
            members[name] = known[id(value)]
        elif hasattr(type(value), "__members__"):
            members[name] = f"{known.get(id(type(value)), type(value).__name__)}.{value.name}"
        elif callable(value) and not inspect.ismodule(value):
            functions[name] = overloads(value)
    return {"classes": classes, "functions": functions, "members": members}


def digest(folder: Path) -> dict[str, Any]:
    """Everything public of the bindings in a folder. Call it in a process of its own."""
    with tempfile.TemporaryDirectory() as libraries:
        module = import_bindings(folder, Path(libraries))
    content = {"version": module.__version__, **describe(module)}
    if "tensorrt.plugin" in sys.modules:
        content |= {f"plugin {section}": part for section, part in describe(sys.modules["tensorrt.plugin"]).items()}
    return content


def compact(content: dict[str, Any]) -> str:
    """One line for every class and function, so that a difference between releases is one too."""
    lines = ["{"]
    for index, (section, value) in enumerate(sorted(content.items())):
        comma = "," if index < len(content) - 1 else ""
        if not isinstance(value, dict):
            lines.append(f"{json.dumps(section)}: {json.dumps(value)}{comma}")
            continue
        rows = [f" {json.dumps(key)}: {_line(entry)}" for key, entry in sorted(value.items())]
        lines.append(f"{json.dumps(section)}: {{\n" + ",\n".join(rows) + f"\n}}{comma}")
    return "\n".join([*lines, "}"]) + "\n"


def _line(entry: Any) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bindings", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    text = compact(digest(arguments.bindings))
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
