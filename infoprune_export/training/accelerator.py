"""Hugging Face accelerate, which brings mixed precision and several processes to a training loop."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from infoprune_export.errors import InfopruneError


def check_precision(section: str, precision: str, device: str) -> None:
    """Refuse a mixed precision of this recipe section that the device cannot train in.

    Raises:
        InfopruneError: fp16 without a GPU.
    """
    if precision == "fp16" and device == "cpu":
        raise InfopruneError(f"{section}.mixed_precision = 'fp16' needs a GPU, the device is cpu; use bf16 or no")


def start_accelerator(precision: str, device: str) -> Accelerator:
    """An Accelerator for this device type and mixed precision, in this process or as one of several."""
    if not torch.distributed.is_initialized():
        # Its state is global, and refuses another precision than the first training of this process used.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)
