"""Stage 2: visual tokens dropped between layers of the language model, during prefill (paper B, section 3.2).

Attention of a layer ranks the visual tokens; the layers behind it see the kept ones, at their original positions, and
their KV cache holds no others. Text always stays. Works on any decoder whose layers take keyword arguments and ask
transformers' attention interface: Llama (LLaVA, LLaVA-NeXT) and the text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Rows of a batch may keep different numbers of tokens: what is left stands right-aligned, as under left padding, so the
last positions of hidden states and logits remain those of the prompt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, Decoding, Prompt
from infoprune_export.tokens.steps import Asked, Step, check_steps, last_token
from infoprune_export.tokens.watch import Watcher, attention_rows, text_model, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Step", "Trace", "decoding", "last_token", "pruned_decoder", "text_model"]


@dataclass
class Trace:
    """What the latest prefill kept; empty before it. Rows are those of the visual mask, not beams."""

    kept: list[list[Tensor]] = field(default_factory=list)
    """By step, then row: kept tokens as ascending places among the row's visual tokens, int64 [T]."""
    per_layer: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """Visual tokens that each layer sees, int64 [B, depth]."""

    @property
    def average(self) -> Tensor:
        """Visual tokens per layer, mean over the layers, [B]."""
        return self.per_layer.double().mean(1)

    @property
    def peak(self) -> Tensor:
        """Visual tokens in the layer that sees most, int64 [B]."""
        return self.per_layer.amax(1)


@contextlib.contextmanager
def pruned_decoder(
    model: PreTrainedModel,
    visual_mask: Tensor,
    attention_mask: Tensor,
    steps: Sequence[Step],
    *,
    last: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Trace]:
    """Within the block, forward and `generate` (greedy, sampled, beams) drop visual tokens while they read the prompt.

    A new prompt of the same masks may be read any number of times, each time with an empty cache (or none). A cache
    that was filled here continues here only, one new token at a time.

    Args:
        model: a vision-language model with SDPA or eager attention; restored when the block ends, however it ends.
        visual_mask: where the prompts hold visual tokens, of any number of images, bool [B, L].
        attention_mask: zero at padding, on either side, [B, L].
        steps: by ascending layer.
        last: where each prompt ends if not at its last attended place (an answer follows), int64 [B].
        generator: for steps that rank at random; torch's own without one.

    Raises:
        InfopruneError: steps, masks, attention implementation or cache do not fit.
    """
    text = text_model(model)
    check_steps(steps, len(text.layers))
    if visual_mask.dim() != 2 or visual_mask.shape != attention_mask.shape:
        raise InfopruneError(
            f"visual_mask {list(visual_mask.shape)} and attention_mask {list(attention_mask.shape)}: both must be "
            "[prompts, length]; pass the mask with 0 at padding, as the tokenizer gives it"
        )
    state = _Pruning(text, visual_mask, attention_mask, last, steps, generator)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched(text, state.watchers))
        handles = [text.register_forward_pre_hook(state.before_all, with_kwargs=True)]
        stack.callback(lambda: [handle.remove() for handle in handles])
        for number, layer in enumerate(text.layers):
            handles.append(layer.register_forward_pre_hook(functools.partial(state.before, number), with_kwargs=True))
            handles.append(layer.register_forward_hook(functools.partial(state.after, number)))
        yield state.trace


def decoding(
    steps: Sequence[Step],
    generator: torch.Generator | None = None,
    on_trace: Callable[[Trace], None] = lambda trace: None,
) -> Decoding:
    """`pruned_decoder` as `models.vlm.answer` takes it; `on_trace` sees what was kept of each batch of prompts."""

    @contextlib.contextmanager
    def prune(vlm: VLM, prompt: Prompt) -> Iterator[None]:
        block = pruned_decoder(vlm.model, prompt.visual, prompt.mask, steps, last=prompt.last, generator=generator)
        with block as trace:
            yield
        on_trace(trace)

    return prune


@dataclass(frozen=True)
class _Stage:
    """What the layers behind a step work on; rows are the model's, beams included."""

    index: Tensor
    """Places in the prompt, right-aligned, int64 [B, L]."""
    valid: Tensor
    """False where there is nothing, bool [B, L]."""
    visual: Tensor
    """bool [B, L]."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What a layer takes in prefill instead of the keyword arguments of that name."""


class _Pruning:
    """The hooks of one `pruned_decoder` block, and what they hand on from layer to layer and from call to call."""

    def __init__(
        self,
        text: Any,
        visual: Tensor,
        attention: Tensor,
        last: Tensor | None,
        steps: Sequence[Step],
        generator: torch.Generator | None,
    ) -> None:
        self._text, self._visual, self._attention, self._last = text, visual, attention, last
        self._steps = {step.layer: step for step in steps}
        # Once for the block: generation without a cache reads the prompt again for every new token.
        device = generator.device if generator is not None else "cpu"
        self._draws = {
            step.layer: torch.rand(visual.shape, generator=generator, device=device)
            for step in steps
            if step.queries is None
        }
        self._stages: list[_Stage] = []
        self._queries: dict[int, Tensor] = {}
        self._scores = torch.zeros(0)
        self._deeper: list[Tensor] = []
        self._reading = False
        self._copies = 1
        self.trace = Trace()

    @property
    def watchers(self) -> dict[int, Watcher]:
        return {n: functools.partial(self._rank, n) for n, step in self._steps.items() if step.queries is not None}

    def _stage_of(self, layer: int) -> int:
        return sum(number < layer for number in self._steps)

    # ── Hooks ──

    def before_all(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Qwen3-VL adds visual features behind its first layers at the prompt's places; `after` does it by stage."""
        self._deeper = []
        if (levels := named.get("deepstack_visual_embeds")) is None:
            return None
        places = named["visual_pos_masks"][..., None]
        for level in levels:
            self._deeper.append(level.new_zeros(*places.shape[:2], level.shape[1]).masked_scatter(places, level))
        return arguments, named | {"deepstack_visual_embeds": None}

    def before(self, number: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden, *rest = arguments
        cache = named.get("past_key_values")
        if number == 0:
            self._begin(hidden, cache)
        if self._reading and (step := self._steps.get(number - 1)) is not None:
            hidden = self._drop(step, hidden, named)
        if (behind := self._stage_of(number)) == 0:
            return None
        stage = self._stages[behind]
        if self._reading:
            return (hidden, *rest), named | stage.arguments
        return arguments, named | {"attention_mask": self._decoding_mask(stage, number, hidden, cache)}

    def after(self, number: int, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if number >= len(self._deeper):
            return None
        stage = self._stages[self._stage_of(number)]
        return output + _take(self._deeper[number], stage.index).to(output)

    # ── Reading the prompt ──

    def _begin(self, hidden: Tensor, cache: Any) -> None:
        batch, length, _ = hidden.shape
        _check_cache(cache)
        past = 0 if cache is None else cache.get_seq_length()
        self._reading = past == 0
        if not self._reading:
            if length > 1 or not self._stages or past < self._stages[0].index.shape[1]:
                raise InfopruneError(
                    f"{length} tokens on a cache of {past}: a pruned prompt continues one token at a time and inside "
                    "its own block; start a new cache with the whole conversation"
                )
            return
        rows, width = self._visual.shape
        if batch % rows or length < width:
            raise InfopruneError(
                f"visual_mask is {rows} x {width}, the model's input {batch} x {length}: give one row per prompt, as "
                "long as the prompt, and do not read it in chunks"
            )
        self._copies = batch // rows
        # Without a cache, generation calls with the prompt and what it has made so far.
        visual, attention = (
            F.pad(mask.to(hidden.device, torch.bool), (0, length - width), value=value)
            for mask, value in ((self._visual, False), (self._attention, True))
        )
        visual = visual & attention
        places = torch.arange(length, device=hidden.device)
        last = (attention * places)[:, :width].argmax(1) if self._last is None else self._last.to(hidden.device)
        asked = Asked(hidden[:: self._copies], visual, attention & ~visual & (places <= last[:, None]), last)
        self._queries = {n: step.queries(asked) for n, step in self._steps.items() if step.queries is not None}
        self._stages = [_Stage(self._repeat(places.expand(rows, -1)), self._repeat(attention), self._repeat(visual))]
        self.trace.kept = []
        self.trace.per_layer = visual.sum(1, keepdim=True).repeat(1, len(self._text.layers)).cpu()

    def _rank(self, number: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        if not self._reading:
            return
        # Beams of a prompt must agree, so the first one speaks for all.
        stage, copies = self._stages[-1], self._copies
        asking = self._queries[number].gather(1, stage.index[::copies])
        rows = asking.int().argsort(dim=1, descending=True, stable=True)[:, : int(asking.sum(1).max())]
        mask = mask if mask is None else mask.expand(len(query), -1, -1, -1)[::copies]
        attention = attention_rows(query[::copies], key[::copies], mask, scaling, rows)
        # Rows ask with different numbers of tokens. The sum over them ranks as the mean does.
        self._scores = (asking.gather(1, rows).float()[:, None] @ attention)[:, 0]

    def _drop(self, step: Step, hidden: Tensor, named: dict[str, Any]) -> Tensor:
        """The ranking layer's output [B, L, D] without what is dropped; a new stage begins."""
        stage, copies = self._stages[-1], self._copies
        visual = stage.visual[::copies]
        scores = self._scores
        if step.queries is None:
            draws = self._draws[step.layer].to(visual.device)
            draws = F.pad(draws, (0, self._stages[0].index.shape[1] - draws.shape[1]))
            scores = draws.gather(1, stage.index[::copies])
        began, present = self._stages[0].visual[::copies].sum(1).tolist(), visual.sum(1).tolist()
        counts = [step.survivors(*row) for row in zip(began, present, strict=True)]
        order = scores.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
        kept = torch.tensor([count for count, _ in counts], device=order.device)
        first = torch.arange(order.shape[1], device=order.device) < kept[:, None]
        stays = torch.zeros_like(visual).scatter(1, order, first)
        if step.recycling is not None:
            hidden, dropped = hidden.clone(), visual & ~stays
            for row in (row for row, (_, recycled) in enumerate(counts) if recycled):
                places = dropped[row].nonzero()[:, 0]
                for beam in range(row * copies, (row + 1) * copies):
                    means, centres = step.recycling.merge(hidden[beam, places], scores[row, places])
                    hidden[beam, places[centres]] = means.to(hidden.dtype)
                    stays[row, places[centres]] = True
        return self._advance(step, hidden, self._repeat(stays), named)

    def _advance(self, step: Step, hidden: Tensor, stays: Tensor, named: dict[str, Any]) -> Tensor:
        """Gather what the layers behind a step take; `named` are a layer's arguments for the whole prompt."""
        old, copies = self._stages[-1], self._copies
        # Padding in front is not carried along; behind the text it is, or the last positions would move.
        keep = stays | (~old.visual & (old.valid.cumsum(1) > 0))
        order = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]
        index, visual = old.index.gather(1, order), stays.gather(1, order)
        valid = (keep & old.valid).gather(1, order)
        hidden = _take(hidden, order)
        arguments: dict[str, Any] = {"attention_mask": self._mask(valid, hidden)}
        if (embeddings := named.get("position_embeddings")) is not None:
            arguments["position_embeddings"] = tuple(_take(part, index) for part in embeddings)
        if (ids := named.get("position_ids")) is not None:
            arguments["position_ids"] = _take(ids[..., None], index)[..., 0]
        self._stages.append(_Stage(index, valid, visual, arguments))
        numbers = self._stages[0].visual[::copies].cumsum(1) - 1
        rows = zip(numbers, index[::copies], visual[::copies], strict=True)
        self.trace.kept.append([number[place[here]].cpu() for number, place, here in rows])
        self.trace.per_layer[:, step.layer + 1 :] = visual[::copies].sum(1, keepdim=True).cpu()
        return hidden

    # ── Masks ──

    def _mask(self, valid: Tensor, hidden: Tensor, cache: Any = None, layer: int = 0) -> Any:
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=self._text.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            layer_idx=layer,
        )

    def _decoding_mask(self, stage: _Stage, layer: int, hidden: Tensor, cache: Any) -> Any:
        """The mask of one new token over a layer's own, shorter cache."""
        new = cache.get_seq_length(0) - self._stages[0].index.shape[1]
        cached, expected = cache.get_seq_length(layer), stage.index.shape[1] + new - 1
        if cached != expected:
            raise InfopruneError(
                f"decoder layer {layer} has {cached} cached tokens, expected {expected}: the cache was not filled "
                "inside this block; start a new one"
            )
        return self._mask(F.pad(stage.valid, (0, new), value=True), hidden, cache, layer)

    def _repeat(self, prompts: Tensor) -> Tensor:
        return prompts.repeat_interleave(self._copies, dim=0)


def _check_cache(cache: Any) -> None:
    from transformers import DynamicCache

    if cache is not None and not isinstance(cache, DynamicCache):
        raise InfopruneError(
            f"{type(cache).__name__}: layers behind a step hold fewer tokens, which needs a cache that grows; use "
            "DynamicCache (cache_implementation='dynamic')"
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Places `index` [B, T] of x [..., B or 1, L, D] along its length."""
    rows, places = index.shape
    index = index.to(x.device)[..., None].expand(*x.shape[:-3], rows, places, x.shape[-1])
    return x.expand(*x.shape[:-3], rows, *x.shape[-2:]).gather(-2, index)
