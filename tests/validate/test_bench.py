"""The bench: what is in its rows, sessions that are opened anew, the graph against itself, and the command."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from bench_cases import Lines, constant, planted, printed, small_case, with_spec
from click.testing import CliRunner
from pydantic import TypeAdapter

from infoprune_export import console
from infoprune_export.cli import bench_commands, main
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import wall_clock
from infoprune_export.measure.results import BenchResult, SelfResult
from infoprune_export.recipe import load_recipe
from infoprune_export.recipe.delivery import PeerName
from infoprune_export.validate import bench_running, peers
from infoprune_export.validate.bench import bench, bench_self
from infoprune_export.validate.bench_case import BenchCase, reference_features
from infoprune_export.validate.bench_running import Running, session_running


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> BenchCase:
    return small_case(tmp_path_factory)


def test_rows_hold_both_sides_and_peers_and_have_the_published_shape(case, monkeypatch):
    def refuses(case, side):
        raise RuntimeError("operator [Loop] is\nnot known")

    def breaks(case, side):
        def call():
            raise ValueError("out of range")

        return lambda load: Running(call, list)

    planted(
        monkeypatch,
        right=constant(reference_features),
        wrong=constant(lambda case, load: 1.01 * reference_features(case, load)),
        nan=constant(lambda case, load: np.full_like(reference_features(case, load), np.nan)),
        absent=dataclasses.replace(constant(reference_features), missing=lambda case: "pip install absent"),
        refusing=dataclasses.replace(constant(reference_features), prepare=refuses),
        breaking=dataclasses.replace(constant(reference_features), prepare=breaks, sides=("original", "compressed")),
    )
    spec = case.spec.model_copy(update={"against": tuple(peers.PEERS)})
    track = Lines()
    threads = torch.get_num_threads()
    result = bench(None, (), track, dataclasses.replace(case, spec=spec))
    assert torch.get_num_threads() == threads
    assert track.lines == {"peers prepared": [6, 6], "bench rounds, batch 2": [3, 3]}
    TypeAdapter(BenchResult).validate_python(result, strict=True)
    row = result["rows"][0]
    assert (row["batch_size"], row["rounds"], row["stopped"], result["rounds"]) == (2, 3, "rounds", 3)
    assert row["efficiency"] == pytest.approx(row["speedup"]["median"] / row["flop_ratio"])
    assert row["flop_ratio"] == row["flops"]["original"] / row["flops"]["compressed"] > 1
    assert set(row["milliseconds"]) == set(row["parity"]) == {"original", "compressed"}
    # Ours: Hugging Face's own is the reference of one, the tower in PyTorch that of the other.
    assert all(one["passed"] and 0 < one["relative_error"] < 1e-4 for one in row["parity"].values())
    found = {(peer["peer"], peer["side"]): peer for peer in row["peers"]}
    right, wrong, nan = (found[name, "original"] for name in ("right", "wrong", "nan"))
    assert right["parity"]["relative_error"] == 0.0
    assert right["parity"]["passed"]
    # Cosine is blind to scale, so the error decides; it is timed all the same, and listed as wrong.
    assert wrong["parity"]["relative_error"] == pytest.approx(0.01, rel=1e-3)
    assert wrong["parity"]["cosine"] > 0.999999
    assert not wrong["parity"]["passed"]
    assert wrong["speedup"]["median"] > 1
    assert nan["parity"]["relative_error"] is None
    assert not nan["parity"]["passed"]
    assert found["absent", "original"]["reason"] == "pip install absent"
    assert found["refusing", "original"]["reason"] == "RuntimeError: operator [Loop] is not known"
    assert found["breaking", "compressed"]["reason"] == "ValueError: out of range"
    assert all(
        peer[key] is None
        for peer in row["peers"]
        if peer["reason"] is not None
        for key in ("milliseconds", "speedup", "parity", "prepare_seconds")
    )
    text = printed(console.print_bench, result)
    assert "wrong, original" in text
    assert text.count("WRONG") == 2
    assert "operator [Loop] is not known" in text
    assert "75% only" in text or "50% only" in text or "0% only" in text


def test_ends_that_rounds_do_not_bound_are_shown_as_unknown():
    times = {"p50": 2.0, "p99": 3.0, "intervals": {"p50": {"low": 1.5, "high": 2.5}, "p99": {"low": 2.8, "high": None}}}
    assert console.percentile_text(times, "p50") == "2.00 (1.50-2.50)"
    assert console.percentile_text(times, "p99") == "3.00 (2.80-?)"


def test_what_is_measured_is_part_of_the_stages_key(tmp_path):
    from infoprune_export.stages import STAGES

    def key(*settings):
        return STAGES["bench"].recipe_slice(load_recipe("quickstart", settings))

    target = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "engines" / "targets" / "onnxruntime-cpu.yaml").read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    mine = f"engine.target={target}"
    before = key(mine)
    target.write_text(f"{text}graph_optimization: basic\n", encoding="utf-8")
    assert key(mine) != before
    assert key() != key("validate.onnx_tolerance=0.5"), "what outputs are held to"
    assert key() == key("validate.max_accuracy_drop=1")


# ── Against itself ───────────────────────────────────────────────────────────


def test_the_graph_against_itself_says_whether_1_is_in_the_interval(case, monkeypatch):
    """On planned times: equal ones, and ones of which the second is a tenth longer."""
    from infoprune_export.validate import bench as module

    rng = np.random.default_rng(1)
    opener = module.Sessions.opener
    for longer, contains in ((0.0, True), (0.1, False)):
        planned: dict[int, float] = {}

        def plan(self, planned_calls, longer=longer, planned=planned):
            def open_calls(order):
                calls = opener(self, planned_calls)(order)
                planned.update({id(call): 1 + longer * (name == "second") for name, call in calls.items()})
                return calls

            return open_calls

        def clock(call, planned=planned):
            return planned[id(call)] * float(np.exp(0.003 * rng.standard_normal()))

        monkeypatch.setattr(module.Sessions, "opener", plan)
        monkeypatch.setattr(module, "clock_of", lambda device, clock=clock: clock)
        result = bench_self(with_spec(case, rounds=40, max_rounds=60), Lines())
        TypeAdapter(SelfResult).validate_python(result, strict=True)
        row = result["rows"][0]
        assert row["contains_one"] is contains
        assert row["relative_width"] < 0.05
        assert (row["stopped"], row["rounds"]) == ("narrow", 40)
        assert ("yes" if contains else "NO") in printed(console.print_self, result)


@pytest.mark.parametrize(("device", "times"), [("cpu", 6), ("cuda", 1)])
def test_sessions_are_opened_for_every_block_on_a_cpu_and_kept_on_a_gpu(case, monkeypatch, device, times):
    """Those of before are closed first, or there would be twice the memory and the same luck again."""
    opened, alive = [], weakref.WeakSet()
    original = bench_running.open_session

    def open_session(model, *arguments, **options):
        assert len(alive) < 2
        opened.append(model.parent.name)
        session = original(model, *arguments, **options)
        alive.add(session)
        return session

    monkeypatch.setattr(bench_running, "open_session", open_session)
    monkeypatch.setattr(bench_running, "device_of", lambda target: device)
    monkeypatch.setattr(bench_running, "_bound", lambda *a: session_running(*a[:2], "cpu"))
    monkeypatch.setattr("infoprune_export.validate.bench.clock_of", lambda device: wall_clock)
    result = bench_self(with_spec(case, rounds=24, max_rounds=24), Lines())
    assert opened == ["original", "original"] * times
    assert all(found["p50"] > 0 for found in result["rows"][0]["milliseconds"].values())


def test_both_sides_are_opened_first_equally_often(case, monkeypatch):
    opened = []
    original = bench_running.open_session
    monkeypatch.setattr(
        bench_running,
        "open_session",
        lambda model, *a, **o: opened.append(model.parent.name) or original(model, *a, **o),
    )
    bench(None, (), Lines(), with_spec(case, rounds=16, max_rounds=16))
    assert opened[:2] == ["original", "compressed"]  # for the parity of both, were there peers
    pairs = [opened[i : i + 2] for i in range(2, 10, 2)]
    assert len(opened) == 10
    assert pairs[0] == pairs[1][::-1]
    assert pairs[2] == pairs[3][::-1]


# ── Command ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--self", "--memory"], "--self compares one graph with itself"),
        (["--self", "--against", "eager"], "--self compares one graph with itself"),
        (["--against", "nothing"], "nothing"),
        (["--set", "bench.against=[nothing]"], "bench.against.0"),
        (["--set", "bench.max_rounds=4"], "max_rounds 4"),
        (["--set", "bench.max_interval=0"], "bench.max_interval"),
        (["--target", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(tmp_path, arguments, word):
    done = CliRunner().invoke(main, ["bench", "quickstart", "-o", str(tmp_path / "run"), *arguments])
    assert done.exit_code == 2
    assert word in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("onnxruntime-cpu", (), False)),
        (["--against", "all", "--memory"], ("onnxruntime-cpu", get_args(PeerName), True)),
        (["--against", "openvino", "--against", "eager"], ("onnxruntime-cpu", ("openvino", "eager"), False)),
        (["--device", "cuda"], ("onnxruntime-cuda", (), False)),
        (["--target", "onnxruntime-cuda"], ("onnxruntime-cuda", (), False)),
        (["--device", "cuda", "--target", "onnxruntime-cpu"], ("onnxruntime-cpu", (), False)),
    ],
)
def test_options_become_the_recipes_keys(monkeypatch, arguments, expected):
    seen = []

    def stop(last, **options):
        recipe = load_recipe(options["recipe"], options["overrides"])
        seen.append((last, recipe.engine.target, recipe.bench.against, recipe.bench.memory))
        raise InfopruneError("far enough")

    monkeypatch.setattr(bench_commands, "bring_up_to", stop)
    CliRunner().invoke(main, ["bench", "quickstart", *arguments])
    assert seen == [("bench", *expected)]


@pytest.mark.gpu
def test_on_a_gpu_inputs_and_outputs_stay_there(case):
    from infoprune_export.recipe import load_target

    on_gpu = with_spec(dataclasses.replace(case, target=load_target("onnxruntime-cuda")), against=("eager", "compile"))
    result = bench(None, (), Lines(), on_gpu)
    row = result["rows"][0]
    assert result["provider"] == "CUDAExecutionProvider"
    assert result["machine"]["gpus"]
    assert all(one["passed"] for one in row["parity"].values())
    assert all(peer["parity"]["passed"] for peer in row["peers"])
