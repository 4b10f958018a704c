"""How near a kernel must come to its reference."""

from __future__ import annotations

import torch
from device import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
"""Of the relative error, by dtype: those that can be tested here. The interpreter rounds bf16 wrongly."""
if DEVICE.type == "cuda":
    TOLERANCE[torch.bfloat16] = 1e-2


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out - exact‖ / ‖exact‖ in fp64, 0 for two empty tensors."""
    out, exact = out.double(), exact.double()
    return float((out - exact).norm() / exact.norm().clamp(min=1e-300))
