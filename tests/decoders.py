"""Random language models with hand-built prompts, and what comes out when dropped tokens are masked by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from families import seeded
from torch import Tensor
from transformers import AutoModelForImageTextToText

from infoprune_export.models.zoo import TINY
from infoprune_export.tokens.decoder import Trace, pruned_decoder
from infoprune_export.tokens.steps import Asked, Step

FAMILIES = ("llava", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
DEPTH = 5
HALF, THIRD, ALL = Fraction(1, 2), Fraction(1, 3), Fraction(1)


def model_of(family: str, attention: str = "sdpa") -> Any:
    """A random model with 5 decoder layers, 4 heads over 2 key-value heads."""
    config = TINY[family](3)
    text = config.text_config
    text.num_hidden_layers = DEPTH
    if hasattr(text, "layer_types"):
        text.layer_types = ["full_attention"] * DEPTH
    torch.manual_seed(2)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


@dataclass
class Batch:
    """Prompts as embeddings: i is a visual token, t text, . padding."""

    rows: tuple[str, ...]
    made: int = 0
    """Tokens at the end that generation made."""

    def __post_init__(self) -> None:
        letters = [list(row) for row in self.rows]
        self.visual = torch.tensor([[letter == "i" for letter in row] for row in letters])
        self.mask = torch.tensor([[int(letter != ".") for letter in row] for row in letters])
        self.embeds = torch.randn(*self.mask.shape, 64, generator=seeded(4))
        self.deeper = [torch.randn(int(self.visual.sum()), 64, generator=seeded(5 + i)) for i in range(2)]
        self.last = (self.mask * torch.arange(self.mask.shape[1])).argmax(1)

    def positions(self, model: Any) -> Tensor:
        """Under M-RoPE time, row and column differ, as they do for images; what is made goes on by one on each axis."""
        order = (self.mask.cumsum(1) - 1).clamp_min(0)
        if "qwen" not in model.config.model_type:
            return order
        prompt = order[:, : order.shape[1] - self.made]
        axes = torch.stack([prompt, prompt, prompt // 3, prompt * 2 // 3])
        return torch.cat([axes, axes[..., -1:] + torch.arange(1, self.made + 1)], dim=-1)

    def inputs(self, model: Any) -> dict[str, Tensor]:
        return {
            "inputs_embeds": self.embeds,
            "attention_mask": self.mask,
            "position_ids": self.positions(model),
        }


# Several images, text between and behind them, rows with different numbers of visual tokens, left padding.
LEFT = Batch(("..tiiiiiiiiitiiiittt", "tiiiiiiiiiiiitiiittt", "....tttttiiiiiiitttt"))
RIGHT = Batch(("tiiiiiiiiitiiiittt..", "tiiiiiiiiiiiiiiitttt", "tttttiiiiiiitttt...."))


@contextlib.contextmanager
def deepstack(model: Any, batch: Batch) -> Iterator[None]:
    """Qwen3-VL's deeper features, for a prompt and for as many beams of it as there are."""
    if model.config.model_type != "qwen3_vl":
        yield
        return

    def add(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        rows, length = named["inputs_embeds"].shape[:2]
        if length < batch.mask.shape[1]:
            return arguments, named
        beams = rows // len(batch.mask)
        visual = torch.nn.functional.pad(batch.visual, (0, length - batch.mask.shape[1]))
        parts = [level.split(batch.visual.sum(1).tolist()) for level in batch.deeper]
        levels = [torch.cat([part for part in level for _ in range(beams)]) for level in parts]
        named |= {"visual_pos_masks": visual.repeat_interleave(beams, 0), "deepstack_visual_embeds": levels}
        return arguments, named

    handle = model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def masked_reference(
    model: Any, batch: Batch, steps: list[Step], chosen: Callable[[list[int]], set[int]] = lambda dropped: set()
) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits of an eager model that sees everything but may not attend to what was dropped; and places kept.

    `chosen` are places that stay although they were dropped.
    """
    dropped = torch.zeros_like(batch.visual)
    kept: list[list[list[int]]] = []
    weights: dict[int, Tensor] = {}
    by_layer = {step.layer: step for step in steps}
    asked = Asked(batch.embeds, batch.visual, batch.mask.bool() & ~batch.visual, batch.last)

    def drop(step: Step) -> None:
        rows = []
        queries = step.queries(asked)
        for row in range(len(batch.rows)):
            scores = weights[step.layer][row].mean(0)[queries[row]].mean(0)
            total = int(batch.visual[row].sum())
            present = (batch.visual[row] & ~dropped[row]).nonzero()[:, 0].tolist()
            best = sorted(present, key=lambda place: -float(scores[place]))
            count = -(-total * step.keep.numerator // step.keep.denominator)
            lost = sorted(best[count:])
            stays = chosen(lost)
            dropped[row, [place for place in lost if place not in stays]] = True
            rows.append(sorted({*best[:count], *stays}))
        kept.append(rows)

    def before(number: int, arguments: Any, named: dict[str, Any]) -> Any:
        if (step := by_layer.get(number - 1)) is not None:
            drop(step)
        hidden = torch.where(dropped, torch.finfo(torch.float32).min, 0.0)[:, None, None]
        return arguments, named | {"attention_mask": torch.minimum(named["attention_mask"], hidden)}

    with contextlib.ExitStack() as stack:
        stack.enter_context(deepstack(model, batch))
        for number, layer in enumerate(model.model.language_model.layers):
            hook = lambda _, a, n, number=number: before(number, a, n)  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            see = lambda _, __, output, number=number: weights.update({number: output[1]})  # noqa: E731
            stack.callback(layer.self_attn.register_forward_hook(see).remove)
        logits = model(**batch.inputs(model)).logits
    return logits, kept


def numbers(batch: Batch, kept: list[list[list[int]]]) -> list[list[list[int]]]:
    """Places in the prompt as places among the row's visual tokens."""
    order = (batch.visual.cumsum(1) - 1).tolist()
    return [[[order[row][place] for place in places] for row, places in enumerate(rows)] for rows in kept]


def as_lists(trace: Trace) -> list[list[list[int]]]:
    return [[row.tolist() for row in rows] for rows in trace.kept]


@torch.no_grad()
def pruned_logits(model: Any, batch: Batch, steps: list[Step], **options: Any) -> tuple[Tensor, Trace]:
    with (
        deepstack(model, batch),
        pruned_decoder(model, batch.visual, batch.mask, steps, **options) as trace,
    ):
        return model(**batch.inputs(model)).logits, trace


def generate(
    model: Any, batch: Batch, steps: list[Step] | None = None, generator: torch.Generator | None = None, **options: Any
) -> tuple[Any, Trace]:
    """Five tokens; nothing is pruned without `steps`."""
    pruned = pruned_decoder(model, batch.visual, batch.mask, steps or [], generator=generator)
    with deepstack(model, batch), contextlib.nullcontext(Trace()) if steps is None else pruned as trace:
        made = model.generate(
            **batch.inputs(model),
            do_sample=False,
            max_new_tokens=5,
            min_new_tokens=5,
            suppress_tokens=[4, 5, 6, 7],
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return made, trace
