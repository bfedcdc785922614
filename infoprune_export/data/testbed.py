"""The shipped testbeds: a tiny LLaVA and a tiny Qwen2.5-VL in standard Hugging Face classes.

``testbed/tiny-llava`` and ``testbed/tiny-qwen2.5-vl`` are model names every command accepts. Small enough to be trained
on one CPU core by ``python -m infoprune_export.data.train_testbed``, they lie beside this file and load with plain
``AutoModelForImageTextToText.from_pretrained`` and ``AutoProcessor.from_pretrained``.

The first sees square images of 64 tokens; the second images of seven sizes and 60 to 66 tokens, six of which its
attention windows do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export.data.scenes import COLORS, IMAGE_SIZE, MIXED_SIZES, SHAPES, WORDS

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PaddleOCRVLProcessor,
        PreTrainedTokenizerFast,
        Qwen2_5_VLForConditionalGeneration,
    )

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PREFIX = "testbed/"

_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
_LLAVA_TOKENS = ["<image>", "<user>", "<assistant>"]
# By name, because the processor asks its tokenizer for `image_token`.
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "user_token": "<user>",
    "assistant_token": "<assistant>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
}
_PATCH_SIZE = 14
_QWEN_PATCH_SIZE = 7
_MERGE_SIZE = 2
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% endif %}{% endfor %}"
    "<user>{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% else %}<assistant>{% for part in message.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def checkpoint(name: str) -> Path:
    """Folder of a shipped checkpoint such as ``testbed/tiny-llava``; it may not exist."""
    return CHECKPOINTS / name.removeprefix(PREFIX)


def names() -> list[str]:
    """Names of the shipped checkpoints."""
    return sorted(PREFIX + path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def vocabulary(special: Iterable[str] = ()) -> dict[str, int]:
    """Special tokens, then every word of `scenes`' questions and answers.

    Numbers are one digit and a ``##`` continuation digit.
    """
    text = (
        "what color is the shape object how many objects are there a in image which side on number word sign "
        "describe of and ? , . yes no left right above below direction from none"
    )
    words = {*text.split(), *SHAPES, *COLORS, *WORDS, *"0123456789", *(f"##{d}" for d in "0123456789")}
    return {token: i for i, token in enumerate([*_TOKENS, *special, *sorted(words)])}


def _build_tokenizer(special: list[str] | dict[str, str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that pads on the left. Of a dictionary of special tokens, keys become attributes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = special.values() if isinstance(special, dict) else special
    backend = Tokenizer(models.WordPiece(vocabulary(tokens), unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, PIL-backed image processor and chat template of the tiny LLaVA. Nothing is downloaded."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(_LLAVA_TOKENS),
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(
    *, layers: int = 6, hidden_size: int = 128, heads: int = 8, seed: int = 0
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA with CLIP tower and Llama decoder, fp32.

    Like LLaVA-1.5 it takes its features from ``hidden_states[-2]``: the last vision block exists but is never used.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = vocabulary(_LLAVA_TOKENS)
    tokens = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    vision = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
        projection_dim=hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **tokens,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        image_seq_length=(IMAGE_SIZE // _PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **tokens,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    return model


def build_qwen_processor() -> PaddleOCRVLProcessor:
    """Tokenizer, PIL-backed image processor and chat template of the tiny Qwen2.5-VL. Nothing is downloaded.

    ``Qwen2_5_VLProcessor`` cannot exist without a video processor, nor that one without torchvision.
    ``PaddleOCRVLProcessor`` is its image half: the same inputs for the same images. (Reading it back without
    torchvision takes a transformers newer than 5.17, whose ``AutoProcessor`` looks for the wrong class.)
    """
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sides = [side for size in MIXED_SIZES for side in size]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=_QWEN_PATCH_SIZE,
        merge_size=_MERGE_SIZE,
        temporal_patch_size=2,
        size={"shortest_edge": min(sides) ** 2, "longest_edge": max(sides) ** 2},  # areas, despite their names
    )
    return PaddleOCRVLProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(_QWEN_TOKENS),
        chat_template=_CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def build_qwen_model(
    *, depth: int = 5, hidden_size: int = 128, heads: int = 8, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL, fp32: full attention in every other block and the last, windows in the rest.

    As in the published models a window is 4 visual tokens wide, and an image whose sides are no multiple of that has
    smaller windows at its right and lower border.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = vocabulary(_QWEN_TOKENS.values())
    tokens = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    vision = {
        "depth": depth,
        "hidden_size": hidden_size,
        "intermediate_size": 8 * round(hidden_size / 3),
        "num_heads": heads,
        "hidden_act": "silu",
        "patch_size": _QWEN_PATCH_SIZE,
        "spatial_merge_size": _MERGE_SIZE,
        "temporal_patch_size": 2,
        "window_size": 4 * _MERGE_SIZE * _QWEN_PATCH_SIZE,
        "fullatt_block_indexes": sorted(range(depth - 1, 0, -2)),
        "out_hidden_size": 128,
    }
    text = {
        "vocab_size": len(ids),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        **tokens,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        **tokens,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    return model
