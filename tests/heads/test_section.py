"""The recipe's heads section: what belongs together, what is refused, what scores depend on."""

from __future__ import annotations

import pytest

from infoprune_export.errors import InfopruneError
from infoprune_export.heads.criteria import CRITERIA
from infoprune_export.recipe import HeadsSpec, Recipe, load_recipe
from infoprune_export.stages import STAGES


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("paper", ("threshold", "l1", "ks")),
        ("budgeted", ("budget", "gates", "wasserstein")),
        ("obs", ("budget", "gates", "wasserstein")),
    ],
)
def test_auto_is_the_methods_own(method, own):
    resolved = HeadsSpec(method=method).resolved()
    assert (resolved.choose, resolved.penalty, resolved.distance) == own
    assert resolved.survivors == "one"


def test_what_is_named_is_kept():
    resolved = HeadsSpec(method="paper", penalty="gates", distance="wasserstein", choose="budget").resolved()
    assert (resolved.choose, resolved.penalty, resolved.distance) == ("budget", "gates", "wasserstein")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"method": "michel", "penalty": "l1"}, "penalty belongs to the methods budgeted and paper, not michel"),
        ({"method": "hard_concrete", "distance": "ks"}, "distance belongs to the methods budgeted and paper"),
        ({"method": "random", "choose": "threshold"}, "random has none to compare; use budget"),
        ({"method": "hard_concrete", "choose": "threshold"}, "hard_concrete has none to compare; use budget"),
        ({"method": "activation", "survivors": "gate"}, "survivors = 'gate' needs trained gates, activation has none"),
        ({"method": "hard_concrete", "task_weight": 0.0}, "leaves hard_concrete nothing to tell heads apart by"),
        (
            {"method": "budgeted", "task_weight": 0.0, "alpha": 0.0, "beta": 0.0, "gamma": 0.0},
            "no term of the objective",
        ),
        ({"method": "paper", "task_weight": 0.0, "alpha": 0.0, "beta": 0.0}, "no term of the objective has a gradient"),
        ({"task_weight": -1.0}, "heads.task_weight = -1.0"),
        ({"processes": 0}, "heads.processes = 0"),
        ({"processes": 65}, "heads.processes = 65"),
        ({"mixed_precision": "fp8"}, "heads.mixed_precision = 'fp8'"),
        ({"checkpoint_steps": 0}, "heads.checkpoint_steps = 0"),
        ({"spectral_blocks": 0}, "heads.spectral_blocks = 0"),
        ({"rounds": 0}, "heads.rounds = 0"),
        ({"penalty": "l2"}, "heads.penalty = 'l2'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(section, said):
    with pytest.raises(InfopruneError) as refused:
        load_recipe("quickstart", [f"heads.{name}={value}" for name, value in section.items()])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ks_beside_a_term_with_a_gradient_is_no_mistake():
    HeadsSpec(method="paper", task_weight=0.0, alpha=0.0, beta=0.1)
    HeadsSpec(task_weight=0.0, alpha=0.0, beta=0.0, gamma=0.1)


def test_every_method_without_training_has_a_criterion():
    methods = set(HeadsSpec.model_fields["method"].annotation.__args__)
    assert methods - {"none"} - set(CRITERIA) == {
        name for name in methods - {"none"} if HeadsSpec(method=name).trains_gates
    }


def key(**heads: object) -> object:
    recipe = Recipe(name="x", model={"name_or_path": "testbed/tiny-llava"}, heads=HeadsSpec(**heads))
    return STAGES["gates"].recipe_slice(recipe)


@pytest.mark.parametrize("method", ["budgeted", "paper", "michel"])
def test_scores_do_not_depend_on_how_heads_are_chosen_from_them(method):
    assert key(method=method) == key(method=method, remove=0.1, threshold=0.3, checkpoint_steps=3)
    assert key(method=method) == key(method=method, choose="budget")
    assert key(method=method) != key(method=method, batch_size=3)


def test_hard_concrete_gates_depend_on_the_budget_they_meet():
    assert key(method="hard_concrete", remove=0.1) != key(method="hard_concrete", remove=0.2)
    assert key(method="hard_concrete", threshold=0.1) == key(method="hard_concrete", threshold=0.2)
