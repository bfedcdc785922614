"""Writes docs/reference from the code: recipe keys, target keys and commands. With --check, only compares.

::

    python docs/make_reference.py
    python docs/make_reference.py --check

A key's meaning is the text below its field, a command's the docstring of its function; neither is written twice.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from infoprune_export.cli import main as group
from infoprune_export.optimum_command import ExportInfopruneCommand
from infoprune_export.recipe import OnnxRuntimeTarget, Recipe, TensorRtTarget

FOLDER = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/make_reference.py; change the docstrings instead. -->\n\n"
NOT_RUN = {
    "real-size --export": "towers of published sizes need minutes and 12 GiB",
    "bench quickstart --real-size": "CLIP-L/336 needs minutes and gigabytes",
    "first-token quickstart --real-size": "a model of 0.9 B needs minutes and gigabytes",
    "attribute quickstart --onnx": "needs a graph that its user has edited",
    "validate --kit-report": "needs the report of a device",
}
"""Examples in docstrings that no test runs: how one begins, and why. All others are run."""


def pages() -> dict[str, str]:
    """File name in `FOLDER` -> text."""
    return {"recipe.md": recipe_page(), "targets.md": targets_page(), "commands.md": commands_page()}


# ── Recipe and targets ───────────────────────────────────────────────────────


def recipe_page() -> str:
    """Every key of every section."""
    schema = Recipe.model_json_schema()
    parts = [
        NOTICE + "# Recipe keys\n",
        "A recipe is a YAML file. Unknown keys, other types and values out of range are refused by name, before any "
        "work is done. `infoprune-export recipes --schema` prints the same as JSON schema, for editors. A key is "
        "overridden on the command line by `--set section.key=VALUE`, where the value is YAML.\n",
        "Paper A is the structural paper (heads, feed-forward networks), paper B the visual-token paper.\n",
        "## Top level\n",
        prose(schema.get("description", "")),
        table(schema, schema, sections=False),
    ]
    for name, entry in schema["properties"].items():
        if (section := referred(entry, schema)) is not None:
            parts += [f"## {name}\n", prose(section.get("description", "")), table(section, schema, f"{name}.")]
    return "\n".join(part for part in parts if part)


def targets_page() -> str:
    """Every key of both kinds of target files."""
    parts = [
        NOTICE + "# Target keys\n",
        "A target is the machine an engine is for: a file of [engines/targets](../../engines/targets), or one of your "
        "own, named by path in `engine.target` or `--target`.\n",
    ]
    for kind, spec in (("onnxruntime", OnnxRuntimeTarget), ("tensorrt", TensorRtTarget)):
        schema = spec.model_json_schema()
        parts += [f"## backend: {kind}\n", prose(schema.get("description", "")), table(schema, schema)]
    bug = TensorRtTarget.model_json_schema()["$defs"]["KnownBug"]
    parts += ["### known_bugs\n", prose(bug["description"]), table(bug, bug, "known_bugs[].")]
    return "\n".join(part for part in parts if part)


def table(of: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "", *, sections: bool = True) -> str:
    """Key, type, default and meaning of an object's properties; without ``sections``, of those that are none."""
    required = of.get("required", ())
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, entry in of["properties"].items():
        if not sections and referred(entry, schema) is not None:
            continue
        default = "required" if name in required else shown(entry.get("default", {}))
        meaning = " ".join(markdown(entry.get("description", "")).split())
        rows.append(
            "| " + " | ".join(map(escaped, (f"`{prefix}{name}`", kind(entry, schema), default, meaning))) + " |"
        )
    return "\n".join(rows) + "\n"


def referred(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a property is, if it is one."""
    reference = entry.get("$ref", "")
    section = schema.get("$defs", {}).get(reference.rpartition("/")[2])
    return section if section is not None and section.get("type") == "object" else None


def kind(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in words: choices, limits, lists."""
    if (section := referred(entry, schema)) is not None:
        return str(section["title"])
    if "$ref" in entry:
        return kind(schema["$defs"][entry["$ref"].rpartition("/")[2]], schema)
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(kind(option, schema) for option in entry["anyOf"]))
    if entry.get("format") == "fraction":
        return "fraction in quotes"
    words = {"string": "text", "null": "none", "boolean": "true or false", "object": "mapping", "array": "list"}
    word = words.get(entry.get("type", ""), entry.get("type", "any value"))
    if entry.get("type") == "array":
        if "prefixItems" in entry:
            return f"list of {len(entry['prefixItems'])}"
        return f"list of {kind(entry.get('items', {}), schema)}"
    return word + limits(entry)


def limits(entry: Mapping[str, Any]) -> str:
    """``, at least 1`` and so on."""
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return "".join(f", {words[name]} {entry[name]:g}" for name in words if name in entry and abs(entry[name]) < 2**53)


def shown(value: Any) -> str:
    """A default as YAML on one line would have it."""
    if value is None:
        return "none"
    if value == "":
        return "empty"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


# ── Commands ─────────────────────────────────────────────────────────────────


def commands_page() -> str:
    """Every command with its arguments, options and examples."""
    parts = [NOTICE + "# Commands\n", "## infoprune-export\n", *described(group.help or "")]
    parts.append("Every command takes `--help`.\n")
    context = click.Context(group, info_name="infoprune-export")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        usage = " ".join(command.collect_usage_pieces(click.Context(command, context)))
        parts += [f"## {name}\n", *described(command.help or ""), f"```text\ninfoprune-export {name} {usage}\n```\n"]
        rows = [option_row(parameter) for parameter in command.params if isinstance(parameter, click.Option)]
        parts.append("\n".join(["| option | default | |", "|---|---|---|", *rows]) + "\n" if rows else "")
    parts += ["## optimum-cli export infoprune\n", *optimum_part()]
    return "\n".join(part for part in parts if part)


def described(text: str) -> Iterator[str]:
    """A docstring's paragraphs; what stands behind ``Example:`` becomes a block of shell."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip() != "\b"]
        if lines and lines[0].strip().startswith("Example"):
            for line in map(str.strip, lines[1:]):
                reason = next((why for start, why in NOT_RUN.items() if start in line), None)
                yield (f"<!-- not run: {reason} -->\n" if reason else "") + f"```sh\n{line}\n```\n"
        else:
            yield prose("\n".join(lines))


def option_row(option: click.Option) -> str:
    """One option: how it is written, what it is by default, what it does."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if not option.is_flag:
        metavar = option.metavar or {
            "choice": "one of " + ", ".join(getattr(option.type, "choices", ())),
            "path": "PATH",
            "integer": "N",
        }.get(option.type.name, option.type.name.upper().removesuffix(" RANGE"))
        names += f" {metavar}"
    help_text, given = option.help or "", ""
    if found := re.search(r"\s*\[default: (.*?)\]", help_text):
        help_text, given = help_text.replace(found[0], ""), found[1]
    elif isinstance(option.default, (int, float, str)) and not isinstance(option.default, bool):
        given = str(option.default)
    elif option.secondary_opts and isinstance(option.default, bool):
        given = (option.opts if option.default else option.secondary_opts)[0]
    if option.required:
        given = "required"
    return "| " + " | ".join(escaped(" ".join(cell.split())) for cell in (names, given, help_text)) + " |"


def optimum_part() -> Sequence[str]:
    """The command that optimum-cli has from this package."""
    parser = ArgumentParser(prog="optimum-cli export infoprune", add_help=False)
    ExportInfopruneCommand.parse_args(parser)
    rows = ["| option | default | |", "|---|---|---|"]
    for action in parser._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        help_text, given = action.help or "", "required" if action.required else ""
        if action.choices:
            names += " one of " + ", ".join(map(str, action.choices))
        if found := re.search(r"\s*\[(?:default: )?(.*?)\]", help_text):
            help_text, given = help_text.replace(found[0], ""), found[1]
        elif action.default is not None:
            given = str(action.default)
        rows.append("| " + " | ".join(map(escaped, (names, given, help_text))) + " |")
    example = "optimum-cli export infoprune --model testbed/tiny-llava --keep-ratio 1/2 encoder-half/"
    return [prose(parser.description or ""), f"```sh\n{example}\n```\n", "\n".join(rows) + "\n"]


# ── Text ─────────────────────────────────────────────────────────────────────


def prose(text: str) -> str:
    """A docstring as Markdown paragraphs, each on one line."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in markdown(inspect.cleandoc(text)).split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n" if text else ""


def markdown(text: str) -> str:
    """Double backticks as single ones."""
    return text.replace("``", "`")


def escaped(cell: str) -> str:
    """Fit for a cell of a table."""
    return cell.replace("|", "\\|").replace("<", "&lt;")


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a page is not current.")
def main(check: bool) -> None:
    """Write the pages of docs/reference that come from the code."""
    stale = [
        name
        for name, text in pages().items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]
    if check:
        click.echo(f"not current: {', '.join(stale)}; run python docs/make_reference.py" if stale else "current")
        sys.exit(1 if stale else 0)
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        click.echo(f"written: {name}")


if __name__ == "__main__":
    main()
