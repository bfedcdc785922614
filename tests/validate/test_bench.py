"""The bench: what is in its rows, peers that are right, wrong or missing, memory, and the graph against itself."""

from __future__ import annotations

import dataclasses
import io
import os
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import build
from finished import finished
from pydantic import TypeAdapter
from rich.console import Console

from infoprune_export import console
from infoprune_export.cli import bench_commands, main
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import wall_clock
from infoprune_export.measure.results import BenchResult, SelfResult
from infoprune_export.models import tower_of
from infoprune_export.recipe import TokensSpec, load_recipe, read_recipe
from infoprune_export.recipe.delivery import BenchSpec, PeerName
from infoprune_export.tokens.encoder import FEATURES
from infoprune_export.validate import bench_memory, bench_running, peers, peers_openvino
from infoprune_export.validate.bench import bench, bench_self
from infoprune_export.validate.bench_case import BenchCase, case_of, case_of_run, check, reference_features
from infoprune_export.validate.bench_running import Running, device_of, session_running
from infoprune_export.validate.peers import Peer, contenders, peer_of

MIB = 2**20


class Lines:
    """Progress lines: total and how far they came."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}

    def __call__(self, title: str, total: int):
        self.lines[title] = [total, 0]

        def advance(amount: int) -> None:
            self.lines[title][1] += amount
            assert amount > 0

        return advance


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> BenchCase:
    """Two blocks of a Qwen2.5-VL that selects tokens, exported for one image a call."""
    folder = finished(tmp_path_factory)
    made = case_of_run(read_recipe(folder / "recipe.json"), folder / "onnx", folder / "checkpoint")
    return with_spec(made)


def with_spec(case: BenchCase, **settings) -> BenchCase:
    spec = BenchSpec(**{"batch_sizes": (2,), "rounds": 3, "max_rounds": 3, "warmup": 0, **settings})
    return dataclasses.replace(case, spec=spec)


def tower_case(family: str, **tokens) -> BenchCase:
    """Towers that were not exported."""
    recipe = load_recipe("quickstart", ["bench.batch_sizes=[2]"])
    towers = {side: tower_of(build(family, 4)) for side in ("original", "compressed")}
    return case_of(recipe, Path("nowhere"), towers, TokensSpec(**tokens), None)


def constant(features, seconds: float = 0.0) -> Peer:
    """A peer that returns what it is told to."""

    def prepare(case, side):
        def start(load):
            outputs = [{FEATURES: np.asarray(features(case, load), np.float32)}]
            return Running(lambda: None, lambda: outputs)

        return start

    return Peer("torch", ("original",), lambda case: None, prepare)


def planted(monkeypatch, **made: Peer) -> None:
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(made, "planted:peer"))
    monkeypatch.setattr(peers, "peer_of", lambda name: made[name])


# ── Rows ─────────────────────────────────────────────────────────────────────


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


def printed(show, result) -> str:
    page = io.StringIO()
    original = console.wide_console
    console.wide_console = lambda: Console(file=page, width=220)
    try:
        show(result)
    finally:
        console.wide_console = original
    return page.getvalue()


def test_ends_that_rounds_do_not_bound_are_shown_as_unknown():
    times = {"p50": 2.0, "p99": 3.0, "intervals": {"p50": {"low": 1.5, "high": 2.5}, "p99": {"low": 2.8, "high": None}}}
    assert console.percentile_text(times, "p50") == "2.00 (1.50-2.50)"
    assert console.percentile_text(times, "p99") == "3.00 (2.80-?)"


# ── Peers ────────────────────────────────────────────────────────────────────


def test_peers_are_the_ones_that_recipes_and_the_command_know():
    assert tuple(peers.PEERS) == get_args(PeerName) == bench_commands._PEERS
    for name in peers.PEERS:
        assert isinstance(peer_of(name), Peer)
    with pytest.raises(InfopruneError, match="there are: eager"):
        peer_of("nothing")


@pytest.mark.parametrize(
    ("family", "tokens", "names"),
    [
        ("llava", {"prior": "cls"}, ["eager"]),
        pytest.param("qwen3-vl", {"method": "none"}, ["eager", "compile"], marks=pytest.mark.exhaustive),
    ],
)
def test_pytorch_compiled_or_not_computes_what_it_is_compared_with(monkeypatch, family, tokens, names):
    """Through torch.compile's own tracing, without the minute its code generator takes on a CPU."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend="aot_eager", **options))
    case = tower_case(family, **tokens)
    load = case.load(2)
    found = contenders(case, names, lambda amount: None)
    assert [one.title for one in found] == [title for name in names for title in (name, f"{name}, compressed")]
    for one in found:
        started = one.on(
            load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
        )
        assert started is not None, one.reason
        running, parity, seconds = started
        assert parity["passed"], (one.title, parity)
        assert seconds > 0


def test_compiled_code_of_one_side_is_not_thrown_away_for_the_other(monkeypatch):
    """Or the first counted round would compile it again."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    case = tower_case("llava")
    found = contenders(case, ["compile"], lambda amount: None)
    for size, expected in ((1, 1), (2, 2)):
        for one in found:
            one.start(case.load(size))
        assert len(resets) == expected


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


def test_a_peers_copy_has_no_language_model_and_changes_nothing():
    case = tower_case("qwen2.5-vl")
    model = case.towers["original"].model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = dataclasses.replace(case, dtype=torch.float16).placed("original").model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    own = sum(p.numel() for name, p in model.named_parameters() if "visual" in name)
    assert case.vision_bytes("original") == 4 * own
    assert sum(p.numel() for p in placed.parameters()) == own
    assert {p.dtype for p in placed.parameters()} == {torch.float16}


def test_openvino_that_is_not_installed_or_not_meant_says_so(monkeypatch):
    case = tower_case("llava")
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: None)
    assert "pip install openvino" in peer_of("openvino").missing(case)
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: True)
    on_gpu = case.target.model_copy(update={"name": "a-gpu", "providers": ("CUDAExecutionProvider",)})
    assert device_of(on_gpu) == "cuda"
    assert "a-gpu" in peer_of("openvino").missing(dataclasses.replace(case, target=on_gpu))


def test_openvino_computes_what_pytorch_does(case):
    pytest.importorskip("openvino")
    load = case.load(1)
    one = contenders(case, ["openvino"], lambda amount: None)[0]
    started = one.on(
        load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
    )
    assert started is not None, one.reason
    assert started[1]["passed"]


@pytest.mark.exhaustive
def test_transformers_exports_what_pytorch_computes():
    case = tower_case("llava")
    load = case.load(2)
    (one,) = contenders(case, ["transformers"], lambda amount: None)
    started = one.on(
        load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
    )
    assert started is not None, one.reason
    assert started[1]["passed"]


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


# ── Memory ───────────────────────────────────────────────────────────────────


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
