"""Portable bodies of the package's ONNX operators, as model-local functions of standard operators of opset 20.

Loop states keep their shapes and loops have trip counts only: TensorRT's rules.
"""

from __future__ import annotations

from onnxscript import opset20 as op
from onnxscript import script, values

DOMAIN, VERSION = "infoprune", 1
OPERATORS = values.Opset(DOMAIN, VERSION)


# mypy: disable-error-code="no-untyped-def"


# ── Token selection ──────────────────────────────────────────────────────────
# Blocked pivoted Cholesky, as in tokens.select.greedy_pivots.


@script(OPERATORS, default_opset=op)
def TokenSelect(  # noqa: N802  (an ONNX operator name)
    features,
    prior,
    counts,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = 1e-5,
):
    zero = op.Constant(value_float=0.0)
    none = op.Constant(value_float=float("-inf"))
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    block = op.Constant(value_int=64)
    minus_one = op.Constant(value_int=-1)
    # T = ceil(N * numerator / denominator); M = min(N, ceil(alpha T)); first for the longest row, then for each
    tokens = op.Shape(prior, start=1, end=2)
    sizes = op.Concat(tokens, counts, axis=0)
    denominator = op.Constant(value_int=keep_denominator)
    wanted = op.Mul(sizes, op.Constant(value_int=keep_numerator))
    every_keep = op.Div(op.Add(op.Add(wanted, denominator), minus_one), denominator)
    over = op.Ceil(op.Mul(op.Cast(every_keep, to=1), op.Constant(value_float=pool_factor)))
    every_pool = op.Min(sizes, op.Cast(over, to=7))
    past = op.Constant(value_ints=[2147483647])
    keep = op.Slice(every_keep, axis0, axis1, axis0)
    keeps = op.Unsqueeze(op.Slice(every_keep, axis1, past, axis0), axis1)
    pool_size = op.Slice(every_pool, axis0, axis1, axis0)
    pool_sizes = op.Unsqueeze(op.Slice(every_pool, axis1, past, axis0), axis1)
    # q = softmax(a / tau) ^ gamma_q; the pool is ranked on a
    # (false for NaN and infinity, which count as zero)
    largest = op.Constant(value_float=3.4028234663852886e38)
    a = op.Cast(prior, to=1)
    places = op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Constant(value_int=1))
    own = op.Less(places, op.Unsqueeze(counts, axis1))
    a = op.Where(own, op.Where(op.LessOrEqual(op.Abs(a), largest), a, zero), none)
    q = op.Pow(op.Softmax(op.Div(a, op.Constant(value_float=temperature)), axis=1), op.Constant(value_float=exponent))
    _, pool = op.TopK(a, pool_size, axis=1, largest=1, sorted=1)
    z = op.Cast(op.GatherND(features, op.Unsqueeze(pool, axis2), batch_dims=1), to=1)
    z = op.Where(op.LessOrEqual(op.Abs(z), largest), z, zero)
    ranks = op.Range(op.Constant(value_int=0), op.Squeeze(pool_size), op.Constant(value_int=1))
    inside = op.Less(ranks, pool_sizes)
    z = op.Mul(z, op.Unsqueeze(op.Where(inside, op.Sqrt(op.GatherElements(q, pool, axis=1)), zero), axis2))
    scale_z = op.ReduceMax(op.Abs(z), op.Constant(value_ints=[1, 2]), keepdims=1)
    z = op.Div(z, op.Max(scale_z, op.Constant(value_float=1.1754943508222875e-38)))
    # pivoted Cholesky of z z^T
    gram = op.MatMul(z, op.Transpose(z, perm=[0, 2, 1]))
    residual = op.ReduceSumSquare(z, axis2, keepdims=0)
    threshold = op.Mul(op.ReduceMax(residual, axis1, keepdims=1), op.Constant(value_float=epsilon))
    shape = op.Shape(residual)
    batch = op.Shape(residual, start=0, end=1)
    position = op.Neg(op.Cast(ranks, to=1))
    taken = op.Where(inside, zero, none)
    minus_infinity = op.Expand(none, op.Concat(batch, axis1, axis=0))
    blocks = op.Squeeze(op.Div(op.Add(op.Add(keep, block), minus_one), block))
    pivots = op.Expand(op.Constant(value_int=0), op.Concat(keep, batch, axis=0))
    empty = op.Expand(zero, op.Concat(op.Reshape(block, axis1), shape, axis=0))
    for outer in range(blocks):
        factor = op.Identity(empty)
        left = op.Squeeze(op.Min(block, op.Sub(keep, op.Mul(outer, block))))
        for inner in range(left):
            free = op.Add(residual, taken)
            saturated = op.LessOrEqual(op.ReduceMax(free, axis1, keepdims=1), threshold)
            pivot = op.ArgMax(op.Where(saturated, op.Add(position, taken), free), axis=1, keepdims=1)
            row = op.GatherND(gram, pivot, batch_dims=1)
            everywhere = op.Expand(
                op.Unsqueeze(pivot, axis0), op.Concat(op.Reshape(block, axis1), batch, axis1, axis=0)
            )
            weights = op.Transpose(op.GatherElements(factor, everywhere, axis=2), perm=[1, 2, 0])
            known = op.Squeeze(op.MatMul(weights, op.Transpose(factor, perm=[1, 0, 2])), axis1)
            scale = op.Sqrt(op.Max(op.GatherElements(residual, pivot, axis=1), op.Constant(value_float=1e-30)))
            column = op.Where(saturated, zero, op.Div(op.Sub(row, known), scale))
            factor = op.ScatterND(
                factor, op.Reshape(inner, op.Constant(value_ints=[1, 1])), op.Unsqueeze(column, axis0)
            )
            residual = op.Max(op.Sub(residual, op.Mul(column, column)), zero)
            taken = op.ScatterElements(taken, pivot, minus_infinity, axis=1)
            slot = op.Reshape(op.Add(op.Mul(outer, block), inner), op.Constant(value_ints=[1, 1]))
            pivots = op.ScatterND(pivots, slot, op.Transpose(pivot, perm=[1, 0]))
        wide = op.Transpose(factor, perm=[1, 0, 2])
        gram = op.Sub(gram, op.MatMul(op.Transpose(wide, perm=[0, 2, 1]), wide))
    kept = op.GatherElements(pool, op.Transpose(pivots, perm=[1, 0]), axis=1)
    # Rows of fewer tokens end in N, which sorts behind all others, then becomes -1.
    steps = op.Range(op.Constant(value_int=0), op.Squeeze(keep), op.Constant(value_int=1))
    indices, _ = op.TopK(op.Where(op.Less(steps, keeps), kept, tokens), keep, axis=1, largest=0, sorted=1)
    return op.Where(op.Less(indices, tokens), indices, minus_one)


# ── Attention received ───────────────────────────────────────────────────────
# models.attention.received_attention, 128 rows at a time. The last block's surplus rows repeat the last one at weight 0.


@script(OPERATORS, default_opset=op)
def ReceivedAttention(query, key, row_weight, key_bias, scale: float):  # noqa: N802  (an ONNX operator name)
    axis1 = op.Constant(value_ints=[1])
    rows = op.Shape(query, start=1, end=2)
    size = op.Min(rows, op.Constant(value_ints=[128]))
    blocks = op.Squeeze(op.Div(op.Add(rows, op.Sub(size, axis1)), size))
    places = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
    scaled = op.Mul(op.Transpose(op.Cast(query, to=1), perm=[0, 2, 1, 3]), op.Constant(value_float=scale))
    keys = op.Transpose(op.Cast(key, to=1), perm=[0, 2, 3, 1])
    bias = op.Unsqueeze(key_bias, op.Constant(value_ints=[1, 2]))
    received = op.Expand(op.Constant(value_float=0.0), op.Shape(key_bias))
    for number in range(blocks):
        wanted = op.Add(places, op.Mul(number, size))
        place = op.Min(wanted, op.Sub(rows, axis1))
        weight = op.Where(op.Less(wanted, rows), op.Gather(row_weight, place, axis=1), op.Constant(value_float=0.0))
        attention = op.Softmax(op.Add(op.MatMul(op.Gather(scaled, place, axis=2), keys), bias), axis=-1)
        weighted = op.Mul(op.ReduceMean(attention, axis1, keepdims=0), op.Unsqueeze(weight, op.Constant(value_ints=[2])))
        received = op.Add(received, op.ReduceSum(weighted, axis1, keepdims=0))
    return received
