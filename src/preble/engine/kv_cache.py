"""The memory that holds K and V of every page."""

from __future__ import annotations

import torch


class KVCache:
    """K and V of all layers, each `[layer, slot, kv_head, head_dim]` where slot = `page * page_size + offset`.

    Memory is reserved, not touched: on the CPU, pages that were never used cost nothing.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        shape = (layers, pages * page_size, kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_page(*, layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of K and V that one page takes over all layers."""
        return 2 * layers * page_size * kv_heads * head_dim * dtype.itemsize
