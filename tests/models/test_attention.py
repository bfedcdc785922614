"""Attention received, against softmax attention written out; rows in pieces, padding, and what is held at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infoprune_export.models import attention
from infoprune_export.models.attention import received_attention

SCALE = 8**-0.5
LOWEST = torch.finfo(torch.float32).min


def inputs(rows: int, size: int, *, batch: int = 2, heads: int = 3, seed: int = 0) -> list[Tensor]:
    """Query, key, row_weight and key_bias without padding; sharp attention, unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(batch, rows, generator=generator)
    return [
        3 * torch.randn(batch, rows, heads, 8, generator=generator),
        torch.randn(batch, size, heads, 8, generator=generator),
        weight / weight.sum(1, keepdim=True),
        torch.zeros(batch, size),
    ]


def eager(query: Tensor, key: Tensor, row_weight: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    """One image, head and row after the other, in float64."""
    received = torch.zeros(key.shape[:2], dtype=torch.float64)
    for image in range(len(query)):
        for head in range(query.shape[2]):
            for row in range(query.shape[1]):
                scores = key[image, :, head].double() @ query[image, row, head].double() * scale
                exponents = torch.exp(scores + key_bias[image] - (scores + key_bias[image]).max())
                received[image] += row_weight[image, row] * exponents / exponents.sum()
    return received / query.shape[2]


# ── Values ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 40), (40, 40), (33, 7), (7, 33)])
def test_received_attention_equals_eager_softmax(rows: int, size: int):
    given = inputs(rows, size)
    received = received_attention(*given, SCALE)
    assert (received.dtype, received.shape) == (torch.float32, (2, size))
    torch.testing.assert_close(received.double(), eager(*given, SCALE), rtol=1e-5, atol=1e-8)


def test_weights_that_sum_to_one_hand_out_all_attention():
    received = received_attention(*inputs(50, 20), SCALE)
    torch.testing.assert_close(received.sum(1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_widened_first(dtype: torch.dtype):
    query, key, weight, bias = inputs(30, 30)
    # These scores overflow fp16.
    narrow = (300 * query).to(dtype), (300 * key).to(dtype)
    received = received_attention(*narrow, weight, bias, SCALE)
    assert received.dtype == torch.float32
    wide = received_attention(narrow[0].float(), narrow[1].float(), weight, bias, SCALE)
    assert torch.equal(received, wide)
    assert received.isfinite().all()


@pytest.mark.parametrize("scores", [1, 100, 10**9], ids=["row by row", "a few rows", "all rows"])
def test_rows_in_pieces_add_up(monkeypatch: pytest.MonkeyPatch, scores: int):
    given = inputs(29, 11)
    expected = eager(*given, SCALE)
    monkeypatch.setattr(attention, "_SCORES", scores)
    torch.testing.assert_close(received_attention(*given, SCALE).double(), expected, rtol=1e-5, atol=1e-8)


# ── Padding ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_padded_segments_equal_each_alone(garbage: float):
    query, key, weight, bias = inputs(24, 24, batch=3)
    sizes = (24, 9, 1)
    for image, size in enumerate(sizes):
        query[image, size:], key[image, size:] = garbage, garbage
        weight[image] = (torch.arange(24) < size) / size
        bias[image, size:] = LOWEST
    received = received_attention(query, key, weight, bias, SCALE)
    for image, size in enumerate(sizes):
        own = [value[image : image + 1, :size] for value in (query, key, weight, bias)]
        torch.testing.assert_close(received[image, :size], received_attention(*own, SCALE)[0], rtol=1e-5, atol=1e-8)
        assert (received[image, size:] == 0).all()
    assert received[2, 0] == 1.0


def test_a_row_of_no_weight_is_not_counted():
    query, key, weight, bias = inputs(10, 10)
    weight[:, 4] = 0
    received = received_attention(query, key, weight, bias, SCALE)
    query[:, 4] = 50 * query[:, 5]
    assert torch.equal(received_attention(query, key, weight, bias, SCALE), received)


# ── The operator ─────────────────────────────────────────────────────────────


def test_the_shape_is_known_without_running():
    with torch.device("meta"):
        given = torch.empty(2, 577, 3, 8, dtype=torch.float16), torch.empty(2, 600, 3, 8, dtype=torch.float16)
        received = received_attention(*given, torch.empty(2, 577), torch.empty(2, 600), SCALE)
    assert (received.shape, received.dtype) == ((2, 600), torch.float32)


def test_inputs_are_left_alone():
    given = inputs(12, 12)
    before = [value.clone() for value in given]
    received_attention(*given, SCALE)
    assert all(torch.equal(value, old) for value, old in zip(given, before, strict=True))


class _LargestTensor(TorchDispatchMode):
    """How many elements the largest result of any operator has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("size", [1500, 16384])
def test_a_large_image_never_holds_all_its_scores(size: int):
    given = inputs(size, size, batch=1, heads=1)
    with _LargestTensor() as largest:
        # The function itself: to a dispatch mode, the operator is one call of unknown content.
        received = received_attention._init_fn(*given, SCALE)
    assert largest.elements <= max(attention._SCORES, 8 * size)
    assert largest.elements < size**2
    assert math.isclose(float(received.sum()), 1.0, rel_tol=1e-4)
