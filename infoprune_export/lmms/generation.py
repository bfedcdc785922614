"""What a task of lmms-eval asks for, read strictly: an argument that would be ignored is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from infoprune_export.errors import InfopruneError

DEFAULT_NEW_TOKENS = 1024
"""Where a task names no limit, as lmms-eval's own models have it; answers end by themselves before."""


@dataclass(frozen=True)
class Generation:
    """How one answer is made: greedily, so many tokens at most, and cut in front of the first stop text."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any], task: str) -> Generation:
        """Of a task's ``generation_kwargs``.

        Arguments of sampling are accepted where they leave the answer greedy (``temperature: 0``, ``top_p`` without
        sampling), and ``image_aspect_ratio`` where it asks for what the model's own processor does.

        Raises:
            InfopruneError: an argument that asks for something else, or that is not known.
        """
        left = dict(arguments)
        until = left.pop("until", ()) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        new_tokens = left.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
        if type(new_tokens) is not int or new_tokens < 1:
            raise InfopruneError(f"task {task}: max_new_tokens = {new_tokens!r}; give a whole number from 1 on")
        if not all(isinstance(text, str) for text in until):
            raise InfopruneError(f"task {task}: until = {until!r:.60}; give texts")
        asked, temperature = left.pop("do_sample", None), left.get("temperature")
        # Without do_sample, a temperature asks for sampling; without a temperature, do_sample means 1.
        sampling = (temperature or 0) > 0 if asked is None else bool(asked) and temperature != 0
        beams = left.pop("num_beams", 1)
        for name in ("temperature", "top_p", "top_k"):
            left.pop(name, None)
        if sampling:
            given = "temperature" if asked is None else "do_sample = true, temperature"
            raise InfopruneError(
                f"task {task}: {given} = {temperature}; answers are greedy here, set --gen_kwargs "
                "do_sample=False,temperature=0"
            )
        if beams not in (None, 1):
            raise InfopruneError(f"task {task}: num_beams = {beams!r}; answers are greedy here, use 1")
        if left.pop("image_aspect_ratio", "original") not in (None, "original"):
            raise InfopruneError(
                f"task {task}: image_aspect_ratio = {arguments['image_aspect_ratio']!r}; images go through the model's "
                "own processor, which is original"
            )
        if left:
            raise InfopruneError(f"task {task}: generation argument {min(left)!r} is not known here; leave it out")
        return cls(new_tokens, tuple(text for text in until if text))

    def cut(self, text: str) -> str:
        """The answer in front of the first stop text."""
        for stop in self.until:
            text = text.split(stop, 1)[0]
        return text.strip()


def pictures(visuals: Sequence[Any] | None, task: str) -> list[Image.Image]:
    """A request's images in RGB.

    Raises:
        InfopruneError: there is none, or one is a video or a sound.
    """
    images = list(visuals or ())
    if not images:
        raise InfopruneError(f"task {task}: a question without an image; this model is asked about images")
    if other := [one for one in images if not isinstance(one, Image.Image)]:
        raise InfopruneError(f"task {task}: a visual is {type(other[0]).__name__}, not an image; choose an image task")
    return [image.convert("RGB") for image in images]


def batches(keys: Sequence[Generation], size: int) -> list[list[int]]:
    """Places of requests, in order, in batches of one `Generation` each."""
    if size < 1:
        raise InfopruneError(f"batch_size = {size}; give a whole number from 1 on")
    by_key: dict[Generation, list[int]] = {}
    for place, key in enumerate(keys):
        by_key.setdefault(key, []).append(place)
    return [places[i : i + size] for places in by_key.values() for i in range(0, len(places), size)]
