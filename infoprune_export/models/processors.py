"""Processors as their models ship them, and without torchvision where only videos need it.

The Qwen processors hold an image processor that runs on Pillow and a video processor that runs on torchvision alone,
and cannot be loaded without both. Here only images are read, so without torchvision the video half is left out.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

# model_type -> the class whose image half is enough.
_WITH_VIDEO = {
    "qwen2_vl": "transformers.models.qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor",
    "qwen2_5_vl": "transformers.models.qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
    "qwen3_vl": "transformers.models.qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
}


def load_processor(source: Path | str, model_type: str, **common: Any) -> ProcessorMixin:
    """``AutoProcessor.from_pretrained``; only its image half where a Qwen processor misses torchvision."""
    try:
        return AutoProcessor.from_pretrained(source, **common)
    except (OSError, ImportError):
        if model_type not in _WITH_VIDEO or importlib.util.find_spec("torchvision") is not None:
            raise
    return _image_half(_WITH_VIDEO[model_type]).from_pretrained(source, **common)


def _image_half(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    full: type[Any] = getattr(import_module(module), name)

    def __init__(  # noqa: N807  (becomes the class's own below)
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any
    ) -> None:
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self: Any, folder: Path, **options: Any) -> Any:
        written = full.save_pretrained(self, folder, **options)
        # The full class finds its video settings in this file, as in the published checkpoints.
        self.image_processor.save_pretrained(folder)
        return written

    # Saved files name the class, so it keeps the full one's name.
    return type(
        name, (full,), {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": full.__module__}
    )
