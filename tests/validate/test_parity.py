"""The engine comparison that the verdict rests on must see planted faults, and forgive what is as good."""

import numpy as np
import pytest
import torch

from infoprune_export.engine.base import Engine
from infoprune_export.models import tower_of
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec, load_recipe
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.select import consolidate
from infoprune_export.validate import parity
from infoprune_export.validate.parity import encoder_parity, limits_of

SPEC = TokensSpec(keep_ratio="1/4")


class TowerEngine(Engine):
    """PyTorch behind the engine interface, with a fault on top."""

    def __init__(self, tower, tokens, fault, several=None):
        self._encoder = VisionEncoder(tower, tokens, several)
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


def check(tower, inputs, fault, spec=SPEC, replay_tolerance=1e-2, several=None):
    engine = TowerEngine(tower, spec, fault, several)
    limits = {**LIMITS, "replay_tolerance": replay_tolerance, "several": several}
    return encoder_parity("engine", tower, spec, engine, inputs, **limits)


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


def one_worse(outputs):
    """The last image keeps its first dropped token instead of its last kept one; its features say so too."""
    kept = outputs["kept_indices"][-1]
    free = next(i for i in range(64) if i not in kept)
    outputs["kept_indices"][-1] = np.sort([*kept[:-1], free])
    return outputs


def fewer(outputs):
    return {name: value[:, :-1] for name, value in outputs.items()}


def one_scaled(outputs):
    outputs["image_features"][1, 5] *= 1.01
    return outputs


@pytest.mark.parametrize(
    "fault",
    [
        changed("image_features", lambda x: x * 1.001),
        changed("image_features", lambda x: x[:, ::-1].copy()),
        changed("image_features", lambda x: np.where(np.arange(x.shape[1])[:, None] == 3, 0, x)),
        changed("image_features", lambda x: np.full_like(x, np.nan)),
        changed("image_features", lambda x: x[:, :-1]),
        one_scaled,
        changed("kept_indices", lambda x: np.broadcast_to(np.arange(16), x.shape).copy()),
        changed("kept_indices", lambda x: np.zeros_like(x)),
        changed("kept_indices", lambda x: np.where(np.arange(16) == 15, x[:, :1], x)),
        changed("kept_indices", lambda x: np.where(np.arange(16) == 15, 64, x)),
        changed("kept_indices", lambda x: np.where(np.arange(16) == 15, -1, x)),
        fewer,
        one_worse,
    ],
    ids=[
        "scaled",
        "reordered",
        "one token lost",
        "nan",
        "one feature too few",
        "one feature wrong",
        "first tokens",
        "one token repeated",
        "the first token repeated",
        "outside the image",
        "one token missing",
        "a wrong number",
        "one token worse",
    ],
)
def test_planted_faults_fail(random_vlm, pixels, fault):
    assert not check(random_vlm.tower, pixels, fault).passed


@pytest.mark.parametrize("fault", [fewer, changed("kept_indices", lambda x: np.where(np.arange(16) == 15, -1, x))])
def test_a_wrong_number_fails_by_the_choice_alone(random_vlm, pixels, fault):
    assert check(random_vlm.tower, pixels, fault).kept_suboptimality == 1.0


def test_one_wrong_feature_fails_without_a_replay_too(random_vlm, pixels):
    assert not check(random_vlm.tower, pixels, one_scaled, replay_tolerance=None).passed


# ── Another choice, and what is made of it ───────────────────────────────────

EVERY_MERGE = SPEC.model_copy(update={"merge_above": -1.0, "pool_factor": 1.0})
"""With as many tokens in the pool as are kept, the prior alone decides, whatever a dropped token looks like."""


class ChoosingEngine(TowerEngine):
    """An engine that is right about what it chose, and chooses as it is told: kept [B, T] to kept [B, T]."""

    def __init__(self, tower, tokens, choose):
        super().__init__(tower, tokens, lambda outputs: outputs)
        self._tower, self._spec, self._choose = tower, tokens, choose

    def run(self, **inputs):
        kept = torch.from_numpy(self._choose(super().run(**inputs)["kept_indices"]))
        with torch.inference_mode():
            candidates = self._encoder.candidates({name: torch.from_numpy(value) for name, value in inputs.items()})
            features = self._tower.project(consolidate(candidates, self._spec, kept).tokens)
        return {"image_features": features.numpy(), "kept_indices": kept.numpy()}


def swapped(kept):
    """The first image's last kept token goes; the first one that nobody wanted comes."""
    free = next(i for i in range(64) if i not in kept[0])
    kept[0] = np.sort([*kept[0][:-1], free])
    return kept


@pytest.mark.parametrize("merge", [True, False])
def test_features_are_judged_on_the_engines_own_choice(random_vlm, pixels, merge):
    """A different choice is judged by replay alone: what the engine makes of it is right."""
    spec = SPEC.model_copy(update={"merge": merge, "merge_above": -1.0})
    engine = ChoosingEngine(random_vlm.tower, spec, swapped)
    for replay_tolerance, passes in ((1.0, True), (1e-2, False), (None, True)):
        limits = {**LIMITS, "replay_tolerance": replay_tolerance}
        result = encoder_parity("engine", random_vlm.tower, spec, engine, pixels, **limits)
        assert result.relative_error < 1e-6
        assert result.passed == passes
        assert result.kept_suboptimality is None if replay_tolerance is None else result.kept_suboptimality > 1e-2


def merged(candidates, kept, elsewhere=None):
    """`consolidate` with inertia 1, token by token; `elsewhere` maps a dropped token of image 0 to its slot."""
    tokens = candidates.tokens.clone()
    result = torch.stack([row[k] for row, k in zip(tokens, kept, strict=True)])
    shares = torch.ones(result.shape[:2])
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    for image, row in enumerate(kept.tolist()):
        for token in range(tokens.shape[1]):
            if token not in row:
                slot = int((unit[image, row] @ unit[image, token]).argmax())
                slot = (elsewhere or {}).get(token, slot) if image == 0 else slot
                result[image, slot] += tokens[image, token]
                shares[image, slot] += 1
    return result / shares[..., None]


@pytest.fixture
def rivals(random_vlm, pixels, monkeypatch):
    """A tower whose first image has a dropped token halfway between its first two kept ones, and that token."""
    tower = random_vlm.tower
    with torch.inference_mode():
        kept = VisionEncoder(tower, EVERY_MERGE).run(pixels)["kept_indices"]
    token = next(i for i in range(64) if i not in kept[0])
    original = tower.visual_tokens

    def visual_tokens(activations, planned):
        tokens = original(activations, planned).clone()
        one, other = torch.nn.functional.normalize(tokens[0, kept[0, :2]], dim=-1)
        tokens[0, token] = 3 * (one + other)
        return tokens

    monkeypatch.setattr(tower, "visual_tokens", visual_tokens)
    return tower, kept, token


def merging(tower, elsewhere):
    """A fault: features of merges done by hand."""
    encoder = VisionEncoder(tower, EVERY_MERGE)

    def fault(pixels):
        def replaced(outputs):
            with torch.inference_mode():
                candidates = encoder.candidates(pixels)
                made = merged(candidates, torch.from_numpy(outputs["kept_indices"]), elsewhere)
                return {**outputs, "image_features": tower.project(made).numpy()}

        return replaced

    return fault


def test_a_merge_may_go_to_either_of_two_equally_similar_tokens(rivals, pixels):
    tower, kept, token = rivals
    features = []
    for slot in (0, 1):
        fault = merging(tower, {token: slot})(pixels)
        assert check(tower, pixels, fault, EVERY_MERGE).passed
        features.append(fault({"kept_indices": kept.numpy()})["image_features"])
    assert np.abs(features[0] - features[1]).max() > 0.01 * np.abs(features[0]).max()


def test_merges_by_hand_are_those_of_the_tower(random_vlm, pixels):
    assert check(random_vlm.tower, pixels, merging(random_vlm.tower, None)(pixels), EVERY_MERGE).passed


def test_a_merge_into_a_token_that_is_not_the_nearest_fails(rivals, pixels):
    tower, kept, token = rivals
    assert not check(tower, pixels, merging(tower, {token: 2})(pixels), EVERY_MERGE).passed
    certain = next(i for i in range(63, 0, -1) if i not in kept[0])
    with torch.inference_mode():
        candidates = VisionEncoder(tower, EVERY_MERGE).candidates(pixels)
        anchors, dropped = candidates.tokens[0, kept[0]], candidates.tokens[0, certain]
        similar = torch.nn.functional.cosine_similarity(anchors, dropped, dim=-1)
    assert similar.topk(2).values.diff().abs() > 1e-3
    second = int(similar.topk(2).indices[1])
    assert not check(tower, pixels, merging(tower, {certain: second})(pixels), EVERY_MERGE).passed


def test_features_without_the_merges_fail(random_vlm, pixels):
    unmerged = EVERY_MERGE.model_copy(update={"merge": False})
    engine = TowerEngine(random_vlm.tower, unmerged, lambda outputs: outputs)
    limits = {**LIMITS, "replay_tolerance": 1e-2}
    assert not encoder_parity("engine", random_vlm.tower, EVERY_MERGE, engine, pixels, **limits).passed


# ── Images of any size ───────────────────────────────────────────────────────

RAGGED = ["llava-next", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
PLAIN = SPEC.model_copy(update={"method": "none"})


def small_tower(name):
    tower = tower_of(random_model(name))
    return tower, tower.example_inputs(3, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["selecting", "all tokens"])
@pytest.mark.parametrize("name", RAGGED)
def test_an_equal_engine_passes_on_images_of_different_sizes(name, spec, several):
    tower, inputs = small_tower(name)
    result = check(tower, inputs, lambda outputs: outputs, spec, several=several)
    assert result.passed, result
    assert result.kept_suboptimality == (0 if spec is SPEC else None)


def swapped_tokens(outputs):
    outputs["image_features"][:, [0, 1]] = outputs["image_features"][:, [1, 0]]
    return outputs


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["selecting", "all tokens"])
@pytest.mark.parametrize("name", RAGGED)
def test_swapped_tokens_fail_on_images_of_different_sizes(name, spec, several):
    tower, inputs = small_tower(name)
    assert not check(tower, inputs, swapped_tokens, spec, several=several).passed


def into_the_padding(outputs):
    """A smaller image keeps one token more than its share."""
    row, slot = np.argwhere(outputs["kept_indices"] < 0)[0]
    outputs["kept_indices"][row, slot] = outputs["kept_indices"][row, slot - 1] + 1
    return outputs


def without_its_last(outputs):
    row, slot = np.argwhere(outputs["kept_indices"] < 0)[0]
    outputs["kept_indices"][row, slot - 1] = -1
    return outputs


def of_another_image(outputs):
    """The smaller image keeps what the larger one does."""
    sizes = (outputs["kept_indices"] >= 0).sum(1)
    outputs["kept_indices"][sizes.argmin()] = outputs["kept_indices"][sizes.argmax()]
    return outputs


def garbage_behind_the_end(outputs):
    outputs["image_features"][outputs["kept_indices"] < 0] = np.nan
    return outputs


@pytest.mark.parametrize("fault", [into_the_padding, without_its_last, of_another_image])
@pytest.mark.parametrize("name", RAGGED)
def test_faults_of_a_smaller_image_in_one_call_fail(name, fault):
    tower, inputs = small_tower(name)
    result = check(tower, inputs, fault, several=True)
    assert not result.passed
    assert result.kept_suboptimality == 1.0


@pytest.mark.parametrize("name", RAGGED)
def test_what_stands_behind_the_end_of_a_smaller_image_means_nothing(name):
    tower, inputs = small_tower(name)
    assert check(tower, inputs, garbage_behind_the_end, several=True).passed


def test_limits_follow_the_precision_unless_the_recipe_names_them():
    recipe = load_recipe("quickstart")
    assert limits_of(recipe) == parity.LIMITS["fp32"]
    int8 = load_recipe("quickstart", ["export.quantization=int8", "validate.min_cosine=0.5"])
    assert limits_of(int8) == (parity.LIMITS["int8"][0], 0.5)
