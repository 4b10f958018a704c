"""From a checkpoint to runners on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from preble.engine.batch import Model
from preble.engine.checkpoint import Checkpoint
from preble.engine.dtypes import resolve_dtype
from preble.engine.host_memory import free_memory
from preble.engine.host_runner import HostRunner
from preble.engine.kv_cache import KVCache
from preble.engine.loading import load_model
from preble.errors import DeviceError

GIB = 1 << 30
MOST_KV_MEMORY = 4 * GIB
"""The most KV memory a replica takes by default."""
SHARE_OF_FREE_MEMORY = 0.25
"""What part of the free memory the replicas' KV pages take together by default, once the weights are there."""


class HostLoad:
    """A model on the CPU, from which runners are made.

    Args:
        folder: the checkpoint.
        replicas: runners that will share it.
        dtype: as for `resolve_dtype`.
        page_size: tokens in a page.
        kv_bytes: of each replica, or None for a share of the free memory.

    Raises:
        CheckpointError: the model cannot be loaded.
        DeviceError: the memory does not suffice.
    """

    def __init__(self, folder: Path, *, replicas: int, dtype: str, page_size: int, kv_bytes: int | None) -> None:
        require_memory(folder, dtype)
        self.model = load_model(folder, device=torch.device("cpu"), dtype=dtype)
        self.pages = kv_pages(self.model, page_size, kv_bytes, sharing=replicas)
        """That each replica can have."""
        self._page_size = page_size

    def runner(self, pages: int) -> HostRunner:
        """A runner with `pages` KV pages."""
        return HostRunner(self.model, pages=pages, page_size=self._page_size)


def require_memory(folder: Path, dtype: str) -> None:
    """Raise `DeviceError` for weights that the host's memory cannot hold, instead of letting the host end the process.

    Args:
        folder: the checkpoint, of which only headers are read.
        dtype: as for `resolve_dtype`.
    """
    checkpoint = Checkpoint(folder)
    resolved = resolve_dtype(dtype, stored=checkpoint.main_dtype, device=torch.device("cpu"))
    needed = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) * resolved.itemsize
    free = free_memory()
    if needed > free:
        half = "dtype='bfloat16', which takes half of it, " if resolved is torch.float32 else ""
        raise DeviceError(
            f"the weights in {folder} take {needed / GIB:.2f} GiB as {str(resolved).removeprefix('torch.')}, more than "
            f"the {free / GIB:.2f} GiB free on cpu; take {half}a smaller model, or a machine with more memory"
        )


def kv_pages(model: Model, page_size: int, wanted_bytes: int | None, *, sharing: int) -> int:
    """How many KV pages a replica gets: `wanted_bytes` worth, or its share of the device's free memory."""
    config = model.config
    page_bytes = KVCache.bytes_per_page(
        layers=config.layers,
        page_size=page_size,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
    )
    free = free_memory()
    if wanted_bytes is None:
        budget = min(int(free * SHARE_OF_FREE_MEMORY) // sharing, MOST_KV_MEMORY)
    else:
        budget = wanted_bytes
        if budget * sharing > free:
            raise DeviceError(
                f"kv_memory of {budget / GIB:.2f} GiB for each of {sharing} replicas is more than the "
                f"{free / GIB:.2f} GiB free on {model.device}; lower kv_memory or replicas, or leave kv_memory out"
            )
    pages = budget // page_bytes
    if pages < 1:
        raise DeviceError(
            f"kv_memory of {budget} bytes holds not one page of {page_bytes} bytes ({page_size} tokens); raise "
            "kv_memory or lower page_size"
        )
    return pages
