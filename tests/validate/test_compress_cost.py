"""What compressing costs, measured on a tiny tower."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from infoprune_export.validate.compress_cost import measure, render


@pytest.fixture(scope="module")
def rows():
    return measure(3, 3, "qwen2-vl")


def test_the_ffn_row_really_compressed_these_images(rows):
    ffn, _ = rows
    assert (ffn["what"], ffn["blocks"], ffn["images"]) == ("ffn", 3, 3)
    assert ffn["kept"] == 0.5  # three widths of 64 among 3 x 128 neurons
    assert ffn["seconds"] > 0
    assert ffn["peak_bytes"] > 100 * 2**20  # torch alone


def test_the_gates_row_relates_spectra_to_a_forward_pass_over_a_batch(rows):
    _, gates = rows
    assert (gates["what"], gates["images"]) == ("gates", 32)
    assert gates["share"] == pytest.approx(gates["seconds"] / gates["forward_seconds"])
    assert gates["seconds"] > 0


def test_the_table_shows_memory_and_share(rows):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(rows))
    text = console.export_text()
    assert f"{rows[1]['share']:.1%}" in text
    assert f"{rows[0]['peak_bytes'] / 2**30:.1f}" in text
