"""A file that holds no recipe or target is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_recipes import SMALLEST, refusal

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    assets,
    find_asset,
    load_recipe,
    load_target,
)

# ── What is refused: files ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: mine\nmodel: {name_or_path: x\nseed: [\n", 3),
        ("name: 'mine\n", 2),
        ("name: mine\n\tseed: 1\n", 2),
        ("name: mine\nseed: 1\n  model: x\n", 3),
        ("name: mine\nseed: @x\n", 2),
    ],
)
def test_broken_yaml_names_file_and_line(write, text, line):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}, line {line}: not valid YAML")


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n", "3", "1: 2\n", "null: 1\n"])
def test_what_is_no_mapping_of_names_is_refused(write, text):
    assert "expected a mapping" in refusal(write(text))


@pytest.mark.parametrize("content", [b"\xff\xfename", b"name: caf\xe9\n", b"\x00\x01\x02", bytes(range(256))])
def test_what_is_no_utf8_text_is_refused(write, content):
    assert "not valid YAML" in refusal(write(content))


@pytest.mark.parametrize(
    "value",
    [
        "2020-13-45",
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "!!binary x",
        "9" * 5000,
        "[" * 5000,
        "{[1]: 2}",
        "!unknown x",
        "=",
    ],
)
def test_a_value_that_yaml_cannot_build_is_refused(write, value):
    """Each passes the scanner and fails in a constructor, with whatever exception that happens to raise."""
    refusal(write(f"name: mine\nseed: {value}\n"))
    refusal(write(SMALLEST), (f"seed={value}",))


@pytest.mark.parametrize(
    "text",
    [
        "heads: &x {remove: *x}",
        "variants: &x {odd: *x}",
        "variants: {odd: &x {heads.remove: *x}}",
        "variants: {odd: {description: !!binary /w==}}",
        "variants: {odd: {description: 2020-01-01}}",
        "variants: {odd: {data.prompts: !!set {a}}}",
        "variants: {odd: {data.prompts: !!omap [a: 1]}}",
        'variants: {"two\\nlines": 3}',
        'variants: {odd: {"name.\\n": 3}}',
        'heads: {"two\\nlines": 3}',
        "heads: {1: 2}",
    ],
)
def test_yaml_that_is_no_tree_of_plain_values_is_refused(write, text):
    refusal(write(f"name: mine\nmodel: {{name_or_path: x}}\n{text}\n"))


def test_a_missing_file_lists_what_is_shipped(tmp_path):
    message = refusal(tmp_path / "none.yaml")
    assert repr(str(tmp_path / "none.yaml")) in message
    assert "quickstart" in message


@pytest.mark.parametrize("name", ["", ".", "..", "quickstar", "quickstart.yml", "a\0b", "x/quickstart", "a" * 5000])
def test_a_name_that_is_nothing_shipped_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in refusal(name)


def test_a_missing_file_in_a_folder_of_ones_own_is_not_replaced_by_a_shipped_one(tmp_path):
    refusal(tmp_path / "recipes" / "quickstart.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    assert repr(str(tmp_path)) in refusal(tmp_path)


def test_an_unreadable_file_is_named(write, monkeypatch):
    path = write(SMALLEST)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert refusal(path) == f"{path}: cannot be read (Permission denied)"


def test_an_unknown_target_lists_what_is_shipped():
    with pytest.raises(InfopruneError, match=r"no target at 'toaster'.*onnxruntime-cpu"):
        load_target("toaster")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "magic"}, "backend"),
        ({"providers": "CPUExecutionProvider"}, "providers"),
        ({"threads": -1}, "threads"),
        ({"provider": ["x"]}, "'provider'; did you mean 'providers'"),
        ({"providers": []}, "providers"),
    ],
)
def test_a_bad_target_names_the_key(write, change, named):
    tree = {"name": "t", "description": "d", "backend": "onnxruntime", "providers": ["CPUExecutionProvider"], **change}
    with pytest.raises(InfopruneError) as caught:
        load_target(str(write(tree)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_find_the_shipped_files_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_asset("recipes", "quickstart") == assets("recipes")["quickstart"]
    assert find_asset("recipes", "recipes/quickstart.yaml") == assets("recipes")["quickstart"]


def test_a_file_is_preferred_to_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text(yaml.safe_dump(SMALLEST))
    assert load_recipe("quickstart").name == "mine"
