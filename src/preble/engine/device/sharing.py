"""Which decodes of a step read a common prefix once."""

from __future__ import annotations

import torch

from preble.engine.config import ModelConfig
from preble.sched.step_plan import Chunk


class PrefixSharing:
    """Finds them, within what CUDA graphs have room for."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, page_size: int) -> None:
        pass

    def tiles(self, decodes: int) -> tuple[int, int] | None:
        """Tiles of a step of so many decodes at most, and requests in a tile; None where sharing never pays."""
        return None

    def find(self, chunks: list[Chunk], size: int) -> None:
        return None
