"""Flows against the equations written out for every pair of tokens, maturity against a truncated model, and K."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Layout
from infoprune_export.models.vlm import Prompt, VisualTokens, answer, answer_loss
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens import saturation
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.saturation import Signals, find_layer, measure, measure_samples, saturated_layer


@pytest.fixture(scope="module")
def asked(trained_vlm, scene_split):
    samples = scene_split.validation[:2]
    with torch.no_grad():
        inputs = inputs_of(trained_vlm, samples)
        visual = VisualTokens.of(list(trained_vlm.tower.features_of(inputs)), trained_vlm.tower.layouts(inputs))
    pairs = [(row, question) for row, sample in enumerate(samples) for question in sample.questions[:3]]
    return SimpleNamespace(
        visual=visual.rows([row for row, _ in pairs]),
        questions=[question.text for _, question in pairs],
        answers=[question.answers[0] for _, question in pairs],
    )


# ── Measured ─────────────────────────────────────────────────────────────────


def written_out(vlm: Any, asked: SimpleNamespace, final: bool) -> tuple[Tensor, Tensor]:
    """S_vt and S_vv [Q, depth] by loops over pairs of tokens, from an eager model's own attention weights."""
    layers = vlm.model.model.language_model.layers
    config = vlm.model.model.language_model.config
    seen: dict[str, Any] = {"weights": [], "streams": []}

    @contextlib.contextmanager
    def spy(_: Any, prompt: Prompt):
        seen["prompt"] = prompt
        config._attn_implementation = "eager"
        hooks = [
            layer.self_attn.register_forward_hook(lambda m, a, o: seen["weights"].append(o[1])) for layer in layers
        ]
        hooks += [layer.register_forward_hook(lambda m, a, o: seen["streams"].append(o)) for layer in layers]
        try:
            yield
        finally:
            config._attn_implementation = "sdpa"
            for hook in hooks:
                hook.remove()

    features = [f.clone().requires_grad_() for f in asked.visual.features]
    loss = answer_loss(vlm, VisualTokens(features, asked.visual.layouts), asked.questions, asked.answers, decoder=spy)
    slopes = torch.autograd.grad(loss, seen["streams"])
    prompt: Prompt = seen["prompt"]
    to_text, within = torch.zeros(2, len(asked.questions), len(layers)).unbind(0)
    for number, layer in enumerate(layers):
        slope = slopes[-1 if final else number] @ layer.self_attn.v_proj.weight.T
        attention = seen["weights"][number].detach().mean(1)
        for row in range(len(asked.questions)):
            visual = prompt.visual[row].nonzero()[:, 0].tolist()
            text = (prompt.mask[row].bool() & ~prompt.visual[row]).nonzero()[:, 0].tolist()
            for total, queries in ((to_text, text), (within, visual)):
                for i in queries:
                    flows = [(slope[row, i] * attention[row, i, j]).norm() for j in visual]
                    total[row, number] += float(sum(flows)) / len(visual)
    return to_text, within


def test_flows_are_equations_4_and_5(trained_vlm, asked):
    # Loops over pairs take their time, and rows should differ in length.
    counts, rows = (12, 14), (0, 3)
    features = [asked.visual.features[row][:count] for row, count in zip(rows, counts, strict=True)]
    layouts = [Layout(torch.arange(count)[None], count) for count in counts]
    small = SimpleNamespace(
        visual=VisualTokens(features, layouts),
        questions=[asked.questions[row] for row in rows],
        answers=[asked.answers[row] for row in rows],
    )
    for gradient in ("own", "final"):
        to_text, within = written_out(trained_vlm, small, gradient == "final")
        signals = measure(trained_vlm, small.visual, small.questions, small.answers, gradient=gradient)
        np.testing.assert_allclose(signals.visual_to_text, to_text.numpy(), rtol=1e-3)
        np.testing.assert_allclose(signals.within_visual, within.numpy(), rtol=1e-3, atol=1e-9)
        # Visual tokens of the last layer give no logit that the loss counts.
        assert (signals.within_visual[:, -1] == 0).all()
        assert (signals.within_visual == 0).all() == (gradient == "final")


def test_maturity_is_what_a_model_cut_off_behind_the_layer_says(trained_vlm, asked):
    signals = measure(trained_vlm, asked.visual, asked.questions, asked.answers)
    text = trained_vlm.model.model.language_model
    whole = text.layers
    chances = []
    for depth in range(1, 5):
        kept: list[Tensor] = []

        @contextlib.contextmanager
        def spy(_: Any, prompt: Prompt, kept: list[Tensor] = kept):
            rows = torch.arange(len(prompt.last))

            def see(module: nn.Module, arguments: Any, output: Tensor) -> None:
                logits = trained_vlm.model.lm_head(output[rows, prompt.last])
                kept.append(logits.softmax(-1))

            hook = text.norm.register_forward_hook(see)
            try:
                yield
            finally:
                hook.remove()

        text.layers = whole[:depth]
        try:
            answer_loss(trained_vlm, asked.visual, asked.questions, asked.answers, decoder=spy)
        finally:
            text.layers = whole
        chances.append(kept[0])
    top = torch.stack([chance.argmax(-1) for chance in chances], dim=1)
    np.testing.assert_array_equal(signals.settled, (top == top[:, -1:]).numpy())
    expected = torch.stack([chance.gather(1, top[:, -1:])[:, 0] for chance in chances], dim=1)
    np.testing.assert_allclose(signals.probability, expected.numpy(), atol=1e-5)
    assert signals.settled[:, -1].all()
    assert 0 < signals.settled[:, :2].sum() < signals.settled[:, :2].size


def test_without_answers_the_models_own_are_taken(trained_vlm, asked):
    own = answer(trained_vlm, asked.visual, asked.questions)
    unlabelled = measure(trained_vlm, asked.visual, asked.questions)
    labelled = measure(trained_vlm, asked.visual, asked.questions, own)
    np.testing.assert_array_equal(unlabelled.visual_to_text, labelled.visual_to_text)
    wrong = measure(trained_vlm, asked.visual, asked.questions, ["none"] * len(own))
    assert not np.allclose(wrong.visual_to_text, labelled.visual_to_text, rtol=1e-2)
    np.testing.assert_allclose(wrong.probability, labelled.probability, atol=1e-5)


def test_rows_of_attention_are_taken_in_parts(trained_vlm, asked, monkeypatch: pytest.MonkeyPatch):
    whole = measure(trained_vlm, asked.visual, asked.questions, asked.answers)
    monkeypatch.setattr(saturation, "_QUERIES", 7)
    parts = measure(trained_vlm, asked.visual, asked.questions, asked.answers)
    np.testing.assert_allclose(parts.visual_to_text, whole.visual_to_text, rtol=1e-5)


def test_samples_are_measured_question_by_question(trained_vlm, scene_split):
    encode = VisionEncoder(trained_vlm.tower, TokensSpec(method="none")).encode
    samples = [*scene_split.calibration[:2], Sample(scene_split.calibration[2].image, ()), scene_split.calibration[3]]
    images: list[int] = []
    signals = measure_samples(
        trained_vlm, samples, encode, labelled=True, batch_size=2, on_batch=lambda count: images.append(count)
    )
    assert images == [2, 1]
    questions = [question for sample in samples for question in sample.questions]
    assert signals.settled.shape == signals.within_visual.shape == (len(questions), 4)
    one = measure_samples(trained_vlm, samples[3:], encode, labelled=True)
    # The loss is the batch's mean, so only shares compare; here the batch is the same.
    np.testing.assert_allclose(signals.visual_to_text[-len(one.settled) :], one.visual_to_text, rtol=1e-4)
    assert trained_vlm.model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("labelled", [True, False])
def test_the_testbed_saturates_behind_its_second_layer(trained_vlm, scene_split, labelled: bool):
    encode = VisionEncoder(trained_vlm.tower, TokensSpec(method="none")).encode
    signals = measure_samples(trained_vlm, scene_split.calibration[:8], encode, labelled=labelled)
    assert saturated_layer(signals) == find_layer(signals) == 1
    assert signals.flow.argmax() == 1


def test_samples_without_questions_are_refused(trained_vlm, scene_split):
    encode = VisionEncoder(trained_vlm.tower, TokensSpec(method="none")).encode
    with pytest.raises(InfopruneError, match="0 questions"):
        measure_samples(trained_vlm, [Sample(scene_split.calibration[0].image, ())], encode, labelled=True)


# ── Chosen ───────────────────────────────────────────────────────────────────


def signals_of(flow: list[float], settled: list[float], probability: list[float], questions: int = 10) -> Signals:
    """All questions alike, but for the share of them that has settled."""
    shares = np.array(settled)[None] * questions
    return Signals(
        np.tile(np.array(flow), (questions, 1)),
        np.ones((questions, len(flow))),
        np.arange(questions)[:, None] < np.round(shares),
        np.tile(np.array(probability), (questions, 1)),
    )


FLOW = [0.3, 1.0, 0.8, 0.6, 0.4, 0.2]
SETTLED = [0.1, 0.3, 0.6, 0.8, 0.9, 1.0]
PROBABILITY = [0.1, 0.3, 0.6, 0.7, 0.8, 0.9]


def test_k_is_the_first_layer_with_every_sign():
    assert find_layer(signals_of(FLOW, SETTLED, PROBABILITY)) == 2


def test_top_1_must_have_settled_for_half_of_the_questions_and_stay():
    assert find_layer(signals_of(FLOW, [0.1, 0.5, *SETTLED[2:]], PROBABILITY)) == 1
    assert find_layer(signals_of(FLOW, [0.1, 0.8, 0.4, *SETTLED[3:]], PROBABILITY)) == 3
    assert saturated_layer(signals_of(FLOW, SETTLED, PROBABILITY), agreement=0.85) == 4


def test_flow_behind_k_must_have_decayed_and_stay():
    settled = [1.0] * 6
    assert find_layer(signals_of(FLOW, settled, PROBABILITY)) == 1
    assert find_layer(signals_of([0.3, 0.9, 1.0, 0.95, 0.6, 0.2], settled, PROBABILITY)) == 3
    assert find_layer(signals_of([0.3, 1.0, 0.8, 0.6, 0.95, 0.2], settled, PROBABILITY)) == 4
    assert saturated_layer(signals_of(FLOW, settled, PROBABILITY), decay=0.5) == 3


def test_probability_must_move_no_further_than_an_even_climb():
    settled, flow = [0.0, *[1.0] * 5], [1.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    # Still to go from layers 1, 2, ...: 0.8, 0.6, 0.4, 0.2 in an even climb.
    assert find_layer(signals_of(flow, settled, [0.0, 0.3, 0.6, 0.8, 0.9, 1.0])) == 1
    assert find_layer(signals_of(flow, settled, [0.0, 0.1, 0.5, 0.8, 0.9, 1.0])) == 2
    assert find_layer(signals_of(flow, settled, [0.0, 0.0, 0.0, 0.5, 0.9, 1.0])) == 4
    assert find_layer(signals_of(flow, settled, [0.5, 0.9, 0.1, 0.9, 0.5, 0.6])) == 4


def test_questions_weigh_the_same_whatever_their_gradient():
    signals = signals_of(FLOW, SETTLED, PROBABILITY)
    loud = Signals(signals.visual_to_text.copy(), signals.within_visual, signals.settled, signals.probability)
    loud.visual_to_text[0] = [1e6] * 6
    np.testing.assert_allclose(loud.flow, 0.9 * np.array(FLOW) + 0.1)
    loud.visual_to_text[0] = 0
    np.testing.assert_allclose(loud.flow, 0.9 * np.array(FLOW))


@pytest.mark.parametrize(("depth", "layer"), [(2, 0), (3, 0), (4, 1), (28, 13), (32, 15)])
def test_where_nothing_settles_k_is_the_papers(depth: int, layer: int):
    signals = signals_of([1.0] * depth, [0.0] * (depth - 1) + [1.0], [0.5] * depth)
    assert saturated_layer(signals) is None
    assert find_layer(signals) == layer


def test_the_last_layer_is_never_chosen():
    signals = signals_of([1.0, 1.0, 1.0, 1.0, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0])
    assert saturated_layer(signals) is None
    assert find_layer(signals_of([1.0, 1.0, 1.0, 1.0, 0.1], [1.0] * 5, [0.5] * 5)) == 3
    with pytest.raises(InfopruneError, match="1 layer"):
        find_layer(signals_of([1.0], [1.0], [1.0]))


def test_curves_are_json():
    tree = json.loads(json.dumps(signals_of(FLOW, SETTLED, PROBABILITY).to_dict()))
    assert (tree["saturated_layer"], tree["questions"]) == (2, 10)
    assert tree["visual_to_text"] == pytest.approx(FLOW)
    assert tree["agreement"] == pytest.approx(SETTLED)
    assert tree["probability"] == pytest.approx(PROBABILITY)
    assert tree["change"] == pytest.approx([0.2, 0.3, 0.1, 0.1, 0.1])
    assert tree["within_visual"] == [1.0] * 6
