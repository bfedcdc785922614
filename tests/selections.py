"""Pictures to select from, and the operator in all its implementations under one signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from infoprune_export.export import operator
from infoprune_export.tokens import reference
from infoprune_export.tokens.reference import scaled_pool
from infoprune_export.tokens.select import token_select

Image = tuple[np.ndarray, np.ndarray]
TYPES = {np.float32: onnx.TensorProto.FLOAT, np.float16: onnx.TensorProto.FLOAT16, np.int64: onnx.TensorProto.INT64}


# ── Pictures ─────────────────────────────────────────────────────────────────


def image(seed: int, tokens: int, width: int) -> Image:
    """Random features [N, D] and a prior [N], exactly representable in fp32."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(tokens, width)).astype(np.float32) * rng.uniform(0.3, 2, (tokens, 1)).astype(np.float32)
    return features, rng.uniform(0, 1, tokens).astype(np.float32)


def vectors(kind: str, rng: np.random.Generator, size: int, width: int) -> np.ndarray:
    """Float64 [M, D] of one structure; none has exact ties."""
    x = rng.normal(size=(size, width))
    if kind == "clustered":
        x = 5 * rng.normal(size=(6, width))[rng.integers(0, 6, size)] + x
    elif kind == "near-duplicate":
        x = x[rng.integers(0, max(1, size // 3), size)] + 1e-3 * rng.normal(size=(size, width))
    elif kind == "graded":
        x = x * 0.93 ** rng.permutation(size)[:, None]
    elif kind == "low rank":
        rank = max(1, min(size, width) // 2)
        x = x[:, :rank] @ rng.normal(size=(rank, width))
    elif kind == "smooth":
        places = np.linspace(0, 3, size)[:, None]
        x = np.sin(places * rng.uniform(0, 6, width) + rng.uniform(0, 6, width)) + 0.05 * x
    return x


KINDS = ("gaussian", "clustered", "near-duplicate", "graded", "low rank", "smooth")


def closest_race(features: np.ndarray, prior: np.ndarray, keep: int, factor: float) -> float:
    """Smallest relative lead of any greedy choice over the runner-up, by Gram-Schmidt in float64; 0 if it saturates."""
    _, z = scaled_pool(features, prior, keep, factor, 0.7, 0.5)
    first, lead = (z**2).sum(1).max(), 1.0
    for _ in range(keep):
        norms = (z**2).sum(1)
        order = np.argsort(norms)
        if norms[order[-1]] <= 1e-3 * first:
            return 0.0
        if len(order) > 1:
            lead = min(lead, 1 - norms[order[-2]] / norms[order[-1]])
        direction = z[order[-1]] / np.sqrt(norms[order[-1]])
        z = np.delete(z - np.outer(z @ direction, direction), order[-1], axis=0)
    return lead


def padded(images: list[Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of any sizes as one batch whose padding is NaN: features [B, N, D], prior [B, N], counts [B]."""
    counts = np.array([len(prior) for _, prior in images])
    features = np.full((len(images), counts.max(), images[0][0].shape[1]), np.nan, images[0][0].dtype)
    prior = np.full((len(images), counts.max()), np.nan, np.float32)
    for row, (x, a) in enumerate(images):
        features[row, : len(a)], prior[row, : len(a)] = x, a
    return features, prior, counts


# ── Implementations ──────────────────────────────────────────────────────────


def by_pytorch(features: np.ndarray, prior: np.ndarray, counts: np.ndarray, *share: int, **options: Any) -> np.ndarray:
    kept = token_select(*map(torch.from_numpy, (features, prior, counts)), *share, **options)
    assert kept.dtype == torch.int64
    return kept.numpy()


def by_numpy(features: np.ndarray, prior: np.ndarray, counts: np.ndarray, *share: int, **options: Any) -> np.ndarray:
    kept = reference.token_select(features, prior, counts, *share, **options)
    assert kept.dtype == np.int64
    return kept


def by_onnx(
    features: np.ndarray,
    prior: np.ndarray,
    counts: np.ndarray,
    numerator: int,
    denominator: int,
    pool_factor: float = 2.0,
    **options: Any,
) -> np.ndarray:
    attributes = {"keep_numerator": numerator, "keep_denominator": denominator, "pool_factor": float(pool_factor)}
    inputs = {"features": features, "prior": prior, "counts": counts}
    return run_operator("TokenSelect", inputs, {**attributes, **options}, (np.int64, 2))


IMPLEMENTATIONS: dict[str, Callable[..., np.ndarray]] = {"pytorch": by_pytorch, "onnx": by_onnx, "numpy": by_numpy}


def run_operator(
    name: str, inputs: dict[str, np.ndarray], attributes: dict[str, float], output: tuple[type, int]
) -> np.ndarray:
    """One of the package's operators alone in ONNX Runtime; `output` is its type and rank, all extents are dynamic."""
    signature = tuple((key, value.dtype.type, value.ndim) for key, value in inputs.items())
    session = _session(name, signature, tuple(attributes.items()), output)
    (result,) = session.run(None, inputs)
    assert (result.dtype, result.ndim) == (np.dtype(output[0]), output[1])
    return result


def operator_model(name: str, signature: Any, attributes: Any, output: tuple[type, int]) -> onnx.ModelProto:
    operator.register_schemas()
    node = onnx.helper.make_node(name, [key for key, *_ in signature], ["out"], domain="infoprune", **dict(attributes))

    def value(key: str, kind: type, rank: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(key, TYPES[kind], [f"{key}_{axis}" for axis in range(rank)])

    graph = onnx.helper.make_graph([node], "one", [value(*entry) for entry in signature], [value("out", *output)])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("infoprune", 1)]
    model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    operator.attach_bodies(model)
    return ir.serde.serialize_model(model)


@cache
def _session(name: str, signature: Any, attributes: Any, output: tuple[type, int]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = operator_model(name, signature, attributes, output)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
