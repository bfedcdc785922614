"""Rows of attention against the whole matrix, and the registry that shows them."""

from __future__ import annotations

import pytest
import torch
from families import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from infoprune_export.errors import InfopruneError
from infoprune_export.tokens.watch import attention_rows, watched


def whole(query: Tensor, key: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """[B, Q, K] in float64, head by head."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        logits = query[:, head].double() @ key[:, head // groups].double().mT * scaling
        heads.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1))
    return torch.stack(heads).mean(0)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    length=st.integers(1, 9),
    kind=st.sampled_from(["causal", "bool", "additive", "shared"]),
    data=st.data(),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_rows_equal_the_whole_matrix(batch, groups, kv_heads, length, kind, data):
    generator = seeded(data.draw(st.integers(0, 99)))
    query = torch.randn(batch, groups * kv_heads, length, 6, generator=generator)
    key = torch.randn(batch, kv_heads, length, 6, generator=generator)
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)
    mask = None
    if kind != "causal":
        hidden = torch.rand(1 if kind == "shared" else batch, length, length, generator=generator) < 0.3
        allowed = allowed & ~(hidden & ~torch.eye(length, dtype=torch.bool))
        mask = allowed[: len(hidden), None]
    if kind == "additive":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    rows = torch.randint(length, (batch, data.draw(st.integers(1, 4))), generator=generator)
    actual = attention_rows(query, key, mask, 0.4, rows)
    expected = whole(query, key, allowed, 0.4).gather(1, rows[..., None].expand(-1, -1, length))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)


def test_half_precision_is_computed_in_single():
    query, key = (torch.randn(1, 2, 5, 64, generator=seeded(i)).half() * 40 for i in range(2))
    allowed = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    rows = torch.arange(5)[None]
    torch.testing.assert_close(
        attention_rows(query, key, None, 1.0, rows).double(), whole(query, key, allowed, 1.0), atol=1e-6, rtol=1e-5
    )


def test_a_query_that_may_see_nothing_gives_no_nan():
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[[[False, False, False], [True, True, False], [True, True, True]]]])
    assert attention_rows(query, key, mask, 1.0, torch.tensor([[0, 2]])).isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_watched_layers_show_what_their_attention_computes_from(attention: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaModel(config).eval()
    ids, mask = torch.randint(9, (2, 7), generator=seeded(0)), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    seen: dict[int, Tensor] = {}
    rows = torch.tensor([[6, 3], [6, 0]])

    def watch(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        seen[len(seen)] = attention_rows(query, key, mask, scaling, rows)

    with torch.no_grad():
        plain = model(ids, attention_mask=mask).last_hidden_state
        with watched(model, {0: watch, 2: watch}):
            shown = model(ids, attention_mask=mask).last_hidden_state
        after = model(ids, attention_mask=mask).last_hidden_state
        model.config._attn_implementation = "eager"
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert torch.equal(plain, shown)
    assert torch.equal(plain, after)
    assert list(seen) == [0, 1]
    for number, layer in enumerate((0, 2)):
        expected = weights[layer].mean(1).gather(1, rows[..., None].expand(-1, -1, 7))
        torch.testing.assert_close(seen[number], expected, atol=1e-6, rtol=1e-5)


def test_two_models_are_watched_apart():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    models = [LlamaModel(config.__class__(**config.to_dict())).eval() for _ in range(2)]
    counts = [0, 0]

    def watcher(number: int):
        def watch(*_: object) -> None:
            counts[number] += 1

        return watch

    with watched(models[0], {0: watcher(0)}), watched(models[1], {0: watcher(1)}):
        models[1](torch.tensor([[1, 2]]))
    models[0](torch.tensor([[1, 2]]))
    assert counts == [0, 1]


def test_an_unknown_attention_is_named():
    config = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=16, num_hidden_layers=1)
    model = LlamaModel(config)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InfopruneError, match="'flash_attention_2'.*sdpa or eager"):
        watched(model, {}).__enter__()
