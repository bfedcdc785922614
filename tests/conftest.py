"""Fixtures: a random LLaVA of every size a test needs, the trained testbed, and a few scenes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="Run the tests that go through every combination, too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, or was not asked to, with the reason."""
    import torch

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device on this machine"
    if not config.getoption("--exhaustive"):
        reasons["exhaustive"] = "takes minutes; give --exhaustive"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure() -> None:
    """Give each of several test processes, and what it starts, a core of its own.

    The thread pools of PyTorch and ONNX Runtime spin while they wait; on the same cores they would wait for each other.
    """
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session", autouse=True)
def _operators_are_parsed_once() -> Iterator[None]:
    """`torch.onnx.export` parses the source of its 500 operators for every file, which is most of a small file's time.

    A release that finds them elsewhere is slower, and no less tested.
    """
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal._lazy_import import onnxscript_apis

            patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        except (ImportError, AttributeError):
            pass
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Two, or one for each of several test processes."""
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def random_vlm():
    """An untrained LLaVA: 5 executed blocks (and one unused), 4 heads of 8, FFN 128, 64 visual tokens."""
    from infoprune_export.data import testbed
    from infoprune_export.models import tower_of
    from infoprune_export.models.vlm import VLM

    model = testbed.build_model(layers=6, hidden_size=32, heads=4, seed=3).eval().requires_grad_(False)
    return VLM(model, testbed.build_processor(), tower_of(model))


@pytest.fixture(scope="session")
def trained_vlm():
    """The shipped checkpoint. Tests must leave it unchanged."""
    from infoprune_export.models.vlm import load
    from infoprune_export.recipe import ModelSpec

    return load(ModelSpec(name_or_path="testbed/tiny-llava"))


@pytest.fixture(scope="session")
def scene_split(tmp_path_factory: pytest.TempPathFactory):
    """24 calibration scenes and about 14 to validate, written and read as VQAv2."""
    from infoprune_export.data import dataset
    from infoprune_export.recipe import DataSpec

    spec = DataSpec(calibration_images=24, validation_questions=96)
    folder: Path = tmp_path_factory.mktemp("scenes")
    dataset.draw_scenes(folder, spec, seed=5)
    return dataset.read(spec, folder)


@pytest.fixture
def pixels():
    """A batch of three random inputs, float32 [3, 3, 112, 112]."""
    import torch

    return {"pixel_values": torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))}
