"""Which attention heads each block keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from infoprune_export.errors import InfopruneError


@dataclass(frozen=True)
class HeadPlan:
    """``kept[l]`` are the heads block l keeps, ascending; ``total[l]`` is how many it has."""

    total: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.total) != len(self.kept):
            raise InfopruneError(f"head plan has {len(self.kept)} blocks of heads for {len(self.total)} blocks")
        for block, (count, heads) in enumerate(zip(self.total, self.kept, strict=True)):
            if list(heads) != sorted(set(heads)) or (heads and not 0 <= heads[0] <= heads[-1] < count):
                raise InfopruneError(
                    f"head plan, block {block}: {list(heads)} is no ascending choice of 0..{count - 1}"
                )

    @property
    def removed_fraction(self) -> float:
        return 1 - sum(map(len, self.kept)) / sum(self.total)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> HeadPlan:
        return cls(tuple(value["total"]), tuple(tuple(heads) for heads in value["kept"]))

    @classmethod
    def full(cls, counts: list[int]) -> HeadPlan:
        """Keep every head."""
        return cls(tuple(counts), tuple(tuple(range(count)) for count in counts))
