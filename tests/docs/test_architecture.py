"""The imports of the package go the way that docs/architecture.md says: down, and nowhere else."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "infoprune_export"


def layers(text: str) -> list[list[str]]:
    """Rooms of every layer in the page's table of layers, top first."""
    table = text.partition("| layer | rooms |")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    return [re.findall(r"`([\w.]+)`", row[2]) for row in rows]


def modules() -> dict[str, Path]:
    """Every module's name below the package -> its file; the package itself is left out."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


@cache
def nodes(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Every import statement, wherever it stands."""
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom)))


def imported(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our own, lazy ones and those for types too."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if not name.startswith(f"{PACKAGE}."):
                continue
            inside = name.removeprefix(f"{PACKAGE}.")
            if inside in known:
                yield node.lineno, inside
            elif inside.rpartition(".")[0] in known:
                yield node.lineno, inside.rpartition(".")[0]


def room_of(module: str, rooms: dict[str, int]) -> str | None:
    """The most specific room that a module lies in."""
    fitting = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


def violations(sources: dict[str, str], rooms: dict[str, int]) -> list[str]:
    """Imports that do not go down: into a higher layer, or into another room of the same."""
    found = []
    for module, source in sources.items():
        here = room_of(module, rooms)
        assert here is not None, f"{module} lies in no room of docs/architecture.md"
        for line, target in imported(source, set(sources)):
            there = room_of(target, rooms)
            assert there is not None
            if there != here and rooms[there] <= rooms[here]:  # layer 0 is the top
                found.append(f"{module}:{line} ({here}) imports {target} ({there})")
    return found


@pytest.fixture(scope="module")
def rooms() -> dict[str, int]:
    table = layers(PAGE.read_text(encoding="utf-8"))
    assert len(table) > 5
    flat = [room for row in table for room in row]
    assert len(flat) == len(set(flat)), "a room is listed twice"
    return {room: depth for depth, row in enumerate(table) for room in row}


def test_every_module_imports_downward_only(rooms):
    sources = {module: path.read_text(encoding="utf-8") for module, path in modules().items()}
    assert len(sources) > 150
    assert violations(sources, rooms) == []


def test_every_room_of_the_page_is_there(rooms):
    assert [room for room in rooms if room not in modules()] == []


def test_an_upward_import_is_found_wherever_it_hides():
    """The check itself: at the top, in a function, for types only, and between rooms of one layer."""
    rooms = {"top": 0, "left": 1, "right": 1, "right.plan": 2}
    sources = {
        "top": f"from {PACKAGE} import left\nimport {PACKAGE}.right.plan",
        "left": f"def f():\n    from {PACKAGE}.top import x",
        "right": f"from {PACKAGE}.right.plan import P\nfrom {PACKAGE} import left",
        "right.plan": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {PACKAGE}.right",
        "right.deep": f"from {PACKAGE}.right import y",
    }
    assert violations(sources, rooms) == [
        "left:2 (left) imports top (top)",
        "right:2 (right) imports left (left)",
        "right.plan:3 (right.plan) imports right (right)",
    ]


def test_tensorrt_is_imported_in_its_room_alone():
    importing = []
    for module, path in modules().items():
        for node in nodes(path.read_text(encoding="utf-8")):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.partition(".")[0] == "tensorrt" for name in names):
                importing.append(module)
    assert [module for module in importing if not module.startswith("engine.tensorrt.")] == []


def test_the_drawing_of_the_stages_is_what_they_need():
    import networkx as nx

    from infoprune_export.stages import STAGES

    block = PAGE.read_text(encoding="utf-8").partition("```mermaid\n")[2].partition("```")[0]
    drawn = nx.DiGraph(re.findall(r"(\w+) --> (\w+)", block))
    needed = nx.DiGraph([(need, stage.name) for stage in STAGES.values() for need in stage.needs])
    assert set(drawn.edges) == set(nx.transitive_reduction(needed).edges)


def test_commands_make_the_stages_that_the_page_says(monkeypatch):
    from click.testing import CliRunner

    from infoprune_export.cli import main

    table = PAGE.read_text(encoding="utf-8").partition("| command | last stage |")[2].partition("\n\n")[0]
    said = {
        command: re.findall(r"`(\w+)`", cells[2])[0]
        for cells in (line.split("|") for line in table.splitlines()[2:])
        for command in re.findall(r"`([\w-]+)`", cells[1])
    }
    assert len(said) >= 9
    made = []

    def note(last, *_, **__):
        made.append(last)
        raise KeyboardInterrupt

    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.cli.")]
    for module in loaded:
        if hasattr(module, "bring_up_to"):
            monkeypatch.setattr(module, "bring_up_to", note)
    for command, stage in said.items():
        made.clear()
        CliRunner().invoke(main, [command, "quickstart"])
        assert made == [stage], command
