"""The comparison of selection algorithms: same answers, consistent figures, and reasons where there are none."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from selections import KINDS, vectors

from infoprune_export.tokens.reference import literal_selection
from infoprune_export.validate import select_bench
from infoprune_export.validate.select_bench import (
    OURS,
    gram_schmidt,
    measure,
    picture,
    pivoted_qr,
    render,
    select_speed,
)

METHODS = [*OURS, "Algorithm 1, float64", "Gram-Schmidt, PyTorch", "pivoted QR, SciPy"]
SIZES = [(40, 9), (150, 70)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row for size in SIZES for row in measure(*size, rounds=3)]


def test_every_size_has_a_row_of_every_method(rows: list[dict[str, Any]]):
    assert [(row["tokens"], row["kept"], row["method"]) for row in rows] == [
        (*size, method) for size in SIZES for method in METHODS
    ]
    assert all(row["rounds"] == 3 and row["note"] == "" and row["width"] == 1024 for row in rows)


def test_all_methods_keep_the_same_tokens(rows: list[dict[str, Any]]):
    assert {row["overlap"] for row in rows} == {1.0}


def test_ratios_are_those_of_the_medians(rows: list[dict[str, Any]]):
    for size in SIZES:
        times = {row["method"]: row["milliseconds"] for row in rows if (row["tokens"], row["kept"]) == size}
        assert all(value > 0 for value in times.values())
        for row in rows:
            if (row["tokens"], row["kept"]) == size:
                assert row["ratio"] == {ours: pytest.approx(times[row["method"]] / times[ours]) for ours in OURS}


def test_the_picture_is_of_unit_vectors_alike_to_their_neighbours():
    features, attention = picture(300)
    assert (features.dtype, features.shape, attention.shape) == (np.float32, (300, 1024), (300,))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    similarity = features @ features.T
    assert np.diag(similarity, 1).mean() > 0.8
    assert abs(np.diag(similarity, 150).mean()) < 0.1
    assert attention.min() > 0
    assert attention.sum() == pytest.approx(1, rel=1e-5)


# ── The other algorithms ─────────────────────────────────────────────────────


@pytest.mark.parametrize("choose", [gram_schmidt, pivoted_qr])
@pytest.mark.parametrize("kind", KINDS)
def test_other_algorithms_choose_in_the_order_of_algorithm_1(choose: Callable[..., list[int]], kind: str):
    z = vectors(kind, np.random.default_rng(3), 60, 80)
    keep = min(20, np.linalg.matrix_rank(z))
    assert choose(z, keep, 1e-9) == literal_selection(z, np.zeros(60), keep, 60, 60, epsilon=1e-9)


@pytest.mark.parametrize("choose", [gram_schmidt, pivoted_qr])
def test_other_algorithms_stop_at_the_rank(choose: Callable[..., list[int]]):
    z = np.zeros((6, 4), np.float32)
    z[3, 0], z[1, 2] = 2.0, 1.0
    assert choose(z, 5, 1e-5) == [3, 1]


# ── What is left out ─────────────────────────────────────────────────────────


def rows_by_method(rounds: int = 3) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in measure(40, 9, rounds)}


def test_the_literal_algorithm_is_left_out_where_it_takes_minutes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select_bench, "_LITERAL_LIMIT", 1e6)
    row = rows_by_method()["Algorithm 1, float64"]
    assert row["note"] == "M D T^2 = 3.3e+06 multiply-adds take minutes"
    assert (row["milliseconds"], row["ratio"], row["overlap"], row["rounds"]) == (None, None, None, 0)


def test_qr_is_left_out_without_scipy(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else find(name, *rest))
    row = rows_by_method()["pivoted QR, SciPy"]
    assert (row["note"], row["milliseconds"]) == ("SciPy is not installed", None)


def test_what_takes_longer_than_anybody_waits_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select_bench, "PATIENCE", 0.0)
    for row in rows_by_method(rounds=5).values():
        assert row["rounds"] == 1
        assert row["milliseconds"] > 0
        assert row["note"] == "timed once: 5 rounds take more than 0 s"
        assert row["overlap"] == 1.0


def test_the_table_shows_figures_and_reasons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select_bench, "_LITERAL_LIMIT", 1e6)
    rows = list(rows_by_method().values())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(rows))
    lines = console.export_text().splitlines()
    assert any("PyTorch" in line and f"{rows[0]['milliseconds']:.1f}" in line and "100.0%" in line for line in lines)
    assert any("Algorithm 1" in line and "multiply-adds" in line and " - " in line for line in lines)


# ── The process ──────────────────────────────────────────────────────────────


@pytest.mark.exhaustive
def test_sizes_are_measured_in_one_process_of_one_thread(monkeypatch: pytest.MonkeyPatch):
    """The environment of this process is as it was, and progress is told."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    told: list[Any] = []

    def track(title: str, total: int) -> Callable[[int], None]:
        told.append((title, total))
        return lambda count: told.append((count, os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]))

    rows = select_speed([(20, 4), (24, 6)], 1, track)
    assert [row["tokens"] for row in rows] == [20] * len(METHODS) + [24] * len(METHODS)
    assert told == [("token selection", 2), (1, "1", "1"), (1, "1", "1")]
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ
