"""The engine comparison that the verdict rests on must see planted faults."""

import numpy as np
import pytest
import torch

from infoprune_export.engine.base import Engine
from infoprune_export.export.onnx import VisionEncoder
from infoprune_export.recipe import TokensSpec
from infoprune_export.validate.parity import encoder_parity

SPEC = TokensSpec(keep_ratio="1/4")


class TowerEngine(Engine):
    """PyTorch behind the engine interface, with a fault on top."""

    def __init__(self, tower, tokens, fault):
        self._encoder = VisionEncoder(tower, tokens)
        self._fault = fault

    def run(self, **inputs):
        with torch.inference_mode():
            outputs = self._encoder(torch.from_numpy(inputs["pixel_values"]))
        named = dict(zip(self._encoder.output_names, outputs, strict=True))
        return self._fault({name: value.numpy().copy() for name, value in named.items()})

    def describe(self):
        return {}


def check(vlm, pixels, fault):
    engine = TowerEngine(vlm.tower, SPEC, fault)
    return encoder_parity("engine", vlm.tower, SPEC, engine, pixels, case="", tolerance=1e-4, replay_tolerance=1e-2)


def changed(name, change):
    def fault(outputs):
        outputs[name] = change(outputs[name])
        return outputs

    return fault


def test_an_equal_engine_passes(random_vlm, pixels):
    result = check(random_vlm, pixels, lambda outputs: outputs)
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
    assert not check(random_vlm, pixels, fault).passed


def test_a_near_tie_is_not_a_failure(random_vlm, pixels):
    """One image keeps a different, equally good token: judged by replay, features compared on the other images."""
    spec = SPEC.model_copy(update={"normalize": False, "merge": False, "pool_factor": 4.0})
    tower = random_vlm.tower
    with torch.no_grad():
        _, kept = VisionEncoder(tower, spec)(pixels["pixel_values"])
    other = sorted({*kept[0].tolist()[1:], next(i for i in range(64) if i not in kept[0].tolist())})

    def swap(outputs):
        outputs["kept_indices"][0] = other
        return outputs

    result = encoder_parity(
        "engine", tower, spec, TowerEngine(tower, spec, swap), pixels, case="", tolerance=1e-4, replay_tolerance=1.0
    )
    assert result.relative_error < 1e-6
    assert result.kept_suboptimality > 0
    assert result.passed
