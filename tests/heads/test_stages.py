"""The stages gates and heads of a real run, for every method and the switches between them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from infoprune_export.heads.criteria import CRITERIA
from infoprune_export.heads.gates import gated
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.vlm import writable_copy
from infoprune_export.pipeline import Run, execute
from infoprune_export.recipe import Recipe
from infoprune_export.rewrite.surgery import apply_heads
from infoprune_export.stages import STAGES

TRAINED = ("budgeted", "paper", "hard_concrete")


@pytest.fixture
def pruned(tmp_path, trained_vlm):
    """Runs both stages in one folder; what is up to date stays."""

    def run(*, refit: bool = True, **heads: object) -> tuple[Run, Path, str]:
        tree = {
            "name": "small",
            "device": "cpu",
            "model": {"name_or_path": "testbed/tiny-llava"},
            "data": {"calibration_images": 8, "validation_questions": 4},
            "heads": {"method": "budgeted", "epochs": 1, "batch_size": 4, "rounds": 2, **heads},
            "refit": {"enabled": refit},
        }
        said = io.StringIO()
        with Progress(console=Console(file=said, width=200)) as progress:
            run = Run(Recipe.model_validate(tree), tmp_path / "run", progress)
            run.original = trained_vlm
            return run, execute(run, STAGES, "heads"), said.getvalue()

    return run


@pytest.mark.parametrize("method", [*TRAINED, *CRITERIA])
def test_every_method_gives_scores_and_a_plan(pruned, method):
    run, heads, _ = pruned(method=method, remove=0.25)
    stored = load_file(run.folder_of("gates") / "gates.safetensors")
    assert set(stored) == ({"scores", "gates"} if method in TRAINED else {"scores"})
    assert all(value.shape == (5, 8) for value in stored.values())
    history = json.loads((run.folder_of("gates") / "history.json").read_text())
    assert len(history) == (method in TRAINED)
    assert sorted(path.name for path in run.folder_of("gates").iterdir()) == [
        "gates.safetensors",
        "history.json",
        "manifest.json",
    ]
    plan = HeadPlan.from_dict(json.loads((heads / "plan.json").read_text()))
    weights = load_file(heads / "weights.safetensors")
    if method == "paper":
        # after two steps from .95 every gate is still above the threshold
        assert plan.removed_fraction == 0
        assert weights == {}
    else:
        assert plan.removed_fraction == 0.25
        assert {name for name in weights if "attention_out" in name} == {
            f"{block}.attention_out.{kind}" for block in range(5) for kind in ("weight", "bias")
        }


def test_nothing_is_scored_or_removed_by_none(pruned):
    run, heads, _ = pruned(method="none")
    assert not (run.folder_of("gates") / "gates.safetensors").exists()
    assert HeadPlan.from_dict(json.loads((heads / "plan.json").read_text())).removed_fraction == 0


def test_another_budget_threshold_or_choice_keeps_the_gates(pruned):
    pruned(remove=0.25)
    for change in ({"remove": 0.5}, {"threshold": 0.3, "choose": "threshold"}, {"survivors": "gate"}):
        _, _, said = pruned(**change)
        assert "gates       up to date" in said
    _, _, said = pruned(gamma=0.2)
    assert "gates       up to date" not in said


def test_survivors_keep_their_gate_in_the_output_projection(pruned, trained_vlm, scene_split):
    run, heads, _ = pruned(remove=0.25, survivors="gate", refit=False, initial_zeta=0.5)
    plan = HeadPlan.from_dict(json.loads((heads / "plan.json").read_text()))
    gates = load_file(run.folder_of("gates") / "gates.safetensors")["gates"]
    kept = torch.zeros(5, 8)
    for block, row in enumerate(plan.kept):
        kept[block, list(row)] = 1.0
    rewritten = writable_copy(trained_vlm)
    apply_heads(rewritten.tower, plan, load_file(heads / "weights.safetensors"))
    inputs = inputs_of(trained_vlm, scene_split.validation[:2])
    with torch.no_grad():
        with gated(trained_vlm.tower, list(kept * gates)):
            expected = trained_vlm.tower.features_of(inputs)
        actual = rewritten.tower.features_of(inputs)
        assert (expected - trained_vlm.tower.features_of(inputs)).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_refit_starts_from_folded_gates(pruned, trained_vlm):
    _, one, _ = pruned(remove=0.25, initial_zeta=-1.0)
    first = load_file(one / "weights.safetensors")
    _, gate, _ = pruned(remove=0.25, initial_zeta=-1.0, survivors="gate")
    second = load_file(gate / "weights.safetensors")
    norms = [sum(value.norm() for name, value in w.items() if name.endswith("weight")) for w in (first, second)]
    # ridge holds weights back near what they start from: the original's, or about .27 of them
    assert norms[1] < norms[0]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_several_processes_are_one_switch_and_give_the_gates_of_one(pruned):
    # 5 and 3 images a step, so that shares differ in size; blocks take turns
    settings = {"batch_size": 5, "spectral_blocks": 3, "epochs": 2}
    trained, histories = [], []
    for processes in (2, 1):
        run, _, _ = pruned(processes=processes, **settings)
        gates = run.folder_of("gates")
        assert sorted(path.name for path in gates.iterdir()) == ["gates.safetensors", "history.json", "manifest.json"]
        trained.append(load_file(gates / "gates.safetensors"))
        histories.append(json.loads((gates / "history.json").read_text()))
    for name in ("scores", "gates"):
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=0, atol=1e-4)
    assert trained[0]["scores"].std() > 1e-3, "the gates must have moved apart"
    for shared, alone in zip(*histories, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
