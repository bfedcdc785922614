"""Target files of both backends: what is shipped, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import (
    EngineSpec,
    OnnxRuntimeTarget,
    TensorRtTarget,
    assets,
    engine_target,
    find_asset,
    load_target,
    read_target,
)

SHIPPED = [name for name in assets("targets") if isinstance(load_target(name), TensorRtTarget)]
OWN = {
    "name": "mine",
    "description": "d",
    "backend": "tensorrt",
    "software": "s",
    "tensorrt": "10.9.0",
    "cuda": "12.8",
    "sm": 86,
    "memory_gib": 24.0,
    "shared_memory": False,
    "precisions": ["fp16"],
    "opset": [9, 20],
    "token_select": "function",
}


def test_the_seven_targets_are_shipped():
    assert set(SHIPPED) == {
        "jetson-orin-jp62",
        "jetson-orin-jp72",
        "jetson-thor-jp72",
        "h100",
        "h200",
        "l40s",
        "rtx-5090",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_hangs_together(name):
    target = load_target(name)
    assert target.name == name
    assert target.series in ("10.3", "10.16", "11.4")
    assert target.shared_memory == name.startswith("jetson"), "only Jetson's CPU and GPU share their memory"
    assert target.opset[1] >= 20, "exports are of opset 20"
    # Python plugins compiled ahead of time came with 10.9.
    assert target.token_select != "aot" or target.series != "10.3"
    assert target.plugin_library is None, "it is the user's to compile"


@pytest.mark.parametrize("name", sorted(assets("targets")))
def test_a_target_survives_json(name):
    target = load_target(name)
    assert read_target(target.model_dump(mode="json")) == target
    assert type(target) is (TensorRtTarget if name in SHIPPED else OnnxRuntimeTarget)


def write(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**OWN, **changes}))
    return str(path)


def test_a_target_of_one_s_own(tmp_path):
    target = load_target(write(tmp_path))
    assert (target.series, target.workspace_gib, target.optimization_level) == ("10.9", None, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "magic"}, "backend = 'magic': there are onnxruntime, tensorrt"),
        ({"backend": None}, "backend = None"),
        ({"providers": ["x"]}, "unknown key 'providers'"),
        ({"tensorrt": "10.9"}, "tensorrt"),
        ({"tensorrt": 10.9}, "tensorrt"),
        ({"sm": 8.6}, "sm"),
        ({"sm": 61}, "sm"),
        ({"precisions": []}, "precisions"),
        ({"precisions": ["fp8"]}, "precisions"),
        ({"opset": [20, 9]}, "the lowest comes first"),
        ({"opset": [20]}, "opset"),
        ({"memory_gib": 0.0}, "memory_gib"),
        ({"workspace_gib": 25.0}, "workspace_gib 25.0 is more than memory_gib 24.0"),
        ({"optimization_level": 6}, "optimization_level"),
        ({"token_select": "loop"}, "token_select"),
        ({"known_bugs": [{"reference": "issue 1", "affects": "a", "advice": "b"}]}, "reference"),
        ({"softwar": "s"}, "did you mean 'software'"),
    ],
)
def test_a_bad_target_names_the_key(tmp_path, change, named):
    with pytest.raises(InfopruneError) as caught:
        load_target(write(tmp_path, **change))
    message = str(caught.value)
    assert named in message
    assert message.splitlines() == [message]


def test_the_recipe_s_plugin_library_overrides_the_target_s(tmp_path):
    path = write(tmp_path, token_select="plugin", plugin_library="of-target.so")
    assert engine_target(EngineSpec(target=path)).plugin_library == "of-target.so"
    assert engine_target(EngineSpec(target=path, plugin_library="mine.so")).plugin_library == "mine.so"
    # ONNX Runtime has no use for it.
    assert engine_target(EngineSpec(plugin_library="mine.so")) == load_target("onnxruntime-cpu")


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"images": [4, 1, 16]}, "images"),
        ({"images": [0, 1, 16]}, "images"),
        ({"images": [1, 16]}, "images"),
        ({"image_sizes": [[224, 224], [448, 448], [448, 336]]}, "widths"),
        ({"image_sizes": [[224], [448, 448], [448, 448]]}, "image_sizes"),
    ],
)
def test_shapes_of_an_engine_section_are_checked(section, named):
    with pytest.raises(ValueError, match=named):
        EngineSpec.model_validate(section)


def test_known_bugs_are_public():
    for name in SHIPPED:
        for bug in load_target(name).known_bugs:
            assert bug.reference in find_asset("targets", name).read_text()
            assert bug.affects.endswith(".")
            assert bug.advice.endswith(".")
