"""Whatever answers behind lmms-eval: a finished run with its engine, or a model in PyTorch, pruned or as it came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer, answer_loss, preprocess


@dataclass(frozen=True)
class Answering:
    """A language model and what stands in front of it."""

    vlm: VLM
    see: Callable[[Sequence[Image.Image]], VisualTokens]
    decoder: Decoding | None = None

    def answers(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers, each question about its own images."""
        visual = self.see([image for row in images for image in row])
        return answer(self.vlm, visual, questions, new_tokens, self.decoder, [len(row) for row in images])

    def loss(self, image: Image.Image, question: str, reply: str) -> float:
        """Mean negative log-likelihood of a reply's tokens and its end."""
        with torch.inference_mode():
            return float(answer_loss(self.vlm, self.see([image]), [question], [reply], self.decoder))


def open_answering(run: str | None, pretrained: str | None, device: str, *, revision: str | None = None) -> Answering:
    """Open the folder of a finished run, or a model by folder, testbed name or hub id.

    Raises:
        InfopruneError: neither or both are given, or what is given cannot be opened.
    """
    if (run is None) == (pretrained is None):
        raise InfopruneError("give either run=FOLDER of a finished run or pretrained=MODEL, one of the two")
    if run is not None:
        from infoprune_export.runtime import open_run

        opened = open_run(Path(run), device)
        return Answering(opened.vlm, opened.encode, opened.decoder)
    return _in_torch(str(pretrained), device, revision)


def _in_torch(name: str, device: str, revision: str | None) -> Answering:
    from infoprune_export.pipeline import load_vlm
    from infoprune_export.recipe import ModelSpec
    from infoprune_export.tokens.encoder import VisionEncoder

    dtype = torch.float32 if device == "cpu" else torch.float16
    vlm = load_vlm(ModelSpec(name_or_path=name, revision=revision), device, dtype)
    encoder = VisionEncoder(vlm.tower, None)

    def see(images: Sequence[Image.Image]) -> VisualTokens:
        with torch.inference_mode():
            return encoder.encode(preprocess(vlm, images))

    return Answering(vlm, see)
