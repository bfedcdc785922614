"""A vision-language model with its processor: loading it, asking it, and its loss on known answers.

Visual features are computed apart from the language model, because that is where this package cuts: the same language
model answers from the original tower, the pruned one, or an engine.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import check_family, tower_of
from infoprune_export.models.precision import keep_fp32
from infoprune_export.models.shards import check_shards
from infoprune_export.models.tower import Layout, VisionTower
from infoprune_export.recipe import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class VLM:
    """`tower` is a view into `model`: surgery on one changes the other."""

    model: PreTrainedModel
    processor: ProcessorMixin
    tower: VisionTower

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass(frozen=True)
class VisualTokens:
    """What the language model gets to see of a batch of images; every list has one entry per image."""

    features: Sequence[Tensor]
    """[T, D_llm] each."""
    layouts: Sequence[Layout]
    """Where the T tokens stand. With gaps where tokens were left out, or contiguous as if there had been no others."""

    @classmethod
    def of(
        cls,
        features: Sequence[Tensor],
        layouts: Sequence[Layout],
        kept: Sequence[Tensor] | None = None,
        *,
        contiguous: bool = False,
    ) -> VisualTokens:
        """Features with the layouts of all their image's tokens, of which `kept` (ascending int64 [T]) are there."""
        if kept is not None:
            places = [
                Layout(layout.ids[:, k.to(layout.ids.device)], layout.advance)
                for layout, k in zip(layouts, kept, strict=True)
            ]
            if contiguous:
                places = [Layout(torch.arange(len(k))[None], len(k)) for k in kept]
            layouts = places
        return cls(features, layouts)

    def rows(self, index: Sequence[int]) -> VisualTokens:
        """These images, repeated as asked for."""
        return VisualTokens([self.features[i] for i in index], [self.layouts[i] for i in index])


_LOADING_ERRORS = (
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


# ── Loading ──────────────────────────────────────────────────────────────────


def resolve(name_or_path: str) -> Path | str:
    """A folder for local and testbed models, the hub id for anything else."""
    if name_or_path.startswith(testbed.PREFIX):
        if not (path := testbed.checkpoint(name_or_path)).is_dir():
            known = ", ".join(testbed.names()) or "none shipped"
            raise InfopruneError(f"no testbed model {name_or_path!r}; there are: {known}")
        return path
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise InfopruneError(f"{name_or_path}: no model folder here; give a folder with config.json or a hub id")
    return name_or_path


def check_model(spec: ModelSpec) -> None:
    """Refuse what cannot be loaded before any work is done; reads only a local ``config.json``."""
    source = resolve(spec.name_or_path)
    if isinstance(source, str):
        return
    config = source / "config.json"
    if not config.is_file():
        raise InfopruneError(f"{source}: no config.json; this is not a Hugging Face model folder")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        if not isinstance(model_type, str):
            raise TypeError
    except OSError as error:
        raise InfopruneError(f"{config}: cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InfopruneError(f"{config}: not a Hugging Face model configuration (no model_type)") from None
    check_family(model_type)
    if not any(source.glob("*.safetensors")):
        raise InfopruneError(f"{source}: no *.safetensors file; pickled weights are not read, convert them first")
    check_shards(source)


def load(spec: ModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VLM:
    """Load model and processor, in evaluation mode, without gradients.

    Raises:
        InfopruneError: not found, not a supported VLM, not safetensors, or a tensor is missing, unknown to the model
            or of the wrong shape. A weight is never initialised to stand in for one that is not in the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from infoprune_export.models.processors import load_processor

    source = resolve(spec.name_or_path)
    if isinstance(source, Path):
        check_shards(source)
    common: dict[str, Any] = {
        "revision": spec.revision or "main",
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": isinstance(source, Path),
    }
    try:
        config = AutoConfig.from_pretrained(source, **common)
        check_family(config.model_type)
        if spec.image_packing != "anyres":
            config.image_packing = spec.image_packing
        processor = load_processor(source, config.model_type, **common)
        model, info = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
        )
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InfopruneError(f"{spec.name_or_path}: cannot be loaded: {reason[:400]}") from error
    problems = {what: sorted(map(str, info[what])) for what in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InfopruneError(
                f"{spec.name_or_path}: checkpoint has {what.replace('_keys', '')} tensors: {keys[0]}{more}; "
                "its weights do not belong to its config.json"
            )
    if not getattr(processor, "chat_template", None):
        raise InfopruneError(f"{spec.name_or_path}: the processor has no chat template; add chat_template.jinja")
    model.requires_grad_(False)
    return VLM(model.eval().to(device), processor, tower_of(model))


def writable_copy(vlm: VLM) -> VLM:
    """A VLM whose tower can be operated on; every weight outside the tower's blocks is shared with the original."""
    own = {id(p) for block in vlm.tower.blocks for p in block.module.parameters()}
    shared = {id(p): p for p in vlm.model.parameters() if id(p) not in own}
    model = copy.deepcopy(vlm.model, memo=dict(shared))
    return VLM(model, vlm.processor, tower_of(model))


def cast(vlm: VLM, dtype: torch.dtype, keep: Collection[str] = ()) -> VLM:
    """The VLM in another floating type: itself if it is in that type, else a copy.

    Parts of the encoder in `keep` stay fp32, see `precision.keep_fp32`.
    """
    if vlm.model.dtype == dtype:
        return vlm
    model = copy.deepcopy(vlm.model).to(dtype)
    made = VLM(model, vlm.processor, tower_of(model))
    keep_fp32(made.tower, vlm.tower, keep)
    return made


def on_cpu(vlm: VLM) -> VLM:
    """The VLM on the CPU: itself if it is there, else a copy."""
    if vlm.device.type == "cpu":
        return vlm
    model = copy.deepcopy(vlm.model).to("cpu")
    return VLM(model, vlm.processor, tower_of(model))


# ── Inputs ───────────────────────────────────────────────────────────────────


def preprocess(
    vlm: VLM, images: Sequence[Image], device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Images to the tower's inputs, by the model's own processor, on its device and in its dtype by default."""
    return place(vlm, prepare(vlm.processor.image_processor, images), device, dtype)


def prepare(image_processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
    """What a model's image processor makes of images, on the CPU; needs no model, so that other processes can do it."""
    return dict(image_processor(list(images), return_tensors="pt"))


def place(
    vlm: VLM,
    inputs: dict[str, Tensor],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Prepared images as the tower takes them, on the model's device and in its dtype by default."""
    vlm.tower.check_inputs(inputs)
    device, dtype = device or vlm.device, dtype or vlm.model.dtype
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def prompt_ids(vlm: VLM, question: str, *visual_tokens: int) -> list[int]:
    """Token ids of one user turn, ready for generation: images of so many visual tokens each, then the question.

    Raises:
        InfopruneError: the question contains the image placeholder, or the chat template has another number of them.
    """
    tokenizer, placeholder = vlm.processor.tokenizer, vlm.processor.image_token
    if placeholder in question:
        raise InfopruneError(
            f"question {question!r:.60} contains {placeholder}, which stands for an image; leave it out, images are "
            "put in front of the question"
        )
    content = [*({"type": "image"} for _ in visual_tokens), {"type": "text", "text": question}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    pieces = text.split(placeholder)
    if len(pieces) != len(visual_tokens) + 1:
        raise InfopruneError(
            f"the chat template writes {placeholder} {len(pieces) - 1} times for {len(visual_tokens)} images; use the "
            "one that belongs to this model"
        )
    filled = "".join(piece + placeholder * count for piece, count in zip(pieces, [*visual_tokens, 0], strict=True))
    ids: list[int] = tokenizer(filled, add_special_tokens=not has_bos).input_ids
    return ids


@dataclass(frozen=True)
class Prompt:
    """Left-padded prompts as the language model takes them."""

    embeds: Tensor
    """[B, L, D], features at the placeholders."""
    mask: Tensor
    """[B, L]."""
    positions: Tensor
    """[B, L], or [4, B, L] under M-RoPE: text order, time, row, column."""
    visual: Tensor
    """Where the placeholders are, bool [B, L]."""
    deeper: Sequence[Tensor]
    """What Qwen3-VL adds to them behind its first layers, [sum of T, D] each; the rest of the features' width."""
    last: Tensor
    """Place of each prompt's last token; a known reply may follow it. int64 [B]."""


Decoding = Callable[[VLM, Prompt], contextlib.AbstractContextManager[object]]
"""What runs around the language model while it reads prompts and answers; see `tokens.decoder.decoding`."""


def _embed(
    vlm: VLM, rows: Sequence[Sequence[int]], visual: VisualTokens, replies: Sequence[int] | None = None
) -> Prompt:
    """Rows of token ids as a prompt; the last `replies` ids of each are a known reply."""
    tokenizer = vlm.processor.tokenizer
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=vlm.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=vlm.device)
    embeds = vlm.model.get_input_embeddings()(ids)
    placeholders = (ids == vlm.model.config.image_token_id) & mask.bool()
    features = torch.cat(list(visual.features)).to(embeds)
    embeds = embeds.masked_scatter(placeholders[..., None], features[:, : embeds.shape[-1]])
    deeper = (
        features[:, embeds.shape[-1] :].split(embeds.shape[-1], dim=1) if features.shape[1] > embeds.shape[-1] else ()
    )
    last = length - 1 - torch.tensor(replies if replies is not None else [0] * len(rows), device=vlm.device)
    return Prompt(embeds, mask, _position_ids(vlm, rows, visual, mask), placeholders, deeper, last)


@contextlib.contextmanager
def _deepstack(vlm: VLM, prompt: Prompt) -> Iterator[None]:
    """Within the block, the language model adds the prompt's deeper features behind its first layers (Qwen3-VL)."""
    if not prompt.deeper:
        yield
        return

    def add(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Later calls of generation see one new token and the cache.
        if named["inputs_embeds"].shape[1] == prompt.embeds.shape[1]:
            named |= {"visual_pos_masks": prompt.visual, "deepstack_visual_embeds": list(prompt.deeper)}
        return arguments, named

    handle = vlm.model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _position_ids(vlm: VLM, rows: Sequence[Sequence[int]], visual: VisualTokens, mask: Tensor) -> Tensor:
    text = (mask.cumsum(1) - 1).clamp_min(0)
    ids = torch.zeros(vlm.tower.position_axes, *mask.shape, dtype=torch.long)
    layouts = iter(visual.layouts)
    for number, row in enumerate(rows):
        ids[:, number, ids.shape[2] - len(row) :] = _row_positions(vlm, row, layouts)
    ids = ids.to(mask.device)
    return ids[0] if len(ids) == 1 else torch.cat([text[None], ids])


def _row_positions(vlm: VLM, row: Sequence[int], layouts: Iterator[Layout]) -> Tensor:
    """Positions of a prompt's tokens [A, L]; takes the layouts of its images from `layouts`."""
    placeholder, axes = vlm.model.config.image_token_id, vlm.tower.position_axes
    parts, place, position = [], 0, 0
    while placeholder in row[place:]:
        before, layout = row.index(placeholder, place) - place, next(layouts)
        parts += [torch.arange(position, position + before).expand(axes, -1), position + before + layout.ids.cpu()]
        place += before + layout.ids.shape[1]
        position += before + layout.advance
    parts.append(torch.arange(position, position + len(row) - place).expand(axes, -1))
    return torch.cat(parts, dim=1)


# ── Answers ──────────────────────────────────────────────────────────────────


@torch.inference_mode()
def answer(
    vlm: VLM,
    visual: VisualTokens,
    questions: Sequence[str],
    max_new_tokens: int = 8,
    decoder: Decoding | None = None,
    images: Sequence[int] | None = None,
) -> list[str]:
    """Greedy answers, within `decoder`. Each question is about one image of `visual`, or the next so many `images`."""
    counts = iter([len(features) for features in visual.features])
    per_question = images if images is not None else [1] * len(questions)
    rows = [
        prompt_ids(vlm, question, *itertools.islice(counts, number))
        for question, number in zip(questions, per_question, strict=True)
    ]
    if sum(per_question) != len(visual.features):
        raise InfopruneError(f"{sum(per_question)} images are asked about, {len(visual.features)} are given")
    prompt = _embed(vlm, rows, visual)
    with _deepstack(vlm, prompt), decoder(vlm, prompt) if decoder else contextlib.nullcontext():
        generated = vlm.model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
        )
    texts: list[str] = vlm.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_loss(
    vlm: VLM,
    visual: VisualTokens,
    questions: Sequence[str],
    answers: Sequence[str],
    decoder: Decoding | None = None,
) -> Tensor:
    """Mean next-token cross-entropy of the answers, end of sequence included, differentiable in the features.

    One question and answer per image of `visual`; the language model runs within `decoder`.
    """
    tokenizer = vlm.processor.tokenizer
    rows, lengths = [], []
    for question, text, features in zip(questions, answers, visual.features, strict=True):
        reply = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append([*prompt_ids(vlm, question, len(features)), *reply])
        lengths.append(len(reply))
    prompt = _embed(vlm, rows, visual, lengths)
    # Rows end together (left padding), so only the tail needs logits.
    tail = max(lengths) + 1
    with _deepstack(vlm, prompt), decoder(vlm, prompt) if decoder else contextlib.nullcontext():
        logits = vlm.model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            use_cache=False,
            logits_to_keep=tail,
        ).logits
    labels = torch.full((len(rows), tail - 1), -100, device=vlm.device)
    for i, (row, count) in enumerate(zip(rows, lengths, strict=True)):
        labels[i, -count:] = torch.tensor(row[-count:], device=vlm.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)
