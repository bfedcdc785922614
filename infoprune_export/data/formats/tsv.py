"""Tables with tabs as pandas writes them, read row by row, with the place of a large cell instead of its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infoprune_export.errors import InfopruneError

# A cell in quotes (doubled inside) or without any at its start, then a tab or the end.
_CELL = re.compile(rb'(?:"((?:[^"]|"")*)"|([^\t]*))(?:\t|$)')
_LARGEST_ROW = 2**26
_KEPT = 16
"""Longest text of a cell in the large column that is kept."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell, empty for a large one; where its bytes are in the file."""

    text: str
    offset: int
    length: int


def read_tsv(path: Path, what: str, large: str) -> Iterator[tuple[int, dict[str, Cell]]]:
    """Rows by column name, numbered from 1 behind the header. Cells of column `large` keep at most 16 characters.

    Raises:
        InfopruneError: missing, not UTF-8, a quote that is never closed, or a row of another number of cells.
    """
    header: list[str] = []
    try:
        for number, (offset, record) in enumerate(_records(path)):
            where = f"{path}: row {number}" if number else f"{path}: header"
            found = _cells(record, offset, where, header.index(large) if large in header else -1)
            if number == 0:
                header = [cell.text for cell in found]
                continue
            if len(found) != len(header):
                raise InfopruneError(f"{where} has {len(found)} cells, the header has {len(header)}; download it again")
            yield number, dict(zip(header, found, strict=True))
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name {what}") from None


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every record; a line end within quotes does not end it."""
    with path.open("rb") as file:
        offset, record, quotes = 0, b"", 0
        for line in file:
            record += line
            quotes += line.count(b'"')
            if quotes % 2 and len(record) < _LARGEST_ROW:
                continue
            if quotes % 2:
                break
            if record.strip():
                yield offset, record.rstrip(b"\r\n")
            offset, record, quotes = offset + len(record), b"", 0
        if record:
            raise InfopruneError(
                f"{path}: a quote that opens at byte {offset} or behind is never closed; download it again"
            )


def _cells(record: bytes, offset: int, where: str, large: int) -> list[Cell]:
    cells: list[Cell] = []
    for match in _CELL.finditer(record):
        quoted = match.group(1) is not None
        start, end = match.span(1 if quoted else 2)
        raw = record[start:end]
        text = ""
        if len(cells) != large or len(raw) <= _KEPT:
            try:
                text = (raw.replace(b'""', b'"') if quoted else raw).decode("utf-8")
            except UnicodeDecodeError:
                raise InfopruneError(f"{where}: cell {len(cells) + 1} is not UTF-8; download it again") from None
        cells.append(Cell(text, offset + start, end - start))
        if not match.group(0).endswith(b"\t"):
            break
    return cells
