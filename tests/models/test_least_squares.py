"""Streaming least squares against NumPy on the whole data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infoprune_export.models import least_squares
from infoprune_export.models.least_squares import AffineFit

Rows = tuple[torch.Tensor, torch.Tensor]


def rows(count: int = 60, inputs: int = 5, outputs: int = 3, offset: float = 0.0) -> Rows:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(count, inputs)) * np.arange(1, inputs + 1) + offset
    y = x @ rng.normal(size=(inputs, outputs)) + rng.normal(size=(count, outputs)) + 2
    return torch.from_numpy(x), torch.from_numpy(y)


def fitted(x: torch.Tensor, y: torch.Tensor) -> AffineFit:
    fit = AffineFit(x.shape[1], y.shape[1])
    fit.update(x, y)
    return fit


def ridge_by_augmented_rows(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The documented objective as ordinary least squares: penalty rows below the data, none for the bias."""
    count, inputs = x.shape
    strength = np.sqrt(ridge * x.var(axis=0).mean())
    design = np.block(
        [
            [x / np.sqrt(count), np.full((count, 1), 1 / np.sqrt(count))],
            [strength * np.eye(inputs), np.zeros((inputs, 1))],
        ]
    )
    target = np.vstack([y / np.sqrt(count), np.zeros((inputs, y.shape[1]))])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_solve_without_ridge_equals_lstsq(offset: float):
    x, y = rows(offset=offset)
    weight, bias = fitted(x, y).solve(0.0)
    solution = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((len(x), 1))]), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), solution[:-1].T, rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), solution[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
def test_solve_equals_ridge_regression_with_free_bias(ridge: float):
    x, y = rows(offset=3.0)
    weight, bias = fitted(x, y).solve(ridge)
    expected_weight, expected_bias = ridge_by_augmented_rows(x.numpy(), y.numpy(), ridge)
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bias.numpy(), expected_bias, rtol=1e-9, atol=1e-12)


def test_ridge_is_relative_to_the_inputs_scale():
    x, y = rows()
    weight, _ = fitted(x, y).solve(0.1)
    scaled, _ = fitted(1000 * x, y).solve(0.1)
    torch.testing.assert_close(1000 * scaled, weight, rtol=1e-9, atol=0)


def test_update_in_pieces_equals_one_update():
    x, y = rows()
    pieces = AffineFit(5, 3)
    for start, end in ((0, 1), (1, 20), (20, 20), (20, 60)):
        pieces.update(x[start:end], y[start:end])
    for got, expected in zip(pieces.solve(1e-3), fitted(x, y).solve(1e-3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(pieces.covariance(), fitted(x, y).covariance(), rtol=1e-11, atol=1e-12)


def test_covariance_is_centred_and_divided_by_the_count():
    x, y = rows(offset=7.0)
    expected = np.cov(x.numpy().T, bias=True)
    np.testing.assert_allclose(fitted(x, y).covariance().numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("stripe", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stripes_make_the_whole_matrix(monkeypatch, stripe, dtype):
    monkeypatch.setattr(least_squares, "_STRIPE", stripe)
    x, y = rows()
    fit = AffineFit(5, 3, dtype)
    for start in (0, 30):
        fit.update(x[start : start + 30].to(dtype), y[start : start + 30].to(dtype))
    covariance = fit.covariance()
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy().T, bias=True), rtol=1e-5, atol=1e-6)


def test_half_precision_rows_are_summed_in_more():
    x, y = (value.half() for value in rows(count=4000, offset=30.0))
    weight, bias = fitted(x, y).solve(1e-3)
    expected_weight, expected_bias = ridge_by_augmented_rows(x.double().numpy(), y.double().numpy(), 1e-3)
    assert weight.dtype == bias.dtype == torch.float64
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), expected_bias, rtol=1e-4)


def test_fewer_rows_than_inputs_give_finite_weights_that_fit():
    x, y = rows(count=3)
    weight, bias = fitted(x, y).solve(1e-9)
    torch.testing.assert_close(x @ weight.T + bias, y, rtol=1e-4, atol=1e-4)


def test_no_inputs_give_the_mean_as_bias():
    _, y = rows()
    weight, bias = fitted(torch.zeros(len(y), 0), y).solve(1e-3)
    assert weight.shape == (3, 0)
    torch.testing.assert_close(bias, y.mean(0))


def test_constant_inputs_give_zero_weight_and_the_mean_as_bias():
    _, y = rows()
    weight, bias = fitted(torch.zeros(len(y), 5), y).solve(1e-3)
    torch.testing.assert_close(weight, torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(bias, y.mean(0))


def test_update_with_wrong_width_raises():
    with pytest.raises(RuntimeError):
        AffineFit(5, 3).update(torch.zeros(4, 6), torch.zeros(4, 3))
