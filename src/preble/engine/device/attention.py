"""Attention backends: how the layers of a forward pass attend over the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from preble.engine.device.batch import DeviceBatch
    from preble.engine.kv_cache import KVCache


class Attention(Protocol):
    """Attends for one runner, one forward pass at a time."""

    name: str
    """For `stats`: triton, flash-attn or torch."""

    capturable: bool
    """Whether CUDA graphs may hold it: it never waits for the device, and decides nothing by what tensors hold."""

    shares_prefixes: bool
    """Whether it takes `DecodeInputs.shared`."""

    def begin(self, batch: DeviceBatch) -> None:
        """Prepare what all layers of a forward pass have in common."""
        ...

    def attend(self, layer: int, q: torch.Tensor, kv: KVCache, scale: float) -> torch.Tensor:
        """Attention of one layer of the batch that was begun; K and V of its tokens already lie in their slots.

        q is [N, query_heads, head_dim], its rows perhaps strided; the result is [N, query_heads, head_dim], contiguous.
        """
        ...
