"""The class that lmms-eval makes: its requests in, answers out. Written against lmms-eval 0.7.3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from infoprune_export.errors import InfopruneError
from infoprune_export.lmms.answering import open_answering
from infoprune_export.lmms.generation import Generation, batches, pictures


class InfopruneModel(lmms):
    """``--model infoprune --model_args run=FOLDER`` or ``pretrained=MODEL``.

    Args:
        run: folder of a finished run; its engine sees, its compressed checkpoint answers, Stage 2 included.
        pretrained: a model in PyTorch instead: a folder, ``testbed/...`` or a hub id; pruned checkpoints too.
        revision: of a hub id.
        device: ``cpu``, ``cuda`` or ``cuda:N``; the GPU where there is one by default.
        batch_size: questions per batch.

    Raises:
        InfopruneError: see `open_answering`; an argument that is not known, a batch size that is no number.
    """

    is_simple = True

    def __init__(
        self,
        run: str | None = None,
        pretrained: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InfopruneError(f"model_args: {min(unknown)!r} is not known; there are run, pretrained, revision")
        if not str(batch_size).isdecimal():
            raise InfopruneError(f"batch_size = {batch_size!r}; give a whole number from 1 on")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self._device = self.accelerator.device if device is None or several else torch.device(device)
        self._answering = open_answering(run, pretrained, str(self._device), revision=revision)

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer per request, in their order."""
        wanted = [Generation.of(request.args[1], request.args[4]) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers") as progress:
            for places in batches(wanted, self.batch_size):
                images = [self._images(*requests[place].args[2:6]) for place in places]
                questions = [str(requests[place].args[0]) for place in places]
                limits = wanted[places[0]]
                given = self._answering.answers(images, questions, limits.max_new_tokens)
                for place, text in zip(places, given, strict=True):
                    texts[place] = limits.cut(text)
                progress.update(len(places))
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """The loss of each continuation, and whether it is the greedy answer.

        lmms-eval takes the continuation with the smallest value, so the value is a loss, as in its own models.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="continuations"):
            if len(request.args) != 6:
                raise InfopruneError("acc_mutual_info asks without a question or an image; leave this metric out")
            question, target, doc_to_visual, doc_id, task, split = request.args
            images = self._images(doc_to_visual, doc_id, task, split)
            if len(images) > 1:
                raise InfopruneError(f"task {task}: {len(images)} images with a continuation; give one")
            reply = str(target if isinstance(target, str) else target(self._document(task, split, doc_id))).strip()
            loss = self._answering.loss(images[0], str(question), reply)
            length = len(self._answering.vlm.processor.tokenizer(reply, add_special_tokens=False).input_ids)
            greedy = self._answering.answers([images], [str(question)], length + 1)[0]
            results.append((loss, greedy == reply))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise InfopruneError("a task with several rounds; this model answers in one, choose a generate_until task")

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str) -> list[Any]:
        return pictures(doc_to_visual(self._document(task, split, doc_id)), task)
