"""Time to first token and peak memory: what is in the rows, that memory is seen, and what is refused."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from rich.console import Console
from torch import Tensor

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.measure import memory
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import VLM, VisualTokens
from infoprune_export.recipe import BenchSpec, TokensSpec
from infoprune_export.tokens.decoder import Step, decoding
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate import first_token
from infoprune_export.validate.first_token import UNPRUNED, Contest, Side

MIB = 2**20
SPEC = BenchSpec(batch_sizes=(1, 3), rounds=3, max_rounds=3, warmup=1)
DELAY = 0.1
PIECE = 100_000
"""Bytes; small enough for the C library to keep to itself when they are freed."""


def tiny() -> VLM:
    model = testbed.build_model(layers=2, hidden_size=32, heads=4, seed=3).eval().requires_grad_(False)
    return VLM(model, testbed.build_processor(), tower_of(model))


def contest() -> Contest:
    """Unpruned, a quarter of the tokens, the same with Stage 2, and one that is late and loses half of an image."""
    vlm = tiny()
    whole = VisionEncoder(vlm.tower, None).encode
    quarter = VisionEncoder(vlm.tower, TokensSpec(keep_ratio="1/4")).encode
    traces: list[Tensor] = []
    inside = decoding([Step(1, Fraction(1, 2))], on_trace=lambda trace: traces.append(trace.per_layer[0]))
    sides = {
        UNPRUNED: Side(whole),
        "quarter": Side(quarter),
        "quarter, Stage 2": Side(quarter, inside),
        "late": Side(partial(delayed, whole)),
    }
    return Contest(vlm, sides, lambda images: vlm.tower.example_inputs(images, torch.Generator()), "Is there a ring?")


def delayed(see, inputs: dict[str, Tensor]) -> VisualTokens:
    time.sleep(DELAY)
    seen = see(inputs)
    kept = [torch.arange(len(features)) for features in seen.features]
    kept[-1] = kept[-1][::2]
    return VisualTokens.of([part[k] for part, k in zip(seen.features, kept, strict=True)], seen.layouts, kept)


def greedy(see, inputs: dict[str, Tensor]) -> VisualTokens:
    """64 MiB more than it needs, in pieces."""
    held = [b"x" * PIECE for _ in range(64 * MIB // PIECE)]
    seen = see(inputs)
    del held
    return seen


def wasteful() -> Contest:
    """Like a model that was loaded: far more was allocated than is left, with the rest strewn about in it."""
    pieces = [b"x" * PIECE for _ in range(128 * MIB // PIECE)]
    vlm = tiny()
    whole = VisionEncoder(vlm.tower, None).encode
    sides = {UNPRUNED: Side(whole), "greedy": Side(partial(greedy, whole))}
    made = Contest(vlm, sides, lambda images: vlm.tower.example_inputs(images, torch.Generator()), "Is there a ring?")
    object.__setattr__(made, "left", pieces[::100])
    return made


def ended() -> Contest:
    """As when the system ends a process that needs too much memory."""
    os._exit(9)


def never() -> Contest:
    raise AssertionError("work was begun")


class Track:
    """Progress lines as they were announced, and how far they came."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def __call__(self, title: str, total: int):
        self.totals[title], self.done[title] = total, 0

        def advance(amount: int) -> None:
            self.done[title] += amount

        return advance


# ── Time ─────────────────────────────────────────────────────────────────────


def test_rows_hold_times_ratios_and_tokens_of_every_side():
    track = Track()
    result = first_token.measure(contest, (), SPEC, track, memory=False)
    assert track.totals == track.done == {"first tokens": 2 * (3 + 1)}
    assert result["threads"] == SPEC.threads == torch.get_num_threads()
    rows = {(row["batch_size"], row["side"]): row for row in result["rows"]}
    assert list(rows) == [(size, side) for size in (1, 3) for side in contest().sides]
    assert [row["visual_tokens"] for row in rows.values()] == [64, 16, 16, 32, 64, 16, 16, (64 + 64 + 32) / 3]
    for (_, side), row in rows.items():
        assert row["milliseconds"]["p50"] <= row["milliseconds"]["p90"] <= row["milliseconds"]["p99"]
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
        assert "peak_bytes" not in row
        assert (row["rounds"], row["stopped"]) == (3, "rounds")
        assert row["speedup"]["confidence"] < 0.95  # three rounds cannot know
        if side == "late":
            assert min(row["encoder_milliseconds"]["p50"], row["milliseconds"]["p50"]) >= 1000 * DELAY


def test_ratios_are_of_the_unpruned_model_over_each(monkeypatch):
    """On planned times; the encoder's own turns take a quarter."""
    made = contest()
    planned = {UNPRUNED: 8.0, "quarter": 4.0, "quarter, Stage 2": 2.0, "late": 16.0}
    names = {id(side): name for name, side in made.sides.items()}

    def clock(call) -> float:
        return planned[names[id(call.args[1])]] * (1 if call.func is first_token._answer else 0.25)

    monkeypatch.setattr(first_token, "clock_of", lambda device: clock)
    result = first_token.first_token(made, BenchSpec(batch_sizes=(1,), rounds=12, max_rounds=24, warmup=0))
    for row in result["rows"]:
        expected = planned[row["side"]]
        assert row["milliseconds"]["p50"] == expected
        assert row["encoder_milliseconds"]["p50"] == expected / 4
        assert row["milliseconds"]["intervals"]["p50"] == {"low": expected, "high": expected}
        for name in ("speedup", "encoder_speedup"):
            assert [row[name][end] for end in ("median", "low", "high")] == pytest.approx([8 / expected] * 3)
        assert (row["rounds"], row["stopped"]) == (12, "narrow")


def test_every_side_answers_with_one_token_about_every_image_within_its_stage_2(monkeypatch):
    """A question is answered as often as it is timed; the encoder's own turns ask nothing."""
    made, calls = contest(), []
    original = first_token.answer

    def spy(vlm, seen, questions, **options):
        calls.append((len(seen.features), questions, options["max_new_tokens"], options["decoder"]))
        return original(vlm, seen, questions, **options)

    monkeypatch.setattr(first_token, "answer", spy)
    first_token.first_token(made, SPEC)
    assert len(calls) == 2 * 4 * 4
    assert [size for size, *_ in calls] == [1] * 16 + [3] * 16
    assert all(questions == [made.question] * size for size, questions, *_ in calls)
    assert {count for *_, count, _ in calls} == {1}
    inside = [decoder for *_, decoder in calls if decoder is not None]
    assert inside == [made.sides["quarter, Stage 2"].decoder] * 8


def test_the_table_has_a_line_for_every_row():
    made = contest()
    result = first_token.first_token(replace(made, sides=dict(list(made.sides.items())[:2])), SPEC)
    result["rows"][1]["peak_bytes"] = 7 * MIB
    page = io.StringIO()
    Console(file=page, width=180).print(first_token.render(result))
    lines = [line for line in page.getvalue().splitlines() if "unpruned" in line or "quarter" in line]
    assert len(lines) == 4
    for line, row in zip(lines, result["rows"], strict=True):
        assert f"{row['milliseconds']['p50']:.1f}" in line
        assert f"{row['encoder_milliseconds']['p50']:.1f}" in line
        assert f"{row['speedup']['median']:.2f}" in line
        assert f" {row['visual_tokens']:.0f} " in line
    assert [" 7 " in line for line in lines] == [False, True, False, False]


# ── Memory ───────────────────────────────────────────────────────────────────

on_linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


@pytest.mark.exhaustive
@on_linux
def test_memory_is_what_an_answer_needs_on_top_of_the_model():
    """The model's own size is not in it, nor does what loading freed hide anything."""
    track = Track()
    spec = BenchSpec(batch_sizes=(1,), rounds=3, max_rounds=3, warmup=0)
    result = first_token.measure(wasteful, (), spec, track)
    assert track.totals == track.done == {"first tokens": 3, "peak memory": 2}
    plain, hungry = (row["peak_bytes"] for row in result["rows"])
    assert 0 < plain < 100 * MIB
    assert 60 * MIB < hungry - plain < 80 * MIB


@on_linux
def test_a_process_that_is_ended_is_one_line(monkeypatch):
    # A forked process has loaded everything already.
    monkeypatch.setattr(first_token.multiprocessing, "get_context", lambda method: get_context("fork"))
    with pytest.raises(InfopruneError) as caught:
        first_token.peak_memory(ended, (), "unpruned", 16)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert "'unpruned' at batch 16" in message
    assert "--no-memory" in message


@pytest.mark.parametrize("lacking", ["_CLEAR_REFS", "_STATUS", "VmHWM"])
def test_a_system_that_does_not_tell_is_refused_before_the_clock_starts(monkeypatch, tmp_path, lacking):
    for name in ("_CLEAR_REFS", "_STATUS"):
        monkeypatch.setattr(memory, name, path := tmp_path / f"proc-{name}" / "file")
        if lacking != name:
            path.parent.mkdir()
            path.write_text("Name:\tpython\nVmRSS:\t  20 kB\n" + "VmHWM:\t  30 kB\n" * (lacking != "VmHWM"))
    with pytest.raises(InfopruneError) as caught:
        first_token.measure(contest, (), SPEC, lambda title, total: never())
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert "peak memory" in message
    assert "--no-memory" in message


def test_memory_fields_are_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t   30 kB\nVmRSS:\t   20 kB\n")
    assert memory.reset_peak() == 20 * 1024
    assert (tmp_path / "refs").read_text() == "5"
