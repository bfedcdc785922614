"""Train a shipped testbed checkpoint from nothing: ``python -m infoprune_export.data.train_testbed NAME OUTPUT``.

Four stages, because a VLM of this size does not learn to see from answers alone:

1. The vision tower learns what every visual token shows (shape, colour, word, digits, position) and, at [CLS] or the
   tokens' mean, what the image holds. The label heads are thrown away afterwards.
2. The whole model learns to answer. All questions of an image share its visual tokens in one packed sequence: each
   question attends to the image and to itself, never to another question.
3. The same on new scenes with the tower frozen: reading numbers and relations is learned late, and by the decoder.
4. The same once more with a random part of the background tokens left out (never a token of an object or a sign). A
   decoder that has only ever seen 64 visual tokens counts objects by their share of all tokens, which no large model
   trained on text of every length does; without this stage any selection, good or bad, loses four points on counting.

About 70 minutes on one CPU core for either model. What a stage ends with is kept beside the output, in fp16 like the
result (4 MB), so an interrupted run starts again at the stage it was in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from infoprune_export.artifacts import sha256_json
from infoprune_export.data.training.batches import SceneStream
from infoprune_export.data.training.families import FAMILIES
from infoprune_export.data.training.loop import ANSWERS, DECODER, SPARSE, AnswerStage, train_answers, train_tower


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(FAMILIES)))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", type=(int, int, int, int), help="Of the four stages.  [default: the model's own]")
@click.option("--batch-size", type=int, help="Images per step.  [default: the model's own]")
@click.option("--pool", default=16000, show_default=True, help="Training images of a stage; drawn once, reshuffled.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--seed", default=1, show_default=True)
def main(
    name: str,
    output: Path,
    steps: tuple[int, int, int, int] | None,
    batch_size: int | None,
    pool: int,
    threads: int,
    seed: int,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from safetensors.torch import load_model, save_model

    torch.set_num_threads(threads)
    family = FAMILIES[name](seed)
    model = family.model
    model.set_attn_implementation("eager")  # packed masks have no fast SDPA kernel on the CPU
    model.train()
    output.parent.mkdir(parents=True, exist_ok=True)
    steps = steps or family.schedule.steps
    images = batch_size or family.schedule.batch_size

    def answers(stage: AnswerStage) -> Callable[[SceneStream, int], float]:
        return lambda stream, count: train_answers(family, stream, count, images, stage)

    stages: tuple[tuple[int, Callable[[SceneStream, int], float]], ...] = (
        (seed, lambda stream, count: train_tower(family, stream, count, images)),
        (seed, answers(ANSWERS)),
        (seed + 1, answers(DECODER)),
        (seed + 2, answers(SPARSE)),
    )
    for number, (count, (stream_seed, train)) in enumerate(zip(steps, stages, strict=True), start=1):
        # What a stage ends with depends on every stage before it.
        key = sha256_json([name, steps[:number], images, pool, seed])[:12]
        finished = output.with_name(f"{output.name}.stage{number}-{key}.safetensors")
        if not finished.exists():
            train(SceneStream(pool, stream_seed, family.scene_sizes), count)
            partial = finished.with_suffix(".partial")
            save_model(model.half(), str(partial))
            partial.replace(finished)
            model.float()
        load_model(model, str(finished))
        model.float()
    model.half().save_pretrained(output)
    family.processor.save_pretrained(output)


if __name__ == "__main__":
    main()
