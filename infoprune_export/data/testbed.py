"""The shipped testbed: a tiny LLaVA in standard Hugging Face classes, small enough to train on one CPU core.

``testbed/tiny-llava`` is a model name every command accepts. Its checkpoint was made by ``python -m
infoprune_export.data.train_testbed`` and lies beside this file; it loads with plain
``AutoModelForImageTextToText.from_pretrained`` and ``AutoProcessor.from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export.data.scenes import COLORS, IMAGE_SIZE, SHAPES, WORDS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PREFIX = "testbed/"

_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
_PATCH_SIZE = 14
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


def vocabulary() -> dict[str, int]:
    """Every word of `scenes`' questions and answers. Numbers are one digit and a ``##`` continuation digit."""
    text = (
        "what color is the shape object how many objects are there a in image which side on number word sign "
        "describe of and ? , . yes no left right above below direction from none"
    )
    words = {*text.split(), *SHAPES, *COLORS, *WORDS, *"0123456789", *(f"##{d}" for d in "0123456789")}
    return {token: i for i, token in enumerate([*_SPECIAL, *sorted(words)])}


def build_processor() -> LlavaProcessor:
    """Tokenizer, PIL-backed image processor and chat template of the tiny LLaVA. Nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    backend = Tokenizer(models.WordPiece(vocabulary(), unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
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

    special = {token: i for i, token in enumerate(_SPECIAL)}
    tokens = {"pad_token_id": special["<pad>"], "bos_token_id": special["<s>"], "eos_token_id": special["</s>"]}
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
        vocab_size=len(vocabulary()),
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
        image_token_id=special["<image>"],
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
