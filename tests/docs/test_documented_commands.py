"""Every command of README and docs: what can run here is run, the rest is parsed and says why it is not run.

A block that cannot run has an HTML comment above it, ``<!-- not run: REASON -->``. The page in `ALWAYS` runs in the
default suite but for the commands named there; all others run with ``--exhaustive``; parsed are all of them, always.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import blocks
import pytest
import running
import yaml

from infoprune_export.recipe import Recipe

LONG = ("parity", "compare-structure", "compare-tokens", "first-token", "front", "sweep", "analyse")
"""Commands with tests of their own (as ``optimum-cli`` has), which the default suite leaves out of pages."""
ALWAYS = {"docs/tutorials/first-steps.md": (*LONG, "validate")}
"""The page of a newcomer's path, which runs in the default suite, and the commands there that do not."""

PAGES = blocks.pages()
OURS = ("infoprune-export", "optimum-cli")


# ── Parsed, always ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists_with_its_options_keys_and_files(page):
    for command in blocks.shell(page):
        program = command.program
        if program == "infoprune-export":
            running.parse(command)
        elif program == "optimum-cli":
            running.run_optimum(command, parse_only=True)
        elif command.block.reason is None:
            running.check_foreign(command)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_language_that_is_checked(page):
    for block in blocks.blocks(page):
        if not block.language:
            assert not re.search(rf"^\s*({'|'.join(OURS)}|make|pip|python3?)\b", block.text, re.M), "shell is ```sh"
        else:
            assert block.language in ("sh", "python", "yaml", "json", "text", "mermaid"), f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_prose_and_tables_exist(page):
    block = blocks.Block(page, 0, "sh", "", None)
    for code in blocks.inline_code(page):
        words = code.split()
        whole = not re.search(r"[A-Z]{4,}|\.\.\.|…|\[", code)  # placeholders such as RECIPE
        if words[0] == "infoprune-export" and len(words) > 1:
            # One without arguments is a name; so is one with placeholders.
            example = code if whole and len(words) > 2 else f"infoprune-export {words[1]} --help"
            for command in blocks.commands(blocks.Block(page, 0, "sh", example, None)):
                running.parse(command)
        elif words[0] == "make" and len(words) == 2:
            running.check_foreign(blocks.Command(block, tuple(words)))


@pytest.mark.parametrize("page", PAGES)
def test_recipes_in_blocks_are_recipes(page):
    base = {"name": "shown", "model": {"name_or_path": "testbed/tiny-llava"}}
    for block in blocks.blocks(page):
        if block.language == "yaml":
            tree = yaml.safe_load(block.text)
            assert isinstance(tree, dict), f"{page}:{block.line}"
            if "backend" not in tree:
                Recipe.model_validate({**base, **tree})


@pytest.mark.parametrize("page", PAGES)
def test_python_in_blocks_is_python(page):
    for block in blocks.blocks(page):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")


# ── Run ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all pages, so that a run which several pages make is made once."""
    import torch

    folder = tmp_path_factory.mktemp("place")
    running.furnish(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two cost more than they bring to models of this size
    yield folder
    torch.set_num_threads(threads)


def _run_page(page: str, place: Path, monkeypatch: pytest.MonkeyPatch, *, leave_out: tuple[str, ...] = ()) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")
    for block in blocks.blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            running.run_python(block.text, f"{page}:{block.line}")
        if block.language != "sh":
            continue
        for command in blocks.commands(block):
            started = time.process_time()
            if command.program == "infoprune-export" and command.words[1] not in leave_out:
                running.run(command)
            elif command.program == "optimum-cli" and command.program not in leave_out:
                running.run_optimum(command)
            if "DOCS_TIMES" in os.environ:
                print(f"{time.process_time() - started:6.1f} s  {command.where}")  # noqa: T201


@pytest.mark.parametrize("page", ALWAYS)
def test_commands_run(page, place, monkeypatch):
    _run_page(page, place, monkeypatch, leave_out=ALWAYS[page])


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", PAGES)
def test_all_commands_of_a_page_run(page, place, monkeypatch):
    _run_page(page, place, monkeypatch)


# ── The check itself ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("infoprune-export runn quickstart", "no command runn"),
        ("infoprune-export run quickstart --sett heads.remove=0.5", "--sett"),
        ("infoprune-export run quickstart --set heads.removed=0.5", "heads.removed"),
        ("infoprune-export run quickstart --set heads.remove=2", "heads.remove"),
        ("infoprune-export run quickstarts", "quickstarts"),
        ("infoprune-export real-size --rounds 1", "--rounds"),
        ("make quickstarts", "no target"),
        ("pip install -e .[gpus]", "extras"),
        ("pytest tests/nowhere", "not there"),
        ("python3 nowhere.py", "not there"),
        ("curl example.org", "no test knows curl"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    command = next(blocks.commands(blocks.Block("page.md", 1, "sh", line, None)))
    with pytest.raises(AssertionError, match=re.escape(message)):
        running.parse(command) if command.program == "infoprune-export" else running.check_foreign(command)


def test_a_command_that_fails_is_a_failure(place, monkeypatch):
    monkeypatch.chdir(place)
    block = blocks.Block("page.md", 1, "sh", "infoprune-export lint nowhere.onnx --target jetson-orin-jp62", None)
    with pytest.raises(AssertionError, match="exit code 2"):
        running.run(next(blocks.commands(block)))


def test_a_reason_belongs_to_the_block_right_below_it():
    text = "<!-- not run: slow -->\n```sh\na\n```\n\n```sh\nb && c > d\n```\n\n"
    text += "<!-- not run: x -->\nprose\n\n```sh\ne\n```\n"
    found = blocks.blocks("page.md", text)
    assert [block.reason for block in found] == ["slow", None, None]
    assert [(c.words, c.output) for c in blocks.commands(found[1])] == [(("b",), None), (("c",), "d")]
