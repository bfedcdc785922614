"""`parity.compare`: what each of its three figures sees and does not see."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from infoprune_export.validate.parity import Parity, compare

LABELS = {"step": "onnx", "case": "batch 1", "tolerance": 1e-4}


def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)


def test_equal_arrays_have_error_zero_and_pass_at_tolerance_zero():
    parity = compare(reference(), reference(), step="s", case="c", tolerance=0.0)
    assert parity.relative_error == 0.0
    assert parity.cosine == pytest.approx(1.0, abs=1e-12)
    assert parity.norm_ratio == 1.0
    assert parity.passed


def test_one_wrong_value_is_measured_against_the_largest_reference():
    a = np.array([1.0, -4.0, 2.0])
    assert compare(a, np.array([1.0, -4.0, 2.5]), **LABELS).relative_error == pytest.approx(0.5 / 4)


def test_scale_error_shows_in_norm_ratio_and_not_in_cosine():
    parity = compare(reference(), 1.5 * reference(), **LABELS)
    assert parity.cosine == pytest.approx(1.0, abs=1e-12)
    assert parity.norm_ratio == pytest.approx(1.5, rel=1e-6)
    assert parity.relative_error == pytest.approx(0.5, rel=1e-6)
    assert not parity.passed


def test_opposite_sign_shows_in_cosine_and_not_in_norm_ratio():
    parity = compare(reference(), -reference(), **LABELS)
    assert parity.cosine == pytest.approx(-1.0, abs=1e-12)
    assert parity.norm_ratio == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_candidate_has_infinite_error(value: float):
    candidate = reference()
    candidate[1, 2, 0] = value
    parity = compare(reference(), candidate, step="s", case="c", tolerance=1e9)
    assert parity.relative_error == math.inf
    assert not parity.passed


def test_non_finite_reference_does_not_pass():
    broken = reference()
    broken[0, 0, 0] = math.nan
    assert not compare(broken, reference(), step="s", case="c", tolerance=1e9).passed


@pytest.mark.parametrize("shape", [(2, 5, 2), (1, 5, 3), (30,), (3, 5, 2), (2, 15)])
def test_other_shape_has_infinite_error(shape: tuple[int, ...]):
    parity = compare(np.ones((2, 5, 3)), np.ones(shape), **LABELS)
    assert parity.relative_error == math.inf
    assert not parity.passed


def test_zero_reference_equals_zero_candidate_and_nothing_else():
    zero = np.zeros((2, 3))
    assert compare(zero, zero, **LABELS).passed
    assert not compare(zero, zero + 1e-6, **LABELS).passed


def test_half_precision_arrays_are_compared_in_float64():
    a = np.full(4, 60000, np.float16)
    parity = compare(a, a, **LABELS)
    assert parity.norm_ratio == 1.0
    assert parity.cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("error", "kept", "bound", "passed"),
    [
        (1e-4, None, None, True),
        (1.01e-4, None, None, False),
        (0.0, 0.01, 0.01, True),
        (0.0, 0.011, 0.01, False),
        (0.0, 0.011, None, False),
        (1.0, 0.0, 0.01, False),
    ],
)
def test_passed_needs_error_and_kept_indices_within_tolerance(
    error: float, kept: float | None, bound: float | None, passed: bool
):
    assert Parity("s", "c", error, 1.0, 1.0, 1e-4, kept, bound).passed is passed


def test_to_dict_is_json_and_says_whether_it_passed():
    tree = json.loads(json.dumps(compare(reference(), 2 * reference(), **LABELS).to_dict()))
    assert tree["passed"] is False
    assert tree["step"] == "onnx"
    assert tree["norm_ratio"] == pytest.approx(2.0)
