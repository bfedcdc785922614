import json
import sys

import numpy as np
import pytest

from infoprune_export.engine import backend_of, open_engine
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL, export_onnx, golden_io
from infoprune_export.recipe import OnnxRuntimeTarget, TokensSpec, load_target

CPU = load_target("onnxruntime-cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory, request):
    """An engine folder of a small tower, with golden inputs and outputs."""
    import torch

    from infoprune_export.data import testbed
    from infoprune_export.models import tower_of

    torch.manual_seed(0)
    tower = tower_of(testbed.build_model(layers=3, hidden_size=32, heads=4).eval().requires_grad_(False))
    root = tmp_path_factory.mktemp("engine")
    (root / "onnx").mkdir()
    (root / "engine").mkdir()
    export_onnx(tower, TokensSpec(), root / "onnx", opset=20)
    backend_of(CPU).build(root / "onnx" / MODEL, root / "engine", CPU)
    return root / "engine", golden_io(tower, TokensSpec(), images=2, seed=0)


def test_engine_gives_the_golden_outputs(built):
    folder, golden = built
    outputs = open_engine(folder, CPU).run(pixel_values=golden["pixel_values"])
    np.testing.assert_allclose(outputs["image_features"], golden["image_features"], atol=1e-5)
    np.testing.assert_array_equal(outputs["kept_indices"], golden["kept_indices"])


def test_engine_is_optimised_ahead_of_time(built):
    import onnx

    operators = {node.op_type for node in onnx.load(built[0] / "engine.onnx", load_external_data=False).graph.node}
    assert "TokenSelect" not in operators, "the function body is inlined"
    assert "Loop" in operators


def test_engine_describes_what_must_match(built):
    description = open_engine(built[0], CPU).describe()
    assert description["provider"] == "CPUExecutionProvider"
    assert set(description) >= {"onnxruntime", "architecture", "processor_features"}


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"pixel_values": np.zeros((1, 3, 112, 100), np.float32)}, r"\[1, 3, 112, 100\].*\[any, 3, 112, 112\]"),
        ({"pixel_values": np.zeros((3, 112, 112), np.float32)}, "takes"),
        ({"pixel_values": np.zeros((1, 3, 112, 112))}, "float64.*float32"),
        ({}, "got"),
        ({"pixels": np.zeros((1, 3, 112, 112), np.float32)}, "pixels"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(built, inputs, match):
    with pytest.raises(InfopruneError, match=match):
        open_engine(built[0], CPU).run(**inputs)


@pytest.mark.parametrize("field", ["onnxruntime", "architecture", "processor_features", "provider"])
def test_engine_for_another_machine_is_refused(built, tmp_path, field):
    import shutil

    folder = shutil.copytree(built[0], tmp_path / "engine")
    record = json.loads((folder / "engine.json").read_text())
    record["compatibility"][field] = "something else"
    (folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(InfopruneError, match=f"{field} something else"):
        open_engine(folder, CPU)


def test_missing_and_damaged_engines_are_refused(tmp_path):
    with pytest.raises(InfopruneError, match="no engine here"):
        open_engine(tmp_path, CPU)
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(InfopruneError, match="cannot be read"):
        open_engine(tmp_path, CPU)


def test_missing_provider_is_refused_with_the_install_command():
    target = OnnxRuntimeTarget(
        name="t", description="", backend="onnxruntime", providers=("CUDAExecutionProvider", "CPUExecutionProvider")
    )
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(InfopruneError, match=r"infoprune-export\[gpu\]"):
        backend_of(target)


def test_missing_onnxruntime_is_refused_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InfopruneError, match=r"infoprune-export\[cpu\]"):
        backend_of(CPU)
