"""A vision-language model with its processor: loading it, asking it, and its loss on known answers.

Visual features are computed apart from the language model, because that is where this package cuts: the same language
model answers from the original tower, the pruned one, or an engine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
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
from infoprune_export.models.tower import VisionTower
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
    """What the language model gets to see of a batch of images."""

    features: Tensor
    """[B, T, D_llm]."""
    positions: Tensor | None = None
    """Which of its image's `total` tokens each one was, ascending int64 [B, T]; None numbers them 0..T-1.

    With positions the language model's position ids keep their gaps: every kept token, and the text behind the image,
    stays where it would be without selection.
    """
    total: int = 0

    def rows(self, index: Sequence[int]) -> VisualTokens:
        """The images of these batch rows, repeated as asked for."""
        picks = list(index)
        return VisualTokens(self.features[picks], None if self.positions is None else self.positions[picks], self.total)


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
    except (ValueError, KeyError, TypeError):
        raise InfopruneError(f"{config}: not a Hugging Face model configuration (no model_type)") from None
    check_family(str(model_type))
    if not any(source.glob("*.safetensors")):
        raise InfopruneError(f"{source}: no *.safetensors file; pickled weights are not read, convert them first")


def load(spec: ModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VLM:
    """Load model and processor, in evaluation mode, without gradients.

    Raises:
        InfopruneError: not found, not a supported VLM, not safetensors, or a tensor is missing, unknown to the model
            or of the wrong shape. A weight is never initialised to stand in for one that is not in the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    source = resolve(spec.name_or_path)
    common: dict[str, Any] = {
        "revision": spec.revision or "main",
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": isinstance(source, Path),
    }
    try:
        config = AutoConfig.from_pretrained(source, **common)
        check_family(config.model_type)
        processor = AutoProcessor.from_pretrained(source, **common)
        model, info = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
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


# ── Inputs ───────────────────────────────────────────────────────────────────


def preprocess(vlm: VLM, images: Sequence[Image]) -> dict[str, Tensor]:
    """Images to the tower's inputs, by the model's own processor, on the model's device."""
    inputs = dict(vlm.processor.image_processor(list(images), return_tensors="pt"))
    vlm.tower.check_inputs(inputs)
    dtype = vlm.model.dtype
    return {k: v.to(vlm.device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def prompt_ids(vlm: VLM, question: str, visual_tokens: int) -> list[int]:
    """Token ids of one user turn with `visual_tokens` image placeholders, ready for generation."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    tokenizer, placeholder = vlm.processor.tokenizer, vlm.processor.image_token
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(
        text.replace(placeholder, placeholder * visual_tokens, 1), add_special_tokens=not has_bos
    ).input_ids
    return ids


def _embed(vlm: VLM, rows: Sequence[Sequence[int]], features: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded embeddings [B, L, D] with `features` [B, T, D] at the placeholders, and the mask [B, L]."""
    tokenizer = vlm.processor.tokenizer
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=vlm.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=vlm.device)
    embeds = vlm.model.get_input_embeddings()(ids)
    placeholders = (ids == vlm.model.config.image_token_id) & mask.bool()
    return embeds.masked_scatter(placeholders[..., None], features.to(embeds)), mask


def _position_ids(vlm: VLM, rows: Sequence[Sequence[int]], mask: Tensor, visual: VisualTokens) -> Tensor:
    """Position of every embedding of left-padded `rows`, [B, L]; see `VisualTokens.positions`."""
    ids = (mask.cumsum(1) - 1).clamp_min(0)
    if visual.positions is None:
        return ids
    kept = visual.positions.shape[1]
    for i, row in enumerate(rows):
        first = ids.shape[1] - len(row) + row.index(vlm.model.config.image_token_id)
        ids[i, first : first + kept] = ids[i, first] + visual.positions[i].to(ids.device)
        ids[i, first + kept :] += visual.total - kept
    return ids


# ── Answers ──────────────────────────────────────────────────────────────────


@torch.inference_mode()
def answer(vlm: VLM, visual: VisualTokens, questions: Sequence[str], max_new_tokens: int = 8) -> list[str]:
    """Greedy answers to one question per image of `visual`."""
    rows = [prompt_ids(vlm, question, visual.features.shape[1]) for question in questions]
    embeds, mask = _embed(vlm, rows, visual.features)
    generated = vlm.model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=_position_ids(vlm, rows, mask, visual),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
    )
    texts: list[str] = vlm.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_loss(vlm: VLM, features: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Mean next-token cross-entropy of the answers, end of sequence included.

    One question and answer per row of `features` [B, T, D_llm], in which the loss is differentiable.
    """
    tokenizer = vlm.processor.tokenizer
    rows, lengths = [], []
    for question, text in zip(questions, answers, strict=True):
        reply = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append([*prompt_ids(vlm, question, features.shape[1]), *reply])
        lengths.append(len(reply))
    embeds, mask = _embed(vlm, rows, features)
    # Rows end together (left padding), so only the tail needs logits.
    tail = max(lengths) + 1
    logits = vlm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=tail).logits
    labels = torch.full((len(rows), tail - 1), -100, device=vlm.device)
    for i, (row, count) in enumerate(zip(rows, lengths, strict=True)):
        labels[i, -count:] = torch.tensor(row[-count:], device=vlm.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)
