"""Other ways to run the encoder, by name: what a user would do without this package, or beside it.

A peer is given the towers that our graphs were exported from and the same images. What is not installed, or refuses
this encoder, stays listed with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from infoprune_export.errors import InfopruneError
from infoprune_export.measure.results import Parity
from infoprune_export.validate.bench_case import SIDES, BenchCase, Load, Side
from infoprune_export.validate.bench_running import Running
from infoprune_export.validate.sweep_peer import one_line, version_of

# Name -> where its `Peer` is, imported when it is asked for.
PEERS = {
    "eager": "infoprune_export.validate.peers_torch:EAGER",
    "compile": "infoprune_export.validate.peers_torch:COMPILE",
    "transformers": "infoprune_export.validate.peers_transformers:TRANSFORMERS",
    "openvino": "infoprune_export.validate.peers_openvino:OPENVINO",
}
Start = Callable[[Load], Running]


@dataclass(frozen=True)
class Peer:
    """One way to run an encoder."""

    package: str
    """Whose version is shown."""
    sides: tuple[Side, ...]
    missing: Callable[[BenchCase], str | None]
    """Why it cannot run here, with what would help, or None."""
    prepare: Callable[[BenchCase, Side], Start]
    """Exports or loads a side, once; what is returned puts the images of a batch size in place."""
    weights: Callable[[BenchCase, Side], int] | None = None
    """Bytes of the weights it runs with, where a process's growth would not tell them, as those that were loaded before
    or what preparing leaves behind; else they are measured."""
    load: Callable[[BenchCase], None] = lambda case: None
    """Loads what runs encoders, whose own memory is no encoder's."""
    own_limits: bool = True
    """Held to what peers are held to; else, as it runs our graphs, to what those are."""


def peer_of(name: str) -> Peer:
    """A peer by its name.

    Raises:
        InfopruneError: there is none.
    """
    if name not in PEERS:
        raise InfopruneError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    module, _, attribute = PEERS[name].partition(":")
    peer: Peer = getattr(import_module(module), attribute)
    return peer


@dataclass
class Contender:
    """A peer on one side; `reason` says why it is not timed."""

    name: str
    side: Side
    version: str | None
    limits: tuple[float, float]
    start: Start | None = None
    seconds: float = 0.0
    reason: str | None = None

    @property
    def title(self) -> str:
        return title_of(self.name, self.side)

    def on(self, load: Load, check: Callable[[Contender, Running], Parity]) -> tuple[Running, Parity, float] | None:
        """It with the images in place and called once, how that compares, and the seconds to here; None if it fails."""
        if self.start is None:
            return None
        began = time.perf_counter()
        try:
            running = self.start(load)
            running.call()
            seconds = self.seconds + time.perf_counter() - began
            return running, check(self, running), seconds
        except Exception as error:  # (a refusal, whatever it raises, is a result)
            self.start, self.reason = None, one_line(error)
            return None


def title_of(name: str, side: Side) -> str:
    """How a peer's side is called in tables."""
    return name if side == "original" else f"{name}, {side}"


def contenders(case: BenchCase, names: Sequence[str], on_each: Callable[[int], None]) -> list[Contender]:
    """Every side of the named peers, prepared or with the reason why not."""
    found = []
    for name in names:
        peer = peer_of(name)
        missing = peer.missing(case)
        for side in (side for side in SIDES if side in peer.sides):
            limits = case.peer_limits if peer.own_limits else case.limits[side]
            contender = Contender(name, side, version_of(peer.package), limits, reason=missing)
            if missing is None:
                began = time.perf_counter()
                try:
                    contender.start = peer.prepare(case, side)
                except Exception as error:
                    contender.reason = one_line(error)
                contender.seconds = time.perf_counter() - began
            found.append(contender)
        on_each(1)
    return found
