"""Every rule catches the graph that breaks it, names the node, and passes the twin that does not; exports are clean."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys

import onnx
import pytest
from click.testing import CliRunner
from exports import CASES as EXPORTS
from exports import SELECT, calls_of, exported, feed_of, tower
from lint_cases import CASES, EVERY

from infoprune_export.cli import main
from infoprune_export.engine.tensorrt import lint_parser, lint_precision
from infoprune_export.engine.tensorrt.limits import limits_of
from infoprune_export.engine.tensorrt.lint import lint, table_of
from infoprune_export.engine.tensorrt.lint_graph import view_of
from infoprune_export.engine.tensorrt.lint_precision import attentions
from infoprune_export.engine.tensorrt.prepare import prepare
from infoprune_export.engine.tensorrt.profiles import Profile, profile_of
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL
from infoprune_export.export.quantize import quantize_int8
from infoprune_export.models.zoo import TINY
from infoprune_export.recipe import EngineSpec, TensorRtTarget, assets, load_target
from infoprune_export.tokens.encoder import form_of

TARGETS = [name for name in assets("targets") if isinstance(load_target(name), TensorRtTarget)]
HEADER = '<ir_version: 10, opset_import: ["" : {}, "local" : 1, "other" : 1]>\n'


def target_of(name, route=None):
    target = load_target(name)
    return target if route is None else target.model_copy(update={"token_select": route})


def written(tmp_path, text, opset=20, change=None):
    model = onnx.parser.parse_model(HEADER.format(opset) + text)
    if change is not None:
        change(model)
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


# ── Rules ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CASES)
def test_a_bad_graph_is_caught_and_its_node_named_and_the_good_twin_is_clean(tmp_path, name):
    case = CASES[name]
    for target in map(target_of, EVERY):
        if case.rule != "opset" and case.opset > target.opset[1]:
            continue  # which would be a finding of its own
        found = lint(written(tmp_path, case.bad, case.opset), target)
        if target.name in case.targets:
            assert [(f.rule, f.severity, f.node) for f in found] == [(case.rule, case.severity, case.node)], target.name
            assert case.words in f"{found[0].problem}; {found[0].fix}"
            assert found[0].problem
            assert found[0].fix
        else:
            assert found == [], target.name
        assert lint(written(tmp_path, case.good, 20 if case.rule == "opset" else case.opset), target) == [], target.name


def test_every_rule_has_a_case():
    made = re.compile(r"""(?:_error|_warning|LintFinding)\(\s*"([a-z0-9-]+)\"""")
    rules = {rule for module in (lint_parser, lint_precision) for rule in made.findall(inspect.getsource(module))}
    assert len(rules) > 20
    # The last two have tests of their own below.
    assert rules == {case.rule for case in CASES.values()} | {"producer", "attention-qdq"}


def test_a_reserved_producer_is_caught(tmp_path):
    path = written(tmp_path, CASES["opset"].good, change=lambda model: setattr(model, "producer_name", "TensorRT"))
    (finding,) = lint(path, target_of("h200"))
    assert (finding.rule, finding.severity, finding.node) == ("producer", "error", "model")


def test_a_target_may_read_less_than_its_release(tmp_path):
    target = load_target("h200").model_copy(update={"opset": (9, 19)})
    (finding,) = lint(written(tmp_path, CASES["opset"].good), target)
    assert (finding.rule, finding.problem, finding.fix) == (
        "opset",
        "opset 20, read are 9 to 19",
        "export.opset=19",
    )


def test_branches_that_call_their_outputs_alike_are_caught(tmp_path):
    def alike(model):
        branch = next(a for a in model.graph.node[0].attribute if a.name == "else_branch").g
        branch.output[0].name = branch.node[0].output[0] = "u"

    good = CASES["branches of another rank"].good
    (finding,) = lint(written(tmp_path, good, change=alike), target_of("h200"))
    assert (finding.rule, finding.node) == ("branches", "choice")
    assert "call their output u" in finding.problem


@pytest.mark.parametrize(("quantized", "rule"), [(0, None), (1, "attention-qdq"), (4, None)])
def test_attention_is_quantized_as_a_whole_or_not_at_all(tmp_path, quantized, rule):
    names = ["q", "k", "v", "w"]
    pairs = {
        name: f"{name}8 = QuantizeLinear ({name}, s, z) {name}d = DequantizeLinear ({name}8, s, z) "
        for name in names[:quantized]
    }
    use = {name: f"{name}d" if name in pairs else name for name in names}
    before = "".join(pairs.get(name, "") for name in "qkv")
    text = (
        "g (float[1, H, S, 64] q, float[1, H, 64, S] k, float[1, H, S, 64] v) => (float[1, H, S, 64] y) "
        f"<float s = {{0.1}}, int8 z = {{0}}> {{ {before} [mm] t = MatMul ({use['q']}, {use['k']}) "
        f"[soft] w = Softmax (t) {pairs.get('w', '')} y = MatMul ({use['w']}, {use['v']}) }}"
    )
    findings = lint(written(tmp_path, text), target_of("h200"))
    assert [(f.rule, f.severity, f.node) for f in findings] == ([(rule, "warning", "mm")] if rule else [])


def test_pairs_between_scores_and_softmax_are_caught(tmp_path):
    text = (
        "g (float[1, H, S, 64] q, float[1, H, 64, S] k, float[1, H, S, 64] v) => (float[1, H, S, 64] y) "
        "<float s = {0.1}, int8 z = {0}> { t = MatMul (q, k) [quant] t8 = QuantizeLinear (t, s, z) "
        "td = DequantizeLinear (t8, s, z) w = Softmax (td) y = MatMul (w, v) }"
    )
    findings = lint(written(tmp_path, text), target_of("h200"))
    assert [f.rule for f in findings] == ["attention-qdq"]
    assert "between the scores and Softmax" in findings[0].problem


# ── K under a profile ────────────────────────────────────────────────────────

SHARE = """g (float[N, M] x) => (float[N, K] v) <int64[1] two = {2}, int64[1] last = {1}> {
  n = Shape (x) m = Gather (n, last) k = Div (m, two) [top] v, p = TopK (x, k) }"""


@pytest.mark.parametrize(("largest", "caught"), [(7679, False), (7680, True), (20000, True)])
def test_k_is_followed_to_a_profiles_largest_shapes(tmp_path, largest, caught):
    path = written(tmp_path, SHARE)
    profile = Profile({"x": ((1, 8), (2, 64), (4, largest))})
    findings = lint(path, target_of("h200"), profile)
    assert [(f.rule, f.node) for f in findings] == ([("topk", "top")] if caught else [])
    assert lint(path, target_of("h200")) == []
    if caught:
        assert f"K is {largest // 2}" in findings[0].problem


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"z": ((1, 8), (1, 8), (1, 8))}, "has z, .* takes x"),
        ({"x": ((8,), (8,), (8,))}, r"x is \[8\] at most"),
    ],
)
def test_a_profile_for_another_graph_is_refused(tmp_path, shapes, words):
    with pytest.raises(InfopruneError, match=words):
        lint(written(tmp_path, SHARE), target_of("h200"), Profile(shapes))


@pytest.mark.exhaustive
def test_a_large_pool_needs_a_plugin(tmp_path_factory):
    """Inherent to TokenSelect's body: it sorts all candidates. The plugin's node takes its place."""
    path = exported(tmp_path_factory, "qwen2.5-vl", True, "fp16", True)
    made = tower("qwen2.5-vl", "fp32")
    profile = profile_of(made, form_of(made, SELECT, True), EngineSpec(images=(1, 1, 1)))
    assert profile.shapes["token_index"][2] == (1, 64 * 96)
    findings = [f for f in lint(path, target_of("h200", "function"), profile) if f.severity == "error"]
    assert {f.rule for f in findings} == {"topk"}
    assert all(f.node.startswith("TokenSelect/TopK") and "token_select: plugin" in f.fix for f in findings)
    assert [f for f in lint(path, target_of("h200", "plugin"), profile) if f.severity == "error"] == []


# ── Our exports ──────────────────────────────────────────────────────────────


def assert_clean(path, folder):
    for name in TARGETS:
        target = load_target(name)
        routes = ("function", "plugin", "aot") if limits_of(target.tensorrt).aot_plugins else ("function", "plugin")
        for route in routes:
            findings = lint(path, target_of(name, route))
            # A tiny Qwen patch has 294 values; a real one 1176.
            assert [f for f in findings if (f.rule, f.node) != ("width", "embedding/Gemm")] == []
    prepared = prepare(path, folder, "function")
    assert lint(prepared, target_of("h200")) == lint(path, target_of("h200", "function"))


@pytest.mark.parametrize("case", EXPORTS, ids=["-".join(map(str, case)) for case in EXPORTS])
def test_exports_are_clean_for_every_target_and_route(tmp_path_factory, tmp_path, case):
    assert_clean(exported(tmp_path_factory, *case), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("selecting", [True, False])
@pytest.mark.parametrize("family", TINY)
def test_all_exports_are_clean(tmp_path_factory, tmp_path, family, selecting, precision, several):
    assert_clean(exported(tmp_path_factory, family, selecting, precision, several), tmp_path)


def test_int8_made_for_cpus_is_an_error_with_the_scheme_that_is_right(tmp_path_factory, tmp_path):
    family, selecting, _, several = EXPORTS[0]
    feeds = [feed_of(planned) for planned in calls_of(family, selecting, several)]
    quantize_int8(exported(tmp_path_factory, *EXPORTS[0]).parent, tmp_path, feeds, scheme="cpu", max_noise=1.0)
    findings = lint(tmp_path / MODEL, target_of("h200"))
    assert {(f.rule, f.severity) for f in findings} == {("quantization", "error")}
    assert all('scheme="tensorrt"' in f.fix for f in findings)


def test_attention_of_every_block_is_recognised(tmp_path_factory):
    """Or its rules would pass for want of a subject."""
    for case, blocks in ((EXPORTS[0], 2), (EXPORTS[-1], 3)):
        assert len(attentions(view_of(exported(tmp_path_factory, *case), "function", None))) == blocks


def test_an_aot_plugin_is_an_error_on_a_release_without(tmp_path_factory):
    path = exported(tmp_path_factory, *EXPORTS[0])
    with_node = prepare(path, path.parent.with_name("aot"), "aot")
    findings = lint(with_node, target_of("jetson-orin-jp62"))
    assert [(f.rule, f.severity) for f in findings] == [("plugin", "error")]


# ── The command ──────────────────────────────────────────────────────────────


def invoke(*arguments):
    return CliRunner().invoke(main, ["lint", *map(str, arguments)])


def test_the_command_ends_with_1_for_errors_and_writes_numbers(tmp_path):
    path = written(tmp_path, CASES["an unsorted K"].bad)
    result = invoke(path, "--target", "h200", "--json", tmp_path / "numbers.json")
    assert result.exit_code == 1, (result.output, result.exception)
    assert "sorted=0" in result.stdout
    assert "1 errors, 0 warnings; no engine was built" in result.stdout
    assert "without --profile" in result.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["target"], numbers["token_select"], numbers["profile"]) == ("h200", "aot", None)
    assert [finding["node"] for finding in numbers["findings"]] == ["top"]


def test_the_command_ends_with_0_for_warnings_and_follows_a_profile(tmp_path):
    path = written(tmp_path, CASES["doubles"].bad)
    assert invoke(path, "--target", "h200").exit_code == 0
    path = written(tmp_path, SHARE)
    (tmp_path / "profile.json").write_text(json.dumps(Profile({"x": ((1, 8), (2, 64), (4, 9000))}).to_dict()))
    result = invoke(path, "--target", "h200", "--profile", tmp_path / "profile.json")
    assert result.exit_code == 1
    assert "K is 4500" in " ".join(result.stdout.split())
    assert "without --profile" not in result.stdout


@pytest.mark.parametrize("inside", ["model.onnx", "compressed/model.onnx", "onnx/compressed/model.onnx"])
def test_a_folder_of_an_export_or_a_run_will_do(tmp_path, inside):
    file = written(tmp_path, CASES["doubles"].good)
    folder = tmp_path / "run"
    (folder / inside).parent.mkdir(parents=True)
    file.rename(folder / inside)
    result = invoke(folder, "--target", "h200")
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "expected one entry for each input"),
        ("{", "--profile"),
        ('{"x": 3}', "expected min, opt, max"),
        ('{"x": {"min": [4], "opt": [2], "max": [1]}}', "falls from"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path, content, words):
    path, profile = written(tmp_path, SHARE), tmp_path / "profile.json"
    if content is not None:
        profile.write_text(content)
    assert_one_line(invoke(path, "--target", "h200", "--profile", profile), words)


def assert_one_line(result, words):
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


def test_mistakes_are_one_line(tmp_path):
    path = written(tmp_path, SHARE)
    assert_one_line(invoke(path, "--target", "onnxruntime-cpu"), "is for onnxruntime, not TensorRT")
    assert_one_line(invoke(path, "--target", "toaster"), "no target at 'toaster'")
    assert_one_line(invoke(tmp_path / "no.onnx", "--target", "h200"), "no such file")
    (tmp_path / "empty").mkdir()
    assert_one_line(invoke(tmp_path / "empty", "--target", "h200"), "no model.onnx here")
    (tmp_path / "text.onnx").write_text("hello " * 99)
    assert_one_line(invoke(tmp_path / "text.onnx", "--target", "h200"), "not an ONNX file")


def test_help_needs_neither_torch_nor_onnx():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom infoprune_export.cli import main\n"
        "assert CliRunner().invoke(main, ['lint', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'onnx', 'onnxscript', 'tensorrt') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_come_first_in_the_table(tmp_path):
    both = CASES["doubles"].bad.replace("[wide]", "[det] t = Det (x) [wide]").replace("(x) y =", "(t) y =")
    findings = lint(written(tmp_path, both), target_of("h200"))
    assert {f.severity for f in findings} == {"error", "warning"}
    cells = list(table_of(findings).columns[0].cells)
    assert [str(cell) for cell in cells] == sorted(str(cell) for cell in cells)
    assert str(cells[0]) == "error"
