"""Floating-point operations, counted while the module runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(module: nn.Module, planned: Mapping[str, Tensor]) -> int:
    """FLOPs (two per multiply-accumulate) of matrix products, convolutions and attention in one forward pass.

    Counted by torch's dispatcher on the module as it stands, so a mask saves nothing and a removed head does. Norms,
    activations and the token selection's greedy loop are not counted.
    """
    # torch has no FLOP formula for the CPU's fused attention and would count nothing; as plain products it counts.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(planned)
    return int(counter.get_total_flops())
