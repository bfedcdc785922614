"""Our build, progress and runtime code against the API of every supported TensorRT, and proof that misuse is caught."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from contracts.fake_behaviour import PLUGIN, Machine
from contracts.fake_tensorrt import VERSIONS, FakeTensorRt
from contracts.machines import PROFILE, install, target_of, tiny_model, without_cuda

from infoprune_export.engine import backend_of, open_engine, tensorrt
from infoprune_export.errors import InfopruneError

OLD, MIDDLE, NEW = VERSIONS
PACKAGE = Path(tensorrt.__file__).parent
X = np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)
_NUMBERS = itertools.count()


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def machine(version, monkeypatch) -> Machine:
    return install(monkeypatch, version)


def build_and_run(folder: Path, version: str, package: Any = None, **changes: Any) -> Any:
    """Build the tiny model, open the folder again, run it; by the package itself or by a mutant of it."""
    model, target = tiny_model(folder / "onnx"), target_of(version, **changes)
    (folder / "engine").mkdir()
    backend = backend_of(target) if package is None else package.runtime.TensorRtBackend()
    backend.build(model, folder / "engine", target, profile=PROFILE)
    return backend.open(folder / "engine").run(pixel_values=X)["image_features"]


def expected(folder: Path) -> Any:
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": X})[0]


# ── What runs on every release ───────────────────────────────────────────────


def test_an_engine_is_built_opened_and_run(machine, version, tmp_path):
    features = build_and_run(tmp_path, version)
    np.testing.assert_array_equal(features, expected(tmp_path))
    assert [network._flags for network in machine.networks] == [{"STRONGLY_TYPED"}], "whatever its number is"
    assert machine.steps[-1] == ("Timing kernels", 2)
    assert {"IProgressMonitor", "ILogger"} <= set(machine.called), "ours inherit from them"


@pytest.mark.parametrize(
    ("option", "flags"),
    [
        ("version_compatible", ["VERSION_COMPATIBLE"]),
        ("strip_weights", ["STRIP_PLAN", "REFIT_IDENTICAL"]),
        ("hardware_compatible", []),
    ],
)
def test_options_reach_the_builder_by_name(machine, version, tmp_path, option, flags):
    features = build_and_run(tmp_path, version, **{option: True})
    np.testing.assert_array_equal(features, expected(tmp_path), "a stripped plan gets its weights back")
    assert [bound["flag"].name for bound in machine.arguments("IBuilderConfig.set_flag")] == flags
    levels = [value.name for value in machine.arguments("IBuilderConfig.hardware_compatibility_level=")]
    assert levels == (["AMPERE_PLUS"] if option == "hardware_compatible" else [])
    allowed = machine.arguments("Runtime.engine_host_code_allowed=")
    assert set(allowed) == {option == "version_compatible"}


# ── Routes of TokenSelect ────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def selecting(tmp_path_factory):
    """An exported encoder that selects tokens."""
    import torch

    from infoprune_export.data import testbed
    from infoprune_export.engine.tensorrt.profiles import profile_of
    from infoprune_export.export.onnx import MODEL, export_onnx, golden_io
    from infoprune_export.models import tower_of
    from infoprune_export.recipe import EngineSpec, TokensSpec

    torch.manual_seed(0)
    tower = tower_of(testbed.build_model(layers=2, hidden_size=32, heads=4).eval().requires_grad_(False))
    folder = tmp_path_factory.mktemp("selecting")
    form = export_onnx(tower, TokensSpec(), folder, opset=20)
    return folder / MODEL, profile_of(tower, form, EngineSpec()), golden_io(tower, TokensSpec(), images=2, seed=0)


def test_selected_tokens_come_out_as_pytorch_selects_them(machine, version, selecting, tmp_path):
    model, profile, golden = selecting
    engine = backend_of(target_of(version)).build(model, tmp_path, target_of(version), profile=profile)
    outputs = engine.run(pixel_values=golden["pixel_values"])
    np.testing.assert_allclose(outputs["image_features"], golden["image_features"], atol=1e-5)
    np.testing.assert_array_equal(outputs["kept_indices"], golden["kept_indices"])
    assert outputs["kept_indices"].dtype == np.int64


def test_a_compiled_plugin_is_loaded_before_the_parser_and_before_the_engine(machine, version, selecting, tmp_path):
    model, profile, _ = selecting
    library = tmp_path / "libtoken_select.so"
    library.write_bytes(PLUGIN)
    target = target_of(version, token_select="plugin", plugin_library=str(library))
    (tmp_path / "engine").mkdir()
    backend_of(target).build(model, tmp_path / "engine", target, profile=profile)
    loaded = machine.called.index("IPluginRegistry.load_library")
    assert loaded < machine.called.index("OnnxParser.parse_from_file")
    machine.trt.calls.clear()
    machine.plugins.clear()
    library.unlink()
    open_engine(tmp_path / "engine", target)
    loaded = machine.called.index("IPluginRegistry.load_library")
    assert loaded < machine.called.index("Runtime.deserialize_cuda_engine")


def test_a_library_that_holds_no_plugin_is_refused(machine, version, selecting, tmp_path):
    model, profile, _ = selecting
    library = tmp_path / "libtoken_select.so"
    library.write_bytes(b"something else")
    target = target_of(version, token_select="plugin", plugin_library=str(library))
    with pytest.raises(InfopruneError, match=r"libtoken_select.so: TensorRT cannot load.*compile it against"):
        backend_of(target).build(model, tmp_path, target, profile=profile)


def test_a_plugin_is_compiled_ahead_of_time_where_tensorrt_can(machine, version, selecting, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.2.0")  # see plugin.check_versions
    model, profile, _ = selecting
    target = target_of(version, token_select="aot")
    if version == OLD:
        with pytest.raises(InfopruneError, match=r"token_select aot.*10\.3\.0.*set token_select to plugin"):
            backend_of(target).build(model, tmp_path, target, profile=profile)
        return
    backend_of(target).build(model, tmp_path, target, profile=profile)
    assert machine.called.index("plugin.register") < machine.called.index("OnnxParser.parse_from_file")
    assert machine.arguments("plugin.register")[0]["plugin_id"] == "infoprune::TokenSelect"
    (network,) = machine.networks
    (node,) = [node for node in network._model.graph.node if node.op_type == "TokenSelect"]
    assert {attribute.name: attribute.i for attribute in node.attribute}["aot"] == 1


# ── Misuse is caught ─────────────────────────────────────────────────────────

MUTATIONS = [
    # removed from 11
    ("build.py", "config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)", "config.set_flag(trt.BuilderFlag.FP16)", [NEW]),
    ("build.py", "    return config\n", "    _ = config.int8_calibrator\n    return config\n", [NEW]),
    ("build.py", "builder = trt.Builder(log)", "builder = trt.Builder(log); _ = builder.platform_has_fast_fp16", [NEW]),
    # came after 10.3
    ("build.py", "    return config\n", "    config.max_num_tactics = 4\n    return config\n", [OLD]),
    (
        "build.py",
        "trt.HardwareCompatibilityLevel.AMPERE_PLUS",
        "trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        [OLD],
    ),
    # misspelt
    ("build.py", "set_memory_pool_limit", "set_memory_pool_limt", VERSIONS),
    ("build.py", "parse_from_file", "parse_file", VERSIONS),
    ("build.py", "config.builder_optimization_level =", "config.optimization_level =", VERSIONS),
    ("runtime.py", "execute_async_v3", "execute_async_v2", VERSIONS),
    # other arguments
    ("build.py", "ignore_mismatch=False", "ignore_mismatches=False", VERSIONS),
    ("build.py", "set_timing_cache(cache, ignore_mismatch=False)", "set_timing_cache(cache)", VERSIONS),
    ("build.py", "parse_from_file(str(model))", "parse_from_file(model)", VERSIONS),
    ("build.py", "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
     "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED", VERSIONS),
    ("build.py", "trt.ProfilingVerbosity.DETAILED", "2", VERSIONS),
    ("build.py", "trt.BuilderFlag.VERSION_COMPATIBLE", "13", VERSIONS),
    ("build.py", "trt.MemoryPoolType.WORKSPACE", "0", VERSIONS),
    ("runtime.py", "name, value.data_ptr()", "name, value", VERSIONS),
    ("runtime.py", "trt.Runtime(log)", "trt.Runtime()", VERSIONS),
    ("progress.py", "            trt.IProgressMonitor.__init__(self)\n", "", VERSIONS),
    ("progress.py", "            trt.ILogger.__init__(self)\n", "", VERSIONS),
]  # fmt: skip


FAILING = [
    ("runtime.py", "device_memory_size_v2", "device_memory_size", [NEW]),
    ("runtime.py", "device_memory_size_v2", "memory_size", VERSIONS),
]
"""Where there is no memory for an execution context."""
_OURS = "|".join(("api", "build", "plugin", "profiles", "progress", "routes", "runtime", "source"))


def mutant(folder: Path, name: str, old: str, new: str) -> Any:
    """The modules that use TensorRT with one change, as a package of another name."""
    package = f"mutant_{next(_NUMBERS)}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for module in _OURS.split("|"):
        text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        if name == f"{module}.py":
            assert old in text, f"{name} has no {old!r} to mutate"
            text = text.replace(old, new)
        text = re.sub(rf"infoprune_export\.engine\.tensorrt(?=\.(?:{_OURS})\b| import (?:{_OURS})\b)", package, text)
        (folder / package / f"{module}.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    importlib.import_module(f"{package}.runtime")
    return sys.modules[package]


@pytest.mark.parametrize(("name", "old", "new", "catchers"), [*MUTATIONS, *FAILING])
def test_a_mutant_is_caught_by_every_release_that_lacks_what_it_uses(name, old, new, catchers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = mutant(tmp_path, name, old, new)
    without_cuda(monkeypatch, package.runtime)
    caught = []
    for version in VERSIONS:
        with monkeypatch.context() as patch:
            machine = install(patch, version)
            machine.context_memory = (name, old, new, catchers) not in FAILING
            folder = tmp_path / version
            folder.mkdir()
            try:
                build_and_run(folder, version, package, version_compatible=True, hardware_compatible=True)
            except (AttributeError, TypeError):
                caught.append(version)
            except InfopruneError:
                assert not machine.context_memory
    assert caught == list(catchers)


@pytest.mark.parametrize("version", [MIDDLE, NEW])
def test_a_misspelt_plugin_call_is_caught(version, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    install(monkeypatch, version)
    for old, new in (("trtp.aot_impl(", "trtp.aot_implementation("), ("trtp.register(PLUGIN)", "trtp.register()")):
        package = mutant(tmp_path, "plugin.py", old, new)
        with pytest.raises((AttributeError, TypeError)):
            importlib.import_module(f"{package.__name__}.plugin")
    package = mutant(tmp_path, "plugin.py", "_register()\n", "_register()\n")
    importlib.import_module(f"{package.__name__}.plugin")


# ── The fake itself ──────────────────────────────────────────────────────────


def test_enum_numbers_differ_between_releases():
    """Which is why none may be written as a number."""
    old, new = FakeTensorRt(OLD), FakeTensorRt(NEW)
    for kind, member in (("BuilderFlag", "VERSION_COMPATIBLE"), ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")):
        assert int(getattr(getattr(old, kind), member)) != int(getattr(getattr(new, kind), member))


def test_the_fake_refuses_what_the_bindings_refuse(version):
    trt = FakeTensorRt(version)
    config = trt.Builder(trt.Logger()).create_builder_config()
    for misuse in (
        lambda: trt.ICudaEngine(),
        lambda: trt.Builder(),
        lambda: trt.Builder("a logger"),
        lambda: config.set_flag(6),
        lambda: config.set_flag(trt.BuilderFlag.TF32, True),
        lambda: setattr(config, "num_optimization_profiles", 2),
        lambda: setattr(config, "something_new", 2),
        lambda: setattr(config, "max_aux_streams", trt.BuilderFlag.TF32),
        lambda: 1 << trt.BuilderFlag.TF32,
    ):
        with pytest.raises((TypeError, AttributeError)):
            misuse()
    config.set_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 2
    assert config.max_aux_streams == 2
