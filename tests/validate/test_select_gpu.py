"""Timing of token selection on a GPU: the refusal and the table anywhere, the rest where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from infoprune_export.errors import InfopruneError
from infoprune_export.validate import select_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InfopruneError, match="torch finds no CUDA device; run this on a machine with an NVIDIA GPU"):
        select_gpu.select_gpu(3)


def test_the_table_has_the_ratio_of_both():
    console = Console(width=120)
    row = {"tokens": 576, "kept": 64, "images": 8, "kernel": 2.0, "pytorch": 25.0, "overlap": 0.975}
    with console.capture() as capture:
        console.print(select_gpu.render([row]))
    assert all(text in capture.get() for text in ("576", "2.00", "25.00", "12.5", "97.5%"))


@pytest.mark.gpu
def test_both_choose_the_same_on_a_gpu():
    rows = select_gpu.select_gpu(3, sizes=[(576, 64)], batches=[1, 3])
    assert [row["images"] for row in rows] == [1, 3]
    assert all(row["overlap"] > 0.95 and row["kernel"] > 0 and row["pytorch"] > 0 for row in rows)
