"""Which decodes of a step read a common prefix once."""

from __future__ import annotations

import torch

from preble.engine.config import ModelConfig
from preble.kernels.architecture import architecture_of
from preble.kernels.prefix_groups import PrefixGroups, SharedPrefixes, SharingCosts
from preble.kernels.shared_prefix import requests_per_tile
from preble.kernels.splits import SHARED_SPLITS
from preble.sched.step_plan import Chunk

DECODES_PER_TILE = 8
"""A batch has room for one tile for so many decodes: CUDA graphs start programs for all of them, needed or not."""


class PrefixSharing:
    """Finds what the decodes of a step have in common, within what their batch has room for.

    Args:
        config: of the model. Layers with a sliding window never share; without others there is nothing to find.
        dtype: of the queries.
        kv_itemsize: bytes of a number in the KV cache.
        device: for its tiles.
        page_size: tokens in a page.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, kv_itemsize: int, device: torch.device, page_size: int
    ) -> None:
        group = config.query_heads // config.kv_heads
        self._requests = requests_per_tile(architecture_of(device), config.head_dim, dtype, group=group)
        self._possible = None in config.layer_windows and self._requests > 1
        costs = SharingCosts.estimate(
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            kv_itemsize=kv_itemsize,
            splits=SHARED_SPLITS,
        )
        self._groups = PrefixGroups(costs, requests_per_tile=self._requests, page_size=page_size)

    def tiles(self, decodes: int) -> tuple[int, int] | None:
        """Tiles of a batch of so many decodes, and requests in a tile; None where nothing can be shared."""
        if decodes < 2 or not self._possible:
            return None
        return -(-decodes // DECODES_PER_TILE), self._requests

    def find(self, chunks: list[Chunk], size: int) -> SharedPrefixes | None:
        """What these decodes, the first of a batch of `size`, read together; None where that would not pay."""
        shape = self.tiles(size)
        if shape is None or len(chunks) < 2:
            return None
        tables = [chunk.sequence.table.pages for chunk in chunks]
        contexts = [chunk.start + 1 for chunk in chunks]
        shared = self._groups.update(tables, contexts, batch=size, tiles=shape[0])
        return shared if shared.tiles else None
