"""A kit's scripts from within: their numerics against the package's, their calls against the API of every TensorRT."""

import ast
import ctypes
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contracts.fake_behaviour import PLUGIN, Machine
from contracts.fake_tensorrt import VERSIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from kits import driver, exported

from infoprune_export.engine.tensorrt.golden import _choice, selection_settings
from infoprune_export.engine.tensorrt.kit import KEPT_LIMITS, make_kit
from infoprune_export.engine.tensorrt.kit_folder import SCRIPTS
from infoprune_export.models import tower_of
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import load_recipe
from infoprune_export.tokens.encoder import KEPT, VisionEncoder
from infoprune_export.tokens.reference import replay
from infoprune_export.tokens.select import EPSILON, merge_tokens

SCRIPTS_FOLDER = Path(__file__).parents[3] / "engines" / "kit"


# ── The scripts themselves ───────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scripts():
    """`compare` and `device` as modules of their own names."""
    return SimpleNamespace(
        **dict(zip(("compare", "device"), _modules(SCRIPTS_FOLDER, "compare", "device"), strict=True))
    )


def _modules(folder, *names):
    """Scripts of a folder, imported anew; nothing of them stays in `sys`."""
    own = [Path(name).stem for name in SCRIPTS]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in own:
            sys.modules.pop(name, None)


def test_scripts_are_python_3_8_and_import_only_what_devices_have():
    own = {Path(name).stem for name in SCRIPTS}
    allowed = own | {"numpy", "tensorrt"} | sys.stdlib_module_names
    for name in SCRIPTS:
        tree = ast.parse((SCRIPTS_FOLDER / name).read_text(), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {found.split(".")[0] for found in names} <= allowed, name
    assert {path.name for path in SCRIPTS_FOLDER.glob("*.py")} == set(SCRIPTS)


def selection(**changes):
    usual = {
        "width": None,
        "normalize": False,
        "pool_factor": 2.0,
        "temperature": 0.7,
        "exponent": 0.5,
        "epsilon": 1e-5,
        "merge": True,
        "merge_above": 0.8,
        "merge_margin": 1e-2,
    }
    return {**usual, **changes}


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.sampled_from([1.0, 1.3, 4.0]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_replay_agrees_with_the_reference(scripts, seed, tokens, width, pool):
    rng = np.random.default_rng(seed)
    features, prior = rng.normal(size=(tokens, width)), rng.normal(size=tokens)
    kept = np.sort(rng.choice(tokens, rng.integers(1, tokens + 1), replace=False))
    expected = replay(features, prior, kept, pool, 0.7, 0.5)
    assert scripts.compare.replayed(features, prior, kept, selection(pool_factor=pool)) == pytest.approx(
        expected, abs=1e-6
    )


@given(st.integers(0, 10**6), st.floats(-1, 1), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_rows_that_count_as_common_are_merged_alike(scripts, seed, above, same):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(20, 3))
    ours = np.sort(rng.choice(20, 6, replace=False))
    theirs = (
        ours
        if same
        else np.sort(np.append(rng.choice(ours, 5, replace=False), rng.choice(np.setdiff1d(np.arange(20), ours))))
    )
    pairs = scripts.compare.common_rows(tokens, ours, theirs, selection(merge_above=above, merge_margin=1e-6))
    merged = [
        merge_tokens(torch.tensor(tokens)[None], torch.tensor(kept)[None], torch.tensor([20]), 1.0, above)[0]
        for kept in (ours, theirs)
    ]
    for a, b in pairs:
        assert ours[a] == theirs[b]
        torch.testing.assert_close(merged[0][a], merged[1][b])
    if same:
        assert len(pairs) == 6


def test_kept_tokens_that_are_alike_are_not_merged(scripts):
    tokens = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    kept = np.array([0, 1, 2])
    assert scripts.compare.common_rows(tokens, kept, kept, selection()) == [(0, 0), (1, 1), (2, 2)]
    dropped_between_equals = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    kept = np.array([0, 1, 3])
    assert scripts.compare.common_rows(dropped_between_equals, kept, kept, selection()) == [(2, 2)]


@pytest.mark.parametrize(
    "settings", [(), ("tokens.quality=softmax", "tokens.normalize=false", "tokens.pool_factor=2.0")]
)
def test_what_a_case_stores_replays_pytorchs_own_choice(scripts, settings):
    tokens = load_recipe("quickstart", ["tokens.keep_ratio=1/4", *settings]).tokens
    tower = tower_of(random_model("qwen2.5-vl", 3, seed=2))
    encoder = VisionEncoder(tower, tokens).eval()
    planned = tower.example_planned(1, torch.Generator().manual_seed(0), encoder.form)
    with torch.inference_mode():
        kept = encoder.run(planned)[KEPT][0].numpy()
        stored = {name: value.numpy()[0] for name, value in _choice(encoder, tokens, planned).items()}
    places = scripts.compare.places(stored["positions"], kept)
    replaying = (stored["tokens"].astype(np.float64), stored["prior"], places, selection_settings(tower, tokens, 1e-2))
    assert len(places) == 16
    assert scripts.compare.replayed(*replaying) < 1e-4


def test_places_refuses_what_is_no_choice(scripts):
    positions = np.array([0, 2, 5, 9])
    assert scripts.compare.places(positions, np.array([2, 9, -1])).tolist() == [1, 3]
    for kept in ([9, 2, -1], [2, 2, 9], [1, 2, 9], [-1, 2, 9], [2, -2, -1], [2, 10, -1]):
        assert scripts.compare.places(positions, np.array(kept)) is None


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_bfloat16_rounds_as_pytorch_does(scripts, bits):
    value = np.array([bits], np.uint32).view(np.float32)
    expected = torch.from_numpy(value).to(torch.bfloat16)
    actual = scripts.device.to_bfloat16(value)
    if np.isnan(value[0]):
        assert np.isnan(scripts.device.from_bfloat16(actual)[0])
    else:
        assert actual[0] == expected.view(torch.uint16).item()
        assert scripts.device.from_bfloat16(actual)[0] == expected.float().item()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pytorch_in_lower_precision_is_within_the_kits_limit(scripts, precision):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    tokens = load_recipe("quickstart").tokens
    towers = [tower_of(random_model("llava-next", 3, seed=2).to(kind)) for kind in (torch.float32, dtype)]
    encoders = [VisionEncoder(tower, tokens).eval() for tower in towers]
    planned = towers[0].example_planned(1, torch.Generator().manual_seed(0), encoders[0].form)
    with torch.inference_mode():
        expected = encoders[0].run(planned)[KEPT]
        actual = encoders[1].run({**planned, "pixel_values": planned["pixel_values"].to(dtype)})[KEPT]
        stored = {name: value.numpy() for name, value in _choice(encoders[0], tokens, planned).items()}
    chosen = selection(pool_factor=tokens.pool_factor, temperature=1.0, exponent=1.0, normalize=True, epsilon=EPSILON)
    figures = scripts.compare.judge_kept(stored, expected.numpy(), actual.numpy(), chosen)
    assert figures["suboptimality"] <= KEPT_LIMITS[precision] / 2


# ── Against the API of every TensorRT ────────────────────────────────────────


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A kit, which tests copy."""
    folder = tmp_path_factory.mktemp("made") / "kit"
    make_kit(exported("llava", tmp_path_factory), folder)
    return folder


@pytest.fixture(params=VERSIONS)
def contract(request, made, monkeypatch, tmp_path_factory, tmp_path):
    """Runs build.py or verify.py of a kit in this process, with a TensorRT that checks every call's signature."""
    machine, library = Machine(request.param), ctypes.CDLL(str(driver(tmp_path_factory)))
    trt, folder = machine.trt, shutil.copytree(made, tmp_path / "kit")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["target"]["tensorrt"] = request.param

    def build(this, network, config):
        assert type(config._profile) is dict
        head = {"version": trt.__version__, "profile": config._profile}
        return json.dumps(head).encode() + b"\n" + network._model.SerializeToString()

    def corners(this, name, profile_index):
        return [manifest["profiles"][0][name][corner] for corner in ("min", "opt", "max")]

    def layers(this, format):  # noqa: A002
        assert format is trt.LayerInformationFormat.JSON
        return json.dumps({"Layers": [{"Name": "a", "TacticName": "_gemm_mha_v2_0x1"}]})

    def registry():
        return trt.make("IPluginRegistry")

    machine.trt.behaviour.update(
        {
            "Builder.build_serialized_network": build,
            "ICudaEngine.num_optimization_profiles": lambda this: 1,
            "ICudaEngine.get_tensor_profile_shape": corners,
            "EngineInspector.get_engine_information": layers,
            "get_plugin_registry": registry,
        }
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)

    def run(script, *arguments):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return _modules(folder, script)[0].main()

    return SimpleNamespace(run=run, machine=machine, manifest=manifest, folder=folder, version=trt.__version__)


def test_every_call_exists_in_every_version(contract):
    contract.manifest["attention"]["expected_fused"] = 1
    assert contract.run("build") == 0
    assert contract.run("verify", "--rounds", "3") == 0
    machine, trt = contract.machine, contract.machine.trt
    assert [network._flags for network in machine.networks] == [{"STRONGLY_TYPED"}]
    assert [bound["flag"] for bound in machine.arguments("IBuilderConfig.clear_flag")] == [trt.BuilderFlag.TF32]
    pools = machine.arguments("IBuilderConfig.set_memory_pool_limit")
    assert pools == [{"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": contract.manifest["build"]["workspace_bytes"]}]
    assert machine.arguments("IBuilderConfig.profiling_verbosity=") == [trt.ProfilingVerbosity.DETAILED]
    assert machine.arguments("IBuilderConfig.builder_optimization_level=") == [3]
    report = json.loads((contract.folder / "report.json").read_text())
    assert report["verdict"] == "PASS"
    assert report["engine"]["tensorrt"] == contract.version


def test_options_of_a_target_reach_the_builder_of_every_version(contract):
    contract.manifest["target"].update(version_compatible=True, hardware_compatible=True)
    assert contract.run("build", "--optimization-level", "5", "--workspace-gib", "2") == 0
    machine, trt = contract.machine, contract.machine.trt
    assert [bound["flag"] for bound in machine.arguments("IBuilderConfig.set_flag")] == [
        trt.BuilderFlag.VERSION_COMPATIBLE
    ]
    levels = machine.arguments("IBuilderConfig.hardware_compatibility_level=")
    assert levels == [trt.HardwareCompatibilityLevel.AMPERE_PLUS]
    assert machine.arguments("IBuilderConfig.builder_optimization_level=") == [5]
    assert machine.arguments("IBuilderConfig.set_memory_pool_limit")[0]["pool_size"] == 2 << 30
    assert contract.run("verify", "--rounds", "3") == 0
    assert machine.arguments("Runtime.engine_host_code_allowed=") == [True]


def test_a_plugin_is_loaded_for_building_and_for_running(contract):
    library = contract.folder / "plugin" / "build" / "libtoken_select.so"
    library.parent.mkdir(parents=True)
    contract.manifest["token_select"]["library"] = str(library.relative_to(contract.folder))
    library.write_bytes(b"something else")
    with pytest.raises(Exception, match="cannot load the plugin"):
        contract.run("build")
    library.write_bytes(PLUGIN)
    assert contract.run("build") == 0
    contract.machine.plugins.clear()
    assert contract.run("verify", "--rounds", "3") == 0
    assert contract.machine.plugins == {"TokenSelect"}


def test_what_the_parser_says_is_shown(contract, capsys):
    contract.machine.parser_error = ("node_3", "TopK", "K is too large")
    assert contract.run("build") == 1
    assert "not built: node_3 (TopK): K is too large" in capsys.readouterr().out
    assert not (contract.folder / "engine.plan").exists()


def test_an_input_whose_values_give_shapes_is_refused(contract):
    contract.machine.shape_tensor = "pixel_values"
    with pytest.raises(Exception, match="values of pixel_values"):
        contract.run("build")
