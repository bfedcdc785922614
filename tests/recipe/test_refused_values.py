"""A key or value that no recipe may have is refused in one line that names it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
from small_recipes import SMALLEST, refusal, with_value

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    load_recipe,
)

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
