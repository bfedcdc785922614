"""Other ways to run an encoder: what they compute, and what is missing or refuses."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from bench_cases import small_case, tower_case

from infoprune_export.cli import bench_commands
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.delivery import PeerName
from infoprune_export.validate import peers, peers_openvino
from infoprune_export.validate.bench_case import BenchCase, check, reference_features
from infoprune_export.validate.bench_running import device_of
from infoprune_export.validate.peers import Peer, contenders, peer_of


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> BenchCase:
    return small_case(tmp_path_factory)


def test_peers_are_the_ones_that_recipes_and_the_command_know():
    assert tuple(peers.PEERS) == get_args(PeerName) == bench_commands._PEERS
    for name in peers.PEERS:
        assert isinstance(peer_of(name), Peer)
    with pytest.raises(InfopruneError, match="there are: eager"):
        peer_of("nothing")


@pytest.mark.parametrize(
    ("family", "tokens", "names"),
    [
        ("llava", {"prior": "cls"}, ["eager"]),
        pytest.param("qwen3-vl", {"method": "none"}, ["eager", "compile"], marks=pytest.mark.exhaustive),
    ],
)
def test_pytorch_compiled_or_not_computes_what_it_is_compared_with(monkeypatch, family, tokens, names):
    """Through torch.compile's own tracing, without the minute its code generator takes on a CPU."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend="aot_eager", **options))
    case = tower_case(family, **tokens)
    load = case.load(2)
    found = contenders(case, names, lambda amount: None)
    assert [one.title for one in found] == [title for name in names for title in (name, f"{name}, compressed")]
    for one in found:
        started = one.on(
            load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
        )
        assert started is not None, one.reason
        running, parity, seconds = started
        assert parity["passed"], (one.title, parity)
        assert seconds > 0


def test_compiled_code_of_one_side_is_not_thrown_away_for_the_other(monkeypatch):
    """Or the first counted round would compile it again."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    case = tower_case("llava")
    found = contenders(case, ["compile"], lambda amount: None)
    for size, expected in ((1, 1), (2, 2)):
        for one in found:
            one.start(case.load(size))
        assert len(resets) == expected


def test_a_peers_copy_has_no_language_model_and_changes_nothing():
    case = tower_case("qwen2.5-vl")
    model = case.towers["original"].model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = dataclasses.replace(case, dtype=torch.float16).placed("original").model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    own = sum(p.numel() for name, p in model.named_parameters() if "visual" in name)
    assert case.vision_bytes("original") == 4 * own
    assert sum(p.numel() for p in placed.parameters()) == own
    assert {p.dtype for p in placed.parameters()} == {torch.float16}


def test_openvino_that_is_not_installed_or_not_meant_says_so(monkeypatch):
    case = tower_case("llava")
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: None)
    assert "pip install openvino" in peer_of("openvino").missing(case)
    monkeypatch.setattr(peers_openvino, "find_spec", lambda name: True)
    on_gpu = case.target.model_copy(update={"name": "a-gpu", "providers": ("CUDAExecutionProvider",)})
    assert device_of(on_gpu) == "cuda"
    assert "a-gpu" in peer_of("openvino").missing(dataclasses.replace(case, target=on_gpu))


def test_openvino_computes_what_pytorch_does(case):
    pytest.importorskip("openvino")
    load = case.load(1)
    one = contenders(case, ["openvino"], lambda amount: None)[0]
    started = one.on(
        load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
    )
    assert started is not None, one.reason
    assert started[1]["passed"]


@pytest.mark.exhaustive
def test_transformers_exports_what_pytorch_computes():
    case = tower_case("llava")
    load = case.load(2)
    (one,) = contenders(case, ["transformers"], lambda amount: None)
    started = one.on(
        load, lambda one, ran: check(case, one.side, load, ran, one.limits, lambda: reference_features(case, load))
    )
    assert started is not None, one.reason
    assert started[1]["passed"]
