"""Shapes of what measurements are written down as, in JSON."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class Interval(TypedDict):
    """A 95% interval of a percentile."""

    low: float | None
    """None where the rounds are too few to bound it."""
    high: float | None


class Percentiles(TypedDict):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float
    intervals: dict[str, Interval]
    """By ``p50``, ``p90`` and ``p99``; see `statistics.quantile_interval`."""


class Ratio(TypedDict):
    """How many times as long one alternative takes as another; see `statistics.paired_ratio`."""

    median: float
    low: float
    high: float
    confidence: float
    """What the interval covers: 0.95, or less where there were too few observations."""
    observations: int
    """Blocks of four rounds; every two where there are fewer than 24, single ones where there are fewer than twelve."""
    effective: float
    """Independent observations that these are worth; fewer where what disturbs one disturbs the next."""


class Machine(TypedDict):
    """What a latency figure depends on and no library version shows."""

    processor: str
    cores: int | None
    governor: str
    system: str
    load: float | None
    """Processes that ran or waited in the last minute, on average, when the figures were taken."""
    gpus: list[dict[str, str]]
    """As nvidia-smi describes them: name, driver, power limit, clocks, and why clocks are held back."""
    power_mode: str | None
    """Of a Jetson, by nvpmodel."""


Stopped = Literal["narrow", "rounds", "time"]
"""Why no more rounds were made: the intervals were narrow enough, or a limit was reached first."""


class Parity(TypedDict):
    """An alternative's outputs against PyTorch's in fp32; see `validate.parity.Parity`."""

    relative_error: float | None
    """None where outputs are not finite or of another shape."""
    cosine: float
    norm_ratio: float
    tolerance: float
    min_cosine: float
    passed: bool


class Memory(TypedDict):
    """Bytes of one side in a process of its own."""

    weights_bytes: int
    """What it holds before the first call."""
    call_bytes: int
    """What one call takes on top of it, at most."""


class PeerRow(TypedDict):
    """Another way to run the same encoder, in the same interleaved run."""

    peer: str
    """A name of `validate.peers.PEERS`."""
    side: Literal["original", "compressed"]
    version: str | None
    reason: str | None
    """Why it was not timed: not installed, or it refuses this encoder. All below is then None."""
    milliseconds: Percentiles | None
    speedup: Ratio | None
    """Our original in ONNX Runtime over this."""
    parity: Parity | None
    """A peer that is fast and wrong has not passed."""
    prepare_seconds: float | None
    """Export or compilation, and the first call."""


class BenchRow(TypedDict):
    """One batch size."""

    batch_size: int
    rounds: int
    stopped: Stopped
    milliseconds: dict[str, Percentiles]
    """By ``original`` and ``compressed``."""
    speedup: Ratio
    flops: dict[str, int]
    flop_ratio: float
    efficiency: float
    """Speed-up over FLOP ratio."""
    parity: dict[str, Parity]
    """Of ``original`` and ``compressed``; only where peers were timed."""
    peers: list[PeerRow]
    memory: dict[str, Memory]
    """By side, and by ``peer, side``; empty where memory was not asked for."""


class BenchResult(TypedDict):
    """``bench.json``."""

    target: str
    provider: str
    threads: int
    rounds: int
    """The most that any row took."""
    warmup: int
    max_interval: float
    """Width of a ratio's interval over the ratio at which rounds end."""
    machine: Machine
    libraries: dict[str, Any]
    rows: list[BenchRow]


class SelfRow(TypedDict):
    """The same graph in two sessions, against itself."""

    batch_size: int
    rounds: int
    stopped: Stopped
    milliseconds: dict[str, Percentiles]
    """By ``first`` and ``second``."""
    ratio: Ratio
    contains_one: bool
    relative_width: float | None
    """Width of the interval over the ratio; None where it covers less than 95%."""


class SelfResult(TypedDict):
    """What ``bench --self`` writes."""

    target: str
    provider: str
    threads: int
    warmup: int
    max_interval: float
    machine: Machine
    libraries: dict[str, Any]
    rows: list[SelfRow]
