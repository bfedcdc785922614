"""Scripts of kits as a device runs them: what is right passes, every planted fault gets its verdict or refusal."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from kits import exported, machine

from infoprune_export.engine.tensorrt.kit import make_kit
from infoprune_export.validate.kit_report import conclusion, read_report


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return machine(tmp_path_factory)


@pytest.fixture(scope="module")
def built(device, tmp_path_factory):
    """A kit with its engine; tests get a copy."""
    kit = tmp_path_factory.mktemp("built") / "kit"
    make_kit(exported("llava", tmp_path_factory), kit)
    done = device("build.py", kit=kit)
    assert done.returncode == 0, done.stdout + done.stderr
    return kit


@pytest.fixture
def kit(built, tmp_path):
    return shutil.copytree(built, tmp_path / "kit")


def refused(done, *named):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("refused: ")
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in named), done.stderr


def failed(done, kit, *named):
    report = json.loads((kit / "report.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert report["verdict"] == "FAIL"
    assert all(any(part in reason for reason in report["reasons"]) for part in named), report["reasons"]
    assert read_report(kit / "report.json").verdict == "FAIL"


# ── The way it should go ─────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llava-fp16", pytest.param("qwen2.5-vl", marks=pytest.mark.exhaustive)])
def test_a_device_builds_and_verifies_every_family(family, device, tmp_path_factory, tmp_path):
    manifest = make_kit(exported(family, tmp_path_factory), tmp_path / "kit")
    names = {case["name"] for case in manifest["cases"]}
    assert names >= {"min", "opt", "max"}
    assert len(names) >= 4
    fused = manifest["attention"]["expected_fused"]
    assert fused == (2 if family == "llava-fp16" else 0), "the third block is behind the feature layer"
    for script, arguments in (("build.py", ()), ("verify.py", ("--rounds", "3"))):
        done = device(script, *arguments, kit=tmp_path / "kit", STANDIN_FUSED=str(fused))
        assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "kit" / "report.json")
    assert report.verdict == "PASS"
    assert {case.case for case in report.cases} == names
    for case in report.cases:
        assert case.outputs.kept_indices.equal
        assert case.outputs.image_features.max_error < (1e-2 if family == "llava-fp16" else 1e-5)
        assert case.outputs.image_features.compared > 0
    assert {row.case for row in report.latency} == {"min", "opt", "max"}
    assert all(0 < row.device_ms.p50 <= row.device_ms.p90 <= row.device_ms.p99 for row in report.latency)
    assert "engine verified on Stand-in 0" in conclusion(report)


def test_the_device_has_neither_torch_nor_this_package(device, tmp_path):
    (tmp_path / "look.py").write_text(
        "from importlib.util import find_spec\nfor name in ('torch', 'infoprune_export', 'onnx', 'yaml'):\n"
        "    assert find_spec(name) is None, name\n"
    )
    assert device("look.py", kit=tmp_path).returncode == 0


def test_bench_measures_every_shape_with_and_without_a_graph(kit, device):
    for flags in ((), ("--cuda-graph",)):
        done = device("bench.py", "--rounds", "3", "--passes", "2", *flags, kit=kit)
        assert done.returncode == 0, done.stderr
        result = json.loads((kit / "bench.json").read_text())
        assert {len(passes) for passes in result["cases"].values()} == {2}
        assert all(one["flags"]["cuda_graph"] == bool(flags) for one in result["cases"]["max"])
    refused(device("bench.py", "--cuda-graph", kit=kit, STANDIN_CAPTURE="900"), "STREAM_CAPTURE", "--cuda-graph")
    refused(device("bench.py", "--case", "huge", kit=kit), "huge", "min")


@pytest.mark.parametrize(("version", "target"), [("10.16.1.11", "10.16.1"), ("11.4.0.106", "11.4.0")])
def test_builds_with_every_version(kit, device, version, target):
    _edit(kit, lambda manifest: manifest["target"].update(tensorrt=target))
    for script in ("build.py", "verify.py"):
        done = device(script, kit=kit, STANDIN_VERSION=version)
        assert done.returncode == 0, done.stdout + done.stderr


def test_want_of_memory_takes_a_smaller_profile_and_says_so(kit, device):
    images = 3 * 56 * 56
    done = device("build.py", kit=kit, STANDIN_MEMORY=str(2 * images))
    assert done.returncode == 0, done.stdout
    assert "smaller profile" in done.stdout
    record = json.loads((kit / "engine.json").read_text())
    assert record["profile_level"] == 1
    assert record["profile"]["pixel_values"]["max"][0] == 2
    assert device("verify.py", "--rounds", "3", kit=kit).returncode == 0
    report = read_report(kit / "report.json")
    assert [case.case for case in report.cases if case.outside] == ["max", "high"]
    assert "made smaller" in conclusion(report)
    done = device("build.py", kit=kit, STANDIN_MEMORY="10")
    assert done.returncode == 1
    assert "not built: " in done.stdout
    assert not (kit / "engine.plan").exists(), "the engine before is gone"
    assert not (kit / "report.json").exists(), "and what was said about it"


def test_clocks_are_read_while_the_engine_runs(kit, device, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {"nvidia-smi": "1300, 1980, [N/A], 42.1, 55, P0", "nvpmodel": "NV Power Mode: MAXN", "tegrastats": "line"}
    for name, answer in answers.items():
        (programs / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (programs / name).chmod(0o755)
    assert device("verify.py", "--rounds", "3", kit=kit, PATH=str(programs)).returncode == 0
    busy = read_report(kit / "report.json").latency[0].clocks.busy
    assert busy["clocks.sm"] == "1300"
    assert "clocks.mem" not in busy, "not available is not a figure"
    assert busy["nvpmodel"] == "NV Power Mode: MAXN"
    assert "tegrastats" not in busy, "only where nothing else tells"
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert device("verify.py", "--rounds", "3", kit=kit, PATH=str(programs)).returncode == 0
    frequencies = any(Path("/sys/class/devfreq").glob("*g[pc][uc]*"))
    assert ("tegrastats" in read_report(kit / "report.json").latency[0].clocks.busy) != frequencies


# ── Planted faults: the engine ───────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("features", "largest error"),
        ("nan", "not finite"),
        ("scale", "norm ratio"),
        ("swap", "kept_indices: a step is worse"),
    ],
)
def test_wrong_outputs_fail(kit, device, fault, named):
    failed(device("verify.py", "--rounds", "3", kit=kit, STANDIN_OUTPUT=fault), kit, named)


def test_too_few_fused_layers_fail(kit, device):
    _edit(kit, lambda manifest: manifest["attention"].update(expected_fused=2))
    assert device("build.py", kit=kit).returncode == 0
    for fused, code in (("1", 1), ("2", 0)):
        done = device("verify.py", "--rounds", "3", kit=kit, STANDIN_FUSED=fused)
        assert done.returncode == code, done.stdout
        assert read_report(kit / "report.json").attention.fused == int(fused)
    failed(device("verify.py", "--rounds", "3", kit=kit), kit, "fused attention in 0 of 2 layers")
    refused(device("verify.py", kit=kit, STANDIN_VERBOSITY="names"), "only names of its layers")


def test_a_truncated_or_missing_plan_is_refused(kit, device):
    plan = kit / "engine.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-7])
    refused(device("verify.py", kit=kit), "engine.plan", "truncated or changed")
    assert not (kit / "report.json").exists()
    # Even where the record was made to fit, TensorRT refuses it.
    record = json.loads((kit / "engine.json").read_text())
    record["plan_sha256"] = hashlib.sha256(plan.read_bytes()).hexdigest()
    (kit / "engine.json").write_text(json.dumps(record))
    refused(device("verify.py", kit=kit), "cannot read the engine", "truncated")
    plan.unlink()
    refused(device("verify.py", kit=kit), "engine.plan: missing")
    for text in ("{", "[]", '{"kit": 3}', "{}"):
        (kit / "engine.json").write_text(text)
        refused(device("verify.py", kit=kit), "engine.json", "build.py")


def test_an_engine_of_another_version_machine_kit_or_profile_is_refused(kit, device):
    refused(device("verify.py", kit=kit, STANDIN_VERSION="10.3.1"), "10.3.0", "10.3.1", "build again")
    before = json.loads((kit / "engine.json").read_text())
    for change, named in (
        ({"kit": "0" * 64}, "another kit"),
        ({"profile_level": 1}, "profile"),
        ({"profile_level": 9}, "another kit"),
        ({"plugin_sha256": "0" * 64}, "plugin"),
        ({"compatibility": {**before["compatibility"], "sm": "90"}}, "SM 90"),
    ):
        (kit / "engine.json").write_text(json.dumps({**before, **change}))
        refused(device("verify.py", kit=kit), named)


# ── Planted faults: kit and machine ──────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.onnx", "changed"),
        ("model.onnx.data", "truncated"),
        ("golden/min.npz", "truncated"),
        ("golden/max.npz", "missing"),
        ("compare.py", "changed"),
    ],
)
def test_changed_files_are_refused_by_name(kit, device, name, how):
    path = kit / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[:-5] if how == "truncated" else content.replace(b"a", b"b", 1) + b"\n")
    script = "build.py" if name.startswith("model") else "verify.py"
    refused(device(script, kit=kit), name, "copy the whole kit again")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', "\x00"])
def test_a_damaged_manifest_is_refused(kit, device, text):
    (kit / "manifest.json").write_text(text)
    refused(device("build.py", kit=kit), "manifest.json")


def test_other_machines_are_refused_before_tensorrt_starts(kit, device, tmp_path):
    for script in ("build.py", "verify.py"):
        refused(device(script, kit=kit, STANDIN_DEVICES="0"), "no CUDA device")
        refused(device(script, kit=kit, STANDIN_INIT="100"), "CUDA_ERROR_NO_DEVICE")
        refused(device(script, kit=kit, STANDIN_SM="110"), "11.0", "8.7", "jetson-orin-jp62")
        refused(device(script, kit=kit, STANDIN_VERSION="10.16.1"), "10.16.1", "10.3.0", "make a kit")
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    refused(device("build.py", kit=kit, LD_LIBRARY_PATH=str(tmp_path)), "no NVIDIA driver", "libcuda.so.1")
    refused(device("build.py", kit=kit, PYTHONPATH=str(device.packages)), "libnvinfer")
    assert (kit / "engine.plan").exists(), "a refusal leaves the engine as it was"


def test_a_model_without_a_profile_or_with_another_is_not_built(kit, device):
    _edit(kit, lambda manifest: [profile.clear() for profile in manifest["profiles"]])
    refused(device("build.py", kit=kit), "pixel_values has no profile")
    other = {"min": [1, 3, 28, 28], "opt": [1, 3, 28, 28], "max": [1, 3, 28, 28]}
    _edit(kit, lambda manifest: manifest.update(profiles=[{"pixel_values": other}]))
    done = device("build.py", kit=kit)
    assert done.returncode == 1
    assert "not built: pixel_values: extent 56" in done.stdout


def test_a_case_outside_the_profile_fails(kit, device):
    def narrow(manifest):
        manifest["profiles"] = [manifest["profiles"][1]]

    _edit(kit, narrow)
    assert device("build.py", kit=kit).returncode == 0
    failed(device("verify.py", "--rounds", "3", kit=kit), kit, "max: pixel_values is [4, 3, 56, 56]")


def test_an_uncompiled_plugin_is_refused(kit, device):
    _edit(kit, lambda manifest: manifest["token_select"].update(library="plugin/build/libtoken_select.so"))
    refused(device("build.py", kit=kit), "libtoken_select.so", "cmake")


def _edit(kit, change):
    manifest = json.loads((kit / "manifest.json").read_text())
    change(manifest)
    (kit / "manifest.json").write_text(json.dumps(manifest))
