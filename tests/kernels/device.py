"""Where kernels are tested: on a GPU, or without one in Triton's interpreter on the CPU."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
