"""Portable bodies of the package's ONNX operators, as model-local functions of standard operators of opset 20.

TensorRT's rules: loop states keep their shapes, loops have trip counts only, and what is an extent or a trip count is
computed from extents alone, never from a tensor's values or from the counter of a loop around it.
"""

from __future__ import annotations

from onnxscript import opset20 as op
from onnxscript import script, values

DOMAIN, VERSION = "infoprune", 1
OPERATORS = values.Opset(DOMAIN, VERSION)


# mypy: disable-error-code="no-untyped-def"


# ── Token selection ──────────────────────────────────────────────────────────
# Pivoted Cholesky in blocks of 64 pivots. A pivot needs its row of the Gram matrix: those of the 96 tokens with the
# largest residuals are made at once for the next block, another one when it is picked, so the Gram matrix itself, 1 GiB
# at 16k tokens, is never held. Behind each row stands the token's vector, which the same elimination turns into an
# orthonormal direction; behind a block, all vectors lose its directions. No more than D can be pivots.


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
    unit = op.Constant(value_float=1.0)
    infinity = op.Constant(value_float=float("inf"))
    none = op.Constant(value_float=float("-inf"))
    first = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    block = op.Constant(value_ints=[64])
    minus_one = op.Constant(value_int=-1)
    past = op.Constant(value_ints=[2147483647])
    # T = ceil(N * numerator / denominator); M = min(N, ceil(alpha T)); for the longest row, which gives extents, ...
    tokens = op.Shape(prior, start=1, end=2)
    numerator = op.Constant(value_int=keep_numerator)
    denominator = op.Constant(value_int=keep_denominator)
    rounding = op.Add(denominator, minus_one)
    factor_m = op.Constant(value_float=pool_factor)
    keep = op.Div(op.Add(op.Mul(tokens, numerator), rounding), denominator)
    pool_size = op.Min(tokens, op.Cast(op.Ceil(op.Mul(op.Cast(keep, to=1), factor_m)), to=7))
    # ... and for each
    own_tokens = op.Unsqueeze(counts, axis1)
    keeps = op.Div(op.Add(op.Mul(own_tokens, numerator), rounding), denominator)
    pool_sizes = op.Min(own_tokens, op.Cast(op.Ceil(op.Mul(op.Cast(keeps, to=1), factor_m)), to=7))
    # q = softmax(a / tau) ^ gamma_q; the pool is ranked on a
    # (false for NaN and infinity, which count as zero)
    largest = op.Constant(value_float=3.4028234663852886e38)
    a = op.Cast(prior, to=1)
    places = op.Range(first, op.Squeeze(tokens), one)
    own = op.Less(places, own_tokens)
    a = op.Where(own, op.Where(op.LessOrEqual(op.Abs(a), largest), a, zero), none)
    q = op.Pow(op.Softmax(op.Div(a, op.Constant(value_float=temperature)), axis=1), op.Constant(value_float=exponent))
    _, pool = op.TopK(a, pool_size, axis=1, largest=1, sorted=1)
    z = op.Cast(op.GatherND(features, op.Unsqueeze(pool, axis2), batch_dims=1), to=1)
    z = op.Where(op.LessOrEqual(op.Abs(z), largest), z, zero)
    ranks = op.Range(first, op.Squeeze(pool_size), one)
    inside = op.Less(ranks, pool_sizes)
    z = op.Mul(z, op.Unsqueeze(op.Where(inside, op.Sqrt(op.GatherElements(q, pool, axis=1)), zero), axis2))
    scale_z = op.ReduceMax(op.Abs(z), op.Constant(value_ints=[1, 2]), keepdims=1)
    z = op.Div(z, op.Max(scale_z, op.Constant(value_float=1.1754943508222875e-38)))
    # greedy choice; `free` holds residuals, -inf for what is taken, zero for padding
    free = op.Unsqueeze(op.ReduceSumSquare(z, axis2, keepdims=0), axis1)
    threshold = op.Mul(op.ReduceMax(free, axis2, keepdims=1), op.Constant(value_float=epsilon))
    batch = op.Shape(z, start=0, end=1)
    width = op.Shape(z, start=2, end=3)
    images = op.Unsqueeze(op.Range(first, op.Squeeze(batch), one), axis1)
    steps = op.Min(keep, width)
    # as many blocks as 64 pivots each need, but equally long ones; what the last has too many chooses nothing
    blocks = op.Div(op.Add(steps, op.Sub(block, axis1)), block)
    divided = op.Max(blocks, axis1)
    length = op.Div(op.Add(steps, op.Sub(divided, axis1)), divided)
    wanted = op.Min(keeps, steps)
    likely_size = op.Min(pool_size, op.Constant(value_ints=[96]))
    numbers = op.Expand(op.Range(first, op.Squeeze(likely_size), one), op.Concat(batch, axis1, likely_size, axis=0))
    nowhere = op.Expand(minus_one, op.Shape(free))
    empty = op.Expand(zero, op.Concat(batch, block, op.Add(pool_size, width), axis=0))
    weights_shape = op.Concat(batch, block, axis1, axis=0)
    trips = op.Squeeze(blocks)
    inner_trips = op.Squeeze(length)
    for outer in range(trips):
        wanted_here = op.Unsqueeze(op.Sub(wanted, op.Mul(outer, length)), axis1)
        _, likely = op.TopK(free, likely_size, axis=2, largest=1, sorted=1)
        vectors = op.GatherND(z, op.Transpose(likely, perm=[0, 2, 1]), batch_dims=1)
        rows = op.Concat(op.MatMul(vectors, op.Transpose(z, perm=[0, 2, 1])), vectors, axis=2)
        row_number = op.ScatterElements(nowhere, likely, numbers, axis=2)
        factor = op.Identity(empty)
        for inner in range(inner_trips):
            best = op.ReduceMax(free, axis2, keepdims=1)
            choosing = op.And(op.Greater(best, threshold), op.Less(inner, wanted_here))
            pivot = op.ArgMax(free, axis=2, keepdims=1)
            number = op.Where(choosing, op.GatherElements(row_number, pivot, axis=2), first)
            unlikely = op.Less(op.ReduceMin(number, keepdims=0), first)
            if unlikely:
                vector = op.GatherND(z, pivot, batch_dims=1)
                row = op.Concat(op.MatMul(vector, op.Transpose(z, perm=[0, 2, 1])), vector, axis=2)
            else:
                row = op.GatherND(rows, number, batch_dims=1)
            known = op.GatherElements(factor, op.Expand(pivot, weights_shape), axis=2)
            rest = op.Sub(row, op.MatMul(op.Reshape(known, op.Constant(value_ints=[0, 1, 64])), factor))
            column = op.Div(rest, op.Where(choosing, op.Sqrt(best), infinity))
            place = op.Concat(images, op.Expand(inner, op.Shape(images)), axis=1)
            factor = op.ScatterND(factor, place, op.Squeeze(column, axis1))
            shared = op.Slice(column, axis0, pool_size, axis2)
            lower = op.Sub(free, op.Mul(shared, shared))
            free = op.ScatterElements(lower, pivot, op.Where(choosing, none, best), axis=2)
        basis = op.Slice(factor, pool_size, past, axis2)
        z = op.Sub(z, op.MatMul(op.Transpose(op.Slice(factor, axis0, pool_size, axis2), perm=[0, 2, 1]), basis))
    # taken first, then in the order of the prior
    order = op.Where(op.Equal(op.Squeeze(free, axis1), none), unit, op.Neg(op.Cast(ranks, to=1)))
    _, pivots = op.TopK(op.Where(inside, order, none), keep, axis=1, largest=1, sorted=1)
    kept = op.GatherElements(pool, pivots, axis=1)
    # Rows of fewer tokens end in N, which sorts behind all others, then becomes -1.
    slots = op.Range(first, op.Squeeze(keep), one)
    indices, _ = op.TopK(op.Where(op.Less(slots, keeps), kept, tokens), keep, axis=1, largest=0, sorted=1)
    return op.Where(op.Less(indices, tokens), indices, minus_one)


# ── Attention received ───────────────────────────────────────────────────────
# models.attention.received_attention, 128 rows at a time. Surplus rows of the last block repeat a row at weight 0.


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
        weighted = op.Mul(
            op.ReduceMean(attention, axis1, keepdims=0), op.Unsqueeze(weight, op.Constant(value_ints=[2]))
        )
        received = op.Add(received, op.ReduceSum(weighted, axis1, keepdims=0))
    return received
