"""Recovery: it learns what the original gives, touches nothing else, and is resumed bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Block, Form
from infoprune_export.models.vlm import load, writable_copy
from infoprune_export.recipe import DataSpec, ModelSpec, RecoverySpec
from infoprune_export.recovery.distill import Progress, check_recovery, recover, schedule
from infoprune_export.recovery.weights import apply_recovery, block_parameters
from infoprune_export.rewrite.surgery import apply_ffn
from infoprune_export.training.state import STATE

SHORT = RecoverySpec(method="distill", epochs=2, batch_size=4, checkpoint_steps=2, warmup=0.25)


class Killed(Exception):
    pass


def cut(original):
    """A copy whose blocks lost heads, one block all of them, and whose FFNs are of every kind."""
    vlm = writable_copy(original)
    for block, heads in zip(vlm.tower.blocks, ((0,), (), (1, 2), (3,), (0, 1, 2, 3)), strict=True):
        if len(heads) < block.num_heads:
            block.keep_heads(heads)
    choices = [
        FfnChoice("mlp", tuple(range(0, 128, 2))),
        FfnChoice("mlp", ()),
        FfnChoice("linear", rank=5),
        FfnChoice("factored", tuple(range(128)), ranks=(7, 6)),
        FfnChoice("bypass", tuple(range(64)), rank=4),
    ]
    generator = torch.Generator().manual_seed(2)
    apply_ffn(vlm.tower, FfnPlan.for_blocks(vlm.tower.blocks, choices), {})
    for block in vlm.tower.blocks[2:]:
        # What replaces an FFN is zero until it is assigned, and from zero factors nothing can be learnt.
        for layer in block.ffn_projections.values():
            torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
    return vlm


@pytest.fixture
def train(random_vlm, scene_split, tmp_path):
    """Trains a fresh cut copy in a folder of this name; `stop` kills behind that step."""

    def run(name: str, spec: RecoverySpec = SHORT, *, stop: int | None = None, seed: int = 1, samples=None):
        def on_step(progress: Progress) -> None:
            run.seen.append(progress)
            if progress.step == stop:
                raise Killed

        run.seen = []
        run.vlm = cut(random_vlm)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        chosen = scene_split.calibration[:10] if samples is None else samples
        return recover(run.vlm, random_vlm.tower, chosen, spec, seed=seed, scratch=folder, on_step=on_step)

    return run


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(vlm, original, samples) -> float:
    """Mean squared difference of the language model's visual tokens over the variance of a channel."""
    inputs = inputs_of(vlm, samples)
    with torch.no_grad():
        target, given = original.features_of(inputs), vlm.tower.features_of(inputs)
    return float((given - target).square().mean() / target.var(dim=(0, 1)).mean())


# ── Learning ─────────────────────────────────────────────────────────────────


def test_the_first_loss_is_the_distance_of_the_untrained_tower(train, random_vlm, scene_split):
    samples = scene_split.calibration[:4]
    train("one", replace_(epochs=1), samples=samples)
    assert [progress.step for progress in train.seen] == [1]
    assert train.seen[0].terms["distance"] == pytest.approx(
        distance(cut(random_vlm), random_vlm.tower, samples), rel=1e-4
    )


def test_streams_are_compared_behind_every_block(train, random_vlm, scene_split):
    samples = scene_split.calibration[:4]
    train("streams", replace_(epochs=1), samples=samples)
    tower, planned = cut(random_vlm).tower, random_vlm.tower.plan(inputs_of(random_vlm, samples), Form())
    stream, context = random_vlm.tower.embed(planned)
    other, distances = stream, []
    for block, reference in zip(tower.blocks, random_vlm.tower.blocks, strict=True):
        stream, other = reference.run(stream, context), block.run(other, context)
        distances.append(float((other - stream).square().mean() / stream.var(dim=(0, 1)).mean()))
    assert len(distances) == 5
    assert train.seen[0].terms["stream"] == pytest.approx(sum(distances) / 5, rel=1e-4)


def test_streams_count_by_their_weight_and_without_it_are_not_computed(train, random_vlm):
    weights = {
        weight: train(f"weight {weight}", replace_(epochs=1, stream_weight=weight)).weights
        for weight in (0.0, 1.0, 9.0)
    }
    assert not same(weights[0.0], weights[1.0])
    assert not same(weights[1.0], weights[9.0])
    assert train("off", replace_(epochs=1, stream_weight=0.0)).history[0]["stream"] == 0
    assert train("on", replace_(epochs=1, stream_weight=1e-30)).history[0]["stream"] > 0


def test_fresh_images_come_closer_to_the_original(trained_vlm, scene_split, tmp_path):
    vlm = writable_copy(trained_vlm)
    for block in vlm.tower.blocks:
        block.keep_heads(range(block.num_heads // 2))
        block.keep_neurons(range(0, block.ffn_shape.size, 2))
    before = distance(vlm, trained_vlm.tower, scene_split.validation)
    spec = RecoverySpec(method="distill", epochs=4, batch_size=8)
    history = recover(vlm, trained_vlm.tower, scene_split.calibration, spec, seed=0, scratch=tmp_path).history
    assert distance(vlm, trained_vlm.tower, scene_split.validation) < 0.5 * before
    assert history[-1]["distance"] < 0.5 * history[0]["distance"]


def test_images_of_several_sizes(tmp_path):
    original = load(ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl"))
    spec = DataSpec(calibration_images=16, validation_questions=42, scene_sizes="mixed")
    dataset.draw_scenes(tmp_path, spec, seed=3)
    split = dataset.read(spec, tmp_path)
    vlm = writable_copy(original)
    for block in vlm.tower.blocks:
        block.keep_neurons(range(0, block.ffn_shape.size, 2))
    inputs = inputs_of(vlm, split.calibration)
    assert len(set(map(tuple, inputs["image_grid_thw"].tolist()))) > 1
    before = distance(vlm, original.tower, split.validation)
    training = RecoverySpec(method="distill", epochs=4, batch_size=3, learning_rate=1e-3)
    recover(vlm, original.tower, split.calibration, training, seed=0, scratch=tmp_path)
    assert distance(vlm, original.tower, split.validation) < 0.8 * before


def test_every_part_that_is_left_learns_and_nothing_else_moves(train, random_vlm):
    before = {name: value.clone() for name, value in random_vlm.model.state_dict().items()}
    start = {name: value.clone() for name, value in block_parameters(cut(random_vlm).tower).items()}
    learnt = train("kinds").weights
    assert [(b.num_heads, b.ffn_shape.kind) for b in train.vlm.tower.blocks] == [
        (1, "mlp"),
        (0, "constant"),
        (2, "linear"),
        (1, "factored"),
        (4, "bypass"),
    ]
    # A block without heads (or neurons) has no use for that norm.
    idle = {"blocks.1.layer_norm1.weight", "blocks.1.layer_norm1.bias", "blocks.1.layer_norm2.weight"}
    idle |= {"blocks.1.layer_norm2.bias"}
    assert {name for name in start if torch.equal(learnt[name], start[name])} == idle
    assert same(before, dict(random_vlm.model.state_dict())), "the original is left alone"
    own = {id(parameter) for block in train.vlm.tower.blocks for parameter in block.module.parameters()}
    others = {name: p for name, p in train.vlm.model.named_parameters() if id(p) not in own}
    assert len(others) > 20
    assert all(torch.equal(parameter, before[name]) for name, parameter in others.items())
    assert not any(p.requires_grad or p.grad is not None for p in train.vlm.model.parameters())


def test_questions_and_answers_play_no_part(train, scene_split):
    samples = scene_split.calibration[:6]
    unlabelled = [replace(sample, questions=()) for sample in samples]
    assert same(train("with", samples=samples).weights, train("without", samples=unlabelled).weights)


def test_history_has_the_mean_loss_and_the_rate(train):
    history = train("history", replace_(learning_rate=2e-3)).history
    # ten images in batches of four: three steps an epoch, the first of six rises
    losses = [progress.terms["distance"] for progress in train.seen]
    assert [epoch["distance"] for epoch in history] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert [epoch["learning_rate"] for epoch in history] == pytest.approx(
        [2e-3 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in (1, 4)]
    )
    assert [(progress.step, progress.steps) for progress in train.seen] == [(i, 6) for i in range(1, 7)]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 400), st.floats(0, 0.99))
def test_the_rate_rises_then_falls_and_is_never_nothing(steps, warmup):
    rates = [schedule(step, steps, warmup) for step in range(steps)]
    rising = math.floor(warmup * steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[rising] == 1
    assert rates[: rising + 1] == sorted(rates[: rising + 1])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


# ── Resumed ──────────────────────────────────────────────────────────────────


def test_training_killed_at_any_step_ends_with_the_same_bits(train, random_vlm):
    whole = train("whole")
    assert len(whole.history) == 2
    # state is there behind steps 2, 3, 4 and 6
    for stop, state in {1: 0, 3: 3, 5: 4, 6: 6}.items():
        with pytest.raises(Killed):
            train(f"cut{stop}", stop=stop)
        assert not any(p.requires_grad for p in train.vlm.model.parameters())
        resumed = train(f"cut{stop}")
        assert [progress.step for progress in train.seen] == list(range(state + 1, 7))
        assert same(resumed.weights, whole.weights)
        assert resumed.history == whole.history
    again = cut(random_vlm)
    apply_recovery(again.tower, resumed.weights)
    assert same(block_parameters(again.tower), block_parameters(train.vlm.tower))


def test_the_seed_matters_and_nothing_else_does(train):
    weights = [train(name, replace_(epochs=1), seed=seed).weights for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_every_epoch_has_an_order_of_its_own(train):
    """Without learning, equal batches would have equal losses."""
    train("still", replace_(learning_rate=1e-30))
    losses = [progress.terms["distance"] for progress in train.seen]
    assert losses[:3] != losses[3:]


def test_state_is_safetensors_with_a_json_history(train, tmp_path):
    train("state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == [STATE]
    with safe_open(tmp_path / "state" / STATE, "pt") as file:
        assert file.get_tensor("step") == 6
        assert "adamw.blocks.0.mlp.fc1.weight.exp_avg" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_damaged_or_foreign_state_is_refused(train, random_vlm, scene_split, tmp_path, damage):
    folder = tmp_path / "state"
    folder.mkdir()
    if damage is None:
        other = writable_copy(random_vlm)
        other.tower.blocks[0].keep_heads([1])
        recover(other, random_vlm.tower, scene_split.calibration[:4], SHORT, seed=1, scratch=folder)
    else:
        (folder / STATE).write_bytes(damage)
    with pytest.raises(InfopruneError, match=r"training.safetensors: not the state of this training .* delete it"):
        train("state")


# ── Memory and precision ─────────────────────────────────────────────────────


def test_gradient_checkpointing_runs_blocks_twice_and_ends_with_the_same_bits(train, monkeypatch):
    runs, attend = [], Block.attend
    monkeypatch.setattr(Block, "attend", lambda *arguments: (runs.append(1), attend(*arguments))[1])
    plain = train("plain", replace_(epochs=1))
    # three steps of five blocks, of both towers; then those that train once more
    assert len(runs) == 3 * 5 * 2
    runs.clear()
    saving = train("saving", replace_(epochs=1, gradient_checkpointing=True))
    # one of them is all constants, for which nothing has to be run again
    assert len(runs) == 3 * (5 * 2 + 4)
    assert same(plain.weights, saving.weights)
    assert "run" not in vars(train.vlm.tower.blocks[0])


def test_bf16_trains_close_to_fp32_but_not_equal(train):
    exact, rounded = (train(name, replace_(epochs=1, mixed_precision=name)) for name in ("no", "bf16"))
    assert {value.dtype for value in rounded.weights.values()} == {torch.float32}
    assert rounded.history[0]["distance"] == pytest.approx(exact.history[0]["distance"], rel=0.05)
    assert rounded.history[0]["distance"] != exact.history[0]["distance"]


@pytest.mark.gpu
def test_fp16_training_on_a_gpu_comes_closer_too(random_vlm, scene_split, tmp_path):
    random_vlm.model.to("cuda")
    spec = replace_(epochs=3, mixed_precision="fp16")
    history = recover(
        cut(random_vlm), random_vlm.tower, scene_split.calibration, spec, seed=1, scratch=tmp_path
    ).history
    assert history[-1]["distance"] < history[0]["distance"]


# ── Refused ──────────────────────────────────────────────────────────────────


def test_a_whole_tower_is_refused(random_vlm, scene_split, tmp_path):
    with pytest.raises(InfopruneError, match=r"nothing was taken from this tower.*recovery.method none"):
        recover(writable_copy(random_vlm), random_vlm.tower, scene_split.calibration, SHORT, seed=0, scratch=tmp_path)


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_a_tower_that_lost_either_is_not(random_vlm, scene_split, tmp_path, part):
    vlm = writable_copy(random_vlm)
    if part == "heads":
        vlm.tower.blocks[3].keep_heads([1])
    else:
        vlm.tower.blocks[3].keep_neurons(range(5))
    spec = replace_(epochs=1, batch_size=8)
    assert recover(vlm, random_vlm.tower, scene_split.calibration[:8], spec, seed=0, scratch=tmp_path).history


def test_fp16_on_a_cpu_is_refused_before_any_work(train):
    with pytest.raises(InfopruneError, match=r"recovery.mixed_precision = 'fp16' needs a GPU.*use bf16 or no"):
        train("fp16", replace_(mixed_precision="fp16"))
    assert train.seen == []
    check_recovery(RecoverySpec(mixed_precision="fp16"), "cpu")
    check_recovery(replace_(mixed_precision="fp16"), "cuda")


def test_a_loss_that_is_no_number_ends_training_with_the_step(train, random_vlm):
    with torch.no_grad():
        random_vlm.tower.blocks[4].attention_out.bias.fill_(torch.inf)
    with pytest.raises(InfopruneError, match=r"not finite at step 1 of 6; lower recovery.learning_rate = "):
        train("nan")


def replace_(**changes: object) -> RecoverySpec:
    return SHORT.model_copy(update=changes)
