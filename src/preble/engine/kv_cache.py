"""The memory that holds K and V of every page."""

from __future__ import annotations

import torch

FP8 = torch.uint8
"""The dtype of a cache of e4m3 numbers: their bits, which every architecture can move."""


class KVCache:
    """K and V of all layers, each `[layer, slot, kv_head, head_dim]` where slot = `page * page_size + offset`.

    Memory is reserved, not touched: on the CPU, pages that were never used cost nothing. In a cache of the dtype `FP8`
    a number is its e4m3 value times the scale of its layer and head.
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
        self.key_scales: torch.Tensor | None = None
        """fp32 [layer, kv_head]; None where numbers are stored as they are. As are the values'."""
        self.value_scales: torch.Tensor | None = None
        if dtype == FP8:
            self.key_scales = torch.ones(layers, kv_heads, dtype=torch.float32, device=device)
            self.value_scales = torch.ones(layers, kv_heads, dtype=torch.float32, device=device)

    def scales(self, layer: int) -> dict[str, torch.Tensor]:
        """The scales of a layer by the names under which kernels take them, fp32 [kv_heads] each; none without FP8."""
        if self.key_scales is None or self.value_scales is None:
            return {}
        return {"key_scales": self.key_scales[layer], "value_scales": self.value_scales[layer]}

    @staticmethod
    def bytes_per_page(*, layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of K and V that one page takes over all layers."""
        return 2 * layers * page_size * kv_heads * head_dim * dtype.itemsize
