"""The GPU benchmark: its measurement on a CPU, its command where there is no GPU, and itself where there is one."""

from __future__ import annotations

import io
import json

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form
from infoprune_export.models.zoo import random_model
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate import gpu_speed
from infoprune_export.validate.gpu_speed import compiled, render

LOADS = [(1, 8), (2, 12)]


@pytest.fixture(scope="module")
def result():
    seen = []
    measured = gpu_speed.gpu_speed(
        3,
        name="qwen2-vl",
        blocks=3,
        loads=LOADS,
        device="cpu",
        dtype=torch.float32,
        engines=["onnxruntime"],
        on_load=seen.append,
    )
    assert seen == [1, 2]
    return measured


def test_every_load_has_a_row_that_computes_what_pytorch_computes(result):
    assert [(row["engine"], row["images"], row["patches"]) for row in result["rows"]] == [
        ("onnxruntime", 1, 64),
        ("onnxruntime", 2, 144),
    ]
    for row in result["rows"]:
        assert row["cosine"] > 0.99999
        assert row["efficiency"] == pytest.approx(row["speedup"]["median"] / row["flop_ratio"])
        assert set(row["milliseconds"]) == {"dense", "compressed"}


def test_flops_are_those_of_half_the_heads_and_neurons(result):
    """Attention and FFN halve; patch embedding and merger stay, so the ratio is below two."""
    for row in result["rows"]:
        assert 1.4 < row["flop_ratio"] < 2


def test_the_table_names_device_and_type(result):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(result))
    text = console.export_text()
    assert "qwen2-vl, 3 blocks, float32" in text
    assert text.count("onnxruntime") == 2
    assert f"{result['rows'][0]['flop_ratio']:.2f}" in text


def test_a_compiled_encoder_gives_what_its_latest_call_computed(monkeypatch):
    """Through torch.compile's own tracing, without the minute its code generator takes on a CPU."""
    backend, compile_ = "aot_eager", torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend=backend, **options))
    tower = tower_of(random_model("qwen2-vl", 3))
    encoder = VisionEncoder(tower, None, True)
    planned = tower.plan(tower.grid_inputs([(1, 8, 8)], torch.Generator().manual_seed(0)), Form(several=True))
    running = compiled(encoder, planned, "cpu")
    running.call()
    np.testing.assert_allclose(running.features(), encoder(planned).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU on this machine")
def test_without_a_gpu_the_command_says_so(tmp_path):
    file = tmp_path / "gpu.json"
    done = CliRunner().invoke(main, ["real-size", "--gpu", "--json", str(file)])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: device cuda: torch finds no CUDA device")
    assert not file.exists()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has the provider"
)
def test_onnx_runtime_without_the_provider_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InfopruneError, match="needs CUDAExecutionProvider"):
        gpu_speed.gpu_speed(3, name="qwen2-vl", blocks=3, engines=["onnxruntime"])


@pytest.mark.gpu
def test_on_a_gpu_both_engines_compute_the_same(tmp_path):
    file = tmp_path / "gpu.json"
    measured = gpu_speed.gpu_speed(3, blocks=2, loads=[(1, 16)])
    file.write_text(json.dumps(measured))
    assert [row["engine"] for row in measured["rows"]] == ["onnxruntime", "torch.compile"]
    assert all(row["cosine"] > 0.999 for row in measured["rows"])
