"""Pruned language models against whole ones in which dropped tokens are masked by hand, layer by layer."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from decoders import (
    ALL,
    DEPTH,
    FAMILIES,
    HALF,
    LEFT,
    RIGHT,
    THIRD,
    Batch,
    as_lists,
    deepstack,
    generate,
    masked_reference,
    model_of,
    numbers,
    pruned_logits,
)
from families import relative_error, seeded
from torch import Tensor

from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.vlm import VisualTokens, answer, answer_loss
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.decoder import Trace, decoding, pruned_decoder
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.steps import Asked, Recycling, Step, tokens_per_layer
from infoprune_export.validate.accuracy import collect_answers

# ── Right ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family: str, attention: str):
    model = model_of(family, attention)
    steps = [Step(0, ALL), Step(2, ALL, queries=None)]
    with torch.no_grad(), deepstack(model, LEFT):
        expected = model(**LEFT.inputs(model)).logits
    logits, trace = pruned_logits(model, LEFT, steps)
    real = LEFT.mask.bool()
    assert relative_error(logits[real], expected[real]) <= 1e-6
    assert trace.per_layer.tolist() == [[int(row.sum())] * DEPTH for row in LEFT.visual]
    whole, again = generate(model, LEFT)[0], generate(model, LEFT, steps)[0]
    assert torch.equal(again.sequences, whole.sequences)
    assert relative_error(torch.stack(again.logits), torch.stack(whole.logits)) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_kept_tokens_are_those_of_masking_by_hand(family: str, attention: str):
    steps = [Step(0, HALF), Step(1, THIRD), Step(3, Fraction(1, 5))]
    expected, kept = masked_reference(model_of(family, "eager"), LEFT, steps)
    logits, trace = pruned_logits(model_of(family, attention), LEFT, steps)
    assert as_lists(trace) == numbers(LEFT, kept)
    assert relative_error(logits[:, -3:], expected[:, -3:]) <= 1e-5
    whole, _ = pruned_logits(model_of(family, attention), LEFT, [])
    assert relative_error(whole[:, -1], expected[:, -1]) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_right_padding_stays_at_its_place(attention: str):
    steps = [Step(0, HALF), Step(2, THIRD)]
    expected, kept = masked_reference(model_of("llava", "eager"), RIGHT, steps)
    logits, trace = pruned_logits(model_of("llava", attention), RIGHT, steps)
    assert as_lists(trace) == numbers(RIGHT, kept)
    for row, padding in enumerate((2, 0, 4)):
        ends = slice(-3 - padding, -padding or None)
        assert relative_error(logits[row, ends], expected[row, ends]) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_reading_prompt_and_answer_again_with_the_same_tokens_masked(family: str, attention: str):
    steps = [Step(0, HALF), Step(2, Fraction(1, 5))]
    model, judge = model_of(family, attention), model_of(family, "eager")
    made, trace = generate(model, LEFT, steps)
    longer = Batch(tuple(row + "tttt" for row in LEFT.rows), made=4)
    longer.embeds = torch.cat([LEFT.embeds, model.get_input_embeddings()(made.sequences[:, :4])], dim=1)
    longer.deeper, longer.last = LEFT.deeper, LEFT.last
    expected, kept = masked_reference(judge, longer, steps)
    assert as_lists(trace) == numbers(LEFT, kept)
    assert relative_error(torch.stack(made.logits, dim=1), expected[:, -5:]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_later_layers_cache_kept_tokens_only(family: str):
    model = model_of(family)
    cache = generate(model, LEFT, [Step(0, HALF), Step(2, Fraction(1, 5))])[0].past_key_values
    # The longest row decides, the last: 9 of text, and 4, then 2 of its 7 visual tokens; 4 tokens were made.
    assert [cache.get_seq_length(layer) for layer in range(DEPTH)] == [24, 17, 17, 15, 15]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_prompt_keep_the_same_tokens_with_and_without_cache(family: str):
    model = model_of(family)
    steps = [Step(0, HALF), Step(1, THIRD, queries=None)]
    results = []
    for options in ({"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {}):
        made, trace = generate(model, LEFT, steps, seeded(1), **options)
        results.append((made.sequences, as_lists(trace)))
    (cached, kept), (uncached, again), (_, greedy) = results
    assert torch.equal(cached, uncached)
    assert kept == again == greedy
    assert [len(row) for row in kept[0]] == [7, 8, 4]


def test_rows_of_a_batch_are_as_if_they_were_alone():
    model = model_of("qwen2.5-vl")
    steps = [Step(1, THIRD)]
    together, trace = pruned_logits(model, LEFT, steps)
    for row, letters in enumerate(LEFT.rows):
        alone = Batch((letters.lstrip("."),))
        alone.embeds = LEFT.embeds[row : row + 1, -alone.mask.shape[1] :]
        logits, own = pruned_logits(model, alone, steps)
        assert own.kept[0][0].tolist() == trace.kept[0][row].tolist()
        assert relative_error(together[row, -1], logits[0, -1]) <= 1e-5


def test_a_row_without_visual_tokens_goes_through():
    model = model_of("llava")
    batch = Batch(("tiiiiiit", "tttttttt"))
    logits, trace = pruned_logits(model, batch, [Step(1, HALF)])
    with torch.no_grad():
        expected = model(**batch.inputs(model)).logits
    assert relative_error(logits[1, -3:], expected[1, -3:]) <= 1e-5
    assert trace.per_layer[1].tolist() == [0] * DEPTH


def test_bfloat16_runs():
    model = model_of("qwen2-vl").bfloat16()
    batch = Batch(LEFT.rows)
    batch.embeds = batch.embeds.bfloat16()
    logits, trace = pruned_logits(model, batch, [Step(1, HALF)])
    assert logits.isfinite().all()
    assert [len(row) for row in trace.kept[0]] == [7, 8, 4]


# ── Steps ────────────────────────────────────────────────────────────────────


def test_several_tokens_rank_by_their_mean_attention():
    def everything_behind(asked: Asked) -> Tensor:
        return asked.text & (asked.visual.cumsum(1) > 0)

    steps = [Step(1, HALF, queries=everything_behind), Step(2, THIRD, queries=everything_behind)]
    expected, kept = masked_reference(model_of("llava", "eager"), LEFT, steps)
    logits, trace = pruned_logits(model_of("llava"), LEFT, steps)
    assert as_lists(trace) == numbers(LEFT, kept)
    assert relative_error(logits[:, -1], expected[:, -1]) <= 1e-5
    assert as_lists(trace) != as_lists(pruned_logits(model_of("llava"), LEFT, [Step(1, HALF), Step(2, THIRD)])[1])


def test_a_known_answer_does_not_rank():
    model = model_of("llava")
    longer = Batch(tuple(row + "tttt" for row in LEFT.rows))
    longer.embeds[:, : LEFT.mask.shape[1]] = LEFT.embeds
    _, expected = pruned_logits(model, LEFT, [Step(1, THIRD)])
    _, trace = pruned_logits(model, longer, [Step(1, THIRD)], last=LEFT.last)
    _, answered = pruned_logits(model, longer, [Step(1, THIRD)])
    assert as_lists(trace) == as_lists(expected) != as_lists(answered)


def test_random_steps_follow_their_generator():
    model = model_of("llava")
    steps = [Step(1, HALF, queries=None), Step(2, THIRD, queries=None)]
    kept = [as_lists(pruned_logits(model, LEFT, steps, generator=seeded(seed))[1]) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert [[len(row) for row in rows] for rows in kept[0]] == [[7, 8, 4], [5, 5, 3]]
    assert all(set(late) <= set(early) for early, late in zip(*kept[0], strict=True))
    # Every token has the same chance.
    generator, counts = seeded(2), torch.zeros(7)
    for _ in range(40):
        counts[pruned_logits(model, LEFT, steps[:1], generator=generator)[1].kept[0][2]] += 1
    assert counts.min() > 12
    assert counts.max() < 34


def test_recycled_tokens_stand_where_their_centres_stood():
    """Returning two dropped tokens unchanged is the same as never dropping them."""
    seen = []

    def first_two(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((len(tokens), len(scores)))
        return tokens[:2], torch.tensor([0, 1])

    steps = [Step(1, HALF, recycling=Recycling(lambda dropped: 2, first_two))]
    expected, kept = masked_reference(model_of("qwen3-vl", "eager"), LEFT, steps, lambda dropped: set(dropped[:2]))
    logits, trace = pruned_logits(model_of("qwen3-vl"), LEFT, steps)
    assert as_lists(trace) == numbers(LEFT, kept)
    assert relative_error(logits[:, -1], expected[:, -1]) <= 1e-5
    assert seen == [(6, 6), (7, 7), (3, 3)]


def test_repeated_rows_are_recycled_like_their_prompt():
    def merge(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return 9 * tokens[:1], torch.tensor([0])

    model, steps = model_of("llava"), [Step(1, HALF, recycling=Recycling(lambda dropped: 1, merge))]
    expected, _ = pruned_logits(model, LEFT, steps)
    twice = {name: part.repeat_interleave(2, dim=0) for name, part in LEFT.inputs(model).items()}
    with pruned_decoder(model, LEFT.visual, LEFT.mask, steps) as trace:
        logits = model(**twice).logits
    for copy in range(2):
        assert relative_error(logits[copy::2, -3:], expected[:, -3:]) <= 1e-5
    assert [len(row) for row in trace.kept[0]] == [8, 9, 5]


def test_recycled_means_replace_their_centres():
    streams: list[Tensor] = []
    means = torch.full((1, 64), 3.0)
    step = Step(1, HALF, recycling=Recycling(lambda dropped: 1, lambda tokens, scores: (means, torch.tensor([2]))))
    model = model_of("llava")
    hook = model.model.language_model.layers[2].input_layernorm.register_forward_pre_hook(
        lambda _, arguments: streams.append(arguments[0])
    )
    _, plain = pruned_logits(model, LEFT, [Step(1, HALF)])
    streams.clear()
    _, trace = pruned_logits(model, LEFT, [step])
    hook.remove()
    for row, kept in enumerate(trace.kept[0]):
        centre = sorted(set(range(int(LEFT.visual[row].sum()))) - set(plain.kept[0][row].tolist()))[2]
        assert set(kept.tolist()) == {*plain.kept[0][row].tolist(), centre}
        assert (streams[0][row] == 3.0).all(-1).sum() == 1


def test_nothing_is_recycled_where_nothing_is_dropped():
    def merge(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError

    step = Step(1, ALL, recycling=Recycling(lambda dropped: 1, merge))
    assert pruned_logits(model_of("llava"), LEFT, [step])[1].per_layer[0].tolist() == [13] * DEPTH


def test_trace_counts_what_each_layer_sees():
    steps = [Step(0, HALF), Step(2, Fraction(1, 5))]
    trace = pruned_logits(model_of("llava"), LEFT, steps)[1]
    assert trace.per_layer.tolist() == [[13, 7, 7, 3, 3], [15, 8, 8, 3, 3], [7, 4, 4, 2, 2]]
    assert trace.average.tolist() == pytest.approx([6.6, 7.4, 3.8])
    assert trace.peak.tolist() == [13, 15, 7]
    assert [tokens_per_layer(steps, DEPTH, tokens) for tokens in (13, 15, 7)] == trace.per_layer.tolist()


# ── With a processor ─────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def asked(trained_vlm, scene_split):
    samples = scene_split.validation[:4]
    with torch.no_grad():
        features = trained_vlm.tower.features_of(inputs_of(trained_vlm, samples))
        layouts = trained_vlm.tower.layouts(inputs_of(trained_vlm, samples))
    visual = VisualTokens.of(list(features), layouts)
    rows = [row for row, sample in enumerate(samples) for _ in sample.questions]
    questions = [question for sample in samples for question in sample.questions]
    texts, replies = [q.text for q in questions], [q.answers[0] for q in questions]
    return SimpleNamespace(visual=visual.rows(rows), questions=texts, answers=replies)


def test_answers_with_all_tokens_are_the_plain_ones_and_with_one_they_are_not(trained_vlm, asked):
    plain = answer(trained_vlm, asked.visual, asked.questions)
    traces: list[Trace] = []
    for keep, same in ((ALL, True), (Fraction(1, 64), False)):
        steps = [Step(0, keep)]
        texts = answer(trained_vlm, asked.visual, asked.questions, decoder=decoding(steps, on_trace=traces.append))
        assert (texts == plain) == same
    assert [trace.per_layer[0].tolist() for trace in traces] == [[64] * 4, [64, 1, 1, 1]]


def test_collected_answers_are_those_of_the_pruned_model(trained_vlm, scene_split, asked):
    encode = VisionEncoder(trained_vlm.tower, TokensSpec(method="none")).encode
    traces: list[Trace] = []
    decoder = decoding([Step(0, Fraction(1, 64))], on_trace=traces.append)
    samples = scene_split.validation[:4]
    collected = collect_answers(trained_vlm, samples, encode, batch_size=2, decoder=decoder)
    assert [text for row in collected for text in row] == answer(
        trained_vlm, asked.visual, asked.questions, decoder=decoding([Step(0, Fraction(1, 64))])
    )
    assert sum(len(trace.per_layer) for trace in traces) == len(asked.questions)


def test_the_answer_after_the_prompt_does_not_choose_its_tokens(trained_vlm, asked):
    traces: list[Trace] = []
    decoder = decoding([Step(1, THIRD)], on_trace=traces.append)
    answer(trained_vlm, asked.visual, asked.questions, decoder=decoder)
    answer_loss(trained_vlm, asked.visual, asked.questions, asked.answers, decoder=decoder)
    assert as_lists(traces[0]) == as_lists(traces[1])
    assert {len(row) for row in traces[0].kept[0]} == {22}


def test_loss_under_pruning_is_the_mean_of_single_losses(trained_vlm, asked):
    decoder = decoding([Step(0, HALF)])
    pick = [asked.answers.index(word) for word in dict.fromkeys(asked.answers) if " " not in word][:3]
    questions, answers = [asked.questions[i] for i in pick], [asked.answers[i] for i in pick]
    together = answer_loss(trained_vlm, asked.visual.rows(pick), questions, answers, decoder=decoder)
    alone = [
        answer_loss(trained_vlm, asked.visual.rows([i]), [q], [a], decoder=decoder)
        for i, q, a in zip(pick, questions, answers, strict=True)
    ]
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-4)


def test_loss_is_differentiable_in_kept_features(trained_vlm, asked):
    feature = asked.visual.features[0].clone().requires_grad_()
    traces: list[Trace] = []
    visual = VisualTokens([feature], asked.visual.layouts[:1])
    steps = [Step(0, Fraction(1, 4))]
    decoder = decoding(steps, on_trace=traces.append)
    answer_loss(trained_vlm, visual, asked.questions[:1], asked.answers[:1], decoder=decoder).backward()
    assert feature.grad is not None
    assert (feature.grad[traces[0].kept[0][0]].abs().sum(1) > 0).all()
