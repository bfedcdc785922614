"""When visual tokens have done their work in the language model (paper B, section 2.2), and the layer K that follows.

Two signals per decoder layer. The flow of information from visual tokens (equations 4 and 5),

    I_l(i, j) = || dL/dh_i W_V^l || A_l(i, j)        A_l(i, j): attention from token i to token j, mean over heads
    S_vt(l)   = sum of I_l(i, j) over text i and visual j, / |V|
    S_vv(l)   = the same over visual i and visual j

and semantic maturity: what the model would answer if this layer were the last (final norm and output embedding on the
last prompt token). Where the paper is read otherwise than it is printed:

- its S_vt sums over text j and visual i, which is attention from visual tokens to text; the flow into text is meant;
- h_i is the output of layer l, where the paper has h_i^L of the last layer. The loss depends on a last-layer state only
  through that position's own logits, so there S_vv is exactly zero and S_vt hardly decays; ``gradient="final"`` has it;
- L, which the paper leaves open, is the cross-entropy of the answer: the known one, or the model's own greedy one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import batches, inputs_of
from infoprune_export.models.vlm import VLM, Prompt, VisualTokens, answer, answer_loss
from infoprune_export.tokens.watch import attention_rows, text_model, watched

Floats = NDArray[np.float64]
_QUERIES = 128
"""Rows of attention held at a time."""


@dataclass(frozen=True)
class Signals:
    """By question and decoder layer, [Q, depth]."""

    visual_to_text: Floats
    """S_vt."""
    within_visual: Floats
    """S_vv."""
    settled: NDArray[np.bool_]
    """Whether the layer's top-1 token is the last layer's."""
    probability: Floats
    """What the layer gives to the last layer's top-1 token."""

    @property
    def flow(self) -> Floats:
        """S_vt as a share of each question's peak, mean over the questions, [depth]; questions weigh the same."""
        peak = self.visual_to_text.max(axis=1, keepdims=True)
        return np.divide(self.visual_to_text, peak, out=np.zeros_like(self.visual_to_text), where=peak > 0).mean(axis=0)

    @property
    def agreement(self) -> Floats:
        """Share of questions whose top-1 token is the final one, [depth]."""
        return self.settled.mean(axis=0)

    @property
    def change(self) -> Floats:
        """How much the probability differs from the layer before to this one, mean over the questions, [depth - 1]."""
        return np.abs(np.diff(self.probability, axis=1)).mean(axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Curves over the layers and what they say, for a report."""
        within = self.within_visual.mean(axis=0)
        return {
            "questions": len(self.settled),
            "saturated_layer": saturated_layer(self),
            "visual_to_text": self.flow.tolist(),
            "within_visual": (within / within.max() if within.max() > 0 else within).tolist(),
            "agreement": self.agreement.tolist(),
            "probability": self.probability.mean(axis=0).tolist(),
            "change": self.change.tolist(),
        }


# ── Measuring ────────────────────────────────────────────────────────────────


@dataclass
class _Seen:
    """One forward pass of the language model, by layer."""

    prompt: list[Prompt] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """Residual stream behind the layer, [B, L, D]."""
    visual_attention: list[Tensor] = field(default_factory=list)
    """Attention that each token pays to all visual tokens, head mean, fp32 [B, L]."""

    @contextlib.contextmanager
    def __call__(self, vlm: VLM, prompt: Prompt) -> Iterator[None]:
        text = text_model(vlm.model)
        self.prompt.append(prompt)
        watchers = dict.fromkeys(range(len(text.layers)), self._watch)
        with contextlib.ExitStack() as stack:
            stack.enter_context(watched(text, watchers))
            for layer in text.layers:
                stack.callback(layer.register_forward_hook(lambda _, __, output: self.outputs.append(output)).remove)
            yield

    @torch.no_grad()
    def _watch(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        rows = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
        visual = self.prompt[0].visual[:, None]
        parts = [
            (attention_rows(query, key, mask, scaling, part) * visual).sum(-1) for part in rows.split(_QUERIES, dim=1)
        ]
        self.visual_attention.append(torch.cat(parts, dim=1))


def measure(
    vlm: VLM,
    visual: VisualTokens,
    questions: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    gradient: Literal["own", "final"] = "own",
) -> Signals:
    """Signals of one question per image of `visual`, from one forward and backward pass through the language model.

    Without `answers`, the model's own greedy ones stand for them. `gradient` chooses h_i; see the module's docstring.
    """
    if answers is None:
        answers = answer(vlm, visual, questions)
    # Copies made here take part in autograd even if the features were computed in inference mode.
    features = [part.detach().clone().requires_grad_() for part in visual.features]
    seen = _Seen()
    with torch.enable_grad():
        loss = answer_loss(vlm, VisualTokens(features, visual.layouts), questions, answers, decoder=seen)
        slopes = torch.autograd.grad(loss, seen.outputs)
    with torch.no_grad():
        prompt, text = seen.prompt[0], text_model(vlm.model)
        count = prompt.visual.sum(1).clamp_min(1)
        to_text, within = [], []
        for layer, own, attention in zip(text.layers, slopes, seen.visual_attention, strict=True):
            slope = F.linear(own if gradient == "own" else slopes[-1], layer.self_attn.v_proj.weight)
            flow = torch.linalg.vector_norm(slope.float(), dim=-1) * attention
            to_text.append((flow * (prompt.mask.bool() & ~prompt.visual)).sum(1) / count)
            within.append((flow * prompt.visual).sum(1) / count)
        rows = torch.arange(len(questions), device=prompt.last.device)
        head = vlm.model.get_output_embeddings()
        lens = [head(text.norm(stream[rows, prompt.last])).float().softmax(-1) for stream in seen.outputs]
        final = lens[-1].argmax(-1)
        settled = [chances.argmax(-1) == final for chances in lens]
        probability = [chances[rows, final] for chances in lens]
    return Signals(_table(to_text), _table(within), _table(settled) > 0, _table(probability))


def measure_samples(
    vlm: VLM,
    samples: Sequence[Sample],
    encode: Callable[[dict[str, Tensor]], VisualTokens],
    *,
    labelled: bool,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Signals:
    """`measure` on every question of the samples; the most frequent annotated answer counts if they are `labelled`.

    Raises:
        InfopruneError: no sample has a question.
    """
    parts = []
    for batch in batches([sample for sample in samples if sample.questions], batch_size):
        with torch.inference_mode():
            visual = encode(inputs_of(vlm, batch))
        rows = [row for row, sample in enumerate(batch) for _ in sample.questions]
        asked = [question for sample in batch for question in sample.questions]
        answers = [max(question.answers, key=question.answers.count) for question in asked] if labelled else None
        parts.append(measure(vlm, visual.rows(rows), [question.text for question in asked], answers))
        on_batch(len(batch))
    if not parts:
        raise InfopruneError("0 questions to measure saturation on: give calibration images with questions, or a layer")
    return Signals(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Signals)))


def _table(layers: Sequence[Tensor]) -> Floats:
    """[Q] per layer to [Q, depth]."""
    return torch.stack(list(layers), dim=1).double().cpu().numpy()


# ── Choosing ─────────────────────────────────────────────────────────────────


def saturated_layer(signals: Signals, *, agreement: float = 0.5, decay: float = 0.9) -> int | None:
    """The first layer, from 0 to depth - 2, with everything that saturation means; None if there is none.

    From it on, in every layer, the top-1 token is the final one for the share `agreement` of the questions. Behind it,
    in every layer, S_vt is at most the share `decay` of its peak. And from it to the last layer the probability moves
    no further, up and down together, than in an even climb from 0 to 1 over all layers.
    """
    depth = signals.settled.shape[1]
    flow = signals.flow
    for layer in range(depth - 1):
        mature = signals.agreement[layer:].min() >= agreement
        steady = signals.change[layer:].mean() <= 1 / (depth - 1)
        injected = flow[layer + 1 :].max() <= decay * flow.max()
        if mature and steady and injected:
            return layer
    return None


def find_layer(signals: Signals) -> int:
    """K: `saturated_layer`, else depth / 2 - 1, which gives the paper's own 15 of 32 and 13 of 28.

    Raises:
        InfopruneError: there is one layer only.
    """
    depth = signals.settled.shape[1]
    if depth < 2:
        raise InfopruneError(
            f"a language model of {depth} layer has none behind which tokens could be dropped; use decoder.method: none"
        )
    layer = saturated_layer(signals)
    return layer if layer is not None else depth // 2 - 1
