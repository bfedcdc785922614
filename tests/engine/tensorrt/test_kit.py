"""Making kits: what is in them, and what is refused before a folder appears."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from kits import ORIN, KitSource, exported

from infoprune_export.engine.serving import normalisation_of
from infoprune_export.engine.tensorrt import kit as rooms
from infoprune_export.engine.tensorrt.kit import expected_attention, kit_route, make_kit
from infoprune_export.engine.tensorrt.kit_folder import SCRIPTS, check_kit
from infoprune_export.engine.tensorrt.lint import LintFinding
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import load_target


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return exported("llava", tmp_path_factory)


@pytest.fixture(scope="module")
def made(llava, tmp_path_factory):
    """A kit; no test may change it."""
    folder = tmp_path_factory.mktemp("made") / "kit"
    make_kit(llava, folder)
    return folder


def test_golden_cases_cover_the_profile(made):
    manifest = json.loads((made / "manifest.json").read_text())
    corners = manifest["profiles"][0]["pixel_values"]
    shapes = {
        case["name"]: list(np.load(made / case["file"])["input.pixel_values"].shape) for case in manifest["cases"]
    }
    assert [shapes[name] for name in ("min", "opt", "max")] == [corners[name] for name in ("min", "opt", "max")]
    assert [4, 3, 56, 56] in shapes.values()
    assert [3, 3, 56, 56] in shapes.values(), "one between opt and max"


@pytest.mark.parametrize(
    ("mean", "std", "known"), [([0.5] * 3, [0.2] * 3, True), ([0.5], [0.2], False), (None, [0.2] * 3, False)]
)
def test_normalisation_comes_from_the_processor(mean, std, known):
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=mean, image_std=std))
    assert (normalisation_of(processor) is not None) == known
    assert normalisation_of(SimpleNamespace()) is None


# ── Making kits ──────────────────────────────────────────────────────────────


def test_two_kits_are_bit_identical_and_name_no_place(llava, made, tmp_path):
    make_kit(llava, tmp_path / "again")
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for file in files:
        content = (made / file).read_bytes()
        assert content == (tmp_path / "again" / file).read_bytes(), file
        assert str(tmp_path).encode() not in content
        assert str(llava.model.parent).encode() not in content
        assert str(Path.home()).encode() not in content
    assert set(SCRIPTS) <= {str(file) for file in files}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_kit_is_replaced_only_by_force_and_nothing_else_ever(llava, made, tmp_path):
    kit = shutil.copytree(made, tmp_path / "kit")
    (kit / "report.json").write_text("{}")
    with pytest.raises(InfopruneError, match="exists already.*--force"):
        make_kit(llava, kit)
    assert (kit / "report.json").exists()
    make_kit(llava, kit, force=True)
    assert not (kit / "report.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InfopruneError, match="exists already and is no kit"):
            check_kit(ORIN, path, force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_targets_that_no_kit_can_serve_are_refused(llava, tmp_path):
    for change, named in (({"strip_weights": True}, "strip_weights"), ({"precisions": ("fp16",)}, "precision fp32")):
        target = ORIN.model_copy(update=change)
        with pytest.raises(InfopruneError, match=named):
            make_kit(KitSource(llava.recipe, llava.vlm, llava.model, target), tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def test_lint_errors_refuse_and_leave_nothing(llava, tmp_path, monkeypatch):
    finding = LintFinding("rule", "error", "node_7", "has a fault", "mend it")
    monkeypatch.setattr(rooms, "lint", lambda *_: [finding, finding])
    with pytest.raises(InfopruneError, match=r"node_7: has a fault \(and 1 more\); mend it"):
        make_kit(llava, tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def test_the_plugin_route_ships_its_source(llava, tmp_path):
    target = ORIN.model_copy(update={"token_select": "plugin"})
    manifest = make_kit(KitSource(llava.recipe, llava.vlm, llava.model, target), tmp_path / "kit")
    assert manifest["token_select"]["library"] == "plugin/build/libtoken_select.so"
    plugin = tmp_path / "kit" / "plugin"
    sources = {path.name for path in plugin.iterdir()}
    assert sources >= {"CMakeLists.txt", "plugin.cpp", "token_select.cu", "token_select.cuh"}
    for path in plugin.iterdir():
        included = re.findall(r'#include "(.*)"', path.read_text())
        assert sources >= set(included), path
    commands = (tmp_path / "kit" / "README.txt").read_text()
    assert "cmake -S plugin -B plugin/build -DCMAKE_CUDA_ARCHITECTURES=87" in commands
    assert "--dynamicPlugins=plugin/build/libtoken_select.so" in commands
    assert "add_library(token_select SHARED" in (plugin / "CMakeLists.txt").read_text(), "which names the .so file"
    model = onnx.load(tmp_path / "kit" / "model.onnx", load_external_data=False)
    assert "TokenSelect" in {node.op_type for node in model.graph.node}


def test_routes():
    aot = ORIN.model_copy(update={"token_select": "aot"})
    assert [kit_route(aot, True), kit_route(aot, False), kit_route(ORIN, True)] == ["plugin", "function", "function"]


@pytest.mark.parametrize(("target", "flag"), [("jetson-orin-jp62", True), ("h200", False)])
def test_trtexec_flags_follow_the_version(llava, tmp_path, target, flag):
    make_kit(KitSource(llava.recipe, llava.vlm, llava.model, load_target(target)), tmp_path / "kit")
    text = (tmp_path / "kit" / "README.txt").read_text()
    assert ("--stronglyTyped" in text) == flag
    assert ("--useCudaGraph" in text) == flag
    assert "--minShapes=pixel_values:1x3x56x56" in text


def test_expected_attention():
    def tower(*blocks):
        return SimpleNamespace(blocks=[SimpleNamespace(num_heads=n, head_dim=width) for n, width in blocks])

    assert expected_attention(tower((4, 64), (0, 64), (1, 80)), "fp16")["expected_fused"] == 2
    assert expected_attention(tower((4, 64), (0, 64), (1, 80)), "fp16")["layers"] == 2
    assert expected_attention(tower((4, 12), (4, 264), (4, 20), (4, 16)), "bf16")["expected_fused"] == 1
    for precision in ("fp32", "int8"):
        assert expected_attention(tower((4, 64)), precision)["expected_fused"] == 0
