"""Which steps a recipe's decoder section becomes, and what the published methods compute besides attention."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from families import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.vlm import VisualTokens, answer
from infoprune_export.recipe import DecoderSpec
from infoprune_export.tokens.decoder import Trace
from infoprune_export.tokens.decoder_methods import decoding_of, recycle, steps_of, text_raters
from infoprune_export.tokens.steps import Asked, Recycling, Step, last_token, tokens_per_layer

METHODS = ("infoprune", "random", "fastv", "pyramiddrop", "sparsevlm")


def spec(method: str, keep: str = "1/3", layer: int | str = "auto") -> DecoderSpec:
    return DecoderSpec(method=method, keep_ratio=keep, layer=layer)


def plain(steps: list[Step]) -> list[tuple[int, Fraction]]:
    return [(step.layer, step.keep) for step in steps]


# ── Steps ────────────────────────────────────────────────────────────────────


def test_none_has_no_steps():
    assert steps_of(spec("none"), 32) == []


def test_infoprune_and_its_control_drop_behind_the_same_layer():
    assert steps_of(spec("infoprune", layer=15), 32) == [Step(15, Fraction(1, 3), last_token)]
    assert steps_of(spec("infoprune"), 32, layer=12) == [Step(12, Fraction(1, 3), last_token)]
    assert steps_of(spec("infoprune", layer=3), 32, layer=12)[0].layer == 3
    assert steps_of(spec("random"), 32, layer=12) == [Step(12, Fraction(1, 3), None)]


@pytest.mark.parametrize(("depth", "layer"), [(32, 1), (40, 1), (28, 1), (80, 2), (4, 0), (2, 0)])
def test_fastv_ranks_in_the_second_of_32_layers(depth: int, layer: int):
    assert steps_of(spec("fastv", "1/2"), depth) == [Step(layer, Fraction(1, 2), last_token)]
    assert tokens_per_layer(steps_of(spec("fastv", "1/2"), 32), 32, 576) == [576] * 2 + [288] * 30


def test_fastv_takes_another_layer():
    assert plain(steps_of(spec("fastv", layer=2), 32)) == [(2, Fraction(1, 3))]


def test_pyramiddrop_shrinks_to_an_eighth_in_three_stages_of_equal_length():
    steps = steps_of(spec("pyramiddrop", "1/2"), 32)
    assert tokens_per_layer(steps, 32, 576) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert tokens_per_layer(steps_of(spec("pyramiddrop", "1/2"), 4), 4, 64) == [64, 32, 16, 8]
    assert {step.queries for step in steps} == {last_token}


@pytest.mark.parametrize(("depth", "counts"), [(2, [64, 8]), (3, [64, 16, 8])])
def test_pyramiddrop_of_shallow_models_keeps_the_last_of_stages_that_coincide(depth: int, counts: list[int]):
    assert tokens_per_layer(steps_of(spec("pyramiddrop", "1/2"), depth), depth, 64) == counts


@pytest.mark.parametrize("keep", ["64/576", "128/576", "192/576", "1/4", "1/2", "0.9"])
@pytest.mark.parametrize("depth", [28, 32, 40])
def test_sparsevlm_meets_its_average(keep: str, depth: int):
    steps = steps_of(spec("sparsevlm", keep), depth)
    wanted = float(spec("sparsevlm", keep).keep_ratio)
    # Rounding up and one more cluster a stage are the rest.
    assert 0 <= sum(tokens_per_layer(steps, depth, 5760)) / depth / 5760 - wanted < 0.002


def test_sparsevlm_follows_the_proportions_of_the_nearest_published_budget():
    for keep, proportions in (("64/576", (66, 30, 17)), ("128/576", (303, 110, 36)), ("192/576", (300, 200, 110))):
        steps = steps_of(spec("sparsevlm", keep), 32)
        assert [step.layer for step in steps] == [2, 6, 15]
        scale = float(steps[0].keep) / proportions[0]
        assert [float(step.keep) / scale for step in steps] == pytest.approx(proportions, rel=0.02)
        assert all(step.queries is text_raters and step.recycling is not None for step in steps)


def test_sparsevlm_of_everything_drops_nothing():
    assert tokens_per_layer(steps_of(spec("sparsevlm", "1"), 32), 32, 576) == [576] * 32


def test_sparsevlm_below_the_cost_of_its_full_layers_is_refused():
    with pytest.raises(InfopruneError, match=r"1/12 with sparsevlm: the first 3 of 32 layers.*below 0\.09"):
        steps_of(spec("sparsevlm", "1/12"), 32)
    with pytest.raises(InfopruneError, match="first 1 of 4 layers"):
        steps_of(spec("sparsevlm", "1/4"), 4)


@pytest.mark.parametrize("method", ["infoprune", "random"])
def test_a_layer_that_nobody_determined_is_refused(method: str):
    with pytest.raises(InfopruneError, match="no layer was determined"):
        steps_of(spec(method), 32)


@pytest.mark.parametrize("method", ["pyramiddrop", "sparsevlm"])
def test_a_layer_for_a_method_of_several_is_refused(method: str):
    with pytest.raises(InfopruneError, match=f"layer = 3 with method {method}.*auto"):
        steps_of(spec(method, layer=3), 32)


@pytest.mark.parametrize("method", ["infoprune", "random", "fastv"])
def test_the_last_layer_is_refused(method: str):
    with pytest.raises(InfopruneError, match="use 0 to 30"):
        steps_of(spec(method, layer=31), 32)


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_is_refused(method: str):
    with pytest.raises(InfopruneError, match="1 in all.*method: none|cannot be below"):
        steps_of(spec(method, "1/2"), 1, layer=0)


@given(
    method=st.sampled_from(METHODS),
    keep=st.fractions(Fraction(1, 2), 1, max_denominator=40),
    depth=st.integers(2, 40),
    tokens=st.integers(0, 700),
)
@settings(max_examples=120, derandomize=True, deadline=None)
def test_tokens_per_layer_never_grow_and_never_run_out(method: str, keep: Fraction, depth: int, tokens: int):
    if method == "sparsevlm":
        keep = max(keep, Fraction(3, 4))
    steps = steps_of(DecoderSpec(method=method, keep_ratio=keep), depth, layer=depth // 2 - 1)
    counts = tokens_per_layer(steps, depth, tokens)
    assert len(counts) == depth
    assert counts[0] == tokens
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= min(1, tokens)
    if keep == 1:
        assert set(counts) == {tokens}


@pytest.mark.parametrize(("tokens", "kept"), [(576, 192), (577, 193), (1, 1), (3, 1), (0, 0)])
def test_a_third_is_rounded_up_in_integers(tokens: int, kept: int):
    assert Step(0, Fraction(1, 3)).survivors(tokens, tokens) == (kept, 0)


def test_shares_are_of_what_entered_the_language_model():
    assert Step(2, Fraction(1, 4)).survivors(64, 40) == (16, 0)
    assert Step(2, Fraction(1, 2)).survivors(64, 20) == (20, 0)
    assert Step(2, Fraction(1, 4), recycling=Recycling(lambda n: n // 8, recycle)).survivors(64, 40) == (16, 3)


# ── SparseVLM ────────────────────────────────────────────────────────────────


def asked(rows: list[str], embeds: Tensor) -> Asked:
    letters = [list(row) for row in rows]
    visual = torch.tensor([[letter == "i" for letter in row] for row in letters])
    text = torch.tensor([[letter == "t" for letter in row] for row in letters])
    return Asked(embeds, visual, text, torch.tensor([row.rindex("t") for row in rows]))


def test_raters_are_what_visual_tokens_resemble_more_than_the_average():
    embeds = torch.randn(2, 10, 4, generator=seeded(0))
    embeds[:, 1] = 3 * embeds[:, 3]  # text in front of the image, most alike of all
    prompt = asked([".tiiittttt", "tttiitttt."], embeds)
    raters = text_raters(prompt)
    for row, (images, texts) in enumerate((((2, 3, 4), (5, 6, 7, 8, 9)), ((3, 4), (5, 6, 7, 8)))):
        relevance = dict.fromkeys(texts, 0.0)
        for image in images:
            products = {text: float(embeds[row, image] @ embeds[row, text]) for text in texts}
            total = sum(torch.tensor(value).exp().item() for value in products.values())
            for text in texts:
                relevance[text] += torch.tensor(products[text]).exp().item() / total / len(images)
        mean = sum(relevance.values()) / len(texts)
        assert raters[row].nonzero()[:, 0].tolist() == [text for text in texts if relevance[text] > mean]


def test_raters_of_a_row_without_choice_are_its_last_token():
    embeds = torch.ones(4, 5, 3)
    rows = ["tiitt", "tttt.", "iiiit", "ttiit"]
    assert text_raters(asked(rows, embeds)).nonzero().tolist() == [[0, 4], [1, 3], [2, 4], [3, 4]]


def clusters(*centres: tuple[float, float], size: int) -> Tensor:
    noise = 0.05 * torch.randn(len(centres) * size, 2, generator=seeded(0))
    return torch.tensor(centres).repeat_interleave(size, dim=0) + noise


def test_recycling_finds_well_separated_clusters():
    # 130 dropped: the best 40 become 5 clusters of 8.
    points = clusters((0, 0), (9, 0), (0, 9), (9, 9), (5, 4), size=8)
    tokens = torch.cat([torch.full((90, 2), 50.0), points])
    scores = torch.cat([torch.zeros(90), torch.ones(40)])
    means, centres = recycle(tokens, scores)
    # floor(.3 * 130) + 1 = 40 candidates
    assert sorted(((centres - 90) // 8).tolist()) == [0, 1, 2, 3, 4]
    for mean, centre in zip(means, centres, strict=True):
        number = int(centre - 90) // 8
        torch.testing.assert_close(mean, points[8 * number : 8 * number + 8].mean(0))


@given(count=st.integers(1, 120), same=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_recycling_returns_as_many_distinct_centres_as_announced(count: int, same: bool, seed: int):
    tokens = torch.ones(count, 6) if same else torch.randn(count, 6, generator=seeded(seed))
    scores = torch.rand(count, generator=seeded(seed))
    recycling = steps_of(spec("sparsevlm"), 32)[0].recycling
    assert recycling is not None
    means, centres = recycling.merge(tokens, scores)
    assert len(means) == len(centres) == recycling.count(count) == (count * 3 // 10 + 1) // 10 + 1 <= count
    assert len(set(centres.tolist())) == len(centres)
    assert means.isfinite().all()
    best = set(scores.argsort(descending=True)[: count * 3 // 10 + 1].tolist())
    assert set(centres.tolist()) <= best
    if len(centres) == 1:
        torch.testing.assert_close(means[0], tokens[sorted(best)].mean(0))


def test_recycling_keeps_the_dtype():
    assert recycle(torch.randn(30, 4).bfloat16(), torch.rand(30))[0].dtype == torch.bfloat16


# ── On the testbed ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_with_the_tokens_it_says(trained_vlm, scene_split, method: str):
    samples = scene_split.validation[:2]
    with torch.no_grad():
        features = trained_vlm.tower.features_of(inputs_of(trained_vlm, samples))
        layouts = trained_vlm.tower.layouts(inputs_of(trained_vlm, samples))
    visual = VisualTokens.of(list(features), layouts)
    traces: list[Trace] = []
    section = spec(method, "1/2")
    decoder = decoding_of(section, trained_vlm.model, 1, on_trace=traces.append)
    questions = [sample.questions[0].text for sample in samples]
    answers = answer(trained_vlm, visual, questions, decoder=decoder)
    assert all(answers)
    expected = tokens_per_layer(steps_of(section, 4, 1), 4, 64)
    assert traces[0].per_layer.tolist() == [expected, expected]
    assert min(expected) < 64


def test_no_method_is_no_decoding(trained_vlm):
    assert decoding_of(spec("none"), trained_vlm.model) is None


def test_random_decoding_is_seeded_and_goes_on_drawing(trained_vlm, scene_split):
    samples = scene_split.validation[:1]
    with torch.no_grad():
        features = trained_vlm.tower.features_of(inputs_of(trained_vlm, samples))
        layouts = trained_vlm.tower.layouts(inputs_of(trained_vlm, samples))
    visual = VisualTokens.of(list(features), layouts)
    kept = []
    for seed in (0, 0, 1):
        traces: list[Trace] = []
        decoder = decoding_of(spec("random"), trained_vlm.model, 1, seed=seed, on_trace=traces.append)
        for _ in range(2):
            answer(trained_vlm, visual, [samples[0].questions[0].text], decoder=decoder)
        kept.append([trace.kept[0][0].tolist() for trace in traces])
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][0] != kept[0][1]
