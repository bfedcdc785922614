"""The sweep over resolutions: what it tries, that it is fit to judge, and that it sees what it is for."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from infoprune_export.errors import InfopruneError
from infoprune_export.models import packing, tower_of
from infoprune_export.models.zoo import TINY, random_model
from infoprune_export.validate import sweep as module
from infoprune_export.validate.sweep import TOLERANCE, Entry, Sweep, Tally, judge, prune_at_random, render, sweep
from infoprune_export.validate.sweep_cases import KINDS, Case, cases_of, model_features
from infoprune_export.validate.sweep_peer import Peer, examine_peer

QUIET = Progress(disable=True)


def cases_for(family: str) -> list[Case]:
    model = random_model(family)
    return cases_of(tower_of(model), model)


def text_of(result: Sweep) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for part in render(result):
        console.print(part)
    return console.export_text()


# ── What is tried ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_every_grid_up_to_40_is_among_the_cases_of_qwen(family):
    cases = cases_for(family)
    labels = {case.label for case in cases}
    assert {f"1 x {rows} x {columns}" for rows in range(4, 41, 2) for columns in range(4, 41, 2)} <= labels
    assert {"1 x 2 x 2", "1 x 2 x 80", "1 x 80 x 2", "1 x 4 x 120"} <= labels
    kinds = Counter(case.kind for case in cases)
    assert kinds["several"] == 40
    assert kinds["video"] == 26
    # Windows of the tiny Qwen2.5-VL are 8 x 8 patches; the others have none to cut.
    assert kinds["whole"] == (26 if family == "qwen2.5-vl" else 370)


@pytest.mark.parametrize("family", TINY)
def test_cases_make_what_they_say_and_the_same_every_time(family):
    model = random_model(family)
    tower = tower_of(model)
    for case, again in list(zip(cases_of(tower, model), cases_of(tower, model), strict=True))[::15]:
        inputs = case.make()
        tower.check_inputs(inputs)
        for same in (case.make(), again.make()):
            assert inputs.keys() == same.keys()
            assert all(torch.equal(inputs[name], same[name]) for name in inputs), case.label
        images = len(tower.split(inputs))
        frames = int(inputs["image_grid_thw"][:, 0].max()) if "image_grid_thw" in inputs else 1
        assert case.alone == (images == frames == 1)
        assert (case.kind == "video") == (frames > 1)
        assert (case.kind == "several") == (images > 1 and frames == 1)


def test_every_layout_of_tiles_is_tried_whole_and_cut():
    model = random_model("llava-next")
    tower = tower_of(model)
    layouts = Counter()
    for case in cases_of(tower, model):
        if case.alone:
            inputs = case.make()
            layouts[case.kind, tower._grid(inputs["image_sizes"][0].tolist())] += 1
    for grid in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)):
        assert layouts["whole", grid]
        assert layouts["cut", grid]


# ── That it is fit to judge ──────────────────────────────────────────────────


@pytest.mark.parametrize("family", TINY)
def test_rounding_in_the_reference_is_far_below_the_tolerance(family):
    model, exact = random_model(family), random_model(family).double()
    for case in cases_of(tower_of(model), model)[:: 3 if family == "llava-siglip" else 110]:
        inputs = case.make()
        doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        reference, truth = model_features(model, inputs), model_features(exact, doubled)
        assert np.abs(reference - truth).max() <= 0.2 * TOLERANCE * np.abs(truth).max(), case.label


@pytest.mark.parametrize("family", TINY)
def test_pruning_at_random_leaves_no_one_and_all_heads(family):
    model, again = random_model(family), random_model(family)
    full = tower_of(model).head_counts()[0]
    for pruned in (model, again):
        prune_at_random(tower_of(pruned), seed=0)
    tower = tower_of(model)
    assert {0, 1, full} <= set(tower.head_counts())
    assert {"constant", "linear", "mlp"} == {shape.kind for shape in tower.ffn_shapes()}
    assert len({shape.size for shape in tower.ffn_shapes()}) == len(tower.ffn_shapes())
    case = cases_of(tower, model)[0]
    np.testing.assert_array_equal(model_features(model, case.make()), model_features(again, case.make()))


# ── That it sees ─────────────────────────────────────────────────────────────


class Windowed:
    """Qwen2.5-VL and its exported graph."""

    def __init__(self) -> None:
        self.model = random_model("qwen2.5-vl")
        self.tower = tower_of(self.model)
        self.graph = module._Graph(self.tower, True)
        cases = cases_of(self.tower, self.model)
        self.cases = [
            *[case for case in cases if case.kind == "whole"][5:20:5],
            *[case for case in cases if case.kind == "cut"][::50],
            *[case for case in cases if case.kind == "several"][-2:],
            *[case for case in cases if case.kind == "video"][::8],
        ]

    def judge(self) -> Tally:
        entry = Entry("planted", lambda: self.graph)
        (tally,) = judge("qwen2.5-vl", self.model, [entry], self.cases, QUIET)
        return tally


@pytest.fixture(scope="module")
def windowed():
    return Windowed()


def test_an_export_without_a_fault_is_right(windowed):
    tally = windowed.judge()
    assert tally.right
    assert tally.cases == len(windowed.cases)
    assert 0 < tally.worst <= TOLERANCE
    assert all(tally.counts[kind]["right"] for kind in KINDS)
    assert tally.examples == []


def plant(windowed: Windowed, monkeypatch: pytest.MonkeyPatch, change) -> Tally:
    plan = windowed.tower.plan

    def changed(inputs, form):
        planned = plan(inputs, form)
        change(planned)
        return planned

    monkeypatch.setattr(windowed.tower, "plan", changed)
    return windowed.judge()


def swap_two(planned):
    # Two places of different visual tokens; within one the order of its patches matters as well.
    for name in ("window_inverse", "frame_inverse"):
        planned[name][[0, -1]] = planned[name][[-1, 0]]


def swap_rows_and_columns(planned):
    planned["position_ids"] = planned["position_ids"].flip(1)


def shift_positions(planned):
    planned["position_ids"] = planned["position_ids"].roll(4, 0)


@pytest.mark.parametrize("fault", [swap_two, swap_rows_and_columns, shift_positions])
def test_a_planted_fault_is_silently_wrong_everywhere(windowed, monkeypatch, fault):
    tally = plant(windowed, monkeypatch, fault)
    assert not tally.right
    for kind in KINDS:
        assert set(tally.counts[kind]) == {"wrong"}, kind
    assert tally.worst > 100 * TOLERANCE
    assert {example["outcome"] for example in tally.examples} == {"wrong"}


def test_a_dropped_window_mask_is_wrong_where_windows_are_cut(windowed, monkeypatch):
    def drop(planned):
        patches = len(planned["window_inverse"])
        planned["window_index"] = planned["window_index"].masked_fill(planned["window_index"] == patches, 0)

    tally = plant(windowed, monkeypatch, drop)
    assert set(tally.counts["whole"]) == {"right"}
    assert set(tally.counts["cut"]) == {"wrong"}


def test_a_dropped_frame_mask_is_wrong_where_images_differ_in_size(windowed, monkeypatch):
    def drop(planned):
        patches = len(planned["frame_inverse"])
        planned["frame_index"] = planned["frame_index"].masked_fill(planned["frame_index"] == patches, 0)

    tally = plant(windowed, monkeypatch, drop)
    assert set(tally.counts["whole"]) == set(tally.counts["cut"]) == {"right"}
    assert tally.counts["several"]["wrong"]


def test_a_mistake_of_the_adapter_shows_although_tower_and_graph_agree(windowed, monkeypatch):
    segments = packing.window_segments

    def turned(grids, merge, window):
        return segments([(frames, columns, rows) for frames, rows, columns in grids], merge, window)

    monkeypatch.setattr(packing, "window_segments", turned)
    case = next(case for case in windowed.cases if case.kind == "cut")
    inputs = case.make()
    np.testing.assert_allclose(
        windowed.graph.run(inputs), windowed.tower.features_of(inputs)[0].numpy(), rtol=0, atol=1e-3
    )
    tally = windowed.judge()
    # A square grid has the same windows either way.
    assert tally.counts["cut"]["wrong"]
    assert not tally.right


# ── How it counts ────────────────────────────────────────────────────────────


class Fake:
    """Answers with a changed reference."""

    def __init__(self, change, model) -> None:
        self._change = change
        self._model = model

    def serves(self, case: Case) -> bool:
        return case.alone

    def run(self, inputs):
        return self._change(model_features(self._model, inputs))


def refuse(_):
    raise ValueError("no\nthank you")


def judged(change) -> Tally:
    model = random_model("llava")
    cases = cases_of(tower_of(model), model)[:2]
    (tally,) = judge("llava", model, [Entry("fake", partial(Fake, change, model))], cases, QUIET)
    return tally


@pytest.mark.parametrize(
    ("change", "outcome", "worst"),
    [
        (lambda x: x, "right", 0.0),
        (lambda x: x + 0.5 * TOLERANCE * np.abs(x).max(), "right", 0.5 * TOLERANCE),
        (lambda x: x + 2 * TOLERANCE * np.abs(x).max(), "wrong", 2 * TOLERANCE),
        (lambda x: x[:-1], "wrong", math.inf),
        (lambda x: x * np.nan, "wrong", math.inf),
        (refuse, "refused", 0.0),
    ],
)
def test_every_case_ends_in_one_class(change, outcome, worst):
    tally = judged(change)
    # The second case has two images, which this contender does not claim to serve.
    assert tally.counts["whole"] == {outcome: 1}
    assert tally.cases == 1
    assert tally.worst == pytest.approx(worst, rel=1e-2)
    assert tally.right == (outcome == "right")
    as_json = json.loads(json.dumps(tally.to_dict(), allow_nan=False))
    assert as_json["right"] == tally.right
    assert [example["outcome"] for example in as_json["examples"]] == [outcome] * (outcome != "right")
    assert ("no thank you" in text_of(Sweep([tally], {"llava": 1.0}))) == (outcome == "refused")


def test_what_cannot_be_exported_is_counted_on_every_case():
    model = random_model("llava")
    cases = cases_of(tower_of(model), model)
    (tally,) = judge("llava", model, [Entry("fake", partial(refuse, None))], cases, QUIET)
    assert tally.counts["whole"]["no export"] + tally.counts["several"]["no export"] == len(cases)
    assert not tally.right
    assert len(tally.examples) < 5


def test_only_our_graphs_decide_and_nothing_tried_is_not_right():
    case = Case("cut", "case", dict)
    ours, peer = Tally("f", "ours"), Tally("f", "peer", ours=False)
    assert not Sweep([ours], {}).right
    ours.add(case, "right", 0.0, "")
    peer.add(case, "wrong", math.inf, "shape")
    result = Sweep([ours, peer], {"f": 1.0})
    assert result.right
    assert "1 wrong" in text_of(result)
    assert "infinite" in text_of(result)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["rows"][1]["worst_relative_error"] is None


def test_markup_in_a_message_is_printed_as_it_is():
    tally = Tally("f", "ours")
    tally.add(Case("cut", "case", dict), "refused", None, "takes [/batch, 3]")
    assert "takes [/batch, 3]" in text_of(Sweep([tally], {"f": 1.0}))


# ── Peers ────────────────────────────────────────────────────────────────────


def test_unknown_names_are_refused():
    with pytest.raises(InfopruneError, match=r"'toaster'.*qwen3-vl"):
        sweep(["llava", "toaster"])
    with pytest.raises(InfopruneError, match=r"'toaster'.*transformers"):
        sweep(["llava"], peer="toaster")


def test_a_transformers_without_exporters_is_reported_and_nothing_else_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.exporters.base", None)
    asked = []

    def swept(family, with_peer, every, progress):
        asked.append((family, with_peer, every))
        yield Tally(family, "ours")

    monkeypatch.setattr(module, "_sweep_family", swept)
    result = sweep(["llava", "llava"], peer="transformers", every=7)
    assert asked == [("llava", False, 7)]
    assert "transformers.exporters.base" in result.peer["not_available"]
    assert "not available: " in text_of(result)
    assert result.to_dict()["peer"]["version"]


@pytest.fixture
def exporters():
    """Skips where the peer is not available."""
    if reason := examine_peer("transformers")["not_available"]:
        pytest.skip(reason)


@pytest.mark.parametrize(("family", "marker"), [("llava", None), ("llava-next", None), ("qwen2.5-vl", "grid_thw")])
def test_the_peer_is_given_what_its_modules_are_called_with(exporters, monkeypatch, family, marker):
    import transformers.exporters.exporter_onnx as exporter_onnx

    samples, calls = [], []

    class Exporter:
        """Exports nothing: the module itself answers."""

        def export(self, module, sample, config):
            assert config.dynamic
            samples.append(sample)
            forward = module.forward

            class Exported:
                def to(self, device, **_):
                    return self

                def __call__(self, **inputs):
                    calls.append(set(inputs))
                    return forward(**inputs)

            return Exported()

    monkeypatch.setattr(exporter_onnx, "OnnxExporter", Exporter)
    model = random_model(family)
    cases = [case for case in cases_of(tower_of(model), model) if case.kind == "several"][:2]
    (tally,) = judge(family, model, [Entry("peer", partial(Peer, family), ours=False)], cases, QUIET)
    assert tally.right, tally.examples
    modules = 1 if marker else 2
    assert len(samples) == modules
    assert len(calls) >= 2 * modules
    if marker:
        assert samples[0]["grid_thw"].tolist() == [[1, 16, 24], [1, 16, 24]]
        assert all({"cu_seqlens", "position_ids", "window_index", "cu_window_seqlens"} <= names for names in calls)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_peers_graphs_stand_in_for_the_models_modules(exporters):
    model = random_model("llava")
    cases = cases_of(tower_of(model), model)[:3]
    (tally,) = judge("llava", model, [Entry("peer", partial(Peer, "llava"), ours=False)], cases, QUIET)
    assert tally.right, tally.examples
    assert tally.worst > 0, "this is the model itself"
