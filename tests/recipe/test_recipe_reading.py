"""What recipes are read as: defaults, overrides, variants, and a run's own record of one."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_recipes import SMALLEST, refusal, with_value

from infoprune_export.artifacts import canonical_json
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    DecoderSpec,
    Recipe,
    TokensSpec,
    assets,
    load_recipe,
    load_target,
    read_recipe,
    variant_of,
)

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
