"""Memory of every side of a bench: what it holds, and what a call takes."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from bench_cases import MIB, Lines, constant, planted, printed, small_case

from infoprune_export import console
from infoprune_export.errors import InfopruneError
from infoprune_export.validate import bench_memory
from infoprune_export.validate.bench import bench
from infoprune_export.validate.bench_case import BenchCase, reference_features
from infoprune_export.validate.bench_running import Running
from infoprune_export.validate.peers import Peer


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> BenchCase:
    return small_case(tmp_path_factory)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_what_a_side_holds_and_what_a_call_takes(case, monkeypatch):
    def prepare(case, side):
        held = np.ones(128 * MIB, np.uint8)

        def start(load):
            return Running(lambda: (held.sum(), np.ones(64 * MIB, np.uint8).sum()), list)

        return start

    greedy = Peer("torch", ("original",), lambda case: None, prepare)
    monkeypatch.setattr(bench_memory, "peer_of", lambda name: greedy)
    found = bench_memory._measure(lambda: case, (), "greedy", "original", 1)
    # The process itself may let go of a few meanwhile.
    assert 120 * MIB < found["weights_bytes"] < 136 * MIB
    assert 60 * MIB < found["call_bytes"] < 75 * MIB
    known = dataclasses.replace(greedy, weights=lambda case, side: 5)
    monkeypatch.setattr(bench_memory, "peer_of", lambda name: known)
    assert bench_memory._measure(lambda: case, (), "greedy", "original", 1)["weights_bytes"] == 5


def test_memory_is_asked_for_every_side_that_was_timed(case, monkeypatch):
    from infoprune_export.validate import bench as module

    planted(
        monkeypatch,
        right=constant(reference_features),
        absent=dataclasses.replace(constant(reference_features), missing=lambda case: "no"),
    )
    asked = []

    def memory_of(prepare, arguments, peer, side, size):
        asked.append((prepare, arguments, peer, side, size))
        return {"weights_bytes": len(asked) * MIB, "call_bytes": 0}

    monkeypatch.setattr(module, "memory_of", memory_of)
    track = Lines()
    spec = case.spec.model_copy(update={"against": ("right", "absent"), "memory": True})
    result = bench("prepare", ("arguments",), track, dataclasses.replace(case, spec=spec))
    expected = [(None, "original"), (None, "compressed"), ("right", "original")]
    assert asked == [("prepare", ("arguments",), *one, 2) for one in expected]
    assert list(result["rows"][0]["memory"]) == ["original", "compressed", "right"]
    assert track.lines["peak memory"] == [3, 3]
    assert "3.0" in printed(console.print_bench, result)


def test_the_runtime_itself_is_not_counted(case, monkeypatch):
    held = []

    def prepare(case, side):
        held.append(np.ones(4 * MIB, np.uint8))
        return lambda load: Running(lambda: None, list)

    large = Peer("torch", ("original",), lambda case: None, prepare, load=lambda case: held.append(np.ones(64 * MIB)))
    monkeypatch.setattr(bench_memory, "peer_of", lambda name: large)
    assert bench_memory._measure(lambda: case, (), "large", "original", 1)["weights_bytes"] < 8 * MIB
    loaded = []
    monkeypatch.setattr(bench_memory, "load_runtime", lambda target: loaded.append(target.name))
    bench_memory._measure(lambda: case, (), None, "original", 1)
    assert loaded == ["onnxruntime-cpu"]


def test_what_compiling_takes_is_not_what_a_call_takes(case, monkeypatch):
    def prepare(case, side):
        calls = []

        def call():
            calls.append(1)
            np.ones((64 if len(calls) == 1 else 8) * MIB, np.uint8).sum()

        return lambda load: Running(call, list)

    compiled = Peer("torch", ("original",), lambda case: None, prepare, weights=lambda case, side: 5)
    monkeypatch.setattr(bench_memory, "peer_of", lambda name: compiled)
    assert bench_memory._measure(lambda: case, (), "compiled", "original", 1)["call_bytes"] < 20 * MIB


def test_memory_that_cannot_be_measured_is_refused_before_anything_is_timed(case, monkeypatch, tmp_path):
    monkeypatch.setattr("infoprune_export.measure.memory._CLEAR_REFS", tmp_path / "nothing" / "clear_refs")
    track = Lines()
    spec = case.spec.model_copy(update={"memory": True})
    with pytest.raises(InfopruneError, match=r"--set bench\.memory=false"):
        bench("prepare", (), track, dataclasses.replace(case, spec=spec))
    assert track.lines == {}
