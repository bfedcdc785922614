"""The findings for a person: a table, the commands to paste, the verdict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from infoprune_export.doctor.findings import Finding, Group, Status
from infoprune_export.doctor.probes import BrokenError, load_module

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES: dict[Status, str] = {"ok": "green", "info": "cyan", "warning": "yellow", "problem": "bold red"}


def render(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print a table, the commands to paste and the verdict; plain lines when rich itself is what is broken."""
    lines = []
    for title, fixes in (("To mend:", commands(findings)), ("Optional:", commands(findings, optional=True))):
        lines += [title, *(f"  {fix}" for fix in fixes)] if fixes else []
    counts = {status: sum(f.status == status for f in findings) for status in ("problem", "warning")}
    lines.append(", ".join(f"{count} {status}{'s' * (count != 1)}" for status, count in counts.items()))
    try:
        console = console or load_module("rich.console").Console()
        load_module("rich.table")
    except BrokenError:
        rows = [f"{f.group:10} {f.subject:28} {f.status:8} {f.detail}" for f in findings]
        sys.stdout.write("\n".join([*rows, *lines]) + "\n")
        return
    console.print(_table(findings))
    for line in lines:
        # Outside the table and unwrapped, or a long command could not be pasted; markup would swallow the [cpu].
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def commands(findings: Sequence[Finding], *, optional: bool = False) -> list[str]:
    """Fixes of warnings and problems in order, each once; with `optional`, those of all other findings instead."""
    needed = dict.fromkeys(f.fix for f in findings if f.fix and f.status in ("warning", "problem"))
    offered = dict.fromkeys(f.fix for f in findings if f.fix and f.fix not in needed)
    return list(offered if optional else needed)


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("group", "subject", "status", "detail")
    for group in get_args(Group):
        members = [finding for finding in findings if finding.group == group]
        for index, finding in enumerate(members):
            status = Text(finding.status, _STYLES[finding.status])
            table.add_row(group if index == 0 else "", Text(finding.subject), status, Text(finding.detail))
        if not members:
            table.add_row(group, "", Text("ok", _STYLES["ok"]), "none found")
        table.add_section()
    return table
