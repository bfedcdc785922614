"""Building an engine: what is written, what is tried again, and what is refused without a trace."""

from __future__ import annotations

import io
import json
import os
import signal
import threading

import numpy as np
import onnx
import pytest
from contracts.fake_tensorrt import VERSIONS
from contracts.machines import PROFILE, install, target_of, tiny_model
from rich.console import Console
from rich.progress import Progress

from infoprune_export.artifacts import sha256_file
from infoprune_export.doctor.probes import Gpu
from infoprune_export.engine.tensorrt import build
from infoprune_export.engine.tensorrt.build import PLAN, RECORD, build_engine, workspace_bytes
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.engine.tensorrt.progress import interruptible
from infoprune_export.engine.tensorrt.source import inspect
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.targets import GIB

NEW = VERSIONS[-1]


@pytest.fixture
def machine(monkeypatch):
    return install(monkeypatch, NEW)


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "onnx")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engine").mkdir()
    return tmp_path / "engine"


@pytest.fixture
def screen():
    """What a build shows."""
    return Progress(console=Console(record=True, width=200, file=io.StringIO()), disable=True)


def refusal(*arguments, **options):
    with pytest.raises(InfopruneError) as caught:
        build_engine(*arguments, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# ── What is written ──────────────────────────────────────────────────────────


def test_the_record_says_what_must_match(machine, model, folder):
    record = build_engine(model, folder, target_of(NEW), PROFILE)
    assert record == json.loads((folder / RECORD).read_text())
    assert (
        record["compatibility"].items()
        >= {
            "backend": "tensorrt",
            "tensorrt": "11.4.0.106",
            "sm": "90",
            "cuda": "13.0",
            "precision": "fp32",
            "target": "h200",
        }.items()
    )
    assert record["hashes"] == {PLAN: sha256_file(folder / PLAN)}
    assert record["onnx"] == {"model.onnx": sha256_file(model)}
    assert record["profile"] == record["asked_for"] == PROFILE.to_dict()
    assert {path.name for path in folder.iterdir()} == {PLAN, RECORD}


def test_the_profile_and_the_options_reach_the_builder(machine, model, folder):
    build_engine(model, folder, target_of(NEW, optimization_level=5, workspace_gib=2.0), PROFILE)
    assert machine.arguments("IBuilderConfig.builder_optimization_level=") == [5]
    (limit,) = machine.arguments("IBuilderConfig.set_memory_pool_limit")
    assert (limit["pool"].name, limit["pool_size"]) == ("WORKSPACE", 2 * GIB)
    (shape,) = machine.arguments("IOptimizationProfile.set_shape")
    assert (shape["min"], shape["opt"], shape["max"]) == PROFILE.shapes["pixel_values"]
    assert [value.name for value in machine.arguments("IBuilderConfig.profiling_verbosity=")] == ["DETAILED"]


@pytest.mark.parametrize(("dtype", "cleared"), [(np.float32, ["TF32"]), (np.float16, [])])
def test_fp32_is_not_rounded_to_ten_bits_on_the_way(machine, folder, tmp_path, dtype, cleared):
    build_engine(tiny_model(tmp_path / "onnx", dtype), folder, target_of(NEW), PROFILE)
    assert [bound["flag"].name for bound in machine.arguments("IBuilderConfig.clear_flag")] == cleared


@pytest.mark.parametrize(
    ("asked", "memory", "expected"), [(None, 16, 4.0), (2.5, 16, 2.5), (20.0, 16, 16.0), (None, 6, 1.5)]
)
def test_the_workspace_follows_the_device(asked, memory, expected):
    assert workspace_bytes(target_of(NEW, workspace_gib=asked), Gpu("g", 90, memory * GIB)) == expected * GIB


def test_precision_is_read_off_the_file(tmp_path):
    assert inspect(tiny_model(tmp_path / "a")).precision == "fp32"
    assert inspect(tiny_model(tmp_path / "b", np.float16)).precision == "fp16"
    quantised = onnx.load(tiny_model(tmp_path / "c"))
    quantised.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["rows", "s", "z"], ["q"]))
    onnx.save(quantised, tmp_path / "c" / "model.onnx")
    assert inspect(tmp_path / "c" / "model.onnx").precision == "int8"


# ── Timings ──────────────────────────────────────────────────────────────────


def test_timings_are_kept_beside_the_engine_and_used_again(machine, model, folder):
    for _ in range(2):
        build_engine(model, folder, target_of(NEW), PROFILE)
    (kept,) = folder.parent.glob("timing-*.cache")
    assert kept.name == "timing-11.4.0.106-sm90.cache"
    first, second = machine.arguments("IBuilderConfig.create_timing_cache")
    assert first["serialized_timing_cache"] == b""
    assert second["serialized_timing_cache"] == kept.read_bytes() != b""


def test_timings_of_another_release_are_left_out(machine, model, folder):
    kept = folder.parent / "timing-11.4.0.106-sm90.cache"
    kept.write_bytes(b"timings of 9.9; used")
    build_engine(model, folder, target_of(NEW), PROFILE)
    assert [bound["serialized_timing_cache"] for bound in machine.arguments("IBuilderConfig.create_timing_cache")] == [
        b"timings of 9.9; used",
        b"",
    ]
    assert kept.read_bytes().startswith(b"timings of 11.4"), "and replaced"


# ── Memory ───────────────────────────────────────────────────────────────────


def test_a_smaller_profile_is_built_when_memory_runs_out_and_that_is_said(machine, model, folder, screen):
    machine.room = 2 * 3 * 4 * 4
    record = build_engine(model, folder, target_of(NEW), PROFILE, progress=screen)
    assert record["asked_for"] == PROFILE.to_dict()
    assert record["profile"]["pixel_values"] == {"min": [1, 3, 4, 4], "opt": [2, 3, 4, 4], "max": [2, 3, 4, 4]}
    shown = screen.console.export_text()
    assert "out of memory for pixel_values up to [8, 3, 4, 4]; trying pixel_values up to [4, 3, 4, 4]" in shown
    assert "trying pixel_values up to [2, 3, 4, 4]" in shown
    assert len(machine.networks) == 3, "each attempt starts anew"


def test_no_memory_for_the_least_shapes_is_refused(machine, model, folder):
    machine.room = 1
    message = refusal(model, folder, target_of(NEW), PROFILE)
    assert "out of memory even for the least shapes (Error Code 2: OutOfMemory" in message
    assert list(folder.iterdir()) == []


def test_other_failures_are_not_tried_again(machine, model, folder):
    machine.failure = "Error Code 10: Could not find any implementation\nfor node product."
    message = refusal(model, folder, target_of(NEW), PROFILE)
    assert (
        "TensorRT 11.4.0.106 cannot build model.onnx: Error Code 10: Could not find any implementation for" in message
    )
    assert len(machine.networks) == 1
    assert list(folder.iterdir()) == []


# ── Refusals ─────────────────────────────────────────────────────────────────


def test_what_the_parser_refuses_is_named(machine, model, folder):
    machine.parser_error = ("/blocks/0/attn", "Loop", "In node 7 (importLoop):\n UNSUPPORTED_NODE: no trip count")
    message = refusal(model, folder, target_of(NEW), PROFILE)
    assert (
        "does not read node /blocks/0/attn (Loop): In node 7 (importLoop): UNSUPPORTED_NODE: no trip count" in message
    )
    assert list(folder.iterdir()) == []


def test_an_input_whose_values_are_shapes_is_refused(machine, model, folder):
    machine.shape_tensor = "pixel_values"
    assert "input pixel_values: TensorRT takes its values for shapes" in refusal(model, folder, target_of(NEW), PROFILE)


def test_a_broken_rule_is_found_before_the_builder_starts(machine, model, folder):
    content = onnx.load(model)
    content.graph.node.append(onnx.helper.make_node("Unique", ["image_features"], ["unique"], name="odd one"))
    onnx.save(content, model)
    message = refusal(model, folder, target_of(NEW), PROFILE)
    assert "odd one: " in message
    assert "Unique" in message
    assert "Builder" not in machine.called


@pytest.mark.parametrize(
    ("profile", "named"),
    [
        (Profile({"pixels": ((1, 3, 4, 4),) * 3}), "inputs are pixel_values, the profile is for pixels"),
        (
            Profile({"pixel_values": ((1, 3, 4, 5),) * 3}),
            r"pixel_values is [any, 3, 4, 4], the profile has [1, 3, 4, 5]",
        ),
        (Profile({"pixel_values": ((1, 3, 4),) * 3}), "the profile has [1, 3, 4]"),
    ],
)
def test_a_profile_for_another_file_is_refused(machine, model, folder, profile, named):
    assert named in refusal(model, folder, target_of(NEW), profile)


def test_a_precision_that_the_target_lacks_is_refused(machine, model, folder):
    message = refusal(model, folder, target_of(NEW, precisions=("fp16", "int8")), PROFILE)
    assert "precision fp32, target h200 runs fp16, int8" in message


def test_a_file_that_is_no_export_is_refused(machine, tmp_path, folder):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    assert "model.onnx" in refusal(tmp_path / "model.onnx", folder, target_of(NEW), PROFILE)
    content = onnx.load(tiny_model(tmp_path / "onnx"))
    content.graph.input[0].name = content.graph.node[0].input[0] = "picture"
    onnx.save(content, tmp_path / "onnx" / "model.onnx")
    assert "pixel_values is of type none" in refusal(tmp_path / "onnx" / "model.onnx", folder, target_of(NEW), PROFILE)


@pytest.mark.parametrize(
    ("library", "named"), [(None, "no plugin_library is named"), ("absent.so", "absent.so: no such file")]
)
def test_a_missing_plugin_is_refused_with_the_command_that_compiles_it(library, named):
    from infoprune_export.engine.tensorrt.routes import check_route

    target = target_of(VERSIONS[0], token_select="plugin", plugin_library=library)
    with pytest.raises(InfopruneError) as caught:
        check_route(target, "plugin")
    assert named in str(caught.value)
    assert "cmake -S engines/token_select -B build/token_select -DCMAKE_CUDA_ARCHITECTURES=87" in str(caught.value)
    assert check_route(target, "function") is None


def test_a_full_disk_leaves_no_engine(machine, model, folder, monkeypatch):
    build_engine(model, folder, target_of(NEW), PROFILE)

    def full(path, content):
        if path.name == PLAN:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_replace", full)
    assert "the disk is full" in refusal(model, folder, target_of(NEW), PROFILE)
    assert not (folder / RECORD).exists(), "the old record would stand for a plan that may be gone"


# ── Progress and Ctrl-C ──────────────────────────────────────────────────────


def test_phases_are_shown_one_below_the_other_and_gone_afterwards(machine, model, folder):
    progress = Progress(console=Console(file=io.StringIO()), disable=True)
    seen = set()
    machine.on_step = lambda: seen.update((task.description, task.total, task.completed) for task in progress.tasks)
    build_engine(model, folder, target_of(NEW), PROFILE, progress=progress)
    assert seen == {("  Building", 2, 0), ("  Building", 2, 1)} | {("    Timing kernels", 3, step) for step in range(3)}
    assert progress.tasks == []


def test_ctrl_c_ends_the_build_at_its_next_step(machine, model, folder, monkeypatch):
    build_engine(model, folder, target_of(NEW), PROFILE)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    machine.steps.clear()
    cancelled = threading.Event()
    monkeypatch.setattr(build, "Event", lambda: cancelled)

    def interrupt():
        if len(machine.steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert cancelled.wait(30), "the main thread, which waits, never heard of it"

    machine.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        build_engine(model, folder, target_of(NEW), PROFILE)
    assert machine.steps == [("Building", 0), ("Building", 1)], "not to its end"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "the old engine is as it was"


def test_what_the_work_raises_comes_out_of_its_thread():
    cancelled = threading.Event()

    def fail():
        raise ValueError(threading.current_thread().name)

    with pytest.raises(ValueError, match="tensorrt"):
        interruptible(fail, cancelled)
    assert not cancelled.is_set()
    assert interruptible(lambda: 7, cancelled) == 7
