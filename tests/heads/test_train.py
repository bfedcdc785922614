"""Training the gates: resumed at any step, shared out, recomputed, in mixed precision, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from infoprune_export.errors import InfopruneError
from infoprune_export.heads.gates import gated
from infoprune_export.heads.train import Progress, check_training, train_gates
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import HeadsSpec
from infoprune_export.training.recompute import recomputed
from infoprune_export.training.state import STATE


class Killed(Exception):
    pass


@pytest.fixture
def train(random_vlm, scene_split, tmp_path):
    """Trains in a folder of this name; `stop` kills behind that step."""

    def run(name: str, spec: HeadsSpec, *, stop: int | None = None, seed: int = 1, labelled: bool = True, images=24):
        def on_step(progress: Progress) -> None:
            seen.append(progress)
            if progress.step == stop:
                raise Killed

        seen: list[Progress] = []
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run.seen = seen
        return train_gates(
            writable_copy(random_vlm),
            random_vlm.tower,
            scene_split.calibration[:images],
            spec,
            labelled=labelled,
            seed=seed,
            scratch=folder,
            on_step=on_step,
        )

    return run


# ── Resumed ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "stops"), [("budgeted", {1: 0, 3: 3, 5: 4}), ("paper", {2: 2}), ("hard_concrete", {4: 4})]
)
def test_training_killed_at_any_step_ends_with_the_same_bits(train, method, stops):
    # 3 steps an epoch, 6 in all; state behind 2, 3, 4 and 6; blocks take turns at the spectral terms
    spec = HeadsSpec(method=method, epochs=2, batch_size=4, checkpoint_steps=2, spectral_blocks=2)
    whole = train("whole", spec, images=12)
    assert len(whole.history) == 2
    for stop, state in stops.items():
        with pytest.raises(Killed):
            train(f"cut{stop}", spec, stop=stop, images=12)
        resumed = train(f"cut{stop}", spec, images=12)
        assert [progress.step for progress in train.seen] == list(range(state + 1, 7))
        assert torch.equal(whole.scores, resumed.scores)
        assert torch.equal(whole.gates, resumed.gates)
        assert resumed.history == whole.history


def test_the_seed_matters_and_nothing_else_does(train):
    spec = HeadsSpec(method="budgeted", epochs=1, batch_size=4)
    scores = [train(name, spec, seed=seed, images=8).scores for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_a_finished_training_is_not_done_again(train):
    spec = HeadsSpec(method="budgeted", epochs=1, batch_size=8)
    first = train("once", spec)
    second = train("once", spec)
    assert train.seen == []
    assert torch.equal(first.scores, second.scores)


def test_state_is_safetensors_with_a_json_history(train, tmp_path):
    train("state", HeadsSpec(method="budgeted", epochs=1, batch_size=8))
    assert [path.name for path in (tmp_path / "state").iterdir()] == [STATE]
    with safe_open(tmp_path / "state" / STATE, "pt") as file:
        assert {"trained.zeta", "adamw.zeta.exp_avg", "adamw.zeta.exp_avg_sq", "step", "sums"} <= set(file.keys())
        assert file.get_tensor("step") == 3


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_damaged_or_foreign_state_is_refused(train, tmp_path, damage):
    spec = HeadsSpec(method="budgeted", epochs=1, batch_size=8)
    if damage is None:
        train("state", HeadsSpec(method="hard_concrete", epochs=1, batch_size=8))
    else:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / STATE).write_bytes(damage)
    with pytest.raises(InfopruneError, match=r"training.safetensors: not the state of this training .* delete it"):
        train("state", spec)


# ── History ──────────────────────────────────────────────────────────────────


def test_history_has_every_term_the_rate_and_the_gates(train):
    result = train("history", HeadsSpec(method="budgeted", epochs=2, batch_size=8, learning_rate=0.5, alpha=1.0))
    assert [set(epoch) for epoch in result.history] == [
        {"task", "sparsity", "erank", "distance", "learning_rate", "mean_gate", "below_half"}
    ] * 2
    last = result.history[-1]
    # half a cosine, at the last of six steps
    assert last["learning_rate"] == pytest.approx(0.25 * (1 + math.cos(math.pi * 5 / 6)))
    assert last["mean_gate"] == pytest.approx(result.gates.mean().item())
    assert last["below_half"] == pytest.approx((result.gates < 0.5).float().mean().item())
    first = [progress.terms["task"] for progress in train.seen[:3]]
    assert result.history[0]["task"] == pytest.approx(np.mean(first))
    assert [(progress.step, progress.steps) for progress in train.seen] == [(i, 6) for i in range(1, 7)]


def test_training_without_labels_distils_features(train):
    result = train("distil", HeadsSpec(method="budgeted", epochs=1, batch_size=8), labelled=False)
    assert 0 < result.history[0]["task"] < 1
    assert result.scores.std() > 0


# ── Ablations ────────────────────────────────────────────────────────────────


def test_terms_of_weight_zero_are_not_computed(train, monkeypatch):
    import infoprune_export.heads.train as module

    monkeypatch.setattr(module, "head_grams", lambda *_, **__: pytest.fail("no spectral term asks for Grams"))
    task_only = train("task", HeadsSpec(method="budgeted", epochs=1, batch_size=8, alpha=0.0, beta=0.0, gamma=0.0))
    assert [task_only.history[0][name] for name in ("sparsity", "erank", "distance")] == [0.0] * 3
    assert task_only.history[0]["task"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(TaskLoss, "__call__", lambda *_: pytest.fail("the task loss is switched off"))
    tasteless = train("no task", HeadsSpec(method="budgeted", epochs=1, batch_size=8, task_weight=0.0))
    assert tasteless.history[0]["task"] == 0.0
    assert tasteless.history[0]["sparsity"] > 0


@pytest.mark.parametrize(
    ("switches", "on"),
    [
        ({"beta": 1.0, "gamma": 1.0}, {"erank", "distance"}),
        ({"beta": 1.0, "gamma": 0.0}, {"erank"}),
        ({"beta": 0.0, "gamma": 1.0}, {"distance"}),
        ({"beta": 0.0, "gamma": 1.0, "method": "paper", "alpha": 0.1}, {"distance"}),
        ({"beta": 0.0, "gamma": 0.0}, set()),
    ],
)
def test_spectral_terms_are_switched_one_by_one(train, switches, on):
    spec = HeadsSpec(**{"epochs": 2, "batch_size": 12, "alpha": 0.0, "learning_rate": 0.3, **switches})
    last = train("switched", spec, images=12).history[-1]
    assert {name for name in ("erank", "distance") if last[name] != 0.0} == on


def test_ks_only_moves_no_gate_by_itself_but_wasserstein_does(train):
    shared = {"epochs": 1, "batch_size": 12, "task_weight": 0.0, "alpha": 0.0, "learning_rate": 0.1}
    held = train("w1", HeadsSpec(**shared, beta=0.0, gamma=1.0, initial_zeta=0.0), images=12).scores
    assert (held > 0).all(), "the distance opens half-closed gates"
    # beta alone gives a gradient, and adding KS to it changes no bit
    rank = train("rank", HeadsSpec(**shared, method="paper", beta=1.0, gamma=0.0), images=12).scores
    both = train("both", HeadsSpec(**shared, method="paper", beta=1.0, gamma=9.0), images=12).scores
    assert torch.equal(rank, both)
    assert rank.std() > 0


def test_the_papers_penalty_leaves_indifferent_gates_at_its_threshold(train):
    """|zeta|_1 has its minimum at zeta = 0: gates .5, where Algorithm 1 cuts; the sum of gates closes them."""
    shared = {"task_weight": 0.0, "beta": 0.0, "gamma": 0.0, "alpha": 1.0, "epochs": 40, "batch_size": 1}
    ends = {
        method: train(method, HeadsSpec(**shared, method=method, learning_rate=0.3), images=1).gates
        for method in ("paper", "budgeted")
    }
    assert (ends["paper"] - 0.5).abs().max() < 0.05
    assert ends["budgeted"].max() < 0.2


# ── Memory and precision ─────────────────────────────────────────────────────


@pytest.mark.parametrize("enabled", [True, False])
def test_recomputed_blocks_give_the_same_gradient_and_run_twice(random_vlm, scene_split, enabled):
    def slope() -> tuple[torch.Tensor, int]:
        runs = []
        handles = [
            module.register_forward_hook(lambda *_: runs.append(1))
            for module in (
                random_vlm.tower.blocks[1].ffn_norm,
                random_vlm.model.model.language_model.layers[0].self_attn,
            )
        ]
        gates = torch.full((5, 4), 0.9, requires_grad=True)
        with gated(random_vlm.tower, list(gates)), recomputed(random_vlm, enabled and counting):
            loss = TaskLoss(True, random_vlm.tower)(random_vlm, scene_split.calibration[:4], np.random.default_rng(0))
            loss.backward()
        for handle in handles:
            handle.remove()
        return gates.grad, len(runs)

    counting = False
    expected, once = slope()
    counting = True
    actual, runs = slope()
    assert torch.equal(actual, expected)
    assert (once, runs) == (2, 4 if enabled else 2)
    assert "run" not in vars(random_vlm.tower.blocks[1]), "the blocks must be their own again"
    assert "forward" not in vars(random_vlm.model.model.language_model.layers[0])


def test_training_with_recomputation_ends_with_the_same_bits(train):
    spec = HeadsSpec(method="budgeted", epochs=1, batch_size=8)
    plain = train("plain", spec)
    saving = train("saving", spec.model_copy(update={"gradient_checkpointing": True}))
    assert torch.equal(plain.scores, saving.scores)


def test_bf16_trains_close_to_fp32_but_not_equal(train):
    spec = HeadsSpec(method="budgeted", epochs=1, batch_size=8)
    exact = train("fp32", spec)
    rounded = train("bf16", spec.model_copy(update={"mixed_precision": "bf16"}))
    assert rounded.scores.dtype == torch.float32
    assert rounded.history[0]["task"] == pytest.approx(exact.history[0]["task"], rel=0.05)
    assert rounded.history[0]["task"] != exact.history[0]["task"]
    # another precision in the same process, and back
    assert torch.equal(train("fp32 again", spec).scores, exact.scores)


@pytest.mark.gpu
def test_fp16_training_killed_on_a_gpu_ends_with_the_same_gates(train, random_vlm, tmp_path):
    random_vlm.model.to("cuda")
    spec = HeadsSpec(method="budgeted", epochs=2, batch_size=8, checkpoint_steps=2, mixed_precision="fp16")
    whole = train("whole", spec)
    with pytest.raises(Killed):
        train("cut", spec, stop=4)
    torch.testing.assert_close(train("cut", spec).scores, whole.scores)
    with safe_open(tmp_path / "cut" / STATE, "pt") as file:
        assert file.get_tensor("scaler")[0] > 1


# ── Refused ──────────────────────────────────────────────────────────────────


def test_pruned_tower_is_refused(train, random_vlm):
    random_vlm.tower.blocks[0].keep_heads([1])
    with pytest.raises(InfopruneError, match="unpruned"):
        train("pruned", HeadsSpec(method="budgeted"))


def test_fp16_on_a_cpu_is_refused_before_any_work(train):
    with pytest.raises(InfopruneError, match=r"heads.mixed_precision = 'fp16' needs a GPU.*use bf16 or no"):
        train("fp16", HeadsSpec(method="budgeted", mixed_precision="fp16"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_training(HeadsSpec(method="budgeted", processes=2), "cuda")
    check_training(HeadsSpec(method="budgeted", processes=3), "cpu")
    with pytest.raises(InfopruneError, match="heads.processes = 3: this machine has 2 GPUs"):
        check_training(HeadsSpec(method="budgeted", processes=3), "cuda")


def test_a_loss_that_is_no_number_ends_training_with_the_step(train, random_vlm):
    with torch.no_grad():
        random_vlm.tower.blocks[4].attention_out.bias.fill_(torch.nan)
    with pytest.raises(InfopruneError, match="not finite at step 1 of 3"):
        train("nan", HeadsSpec(method="budgeted", epochs=1, batch_size=8, beta=0.0, gamma=0.0))
