"""Reading a kit's report back: what is believed, and what is refused in one line."""

import copy
import json

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.artifacts import canonical_json, sha256_file
from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.validate.kit_report import KITS, KitReport, conclusion, read_report

MANIFEST = {
    "schema_version": 1,
    "name": "quickstart",
    "precision": "fp16",
    "target": {"name": "jetson-orin-jp62", "tensorrt": "10.3.0", "sm": 87, "hardware_compatible": False},
    "cases": [{"name": "min", "images": 1, "file": "golden/min.npz"}, {"name": "max", "images": 4, "file": "x"}],
    "attention": {"expected_fused": 3, "layers": 3, "why": "every block with heads left"},
    "tolerances": {"max_error": 0.03, "min_cosine": 0.9995, "kept_suboptimality": 0.05},
    "selection": {"normalize": True},
    "files": {},
}
OUTPUTS = {
    "image_features": {"max_error": 0.01, "cosine": 0.9999, "norm_ratio": 1.001, "rows": 8, "compared": 6},
    "kept_indices": {"equal": False, "overlap": 0.9, "suboptimality": 0.01},
}
REPORT = {
    "schema_version": 1,
    "kit": "0" * 64,
    "name": "quickstart",
    "target": "jetson-orin-jp62",
    "engine": {
        "backend": "tensorrt",
        "tensorrt": "10.3.0",
        "cuda_driver": "12.6",
        "device": "Orin",
        "sm": "87",
        "precision": "fp16",
        "plan_sha256": "1" * 64,
        "profile_level": 0,
    },
    "cases": [{"case": name, "outside": "", "outputs": OUTPUTS} for name in ("min", "max")],
    "attention": {"fused": 3, "expected": 3, "layers": 40},
    "latency": [
        {
            "case": "min",
            "rounds": 100,
            "device_ms": {"p50": 1.0, "p90": 1.5, "p99": 2.0},
            "host_ms": {"p50": 1.1, "p90": 1.6, "p99": 2.1},
            "flags": {"cuda_graph": False, "copies_included": False, "warmup": 10},
            "clocks": {"idle": {}, "busy": {"17000000.gpu.cur_freq": "1300500000"}},
        }
    ],
    "verdict": "PASS",
    "reasons": [],
}


@pytest.fixture
def kit(tmp_path):
    """A kit's folder with its manifest and a report; the returned function edits the report and gives its path."""
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "manifest.json").write_text(canonical_json(MANIFEST))

    def write(path=(), value=None, *, text=None):
        report = copy.deepcopy(REPORT)
        report["kit"] = sha256_file(folder / "manifest.json")
        _set(report, path, value)
        (folder / "report.json").write_text(json.dumps(report) if text is None else text)
        return folder / "report.json"

    return write


def _set(tree, path, value):
    *parents, last = path or (None,)
    for parent in parents:
        tree = tree[parent]
    if last is not None:
        tree[last] = value


def refusal(path, run=None):
    with pytest.raises(InfopruneError) as caught:
        read_report(path, run)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)) or run is not None
    return message


# ── Believed ─────────────────────────────────────────────────────────────────


def test_a_report_that_passes(kit):
    report = read_report(kit())
    assert report.verdict == "PASS"
    assert conclusion(report) == "engine verified on Orin, TensorRT 10.3.0, fp16; fused attention in 3 layers"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("cases", 0, "outputs", "image_features", "max_error"), 0.04),
        (("cases", 1, "outputs", "image_features", "cosine"), 0.9),
        (("cases", 0, "outputs", "image_features", "norm_ratio"), 1.1),
        (("cases", 0, "outputs", "image_features", "norm_ratio"), 0.9),
        (("cases", 0, "outputs", "image_features", "max_error"), None),
        (("cases", 0, "outputs", "image_features", "compared"), 0),
        (("cases", 0, "outputs", "kept_indices", "suboptimality"), 0.2),
        (("cases", 0, "outputs"), None),
        (("cases", 1, "outside"), "pixel_values is [4]"),
        (("attention", "fused"), 2),
    ],
)
def test_a_figure_beyond_its_limit_is_a_fail_and_never_a_pass(kit, path, value):
    assert "states PASS, but" in refusal(kit(path, value))
    source = kit(path, value)
    report = json.loads(source.read_text())
    report.update(verdict="FAIL", reasons=["as measured"])
    source.write_text(json.dumps(report))
    found = read_report(source)
    assert found.verdict == "FAIL"
    assert conclusion(found).startswith("engine NOT verified on Orin")
    assert conclusion(found).endswith("as measured")


def test_a_fail_without_a_cause_is_refused(kit):
    assert "states FAIL, but none of its figures" in refusal(kit(("verdict",), "FAIL"))


def test_a_smaller_profile_may_leave_cases_out_but_not_all(kit):
    source = kit(("engine", "profile_level"), 2)
    report = json.loads(source.read_text())
    report["cases"][1] = {"case": "max", "outside": "too large", "outputs": None}
    source.write_text(json.dumps(report))
    assert "made smaller 2 times" in conclusion(read_report(source))
    report["cases"][0] = {"case": "min", "outside": "too large", "outputs": None}
    source.write_text(json.dumps(report))
    assert "no case fits" in refusal(source)


def test_without_selection_there_are_no_kept_tokens(kit, tmp_path):
    (tmp_path / "kit" / "manifest.json").write_text(canonical_json({**MANIFEST, "selection": None}))
    assert "kept tokens where none are selected" in refusal(kit())
    report = json.loads(kit().read_text())
    for case in report["cases"]:
        case["outputs"] = {"image_features": OUTPUTS["image_features"]}
    kit(text=json.dumps(report))
    assert read_report(tmp_path / "kit" / "report.json").cases[0].outputs.kept_indices is None


# ── Refused ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("surplus",), 1, "surplus"),
        (("engine", "surplus"), 1, "engine.surplus"),
        (("schema_version",), 2, "schema_version"),
        (("kit",), "abc", "kit"),
        (("kit",), 7, "kit"),
        (("verdict",), "OK", "verdict"),
        (("verdict",), True, "verdict"),
        (("cases",), [], "cases"),
        (("cases", 0, "outputs", "image_features", "max_error"), "0.01", "max_error"),
        (("cases", 0, "outputs", "image_features", "max_error"), float("nan"), "max_error"),
        (("cases", 0, "outputs", "image_features", "cosine"), float("inf"), "cosine"),
        (("cases", 0, "outputs", "image_features", "max_error"), -0.1, "max_error"),
        (("cases", 0, "outputs", "kept_indices", "overlap"), 1.5, "overlap"),
        (("attention", "fused"), 3.5, "fused"),
        (("attention", "fused"), True, "fused"),
        (("latency", 0, "device_ms", "p50"), -1.0, "p50"),
        (("engine", "plan_sha256"), "1" * 63, "plan_sha256"),
        (("target",), "../../etc", "target"),
    ],
)
def test_another_form_is_refused_by_key(kit, path, value, named):
    assert named in refusal(kit(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"PASS"', "[" * 9000, "\x00"])
def test_what_is_no_report_is_refused(kit, text):
    assert "verify.py" in refusal(kit(text=text))


def test_missing_and_binary_files_are_refused(kit, tmp_path):
    assert "No such file" in refusal(tmp_path / "report.json")
    source = kit()
    source.write_bytes(b"\xff\xfe\x00")
    assert "not text" in refusal(source)
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("path", [(key,) for key in REPORT] + [("engine", key) for key in REPORT["engine"]])
def test_every_key_is_required(kit, path):
    source = kit()
    report = json.loads(source.read_text())
    parent = report if len(path) == 1 else report[path[0]]
    del parent[path[-1]]
    source.write_text(json.dumps(report))
    assert ".".join(path) in refusal(source)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("kit",), "2" * 64, "another kit"),
        (("name",), "other", "name other"),
        (("target",), "h200", "target h200"),
        (("engine", "precision"), "fp32", "precision fp32"),
        (("engine", "tensorrt"), "10.16.1", "TensorRT"),
        (("engine", "sm"), "90", "SM 90"),
        (("cases",), [REPORT["cases"][0]], "cases"),
        (("attention", "expected"), 0, "fused attention expected 0"),
    ],
)
def test_a_report_of_another_kit_is_refused(kit, path, value, named):
    message = refusal(kit(path, value))
    assert named in message
    assert "run verify.py of this kit" in message


def test_the_manifest_must_be_there_and_whole(kit, tmp_path):
    source = kit()
    for text in ("{", "[]", canonical_json({**MANIFEST, "tolerances": {}}), canonical_json({"schema_version": 1})):
        (tmp_path / "kit" / "manifest.json").write_text(text)
        with pytest.raises(InfopruneError, match="no kit manifest"):
            read_report(source)
    (tmp_path / "kit" / "manifest.json").unlink()
    assert "-o" in refusal(source)


def test_a_runs_own_record_outweighs_the_manifest_beside_the_report(kit, tmp_path):
    source, run = kit(), tmp_path / "run"
    assert "make the kit from this run first" in refusal(source, run)
    (run / KITS).mkdir(parents=True)
    record = run / KITS / "jetson-orin-jp62.json"
    record.write_text(canonical_json(MANIFEST))
    assert read_report(source, run).verdict == "PASS"
    loose = {**MANIFEST["tolerances"], "max_error": 9.0}
    (tmp_path / "kit" / "manifest.json").write_text(canonical_json({**MANIFEST, "tolerances": loose}))
    forged = kit(("cases", 0, "outputs", "image_features", "max_error"), 5.0)
    assert "norm" not in conclusion(read_report(forged))
    assert "another kit" in refusal(forged, run)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s), max_leaves=4
    )
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_no_other_value_passes_for_a_verdict_or_a_figure(value):
    for path in (("verdict",), ("attention", "fused"), ("cases", 0, "outputs", "image_features", "compared")):
        report = copy.deepcopy(REPORT)
        _set(report, path, value)
        fits = value in ("PASS", "FAIL") if path == ("verdict",) else type(value) is int and value >= 0
        if fits:
            continue
        with pytest.raises(ValueError, match=path[-1]):
            KitReport.model_validate_json(json.dumps(report))


# ── Command ──────────────────────────────────────────────────────────────────


def test_validate_prints_the_figures_and_ends_with_the_verdict(kit, tmp_path):
    done = CliRunner().invoke(main, ["validate", "--kit-report", str(kit())])
    assert done.exit_code == 0, done.output
    assert "engine verified on Orin" in done.stdout
    assert done.stdout.endswith("verdict: PASS\n")
    assert "17000000.gpu.cur_freq" in done.stdout
    source = kit(("attention", "fused"), 1)
    report = json.loads(source.read_text())
    source.write_text(json.dumps({**report, "verdict": "FAIL", "reasons": ["fused attention in 1 of 3 layers"]}))
    done = CliRunner().invoke(main, ["validate", "--kit-report", str(source)])
    assert done.exit_code == 1
    assert "engine NOT verified" in done.stdout
    assert "engine verified" not in done.stdout


def test_validate_checks_against_the_run_and_refuses_in_one_line(kit, tmp_path):
    done = CliRunner().invoke(main, ["validate", "--kit-report", str(kit()), "-o", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert CliRunner().invoke(main, ["validate"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quickstart", "--target", "onnxruntime-cpu", "-o", "kit"], "onnxruntime"),
        (["quickstart", "--target", "nowhere", "-o", "kit"], "nowhere"),
        (["quickstart", "--target", "jetson-orin-jp62", "-o", "there"], "there: exists already"),
        (["no-recipe", "--target", "jetson-orin-jp62", "-o", "kit"], "no-recipe"),
    ],
)
def test_kits_that_cannot_be_made_are_refused_before_any_work(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    done = CliRunner().invoke(main, ["kit", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
