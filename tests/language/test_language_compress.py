"""Pruning the language models that answer: padding does not count, the refit helps, nothing else is changed."""

from __future__ import annotations

import functools

import pytest
import torch
from families import QWEN, build

from infoprune_export.data import testbed
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.language.asking import ask, see, start_of
from infoprune_export.language.compress import check_language, compress_language
from infoprune_export.language.moments import collect_moments, fit_of
from infoprune_export.language.plan import LanguagePlan, LayerSize, apply_language, sizes_of
from infoprune_export.language.refit import LanguageStreams, refit_language
from infoprune_export.models import tower_of
from infoprune_export.models.calibration import captured_input
from infoprune_export.models.language import language_layers
from infoprune_export.models.vlm import VLM, answer, answer_loss, load, writable_copy
from infoprune_export.recipe import LanguageSpec, ModelSpec

HALF = LanguageSpec(method="obs", remove_heads=0.25, keep_macs=0.5, round_to=16)


@functools.cache
def shipped(name):
    return load(ModelSpec(name_or_path=f"testbed/{name}"))


@functools.cache
def talking(name):
    """A random model of any family that speaks the testbed's language."""
    if name not in QWEN:
        model = testbed.build_model(layers=3, hidden_size=32, heads=4).eval().requires_grad_(False)
        return VLM(model, testbed.build_processor(), tower_of(model))
    processor, model = testbed.build_qwen_processor(), build(name, blocks=3)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return VLM(model, processor, tower_of(model))


@pytest.fixture(scope="module")
def samples(scene_split):
    return scene_split.calibration[:8]


def logits(vlm, asked):
    """At the tokens that predict the answers."""
    rows = []
    with torch.no_grad(), captured_input(vlm.model.get_output_embeddings()) as seen:
        for batch in asked:
            answer_loss(vlm, batch.see(vlm), batch.questions, batch.answers)
            rows.append(vlm.model.get_output_embeddings()(seen()[:, -2]))
    return torch.cat(rows)


def end_of(vlm, batch):
    """The residual stream behind the last layer at real tokens, [tokens, D]."""
    prompts = []
    with torch.no_grad(), captured_input(vlm.model.model.language_model.norm) as last:
        batch.loss(vlm, prompts.append)
        return last()[prompts[0].mask.bool()]


def distance(a, b):
    return float((a - b).square().mean())


# ── Questions ────────────────────────────────────────────────────────────────


def test_questions_are_drawn_by_seed_and_answered_by_annotators(samples):
    vlm = shipped("tiny-llava")
    asked = ask(vlm, samples, labelled=True, per_image=2, seed=0, batch_size=5)
    assert [len(batch.samples) for batch in asked] == [5, 3]
    for batch in asked:
        assert sorted(set(batch.rows)) == list(range(len(batch.samples)))
        assert len(batch.rows) == len(batch.questions) == len(batch.answers) == 2 * len(batch.samples)
        for row, question, text in zip(batch.rows, batch.questions, batch.answers, strict=True):
            assert (question, text) in [(q.text, q.answers[0]) for q in batch.samples[row].questions]
    again, other = (ask(vlm, samples, labelled=True, per_image=2, seed=seed) for seed in (0, 1))
    texts = [[q for batch in drawn for q in batch.questions] for drawn in (asked, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_without_labels_the_models_own_answers_stand_for_them(samples):
    vlm = shipped("tiny-llava")
    bare = [Sample(s.image, tuple(Question(q.text) for q in s.questions)) for s in samples]
    (batch,) = ask(vlm, bare, labelled=False, per_image=1, seed=0)
    with torch.inference_mode():
        assert batch.answers == answer(vlm, see(vlm, bare).rows(batch.rows), batch.questions)
    pruned = writable_copy(vlm)
    plan, weights = compress_language(vlm, pruned, bare, HALF, labelled=False, ridge=0.1, seed=0)
    assert plan.ffn_kept <= 0.5
    assert distance(logits(pruned, [batch]), logits(vlm, [batch])) > 0
    assert weights


def test_without_questions_there_is_nothing_to_calibrate_on(samples):
    with pytest.raises(InfopruneError, match="0 questions"):
        ask(shipped("tiny-llava"), [Sample(samples[0].image, ())], labelled=True, per_image=1, seed=0)


# ── Padding ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_padding_counts_neither_in_moments_nor_in_the_refit(samples, name):
    """Prompts of different lengths, all in one batch and each in its own."""
    vlm = shipped(name)
    by_size = []
    for size in (8, 1):
        asked = ask(vlm, samples, labelled=True, per_image=1, seed=0, batch_size=size)
        attention, ffn = collect_moments(vlm, asked)
        starts = [start_of(vlm, batch) for batch in asked]
        assert any(not start.real.all() for start in starts) == (size == 8)
        pruned = writable_copy(vlm)
        layers = language_layers(pruned.model)
        for layer in layers:
            layer.keep_neurons(range(100))
        streams = LanguageStreams(starts, starts, vlm.device)
        weights = refit_language(language_layers(vlm.model), layers, streams, 0.1)
        by_size.append(([m.covariance for m in attention + ffn], weights))
    (together, ours), (apart, theirs) = by_size
    for a, b in zip(together, apart, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    for key, value in theirs.items():
        assert float((ours[key] - value).abs().max()) <= 1e-3 * float(value.abs().max()), key


@pytest.mark.parametrize(("bias", "moment"), [(True, 0.0), (False, 1.0)])
def test_inputs_of_a_projection_with_a_bias_are_centred(bias, moment):
    """Its bias takes up what their mean carried; without one, the other inputs have to."""
    fit = fit_of(torch.nn.Linear(3, 2, bias=bias))
    for _ in range(2):
        fit.update(torch.ones(5, 3), torch.zeros(5, 0))
    assert torch.equal(fit.covariance(), torch.full((3, 3), moment, dtype=torch.float64))


# ── Streams ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_streams_are_the_models_own(samples, name):
    """Layer by layer, deepstack features included; a refit of what is whole changes nothing."""
    vlm = talking(name)
    (batch,) = ask(vlm, samples[:3], labelled=True, per_image=1, seed=0)
    end, start = end_of(vlm, batch), start_of(vlm, batch)
    assert len(start.deeper) == (2 if name == "qwen3-vl" else 0)
    copy = writable_copy(vlm)
    layers = language_layers(copy.model)
    before = [layer.ffn_out.weight.clone() for layer in layers]
    streams = LanguageStreams([start], [start], vlm.device)
    refit_language(language_layers(vlm.model), layers, streams, 0.1)
    for stream in (streams.original[0], streams.changed[0]):
        assert float((stream[start.real] - end).abs().max()) <= 1e-4 * float(end.abs().max())
    for layer, weight in zip(layers, before, strict=True):
        assert float((layer.ffn_out.weight - weight).abs().max()) <= 1e-4 * float(weight.abs().max())


# ── Compression ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_the_refit_brings_logits_closer_and_the_original_stays(samples, scene_split, name):
    vlm = shipped(name)
    before = {key: value.clone() for key, value in vlm.model.state_dict().items()}
    fresh = ask(vlm, scene_split.validation[:8], labelled=True, per_image=1, seed=0)
    pruned, again, bare = (writable_copy(vlm) for _ in range(3))
    plan, weights = compress_language(vlm, pruned, samples, HALF, labelled=True, ridge=0.1, seed=0)
    assert sizes_of(language_layers(pruned.model)) == plan.kept
    assert plan.attention_kept <= 0.75
    assert plan.ffn_kept <= 0.5
    apply_language(language_layers(again.model), LanguagePlan.from_dict(plan.to_dict()), weights)
    apply_language(language_layers(bare.model), plan, {})
    target, refitted = logits(vlm, fresh), logits(pruned, fresh)
    assert torch.equal(logits(again, fresh), refitted)
    assert distance(refitted, target) < 0.7 * distance(logits(bare, fresh), target)
    assert all(torch.equal(value, before[key]) for key, value in vlm.model.state_dict().items())


def test_the_criterion_does_less_harm_than_chance(scene_split):
    vlm = shipped("tiny-llava")
    (fresh,) = ask(vlm, scene_split.validation[:8], labelled=True, per_image=2, seed=0)
    loss = {}
    for method in ("obs", "random"):
        pruned = writable_copy(vlm)
        spec = LanguageSpec(method=method, remove_heads=0.0, keep_macs=0.25)
        compress_language(vlm, pruned, scene_split.calibration, spec, labelled=True, ridge=None, seed=0)
        with torch.no_grad():
            loss[method] = float(fresh.loss(pruned, lambda prompt: None))
    assert loss["obs"] < 0.5 * loss["random"]


def test_random_goes_by_the_seed_and_looks_at_no_data():
    vlm = shipped("tiny-llava")
    spec = HALF.model_copy(update={"method": "random"})
    plans = [
        compress_language(vlm, writable_copy(vlm), [], spec, labelled=True, ridge=None, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_pruned_tower_in_front_is_made_up_for(samples):
    """The original keeps its own tower; the pruned model reads what the pruned one sees."""
    vlm = shipped("tiny-llava")
    pruned = writable_copy(vlm)
    pruned.tower.blocks[-1].keep_heads([0])
    (batch,) = ask(vlm, samples, labelled=True, per_image=1, seed=0)
    target, damaged = end_of(vlm, batch), end_of(pruned, batch)
    spec = LanguageSpec(method="obs", remove_heads=0.0, keep_macs=1.0)
    plan, _ = compress_language(vlm, pruned, samples, spec, labelled=True, ridge=0.1, seed=0)
    assert plan.kept == plan.total == (LayerSize(4, 4, 384),) * 4
    assert distance(end_of(pruned, batch), target) < 0.8 * distance(damaged, target)


# ── Refused ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"remove_heads": 0.9}, "language.remove_heads = 0.9 leaves 4 units"),
        ({"keep_macs": 0.1}, "language.keep_macs = 0.1 leaves 153 neurons for 4 layers, which need 256"),
    ],
)
def test_budgets_that_leave_too_little_are_refused(settings, named):
    vlm = shipped("tiny-llava")
    with pytest.raises(InfopruneError, match=named):
        check_language(LanguageSpec(method="random", **settings), vlm.model)


def test_a_language_model_is_pruned_once():
    pruned = writable_copy(shipped("tiny-llava"))
    language_layers(pruned.model)[2].keep_heads((1,))
    check_language(LanguageSpec(), pruned.model)
    with pytest.raises(InfopruneError, match="pruned before"):
        check_language(HALF, pruned.model)
