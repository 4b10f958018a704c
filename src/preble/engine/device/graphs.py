"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches of a few sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preble.engine.device.attention import Attention
from preble.engine.device.batch import DecodeInputs, DeviceBatch, DeviceModel, SharedPrefixInputs
from preble.engine.kv_cache import KVCache

logger = logging.getLogger("preble.engine")


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """A model over the pages and with the attention of one runner."""

    model: DeviceModel
    kv: KVCache
    attention: Attention

    def __call__(self, batch: DeviceBatch) -> torch.Tensor:
        """Logits [R, vocabulary]."""
        return self.model.forward(batch, self.kv, self.attention)


def buckets_up_to(largest: int) -> list[int]:
    """The batch sizes that get a graph, ascending: at most a quarter of a batch is padding, beyond 8 an eighth."""
    sizes = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [*(size for size in sizes if size < largest), largest]


class DecodeBuffers:
    """Where the inputs of decode steps lie, always in the same place: graphs know tensors by their addresses.

    Args:
        decodes: of the largest step.
        tables: the page tables of all requests.
        shared_tiles: tiles of shared prefixes at most, and requests in a tile; None where prefixes are never shared.
    """

    def __init__(self, decodes: int, tables: torch.Tensor, *, shared_tiles: tuple[int, int] | None) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=tables.device)

        self.tables = tables
        self.token_ids = integers(decodes)
        self.positions = integers(decodes)
        self.slots = integers(decodes).fill_(-1)
        self.rows = integers(decodes)
        self.context_lengths = integers(decodes)
        self.shared: SharedPrefixInputs | None = None
        if shared_tiles is not None:
            tiles, members = shared_tiles
            self.shared = SharedPrefixInputs(integers(tiles, members), integers(tiles), integers(decodes))

    def batch(self, size: int, tiles: int) -> DeviceBatch:
        """The first `size` decodes as a batch; with `tiles` of shared prefixes, or 0."""
        shared = None
        if tiles:
            assert self.shared is not None
            shared = SharedPrefixInputs(
                self.shared.members[:tiles], self.shared.prefix_lengths[:tiles], self.shared.starts[:size]
            )
        return DeviceBatch(
            token_ids=self.token_ids[:size],
            positions=self.positions[:size],
            slots=self.slots[:size],
            tables=self.tables,
            decodes=DecodeInputs(self.rows[:size], self.context_lengths[:size], shared),
            extends=None,
            logit_rows=None,
        )

    def share(self, size: int, inputs: Sequence[torch.Tensor]) -> int:
        """Enter members, prefix lengths and starts of shared prefixes for `size` decodes, or none; how many tiles."""
        if not inputs:
            return 0
        assert self.shared is not None
        members, prefix_lengths, starts = inputs
        tiles = len(members)
        self.shared.members[:tiles].copy_(members)
        self.shared.prefix_lengths[:tiles].copy_(prefix_lengths)
        self.shared.starts[:size].copy_(starts)
        return tiles


class DecodeGraphs:
    """Runs padded decode steps over `DecodeBuffers`: captured on a GPU, called one by one elsewhere.

    Args:
        forward: the forward pass. On a GPU it must queue its work without waiting for any.
        buffers: its inputs.
        variants: (size, tiles of shared prefixes or 0) that steps may have.
    """

    def __init__(
        self,
        forward: Callable[[DeviceBatch], torch.Tensor],
        buffers: DecodeBuffers,
        variants: Sequence[tuple[int, int]],
    ) -> None:
        self._forward = forward
        self._buffers = buffers
        self.variants = list(variants)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self) -> None:
        """Capture every variant on the current stream, the largest first, so that the others fit in its memory."""
        pool = torch.cuda.graph_pool_handle()
        for size, tiles in sorted(self.variants, reverse=True):
            self._capture(size, tiles, pool)
        logger.debug("captured %d CUDA graphs", len(self._graphs))

    def _capture(self, size: int, tiles: int, pool: Any) -> None:
        batch = self._buffers.batch(size, tiles)
        self._forward(batch)  # what is compiled or allocated once must not be in the graph
        stream = torch.cuda.current_stream()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other replicas may run meanwhile, in other threads.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        self._graphs[size, tiles] = graph, logits

    def run(self, size: int, tiles: int) -> torch.Tensor:
        """Logits [size, vocabulary], valid until the next run."""
        captured = self._graphs.get((size, tiles))
        if captured is None:
            return self._forward(self._buffers.batch(size, tiles))
        graph, logits = captured
        graph.replay()
        return logits
