"""The engine comparison that the verdict rests on must see planted faults."""

import numpy as np
import pytest
import torch

from infoprune_export.engine.base import Engine
from infoprune_export.models import tower_of
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec, load_recipe
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate import parity
from infoprune_export.validate.parity import encoder_parity, limits_of

SPEC = TokensSpec(keep_ratio="1/4")


class TowerEngine(Engine):
    """PyTorch behind the engine interface, with a fault on top."""

    def __init__(self, tower, tokens, fault):
        self._encoder = VisionEncoder(tower, tokens)
        self._fault = fault

    def run(self, **inputs):
        with torch.inference_mode():
            outputs = self._encoder.run({name: torch.from_numpy(value) for name, value in inputs.items()})
        return self._fault({name: value.numpy().copy() for name, value in outputs.items()})

    def input_types(self):
        return {"pixel_values": np.dtype(np.float32)}

    def describe(self):
        return {}


LIMITS = {"case": "", "tolerance": 1e-4, "min_cosine": 0.999999}


def check(tower, inputs, fault, spec=SPEC, replay_tolerance=1e-2):
    engine = TowerEngine(tower, spec, fault)
    return encoder_parity("engine", tower, spec, engine, inputs, **LIMITS, replay_tolerance=replay_tolerance)


def changed(name, change):
    def fault(outputs):
        outputs[name] = change(outputs[name])
        return outputs

    return fault


def test_an_equal_engine_passes(random_vlm, pixels):
    result = check(random_vlm.tower, pixels, lambda outputs: outputs)
    assert result.passed
    assert result.relative_error < 1e-6
    assert result.kept_suboptimality == 0


@pytest.mark.parametrize(
    "fault",
    [
        changed("image_features", lambda x: x * 1.001),
        changed("image_features", lambda x: x[:, ::-1].copy()),
        changed("image_features", lambda x: np.where(np.arange(x.shape[1])[:, None] == 3, 0, x)),
        changed("image_features", lambda x: np.full_like(x, np.nan)),
        changed("kept_indices", lambda x: np.broadcast_to(np.arange(16), x.shape)),
        changed("kept_indices", lambda x: np.zeros_like(x)),
    ],
    ids=["scaled", "reordered", "one token lost", "nan", "first tokens", "one token repeated"],
)
def test_planted_faults_fail(random_vlm, pixels, fault):
    assert not check(random_vlm.tower, pixels, fault).passed


def test_a_near_tie_is_not_a_failure(random_vlm, pixels):
    """One image keeps a different, equally good token: judged by replay, features compared on the other images."""
    spec = SPEC.model_copy(update={"normalize": False, "merge": False, "pool_factor": 4.0})
    tower = random_vlm.tower
    with torch.no_grad():
        _, kept = VisionEncoder(tower, spec)(pixels)
    other = sorted({*kept[0].tolist()[1:], next(i for i in range(64) if i not in kept[0].tolist())})

    def swap(outputs):
        outputs["kept_indices"][0] = other
        return outputs

    result = check(tower, pixels, swap, spec, replay_tolerance=1.0)
    assert result.relative_error < 1e-6
    assert result.kept_suboptimality > 0
    assert result.passed


# ── Images of any size ───────────────────────────────────────────────────────

RAGGED = ["llava-next", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
PLAIN = SPEC.model_copy(update={"method": "none"})


def small_tower(name):
    tower = tower_of(random_model(name))
    return tower, tower.example_inputs(3, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["selecting", "all tokens"])
@pytest.mark.parametrize("name", RAGGED)
def test_an_equal_engine_passes_on_images_of_different_sizes(name, spec):
    tower, inputs = small_tower(name)
    result = check(tower, inputs, lambda outputs: outputs, spec)
    assert result.passed, result
    assert result.kept_suboptimality == (0 if spec is SPEC else None)


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["selecting", "all tokens"])
@pytest.mark.parametrize("name", RAGGED)
def test_swapped_tokens_fail_on_images_of_different_sizes(name, spec):
    tower, inputs = small_tower(name)

    def swap(outputs):
        outputs["image_features"][:, [0, 1]] = outputs["image_features"][:, [1, 0]]
        return outputs

    assert not check(tower, inputs, swap, spec).passed


def test_in_lower_precision_tokens_that_both_kept_are_compared():
    """Without a replay tolerance another choice is no failure by itself; wrong features of a common token are."""
    tower, inputs = small_tower("qwen2.5-vl")
    spec = SPEC.model_copy(update={"merge": False})

    def other_choice(outputs):
        kept = outputs["kept_indices"][0]
        free = next(i for i in range(kept[-1]) if i not in kept)
        swapped = int(np.searchsorted(kept, free))  # the next larger one goes, so they stay ascending
        kept[swapped] = free
        outputs["image_features"][0, swapped] = 7.0
        return outputs

    def wrong_features(outputs):
        return {**outputs, "image_features": outputs["image_features"] * 1.01}

    assert check(tower, inputs, other_choice, spec, replay_tolerance=None).passed
    assert not check(tower, inputs, wrong_features, spec, replay_tolerance=None).passed


def test_limits_follow_the_precision_unless_the_recipe_names_them():
    recipe = load_recipe("quickstart")
    assert limits_of(recipe) == parity.LIMITS["fp32"]
    int8 = load_recipe("quickstart", ["export.quantization=int8", "validate.min_cosine=0.5"])
    assert limits_of(int8) == (parity.LIMITS["int8"][0], 0.5)
