"""What tests of the bench time: small cases, peers that return what they are told to, progress lines."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from families import build
from finished import finished
from rich.console import Console

from infoprune_export import console
from infoprune_export.models import tower_of
from infoprune_export.recipe import TokensSpec, load_recipe, read_recipe
from infoprune_export.recipe.delivery import BenchSpec
from infoprune_export.tokens.encoder import FEATURES
from infoprune_export.validate import peers
from infoprune_export.validate.bench_case import BenchCase, case_of, case_of_run
from infoprune_export.validate.bench_running import Running
from infoprune_export.validate.peers import Peer

MIB = 2**20


class Lines:
    """Progress lines: total and how far they came."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}

    def __call__(self, title: str, total: int):
        self.lines[title] = [total, 0]

        def advance(amount: int) -> None:
            self.lines[title][1] += amount
            assert amount > 0

        return advance


def small_case(factory: pytest.TempPathFactory) -> BenchCase:
    """Two blocks of a Qwen2.5-VL that selects tokens, exported for one image a call."""
    folder = finished(factory)
    made = case_of_run(read_recipe(folder / "recipe.json"), folder / "onnx", folder / "checkpoint")
    return with_spec(made)


def with_spec(case: BenchCase, **settings) -> BenchCase:
    spec = BenchSpec(**{"batch_sizes": (2,), "rounds": 3, "max_rounds": 3, "warmup": 0, **settings})
    return dataclasses.replace(case, spec=spec)


def tower_case(family: str, **tokens) -> BenchCase:
    """Towers that were not exported."""
    recipe = load_recipe("quickstart", ["bench.batch_sizes=[2]"])
    towers = {side: tower_of(build(family, 4)) for side in ("original", "compressed")}
    return case_of(recipe, Path("nowhere"), towers, TokensSpec(**tokens), None)


def constant(features, seconds: float = 0.0) -> Peer:
    """A peer that returns what it is told to."""

    def prepare(case, side):
        def start(load):
            outputs = [{FEATURES: np.asarray(features(case, load), np.float32)}]
            return Running(lambda: None, lambda: outputs)

        return start

    return Peer("torch", ("original",), lambda case: None, prepare)


def planted(monkeypatch, **made: Peer) -> None:
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(made, "planted:peer"))
    monkeypatch.setattr(peers, "peer_of", lambda name: made[name])


def printed(show, result) -> str:
    page = io.StringIO()
    original = console.wide_console
    console.wide_console = lambda: Console(file=page, width=220)
    try:
        show(result)
    finally:
        console.wide_console = original
    return page.getvalue()
