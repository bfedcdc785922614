"""What a lint says: one finding a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

Severity = Literal["error", "warning"]
"""An error stops the build; a warning costs speed or precision."""


@dataclass(frozen=True)
class LintFinding:
    """One broken rule."""

    rule: str
    severity: Severity
    node: str
    """Name of the ONNX node, function, weight, input or output; "model" for what concerns all of it."""
    problem: str
    fix: str


def table_of(findings: Sequence[LintFinding]) -> Table:
    """Errors first, each rule's findings together."""
    from rich.table import Table
    from rich.text import Text

    table = Table("severity", "rule", "node", "problem", "fix")
    for finding in sorted(findings, key=lambda f: (f.severity, f.rule)):
        style = "bold red" if finding.severity == "error" else "yellow"
        cells = (finding.rule, finding.node, finding.problem, finding.fix)
        table.add_row(Text(finding.severity, style), *map(Text, cells))
    return table
