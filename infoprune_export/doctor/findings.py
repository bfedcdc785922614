"""What the doctor says: one finding a line, and the gravest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["ok", "info", "warning", "problem"]
"""From harmless to a run that fails: `info` needs no action, `warning` is something installed that cannot be used."""
Group = Literal["packages", "devices", "backends", "targets", "conflicts"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `fix` is a shell command that can be pasted as it is."""

    group: Group
    subject: str
    status: Status
    detail: str
    fix: str | None = None


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status; ``problem`` is the one that fails the command."""
    order: tuple[Status, ...] = get_args(Status)
    return max((finding.status for finding in findings), key=order.index, default="ok")
