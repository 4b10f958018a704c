"""How much of a device's memory becomes KV pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preble.engine.host_memory import free_memory
from preble.errors import DeviceError

GIB = 1 << 30
SHARE = 0.92
"""The part of a device's memory that is used. The rest is for what nobody can count: fragmentation, libraries."""
PER_GRAPH = 4 << 20
"""Bytes that a CUDA graph takes besides the memory of its tensors, which all graphs share."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory once the weights are loaded and a forward pass has been rehearsed, in bytes."""

    device: str
    total: int
    free: int
    """Now, with the weights in place."""
    activations: int
    """The most that a forward pass at the token budget takes for a while."""
    graphs: int
    """What CUDA graphs will hold."""
    fixed: int
    """Tables, scratch memory of attention, sampling state."""

    def kv_bytes(self, *, replicas: int, wanted: int | None) -> int:
        """Bytes of KV for each of `replicas` on the device: `wanted`, or an equal share of what is left.

        Raises `DeviceError`, naming what takes the memory and what to change.
        """
        overhead = replicas * (self.activations + self.graphs + self.fixed)
        room = self.free - int((1 - SHARE) * self.total) - overhead
        each = room // replicas
        if wanted is None:
            if each <= 0:
                raise DeviceError(f"{self.device} has no memory left for KV pages: {self._account(overhead)}")
            return each
        if wanted > each:
            raise DeviceError(
                f"kv_memory of {wanted / GIB:.2f} GiB for each of {replicas} replicas on {self.device} is more than "
                f"the {max(each, 0) / GIB:.2f} GiB there are: {self._account(overhead)}"
            )
        return wanted

    def _account(self, overhead: int) -> str:
        used = self.total - self.free
        return (
            f"of {self.total / GIB:.2f} GiB, {used / GIB:.2f} are in use (the weights, and other programs), "
            f"{(1 - SHARE) * self.total / GIB:.2f} are kept free, and {overhead / GIB:.2f} go to activations "
            f"({self.activations / GIB:.2f} a replica), CUDA graphs ({self.graphs / GIB:.2f}) and scratch "
            f"({self.fixed / GIB:.2f}). Lower max_batched_tokens, max_running or the number of replicas on the device, "
            "or use a smaller model or kv_dtype='fp8'"
        )


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on a device, for this process too, and in all."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and does not use counts as free
        return torch.cuda.mem_get_info(device)
    free = free_memory()
    return free, free
