"""What replaces each block's feed-forward network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from infoprune_export.errors import InfopruneError


@dataclass(frozen=True)
class FfnChoice:
    """``mlp`` keeps `neurons` (ascending) and the activation; ``linear`` is a product of rank `rank` without it."""

    kind: Literal["mlp", "linear"]
    neurons: tuple[int, ...] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind == "mlp" and list(self.neurons) != sorted(set(self.neurons)):
            raise InfopruneError("FFN plan: neurons must be ascending and different")
        if self.kind == "linear" and self.rank < 1:
            raise InfopruneError(f"FFN plan: rank {self.rank}; a linear replacement needs at least 1")

    @property
    def size(self) -> int:
        """Multiply-accumulates are proportional to it: 2 * d * size per token for fc1-fc2 networks."""
        return len(self.neurons) if self.kind == "mlp" else self.rank


@dataclass(frozen=True)
class FfnPlan:
    """``widths[l]`` is block l's original number of neurons, ``choices[l]`` what is left of it."""

    widths: tuple[int, ...]
    choices: tuple[FfnChoice, ...]

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.choices):
            raise InfopruneError(f"FFN plan has {len(self.choices)} choices for {len(self.widths)} blocks")
        for block, (width, choice) in enumerate(zip(self.widths, self.choices, strict=True)):
            if choice.neurons and not 0 <= choice.neurons[0] <= choice.neurons[-1] < width:
                raise InfopruneError(f"FFN plan, block {block}: neurons outside 0..{width - 1}")

    @property
    def kept_fraction(self) -> float:
        """Fraction of the FFN multiply-accumulates that is left, biases not counted."""
        return sum(choice.size for choice in self.choices) / sum(self.widths)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FfnPlan:
        choices = (FfnChoice(c["kind"], tuple(c["neurons"]), c["rank"]) for c in value["choices"])
        return cls(tuple(value["widths"]), tuple(choices))

    @classmethod
    def full(cls, widths: list[int]) -> FfnPlan:
        """Keep every neuron."""
        return cls(tuple(widths), tuple(FfnChoice("mlp", tuple(range(width))) for width in widths))
