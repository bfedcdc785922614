"""Pages are complete and current: links, recipe pages, keys, generated reference."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import blocks
import pytest

from infoprune_export.recipe import Recipe, assets, load_recipe
from infoprune_export.runtime import CompressedVLM

PAGES = blocks.pages()


def known_keys() -> set[str]:
    """Every dotted key of a recipe, and the names of its sections."""
    keys = set[str]()
    for name, field in Recipe.model_fields.items():
        section = field.alias or name
        keys.add(section)
        inner = getattr(field.annotation, "model_fields", {})
        keys.update(f"{section}.{key}" for key in inner)
    return keys


SECTIONS = {key for key in known_keys() if any(other.startswith(f"{key}.") for other in known_keys())}


def keys_in(page: str) -> Iterator[str]:
    """What prose and tables name as keys of a recipe: ``section.key``, alone or with a value behind it."""
    for code in blocks.inline_code(page):
        for word in re.findall(r"^(?:--set )?([a-z_]+\.[a-z_0-9]+)(?:[:=].*)?$", code):
            if word.split(".")[0] in SECTIONS and not _is_code(word):
                yield word


def _is_code(word: str) -> bool:
    """Files, modules such as heads.criteria, and the methods of `runtime` that pages call on a `model`."""
    module = blocks.ROOT / "infoprune_export" / word.replace(".", "/")
    return (
        word.endswith((".py", ".json"))
        or module.is_dir()
        or module.with_suffix(".py").exists()
        or hasattr(CompressedVLM, word.removeprefix("model."))
    )


# ── Links ────────────────────────────────────────────────────────────────────


def broken(page: str) -> Iterator[str]:
    for link in blocks.links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (blocks.ROOT / page).parent / target if target else blocks.ROOT / page
        if (
            not path.exists()
            or anchor
            and path.suffix == ".md"
            and anchor not in blocks.anchors(path.read_text(encoding="utf-8"))
        ):
            yield link


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert list(broken(page)) == []


def test_every_page_is_reached_from_the_index():
    seen, ahead = set[Path](), [blocks.ROOT / "docs" / "index.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        relative = page.relative_to(blocks.ROOT).as_posix()
        ahead += [page.parent / link.partition("#")[0] for link in blocks.links(relative) if ".md" in link]
    missing = {(blocks.ROOT / page).resolve() for page in PAGES if page.startswith("docs/")} - seen
    assert missing == set()


@pytest.mark.parametrize("page", PAGES)
def test_files_in_prose_are_there(page):
    """Code that looks like a path below one of the repository's folders."""
    tops = "docs|recipes|engines|tests|infoprune_export|optimum"
    for code in blocks.inline_code(page):
        if re.fullmatch(rf"(?:{tops})/[\w./-]+", code):
            parents = (blocks.ROOT, (blocks.ROOT / page).parent)
            assert any((parent / code).exists() for parent in parents), code


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_one_title_and_no_word_of_this_machine(page):
    text = blocks.text_of(page)
    titles = [token for token in blocks.tokens(text) if token.type == "heading_open" and token.tag == "h1"]
    assert len(titles) == 1
    assert not re.search(r"(?<![\w.])/(tmp|work|home|root)/", text)
    assert not re.search(r"\bTODO\b|\bTBD\b|\bFIXME\b", text)


# ── Recipes and keys ─────────────────────────────────────────────────────────


def test_every_recipe_has_its_page_and_every_page_its_recipe():
    written = {path.stem for path in (blocks.ROOT / "docs" / "recipes").glob("*.md")}
    assert written == set(assets("recipes"))


@pytest.mark.parametrize("name", sorted(assets("recipes")))
def test_a_recipe_page_names_its_recipe_its_variants_and_what_was_measured(name):
    page = f"docs/recipes/{name}.md"
    text, recipe = blocks.text_of(page), load_recipe(name)
    assert text.startswith(f"# {name}\n")
    for part in ("**For**", "**Source**", "**Expect**", "**Measured**"):
        assert part in text, part
    assert any(name in command.words for command in blocks.shell(page)), "no command runs it"
    if recipe.model.name_or_path.startswith("testbed/"):
        return
    named = set(blocks.inline_code(page))
    assert {"ours", "random-stage-2"} <= named
    ranges = re.findall(r"`([\w.-]+)` to `([\w.-]+)`", text)
    ordered = list(recipe.variants)
    for first, last in ranges:
        named.update(ordered[ordered.index(first) : ordered.index(last) + 1])
    assert set(recipe.variants) <= named, "a variant is not explained"


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_prose_exist(page):
    assert [key for key in keys_in(page) if key not in known_keys()] == []


def test_the_check_of_keys_sees_keys():
    assert {"heads.remove", "ffn.keep_macs", "tokens.keep_ratio"} <= set(keys_in("docs/recipes/quickstart.md"))
    assert "heads.remove" in known_keys()
    assert "heads.removed" not in known_keys()


# ── Reference ────────────────────────────────────────────────────────────────


def test_the_reference_is_what_the_code_says():
    command = [sys.executable, str(blocks.ROOT / "docs" / "make_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_and_every_command_is_in_the_reference():
    from infoprune_export.cli import main

    keys = set(blocks.inline_code("docs/reference/recipe.md"))
    assert {key for key in known_keys() if key not in SECTIONS} <= keys
    commands = blocks.text_of("docs/reference/commands.md")
    assert [name for name in main.commands if f"\n## {name}\n" not in commands] == []


@pytest.mark.parametrize("page", ["recipe", "targets", "commands"])
def test_nothing_in_the_reference_goes_without_saying(page):
    rows = [line for line in blocks.text_of(f"docs/reference/{page}.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    assert [row for row in rows if not row.removesuffix("|").rstrip(" ").rpartition("|")[2]] == []


def test_a_stale_reference_is_found(tmp_path, monkeypatch):
    import importlib.util

    from click.testing import CliRunner

    spec = importlib.util.spec_from_file_location("make_reference", blocks.ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert CliRunner().invoke(module.main, ["--check"]).exit_code == 1
    assert CliRunner().invoke(module.main, []).exit_code == 0
    assert CliRunner().invoke(module.main, ["--check"]).exit_code == 0
    page = tmp_path / "recipe.md"
    page.write_text(page.read_text(encoding="utf-8").replace("Fraction of all heads", "Part of all heads"))
    stale = CliRunner().invoke(module.main, ["--check"])
    assert stale.exit_code == 1
    assert "recipe.md" in stale.output
