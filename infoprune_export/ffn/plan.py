"""What replaces each block's feed-forward network, and what is left of its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infoprune_export.errors import InfopruneError
from infoprune_export.models.block import Block


@dataclass(frozen=True)
class FfnChoice:
    """``mlp`` keeps `neurons` (ascending) and the activation; ``linear`` is a product of rank `rank` without it.

    ``factored`` keeps `neurons` and makes a product of each projection, those in, then down, of its rank in `ranks`.
    ``bypass`` keeps `neurons` and adds a linear path of rank `rank` around the activation.
    """

    kind: Literal["mlp", "linear", "factored", "bypass"]
    neurons: tuple[int, ...] = ()
    rank: int = 0
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "linear" and list(self.neurons) != sorted(set(self.neurons)):
            raise InfopruneError("FFN plan: neurons must be ascending and different")
        if self.kind == "linear" and self.rank < 1:
            raise InfopruneError(f"FFN plan: rank {self.rank}; a linear replacement needs at least 1")
        if self.kind == "bypass" and (self.rank < 1 or not self.neurons):
            raise InfopruneError(
                f"FFN plan: bypass of rank {self.rank} around {len(self.neurons)} neurons; it needs one of both"
            )
        if self.kind == "factored" and not (self.neurons and self.ranks and min(self.ranks) >= 1):
            raise InfopruneError(f"FFN plan: factors of ranks {list(self.ranks)}; each needs at least 1")

    @property
    def size(self) -> int:
        """Neurons, or the rank of a linear replacement."""
        return self.rank if self.kind == "linear" else len(self.neurons)


@dataclass(frozen=True)
class FfnPlan:
    """``widths[l]`` is block l's original number of neurons, ``choices[l]`` what is left of it."""

    widths: tuple[int, ...]
    choices: tuple[FfnChoice, ...]
    features: int = 0
    """Width D of the residual stream; 0 where no choice needs it to be counted, as with neurons alone."""
    projections: int = 2
    """Of one FFN: 2, or 3 with a gate."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.choices):
            raise InfopruneError(f"FFN plan has {len(self.choices)} choices for {len(self.widths)} blocks")
        for block, (width, choice) in enumerate(zip(self.widths, self.choices, strict=True)):
            if choice.neurons and not 0 <= choice.neurons[0] <= choice.neurons[-1] < width:
                raise InfopruneError(f"FFN plan, block {block}: neurons outside 0..{width - 1}")
            # Either would leave a tensor of the original's shape, which a loader that knows nothing of it would accept.
            if choice.kind == "bypass" and choice.size == width:
                raise InfopruneError(f"FFN plan, block {block}: a bypass around all {width} neurons saves nothing")
            if choice.kind == "factored":
                most = min(self.features, choice.size) - 1
                if len(choice.ranks) != self.projections or max(choice.ranks) > most:
                    raise InfopruneError(
                        f"FFN plan, block {block}: ranks {list(choice.ranks)} for {self.projections} projections of "
                        f"{self.features} features and {choice.size} neurons; give each one of at most {most}"
                    )

    def macs(self, choice: FfnChoice) -> int:
        """Multiply-accumulates per token of one choice, biases not counted; over D where `features` is not given."""
        if choice.kind == "linear":
            return 2 * self._scale * choice.rank
        if choice.kind == "factored":
            return sum(choice.ranks) * (self.features + choice.size)
        return self._scale * (self.projections * choice.size + 2 * choice.rank)

    @property
    def _scale(self) -> int:
        return self.features or 1

    @property
    def kept_fraction(self) -> float:
        """Fraction of the FFN multiply-accumulates that is left, biases not counted."""
        full = self._scale * self.projections * sum(self.widths)
        return sum(map(self.macs, self.choices)) / full

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FfnPlan:
        choices = (
            FfnChoice(c["kind"], tuple(c["neurons"]), c["rank"], tuple(c.get("ranks", ()))) for c in value["choices"]
        )
        shape = {name: value[name] for name in ("features", "projections") if name in value}
        return cls(tuple(value["widths"]), tuple(choices), **shape)

    @classmethod
    def full(cls, widths: list[int]) -> FfnPlan:
        """Keep every neuron."""
        return cls(tuple(widths), tuple(FfnChoice("mlp", tuple(range(width))) for width in widths))

    @classmethod
    def for_blocks(cls, blocks: Sequence[Block], choices: Sequence[FfnChoice]) -> FfnPlan:
        """A plan for blocks that nothing is done to yet."""
        widths = tuple(block.ffn_shape.size for block in blocks)
        return cls(widths, tuple(choices), blocks[0].ffn_out.out_features, len(blocks[0].ffn_projections))
