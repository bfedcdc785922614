"""The package's two operators as ONNX functions: the same answers as PyTorch and NumPy, on good input and bad."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selections import (
    IMPLEMENTATIONS,
    KINDS,
    by_numpy,
    by_onnx,
    by_pytorch,
    closest_race,
    image,
    operator_model,
    padded,
    run_operator,
    vectors,
)

from infoprune_export.export import operator
from infoprune_export.models.attention import received_attention
from infoprune_export.tokens.reference import literal_selection, replay
from infoprune_export.tokens.select import keep_count

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=25)
Select = Callable[..., np.ndarray]


@pytest.fixture(params=IMPLEMENTATIONS)
def select(request: pytest.FixtureRequest) -> Select:
    return IMPLEMENTATIONS[request.param]


def one(features: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch of one image."""
    return features[None], prior[None], np.array([len(prior)])


# ── The same choice ──────────────────────────────────────────────────────────


@REPEATABLE
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([(1, 9, 8.0), (1, 2, 2.0), (2, 3, 1.25), (1, 1, 1.0)])
)
def test_all_implementations_equal_algorithm_1_where_no_race_is_close(seed, tokens, setting):
    numerator, denominator, factor = setting
    features, prior = image(seed, tokens, 64)
    assume(closest_race(features, prior, keep_count(tokens, numerator, denominator), factor) > 1e-4)
    expected = sorted(literal_selection(features, prior, numerator, denominator, factor))
    for name, select in IMPLEMENTATIONS.items():
        kept = select(*one(features, prior), numerator, denominator, pool_factor=factor)
        assert kept.tolist() == [expected], name


@pytest.mark.parametrize(
    ("tokens", "dim", "numerator", "denominator", "factor"),
    [
        (50, 80, 2, 5, 2.0),
        (200, 256, 3, 4, 1.25),
        (1, 4, 1, 9, 2.0),
        (64, 100, 1, 1, 1.0),
        (130, 140, 1, 1, 1.5),
        (300, 256, 1, 3, 9.0),
    ],
    ids=["one block", "three blocks", "one token", "all of one block", "all of three blocks", "unlikely pivots"],
)
def test_all_implementations_equal_algorithm_1(select, tokens, dim, numerator, denominator, factor):
    images = []
    for seed in range(3):
        rng = np.random.default_rng(1000 * tokens + seed)
        images.append((rng.normal(size=(tokens, dim)).astype(np.float32), rng.random(tokens, np.float32)))
    kept = select(*padded(images), numerator, denominator, pool_factor=factor)
    for row, (features, prior) in zip(kept, images, strict=True):
        assert row.tolist() == sorted(literal_selection(features, prior, numerator, denominator, factor))


@pytest.mark.parametrize("width", [48, 400], ids=["fewer dimensions than pivots", "more"])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_replay_without_a_bad_step(select, kind, width):
    """More pivots than two blocks, and a pool of more tokens than have their rows made in advance."""
    features = vectors(kind, np.random.default_rng(7), 300, width).astype(np.float32)
    prior = image(7, 300, 1)[1]
    kept = select(*one(features, prior), 1, 2, pool_factor=2.0)[0]
    assert len(set(kept.tolist())) == 150
    assert replay(features, prior, kept, 2.0) <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_features_are_widened_and_chosen_from_alike(kind):
    features = vectors(kind, np.random.default_rng(2), 200, 96)
    features, prior = (features / np.abs(features).max()).astype(np.float16), image(2, 200, 1)[1]
    wide = by_pytorch(*one(features.astype(np.float32), prior), 1, 3, pool_factor=8.0)
    for name, select in IMPLEMENTATIONS.items():
        kept = select(*one(features, prior), 1, 3, pool_factor=8.0)
        assert replay(features, prior, kept[0], 8.0) <= 1e-2, name
        if select is not by_pytorch and closest_race(features, prior, 67, 8.0) <= 1e-4:
            continue
        assert kept.tolist() == wide.tolist(), name


def test_temperature_exponent_and_epsilon_reach_every_implementation(select):
    features, prior = image(1, 24, 16)
    answers = set()
    for options in ({}, {"temperature": 0.05}, {"exponent": 4.0}, {"epsilon": 0.3}):
        kept = select(*one(features, prior), 1, 3, pool_factor=3.0, **options)[0]
        assert kept.tolist() == sorted(literal_selection(features, prior, 1, 3, 3.0, **options))
        answers.add(tuple(kept.tolist()))
    assert len(answers) == 4  # every setting matters on this image


# ── Degenerate input ─────────────────────────────────────────────────────────


def degenerate() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    features, prior = image(0, 40, 16)
    yield "zeros", np.zeros_like(features), prior
    yield "duplicates of one", np.repeat(features[:1], 40, 0), prior
    yield "every token twice", np.repeat(features[:20], 2, 0), np.repeat(prior[:20], 2)
    yield "constant prior", features, np.full_like(prior, 0.5)
    yield "all equal", np.ones_like(features), np.full_like(prior, 0.5)
    yield "rank 3", np.round(3 * features[:, :3]) @ np.round(3 * features[:3]), prior
    yield "rank 1", features[:, :1] * features[:1], prior
    for what, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        spoilt, spoilt_prior = features.copy(), prior.copy()
        spoilt[3, 1], spoilt[7], spoilt_prior[[4, 9]] = value, value, value
        yield f"{what} features", spoilt, prior
        yield f"{what} prior", features, spoilt_prior
        yield f"all {what}", np.full_like(features, value), np.full_like(prior, value)
    yield "largest fp32", np.full_like(features, 3e38) * np.sign(features), prior
    yield "smallest fp32", 1e-38 * features, prior


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 2), (1, 40), (1, 1)], ids=["half", "one", "all"])
@pytest.mark.parametrize("fault", [name for name, *_ in degenerate()])
def test_implementations_agree_on_degenerate_input(fault, numerator, denominator):
    batch = next(one(features, prior) for name, features, prior in degenerate() if name == fault)
    kept = {name: select(*batch, numerator, denominator).tolist() for name, select in IMPLEMENTATIONS.items()}
    assert kept["onnx"] == kept["numpy"] == kept["pytorch"]
    (row,) = kept["pytorch"]
    assert row == sorted(set(row))
    assert len(row) == 40 * numerator // denominator
    assert 0 <= row[0] <= row[-1] < 40


def test_zeros_are_kept_by_prior_and_equal_tokens_by_place(select):
    prior = np.array([0.1, 0.9, 0.3, 0.8, 0.2], np.float32)
    assert select(*one(np.zeros((5, 4), np.float32), prior), 2, 5).tolist() == [[1, 3]]
    many = select(*one(np.ones((600, 4), np.float32), np.zeros(600, np.float32)), 1, 2)
    assert many.tolist() == [list(range(300))]


def test_what_the_greedy_step_leaves_open_is_filled_by_prior(select):
    features = np.zeros((6, 4), np.float32)
    features[0, 0] = 1.0
    prior = np.array([0.0, 0.1, 0.5, 0.2, 0.4, 0.3], np.float32)
    assert select(*one(features, prior), 3, 6).tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("select", [by_onnx, by_numpy])
def test_no_more_are_chosen_than_there_are_dimensions(select):
    """Without a threshold, rounding errors would go on."""
    features, prior = image(5, 40, 6)
    chosen = literal_selection(features, prior, 6, 40, 40.0)
    rest = [i for i in np.argsort(-prior).tolist() if i not in chosen][:14]
    assert select(*one(features, prior), 1, 2, pool_factor=40.0, epsilon=0.0).tolist() == [sorted(chosen + rest)]


def test_one_token_and_one_of_one(select):
    assert select(*one(*image(0, 1, 8)), 1, 9).tolist() == [[0]]
    features = np.array([[1.0, 0], [0, 3.0], [2.0, 0]], np.float32)
    assert select(*one(features, np.zeros(3, np.float32)), 1, 3, pool_factor=3.0).tolist() == [[1]]


# ── Images of unequal size ───────────────────────────────────────────────────


@pytest.mark.parametrize("sizes", [(150, 1, 80, 0), (70, 70), (1, 2, 3), (0, 0, 5), (0,), (200, 199)])
def test_a_padded_batch_equals_each_image_alone(select, sizes):
    """Padding is NaN in `padded`, so that whatever looks at it shows."""
    images = [image(seed, size, 40) for seed, size in enumerate(sizes)]
    width = max(*sizes, 3)
    kept = select(*padded([*images, image(9, width, 40)]), 3, 7, pool_factor=2.0)
    assert kept.shape == (len(sizes) + 1, keep_count(width, 3, 7))
    for row, size in enumerate(sizes):
        keep = keep_count(size, 3, 7)
        assert (kept[row, keep:] == -1).all()
        if size:
            alone = select(*one(*images[row]), 3, 7, pool_factor=2.0)
            assert kept[row, :keep].tolist() == alone[0].tolist()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 0.0, 1e30])
def test_garbage_in_the_padding_changes_nothing(select, garbage):
    features, prior, counts = padded([image(0, 90, 24), image(1, 33, 24), image(2, 1, 24)])
    expected = select(features, prior, counts, 1, 2)
    outside = np.arange(90) >= counts[:, None]
    features[outside], prior[outside] = garbage, garbage
    assert select(features, prior, counts, 1, 2).tolist() == expected.tolist()


@REPEATABLE
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=1, max_size=4), st.booleans())
def test_implementations_agree_on_unequal_images_with_ties(seed, sizes, coarse):
    """Coarse features repeat and are of low rank; the longest image does not fill the batch."""
    images = [image(seed + row, size, 6 if coarse else 50) for row, size in enumerate([*sizes, max(*sizes, 1) + 3])]
    if coarse:
        images = [(np.round(features), np.round(4 * prior)) for features, prior in images]
    features, prior, counts = padded(images)
    counts[-1] -= 3
    kept = {name: select(features, prior, counts, 1, 2, pool_factor=1.5) for name, select in IMPLEMENTATIONS.items()}
    assert kept["onnx"].tolist() == kept["numpy"].tolist() == kept["pytorch"].tolist()
    for row, count in zip(kept["onnx"], counts, strict=True):
        own = row[row >= 0]
        assert len(own) == keep_count(int(count), 1, 2)
        assert (own < count).all()
        assert len(set(own.tolist())) == len(own)


# ── Attention received ───────────────────────────────────────────────────────


def attention_inputs(rows: int, size: int, dtype: type = np.float32, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    weight = rng.random((batch, rows), np.float32)
    return {
        "query": (3 * rng.normal(size=(batch, rows, 3, 8))).astype(dtype),
        "key": rng.normal(size=(batch, size, 3, 8)).astype(dtype),
        "row_weight": weight / weight.sum(1, keepdims=True),
        "key_bias": np.zeros((batch, size), np.float32),
    }


def received_by_onnx(inputs: dict[str, np.ndarray], scale: float = 8**-0.5) -> np.ndarray:
    return run_operator("ReceivedAttention", inputs, {"scale": scale}, (np.float32, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
def test_received_attention_equals_pytorch(rows, dtype):
    inputs = attention_inputs(rows, 45, dtype)
    expected = received_attention(*map(torch.from_numpy, inputs.values()), 8**-0.5).numpy()
    np.testing.assert_allclose(received_by_onnx(inputs), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [60, 200])
def test_received_attention_of_padded_segments_is_that_of_each_alone(rows):
    inputs = attention_inputs(rows, rows)
    sizes = (rows, rows // 3)
    for row, size in enumerate(sizes):
        inputs["row_weight"][row] = np.where(np.arange(rows) < size, 1 / size, 0)
        inputs["key_bias"][row, size:] = np.finfo(np.float32).min
    received = received_by_onnx(inputs)
    for row, size in enumerate(sizes):
        own = {name: value[row : row + 1, :size] for name, value in inputs.items()}
        np.testing.assert_allclose(received[row, :size], received_by_onnx(own)[0], rtol=2e-5, atol=1e-8)
        assert (received[row, size:] == 0).all()


# ── The functions ────────────────────────────────────────────────────────────


def loops(nodes: Iterator[onnx.NodeProto] | list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        if node.op_type == "Loop":
            yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from loops(attribute.g.node)


@pytest.mark.parametrize(("name", "count"), [("TokenSelect", 2), ("ReceivedAttention", 1)])
def test_loops_have_trip_counts_only_and_no_scan_outputs(name, count):
    (body,) = (function for function in operator.function_bodies() if function.name == name)
    found = list(loops(list(body.node)))
    assert len(found) == count
    for loop in found:
        graph = loop.attribute[0].g
        trips, condition, *carried = loop.input
        assert trips
        assert condition == ""
        assert len(carried) == len(loop.output) == len(graph.input) - 2 == len(graph.output) - 1
        # The condition that a body must return is the one it was given.
        (last,) = (node for node in graph.node if graph.output[0].name in node.output)
        assert (last.op_type, list(last.input)) == ("Identity", [graph.input[1].name])


@pytest.mark.parametrize("name", ["TokenSelect", "ReceivedAttention"])
def test_what_loops_carry_comes_from_operators_that_keep_its_shape(name):
    (body,) = (function for function in operator.function_bodies() if function.name == name)
    carried = []
    for loop in loops(list(body.node)):
        graph = loop.attribute[0].g
        made_by = {output: node for node in graph.node for output in node.output}
        for value in graph.output[1:]:
            node = made_by[value.name]
            while node.op_type == "Identity":
                node = made_by[node.input[0]]
            carried.append(node.op_type)
    assert (
        sorted(carried)
        == {
            "TokenSelect": ["Loop", "ScatterElements", "ScatterND", "Sub"],
            "ReceivedAttention": ["Add"],
        }[name]
    )


def test_only_the_bodies_that_a_graph_uses_are_attached():
    names = [
        ("query", np.float32, 4),
        ("key", np.float32, 4),
        ("row_weight", np.float32, 2),
        ("key_bias", np.float32, 2),
    ]
    model = operator_model("ReceivedAttention", tuple(names), (("scale", 0.5),), (np.float32, 2))
    assert [function.name for function in model.functions] == ["ReceivedAttention"]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.exhaustive
def test_bodies_have_the_same_bytes_in_every_process():
    code = (
        "from infoprune_export.export.operator import function_bodies; import sys\n"
        "sys.stdout.buffer.write(b''.join(body.SerializeToString(deterministic=True) for body in function_bodies()))"
    )
    # Any fixed seed but 0 is as good as the random one of this process.
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout
    assert there == b"".join(body.SerializeToString(deterministic=True) for body in operator.function_bodies())


def test_registering_the_schemas_twice_is_no_error():
    operator.register_schemas()
    operator.register_schemas()
    assert onnx.defs.get_schema("ReceivedAttention", domain=operator.DOMAIN).since_version == operator.VERSION
    by_onnx(*one(*image(0, 4, 4)), 1, 2)
    assert by_numpy(*one(*image(0, 4, 4)), 1, 2).shape == (1, 2)
