"""Recipes: everything that is wrong with one is refused in one line that names the key."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from infoprune_export.artifacts import canonical_json
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    DecoderSpec,
    Recipe,
    TokensSpec,
    assets,
    find_asset,
    load_recipe,
    load_target,
    read_recipe,
    variant_of,
)

SMALLEST: dict[str, Any] = {"name": "mine", "model": {"name_or_path": "testbed/tiny-llava"}}


@pytest.fixture
def write(tmp_path):
    def write(content: Any) -> Path:
        path = tmp_path / "mine.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


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


# ── What is accepted ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(assets("recipes")))
def test_every_shipped_recipe_loads_by_name_and_by_path_with_its_variants(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(assets("recipes")[name])
    assert recipe.name == name
    assert recipe.description
    for variant in recipe.variants:
        assert variant_of(recipe, variant).name == f"{name}-{variant}"


@pytest.mark.parametrize("name", sorted(assets("targets")))
def test_every_shipped_target_loads(name):
    target = load_target(name)
    assert target.name == name
    assert target.description


def test_something_is_shipped():
    assert "quickstart" in assets("recipes")
    assert {"onnxruntime-cpu", "onnxruntime-cuda"} <= set(assets("targets"))


def test_shipped_recipes_name_shipped_targets():
    for name in assets("recipes"):
        load_target(load_recipe(name).engine.target)


def test_the_smallest_recipe_has_every_default(write):
    recipe = load_recipe(write(SMALLEST))
    assert recipe == Recipe.model_validate(SMALLEST)
    assert recipe.tokens.keep_ratio == Fraction(1, 2)
    assert recipe.engine.target in assets("targets")
    assert recipe.variants == {}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (1, Fraction(1)),
        (1.0, Fraction(1)),
        ("1", Fraction(1)),
        (0.1, Fraction(1, 10)),
        ("0.25", Fraction(1, 4)),
        ("64/576", Fraction(1, 9)),
        ("2/9", Fraction(2, 9)),
        ("128/576", Fraction(2, 9)),
        (0.222222, Fraction(111111, 500000).limit_denominator(10_000)),
    ],
)
def test_keep_ratio_is_an_exact_fraction(write, given, kept):
    assert load_recipe(write(with_value("tokens.keep_ratio", given))).tokens.keep_ratio == kept


def test_overrides_are_yaml_and_the_last_one_wins(write):
    recipe = load_recipe(
        write(SMALLEST),
        [
            "heads.remove=0.25",
            "heads.remove=0.75",
            "data.prompts=['What is it?', 'Is it = red?']",
            "refit.enabled=false",
            "model.revision=null",
            "ffn={method: paper}",
            "ffn.epsilon=0.5",
        ],
    )
    assert recipe.heads.remove == 0.75
    assert recipe.data.prompts == ("What is it?", "Is it = red?")
    assert recipe.refit.enabled is False
    assert recipe.model.revision is None
    assert (recipe.ffn.method, recipe.ffn.epsilon) == ("paper", 0.5)


def test_an_override_makes_a_section_that_the_file_does_not_have(write):
    assert load_recipe(write(SMALLEST), ["bench.rounds=5"]).bench.rounds == 5


def test_a_variant_changes_what_it_names_and_nothing_else(write):
    tree = {**SMALLEST, "heads": {"remove": 0.25}, "variants": {"odd": {"heads.method": "paper", "ffn.epsilon": 0.2}}}
    recipe = load_recipe(write(tree))
    variant = variant_of(recipe, "odd")
    assert variant.name == "mine-odd"
    assert variant.variants == {}
    assert (variant.heads.method, variant.heads.remove, variant.ffn.epsilon) == ("paper", 0.25, 0.2)
    unchanged = {"heads", "ffn", "name", "variants"}
    before, after = recipe.to_dict(), variant.to_dict()
    assert {k: v for k, v in before.items() if k not in unchanged} == {
        k: v for k, v in after.items() if k not in unchanged
    }


# ── to_dict ──────────────────────────────────────────────────────────────────

_positive = st.floats(1e-6, 1e6)
_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@st.composite
def _trees(draw: st.DrawFn) -> dict[str, Any]:
    """Valid recipes."""
    denominator = draw(st.integers(1, 1_000_000))
    return {
        "name": draw(_names),
        "description": draw(st.text(max_size=30)),
        "seed": draw(st.integers(0, 2**32)),
        "model": {"name_or_path": draw(st.text(min_size=1, max_size=30)), "revision": draw(st.none() | st.text())},
        "data": {"prompts": draw(st.lists(st.text(), min_size=1, max_size=3))},
        "heads": {
            "remove": draw(st.floats(0, 0.999)),
            "alpha": draw(st.floats(0, 9)),
            "learning_rate": draw(_positive),
        },
        "ffn": {"method": draw(st.sampled_from(["obs", "paper", "none"])), "keep_macs": draw(st.floats(1e-9, 1))},
        "tokens": {"keep_ratio": f"{draw(st.integers(1, denominator))}/{denominator}", "merge": draw(st.booleans())},
        "validate": {"parity_batches": draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))},
        "variants": draw(st.dictionaries(_names, st.just({"heads.remove": 0.1}), max_size=2)),
    }


@settings(derandomize=True, max_examples=100, deadline=None)
@given(_trees())
@example({**SMALLEST, "tokens": {"keep_ratio": "1/30000"}})
def test_to_dict_is_the_recipe_again(tree):
    recipe = Recipe.model_validate(tree)
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert yaml.safe_load(yaml.safe_dump(recipe.to_dict())) == recipe.to_dict()


def test_to_dict_has_the_keys_of_the_file_and_plain_types():
    tree = load_recipe("quickstart").to_dict()
    assert "validate" in tree
    assert "validate_" not in tree
    assert tree["tokens"]["keep_ratio"] == "1/2"
    assert isinstance(tree["data"]["prompts"], list)


# ── What is refused: keys ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dotted", "hint"),
    [
        ("head", "'heads'"),
        ("heads.metod", "'method'"),
        ("tokens.keep_ration", "'keep_ratio'"),
        ("model.name_or_pat", "'name_or_path'"),
        ("data.calibration_image", "'calibration_images'"),
        ("validate_", "'validate'"),
        ("validate.onnx_tolerence", "'onnx_tolerance'"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(write, dotted, hint):
    message = refusal(write(with_value(dotted, 1)))
    assert f"unknown key {dotted!r}" in message
    assert f"did you mean {hint}" in message


@pytest.mark.parametrize(
    ("dotted", "known"), [("zzzz", "heads"), ("heads.zzzz", "learning_rate"), ("validate.zzzz", "replay_tolerance")]
)
def test_an_unknown_key_like_no_other_lists_those_of_its_section(write, dotted, known):
    message = refusal(write(with_value(dotted, 1)))
    assert f"unknown key {dotted!r}; known keys: " in message
    assert known in message


@pytest.mark.parametrize("key", ["name", "model", "model.name_or_path"])
def test_a_missing_key_is_named(write, key):
    tree = copy.deepcopy(SMALLEST)
    if key == "model.name_or_path":
        tree["model"] = {}
    else:
        del tree[key]
    message = refusal(write(tree))
    assert f"'{key}' is required" in message


def test_the_file_is_named(write):
    path = write({})
    assert refusal(path).startswith(f"{path}: ")


# ── What is refused: values ──────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("name", 5),
        ("name", ""),
        ("name", "../up"),
        ("name", "a b"),
        ("name", ".hidden"),
        ("description", ["text"]),
        ("seed", True),
        ("seed", 1.0),
        ("seed", "1"),
        ("seed", -1),
        ("device", "tpu"),
        ("model", "testbed/tiny-llava"),
        ("model", None),
        ("model.name_or_path", ""),
        ("model.name_or_path", 7),
        ("model.trust_remote_code", "yes please"),
        ("data.prompts", "What is it?"),
        ("data.calibration_images", 0),
        ("data.calibration_images", 1.5),
        ("data.validation_questions", -1),
        ("heads", []),
        ("heads.method", "magic"),
        ("heads.remove", -0.1),
        ("heads.remove", 1),
        ("heads.remove", True),
        ("heads.remove", "half"),
        ("heads.remove", float("nan")),
        ("heads.threshold", 0),
        ("heads.learning_rate", 0),
        ("heads.epochs", 0),
        ("heads.batch_size", 0),
        ("ffn.keep_macs", 0),
        ("ffn.keep_macs", 1.01),
        ("ffn.round_to", 0),
        ("ffn.epsilon", 1),
        ("refit.enabled", 1),
        ("refit.ridge", 0),
        ("tokens.method", "magic"),
        ("tokens.prior", "magic"),
        ("tokens.pool_factor", 0.5),
        ("tokens.temperature", 0),
        ("tokens.inertia", 0),
        ("tokens.positions", "none"),
        ("tokens.quality", "constant"),
        ("tokens.exponent", -0.1),
        ("tokens.merge", "yes please"),
        ("tokens.merge_above", 1.01),
        ("tokens.merge_above", -1.01),
        ("decoder", "infoprune"),
        ("decoder.method", "magic"),
        ("decoder.layer", -1),
        ("decoder.layer", 1.5),
        ("decoder.layer", True),
        ("decoder.layer", None),
        ("decoder.layer", "15"),
        ("decoder.layer", "last"),
        ("decoder.layer", [15]),
        ("decoder.keep_ratio", 0),
        ("decoder.keep_ratio", "4/3"),
        ("export.opset", 17),
        ("export.opset", 23),
        ("engine.target", 1),
        ("validate.max_accuracy_drop", -1),
        ("validate.max_accuracy_drop", float("nan")),
        ("validate.min_agreement", 1.1),
        ("validate.onnx_tolerance", 0),
        ("bench.rounds", 2),
        ("bench.warmup", -1),
        ("bench.threads", 0),
        ("variants", []),
        ("variants.odd", 3),
    ],
)
def test_a_wrong_type_or_range_names_key_and_value(write, dotted, value):
    message = refusal(write(with_value(dotted, value)))
    assert f": {dotted} = " in message
    assert repr(value) in message


def test_a_wrong_entry_of_a_list_is_named_by_its_place(write):
    assert ": data.prompts.1 = 7: " in refusal(write(with_value("data.prompts", ["a", 7])))


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        # infinities reach losses and JSON, a seed this large no generator takes
        *((f"heads.{name}", float("inf")) for name in ("alpha", "beta", "gamma", "learning_rate")),
        *(("heads.initial_zeta", value) for value in (float("nan"), float("inf"), float("-inf"))),
        ("refit.ridge", float("inf")),
        ("tokens.temperature", float("inf")),
        ("tokens.pool_factor", float("inf")),
        ("seed", 2**64),
        # every size is at least one image, and there is at least one size
        *(
            (f"{key}", sizes)
            for key in ("bench.batch_sizes", "validate.parity_batches")
            for sizes in ([], [0], [1, -1])
        ),
    ],
)
def test_a_value_that_would_fail_only_in_the_middle_of_the_run_is_refused(write, dotted, value):
    assert f": {dotted}" in refusal(write(with_value(dotted, value)))


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -0.5,
        1.5,
        2,
        True,
        False,
        None,
        "1/0",
        "0/5",
        "3/2",
        "-1/2",
        "half",
        "",
        "1/2/3",
        "nan",
        "inf",
        float("nan"),
        float("inf"),
        [1, 2],
        {"a": 1},
    ],
)
def test_keep_ratio_outside_what_can_be_kept_is_refused(write, value):
    message = refusal(write(with_value("tokens.keep_ratio", value)))
    assert ": tokens.keep_ratio = " in message
    assert "(0, 1]" in message or "fraction in quotes" in message or "is not a number or a fraction" in message


def test_keep_ratio_never_rounds_to_nothing(write):
    """A ratio finer than what is stored is refused or kept above zero."""
    path = write(with_value("tokens.keep_ratio", "1/30000"))
    try:
        kept = load_recipe(path).tokens.keep_ratio
    except InfopruneError:
        assert "tokens.keep_ratio" in refusal(path)
    else:
        assert kept > 0


def test_keep_ratio_with_a_huge_exponent_is_refused_at_once(write):
    """Exact arithmetic on it would take minutes and gigabytes."""
    path = write(with_value("tokens.keep_ratio", "1e-99999999"))
    code = f"from infoprune_export.recipe import load_recipe; load_recipe({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "InfopruneError" in done.stderr


def test_a_long_value_is_shortened(write):
    message = refusal(write(with_value("heads.remove", "x" * 10_000)))
    assert len(message) < 400
    assert "..." in message


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        ({"questions": "q.json"}, "both VQAv2 files or neither"),
        ({"images": "i", "annotations": "a.json"}, "both VQAv2 files or neither"),
        ({"questions": "q.json", "annotations": "a.json"}, "name the folder"),
        ({"prompts": []}, "at least one question"),
    ],
)
def test_data_that_does_not_belong_together_is_refused(write, data, fix):
    message = refusal(write({**SMALLEST, "data": data}))
    assert ": data = " in message
    assert fix in message


# ── Token settings ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("layer", ["auto", 0, 15])
def test_the_layer_of_stage_2_is_a_number_or_auto(write, layer):
    decoder = load_recipe(write(with_value("decoder.layer", layer))).decoder
    assert decoder.layer == layer
    assert type(decoder.layer) is type(layer)
    assert load_recipe(write(SMALLEST), [f"decoder.layer={layer}"]).decoder == decoder


def test_a_wrong_layer_says_what_one_is(write):
    assert "expected auto or the number of a layer, counted from 0" in refusal(write(with_value("decoder.layer", -1)))


@pytest.mark.parametrize("method", ["none", "infoprune", "random", "fastv", "pyramiddrop", "sparsevlm"])
def test_only_methods_behind_one_layer_have_it_found(method):
    assert DecoderSpec(method=method).finds_layer == (method in ("infoprune", "random"))
    assert not DecoderSpec(method=method, layer=0).finds_layer


def test_stage_2_is_off_and_keeps_a_third_by_default(write):
    assert load_recipe(write(SMALLEST)).decoder == DecoderSpec(method="none", layer="auto", keep_ratio=Fraction(1, 3))


@pytest.mark.parametrize("prior", ["cls", "received", "value"])
@pytest.mark.parametrize("quality", ["power", "softmax"])
def test_token_settings_are_read(write, prior, quality):
    section = {"prior": prior, "quality": quality, "exponent": 0.0, "merge_above": -1.0, "merge": False}
    tokens = load_recipe(write({**SMALLEST, "tokens": section})).tokens
    assert tokens == TokensSpec(prior=prior, quality=quality, exponent=0.0, merge_above=-1.0, merge=False)
    assert load_recipe(write(SMALLEST), ["tokens.merge_above=1.0"]).tokens.merge_above == 1.0


# ── A run's own recipe ───────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(assets("recipes")))
def test_a_recipe_is_read_back_as_a_run_records_it(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.json").write_text(canonical_json(recipe.to_dict()), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[]", "recipe = []"),
        (b'"text"', "recipe = 'text'"),
        (b"null", "recipe = None"),
        (b"{}", "'name' is required"),
        (b'{"name": "t", "model": {"name_or_path": "x"}, "modle": 1}', "unknown key 'modle'"),
        (b'{"name": "t", "model": {"name_or_path": "x"}, "heads": {"remove": NaN}}', "heads.remove = nan"),
    ],
)
def test_a_damaged_record_of_a_run_is_refused(tmp_path, content, named):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(InfopruneError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert named in message
    assert message.splitlines() == [message]


def test_half_a_character_in_a_recorded_recipe_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**load_recipe("quickstart").to_dict(), "description": "\udc80"}))
    with pytest.raises(InfopruneError, match="not a tree of plain values .*surrogates"):
        read_recipe(path)


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    for path in (tmp_path / "recipe.json", tmp_path):
        with pytest.raises(InfopruneError, match="name the folder of a run"):
            read_recipe(path)


# ── What is refused: variants ────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"heads.remve": 0.5}, "'heads.remve'; did you mean 'remove'?"),
        ({"nothing": 1}, "'nothing'"),
        ({"heads.remove": 2}, "heads.remove = 2"),
        ({"tokens.keep_ratio": "1/0"}, "tokens.keep_ratio = '1/0'"),
        ({"heads": 1}, "heads = 1"),
        ({"name.first": 1}, "name.first"),
    ],
)
def test_a_bad_variant_is_refused_when_the_recipe_is_loaded(write, overrides, named):
    message = refusal(write({**SMALLEST, "variants": {"good": {"heads.remove": 0.1}, "odd": overrides}}))
    assert named in message
    assert "odd" in message


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", "two\nlines"])
def test_a_variant_name_that_is_no_folder_name_is_refused(write, name):
    refusal(write({**SMALLEST, "variants": {name: {"heads.remove": 0.1}}}))


# ── What is refused: --set ───────────────────────────────────────────────────


@pytest.mark.parametrize("override", ["heads.remove", "", "=", "=0.5", "heads.remove:0.5", "two\nlines"])
def test_an_override_without_key_or_value_is_refused(write, override):
    message = refusal(write(SMALLEST), (override,))
    assert f"--set {override!r}: expected KEY=VALUE" in message


@pytest.mark.parametrize("value", ["[", "{a: ", "'", "a: b: c", "&", "*nowhere", "!!python/object:os.system x"])
def test_an_override_that_is_no_yaml_is_refused(write, value):
    message = refusal(write(SMALLEST), (f"description={value}",))
    assert message.startswith("--set ")
    assert "not valid YAML" in message


@pytest.mark.parametrize("dotted", ["name.first", "model.name_or_path.x", "seed.x.y"])
def test_a_dotted_key_into_a_value_is_refused(write, dotted):
    message = refusal(write({**SMALLEST, "seed": 3}), (f"{dotted}=1",))
    assert dotted in message
    assert "is a value, not a section" in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("heads.=1", "'heads.'"),
        (".heads=1", "'heads' at"),
        ("heads..remove=1", "heads."),
        ("heads.remove=", "heads.remove = None"),
        ("heads=5", "heads = 5"),
        ("tokens.keep_ratio=1.5", "tokens.keep_ratio = 1.5"),
        ("tokens.keep_ratio=0", "tokens.keep_ratio = 0"),
        ("heads.remve=0.5", "'heads.remve'; did you mean 'remove'?"),
    ],
)
def test_an_override_is_checked_like_the_file(write, override, named):
    message = refusal(write(SMALLEST), (override,))
    assert named.removesuffix(" at").strip("'") in message


@pytest.mark.parametrize("override", ["name.\n=1", "a\nb=1", "name.a\rb=1", "name.a\u2028b=1"])
def test_a_line_break_in_an_override_stays_out_of_the_message(write, override):
    refusal(write(SMALLEST), (override,))


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


# ── Anything at all ──────────────────────────────────────────────────────────

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


def test_a_joint_budget_takes_the_criterion_that_knows_damages():
    plain = load_recipe("quickstart")
    assert plain.heads.method == "budgeted"
    assert load_recipe("quickstart", ["budget.by=flops"]).heads.method == "obs"
    with pytest.raises(InfopruneError, match=r"heads\.method obs knows, not michel; use obs"):
        load_recipe("quickstart", ["budget.by=flops", "heads.method=michel"])
    with pytest.raises(InfopruneError, match=r"ffn\.method obs knows, not random"):
        load_recipe("quickstart", ["budget.by=latency", "ffn.method=random"])


# ── Numbers ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "+1.e-5", "0.00001", "1.0e-5"])
def test_numbers_are_those_of_json(text):
    assert load_recipe("quickstart", [f"validate.onnx_tolerance={text}"]).validate_.onnx_tolerance == 1e-5


def test_a_runs_own_recipe_is_a_recipe(tmp_path):
    """As it is written into the run's folder, with numbers as JSON writes them."""
    recipe = load_recipe("quickstart", ["validate.onnx_tolerance=0.00001"])
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert "1e-05" in path.read_text()
    assert load_recipe(path) == recipe
