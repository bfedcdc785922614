"""Token selection against other algorithms for the same greedy choice, on one CPU thread.

Column-pivoted QR of Z^T, Gram-Schmidt with cached residuals and Algorithm 1 as it is printed choose the same tokens in
exact arithmetic, so only their time differs. Every method starts from features and prior: its time counts pool and Z.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from infoprune_export.engine.onnxruntime import open_session
from infoprune_export.export import operator
from infoprune_export.measure.latency import interleaved
from infoprune_export.recipe import TokensSpec, load_target
from infoprune_export.tokens import reference
from infoprune_export.tokens.select import EPSILON, token_select, weighting

SIZES = ((576, 64), (2880, 640), (16384, 1820))
"""Tokens, all of them in the pool, and how many are kept: of LLaVA-1.5, of LLaVA-NeXT, and of a large Qwen image."""
WIDTH = 1024
OURS = ("PyTorch", "ONNX", "NumPy")
PATIENCE = 60.0
"""Seconds that a method may take for all its rounds; one that takes longer is timed once."""
_LITERAL_LIMIT = 2e12
"""Multiply-adds of the printed algorithm, M D T^2, up to which it is run: about a minute."""
_INPUTS = ("features", "prior", "counts")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Selector = Callable[[], Indices]


def select_speed(
    sizes: Sequence[tuple[int, int]], rounds: int, track: Callable[[str, int], Callable[[int], None]]
) -> list[dict[str, Any]]:
    """A row for every size and method, in a process of its own, where all libraries have one thread.

    The methods of a size take turns, `rounds` times, after one call each to warm up. ``milliseconds`` is the median,
    ``ratio`` this over the medians of `OURS`, ``overlap`` the share of kept tokens that our NumPy form keeps too;
    they are None, and ``note`` says why, where a method was left out.
    """
    advance, rows = track("token selection", len(sizes)), []
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    # BLAS libraries read this once, when they are loaded.
    os.environ.update(_ONE_THREAD)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            for tokens, kept in sizes:
                rows += pool.submit(measure, tokens, kept, rounds).result()
                advance(1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return rows


def measure(tokens: int, kept: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size, in this process."""
    torch.set_num_threads(1)
    spec = TokensSpec()
    features, attention = picture(tokens)
    weights, temperature = weighting(torch.from_numpy(attention), spec)
    prior = weights.numpy()
    # So many tokens are in the pool that it holds all of them.
    settings = (float(tokens), temperature, spec.exponent)
    batch = features[None], prior[None], np.array([tokens])
    tensors = [torch.from_numpy(value) for value in batch]
    session, feeds = _session(kept, tokens, settings), dict(zip(_INPUTS, batch, strict=True))
    z_of = partial(reference.scaled_pool, features, prior, kept, *settings, np.float32)
    methods: dict[str, Selector | str] = {
        "PyTorch": lambda: token_select(*tensors, kept, tokens, *settings)[0].numpy(),
        "ONNX": lambda: session.run(None, feeds)[0][0],
        "NumPy": lambda: reference.token_select(*batch, kept, tokens, *settings)[0],
        "Algorithm 1, float64": lambda: np.array(
            reference.literal_selection(features, prior, kept, tokens, *settings), np.int64
        ),
        "Gram-Schmidt, PyTorch": lambda: _chosen(z_of(), gram_schmidt, kept),
        "pivoted QR, SciPy": lambda: _chosen(z_of(), pivoted_qr, kept),
    }
    if (work := tokens * WIDTH * min(kept, WIDTH) ** 2) > _LITERAL_LIMIT:
        methods["Algorithm 1, float64"] = f"M D T^2 = {work:.1e} multiply-adds take minutes"
    if importlib.util.find_spec("scipy") is None:
        methods["pivoted QR, SciPy"] = "SciPy is not installed"
    return [{"tokens": tokens, "kept": kept, "width": WIDTH, **row} for row in _timed(methods, rounds)]


def picture(tokens: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Unit-length features [N, D] whose neighbours in the raster are alike, and a log-normal attention [N]."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((tokens, WIDTH), np.float32)
    for place in range(1, tokens):
        features[place] = 0.9 * features[place - 1] + 0.4 * features[place]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    attention = np.exp(rng.standard_normal(tokens, np.float32))
    return features, attention / attention.sum()


def _timed(methods: Mapping[str, Selector | str], rounds: int) -> list[dict[str, Any]]:
    """Medians of the methods that run, and why the others do not."""
    notes = {name: method for name, method in methods.items() if isinstance(method, str)}
    calls = {name: method for name, method in methods.items() if not isinstance(method, str)}
    kept, times = {}, {}
    for name, call in list(calls.items()):
        start = time.perf_counter()
        kept[name] = set(call().tolist())
        seconds = time.perf_counter() - start
        if seconds * rounds > PATIENCE:
            times[name] = np.array([1000 * seconds])
            notes[name] = f"timed once: {rounds} rounds take more than {PATIENCE:.0f} s"
            del calls[name]
    times |= interleaved(calls, rounds=rounds, warmup=0)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return [
        {
            "method": name,
            "milliseconds": medians.get(name),
            "rounds": len(times.get(name, ())),
            "ratio": {ours: medians[name] / medians[ours] for ours in OURS} if name in medians else None,
            "overlap": len(kept[name] & kept["NumPy"]) / len(kept["NumPy"]) if name in kept else None,
            "note": notes.get(name, ""),
        }
        for name in methods
    ]


def _session(numerator: int, denominator: int, settings: tuple[float, float, float]) -> Any:
    """ONNX Runtime on a graph with nothing but the operator and its body."""
    operator.register_schemas()
    node = onnx.helper.make_node(
        "TokenSelect",
        _INPUTS,
        ["indices"],
        domain=operator.DOMAIN,
        keep_numerator=numerator,
        keep_denominator=denominator,
        pool_factor=settings[0],
        temperature=settings[1],
        exponent=settings[2],
    )
    value, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    kinds = (types.FLOAT, ["B", "N", "D"]), (types.FLOAT, ["B", "N"]), (types.INT64, ["B"])
    inputs = [value(name, *kind) for name, kind in zip(_INPUTS, kinds, strict=True)]
    graph = onnx.helper.make_graph([node], "select", inputs, [value("indices", types.INT64, ["B", "T"])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(operator.DOMAIN, operator.VERSION)]
    model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    operator.attach_bodies(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "select.onnx"
        ir.save(model, path)
        return open_session(path, load_target("onnxruntime-cpu"), threads=1)


# ── The others ───────────────────────────────────────────────────────────────


def _chosen(
    pool_and_z: tuple[Indices, NDArray[np.floating]], choose: Callable[[Any, int, float], list[int]], keep: int
) -> Indices:
    """Kept tokens from a method's pivots; what it leaves open is filled in the order of the prior."""
    pool, z = pool_and_z
    pivots = choose(z, keep, EPSILON)
    rest = np.setdiff1d(np.arange(len(pool)), pivots)[: keep - len(pivots)]
    return np.sort(pool[np.concatenate((np.array(pivots, np.int64), rest))])


def gram_schmidt(z: Floats, keep: int, epsilon: float) -> list[int]:
    """Algorithm 1 with cached residuals: a new direction takes its share from every residual, O(T M D)."""
    rows = torch.from_numpy(z)
    residual = rows.square().sum(1)
    threshold = float(epsilon * residual.max())
    basis: Tensor = rows.new_zeros(keep, rows.shape[1])
    pivots: list[int] = []
    for step in range(keep):
        pivot = int(residual.argmax())
        if float(residual[pivot]) <= threshold:
            break
        direction = rows[pivot] - (basis[:step] @ rows[pivot]) @ basis[:step]
        basis[step] = direction / direction.norm()
        residual = residual - (rows @ basis[step]).square()
        pivots.append(pivot)
    return pivots


def pivoted_qr(z: Floats, keep: int, epsilon: float) -> list[int]:
    """LAPACK's Businger-Golub QR of Z^T; it cannot stop at T."""
    linalg: Any = importlib.import_module("scipy.linalg")
    r, pivots = linalg.qr(z.T, mode="r", pivoting=True, check_finite=False)
    energy = np.diag(r)[:keep] ** 2
    return pivots[: int((energy > epsilon * energy[0]).sum())].tolist()


# ── Display ──────────────────────────────────────────────────────────────────


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per size and method; how many times longer than ours it takes."""
    table = Table("tokens", "kept", "method", "ms", *(f"/ {name}" for name in OURS), "overlap", "note")
    for row in rows:
        figures = ["-"] * (len(OURS) + 2)
        if row["milliseconds"] is not None:
            ratios = [f"{row['ratio'][name]:.2f}" for name in OURS]
            figures = [f"{row['milliseconds']:.1f}", *ratios, f"{100 * row['overlap']:.1f}%"]
        table.add_row(str(row["tokens"]), str(row["kept"]), row["method"], *figures, row["note"])
    return table
