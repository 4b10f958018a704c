"""One copy per step from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 4
"""Integers: every array begins at a multiple of 16 bytes."""


class Staging:
    """Packs the int32 arrays of a step into pinned memory and copies them at once, without waiting for the device.

    What `send` returns is valid for work that is queued before the next `send`: both go through the same queue.

    Args:
        device: where to.
        depth: buffers to take in turn, so that one is filled while others are on their way.
    """

    def __init__(self, device: torch.device, *, depth: int) -> None:
        self._device = device
        self._hosts: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)] * depth
        self._sent: list[torch.cuda.Event | None] = [None] * depth
        self._turn = 0
        self._target = torch.empty(0, dtype=torch.int32, device=device)

    def send(self, arrays: Sequence[NDArray[np.int32]]) -> list[torch.Tensor]:
        """The same arrays on the device, int32."""
        starts = []
        size = 0
        for array in arrays:
            starts.append(size)
            size += -(-array.size // ALIGNMENT) * ALIGNMENT
        host = self._next_buffer(size)
        if len(self._target) < size:
            self._target = torch.empty(2 * size, dtype=torch.int32, device=self._device)
        packed = host.numpy()
        for start, array in zip(starts, arrays, strict=True):
            packed[start : start + array.size] = array.reshape(-1)
        self._target[:size].copy_(host[:size], non_blocking=True)
        if self._device.type == "cuda":
            event = self._sent[self._turn] or torch.cuda.Event()
            event.record()
            self._sent[self._turn] = event
        return [
            self._target[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _next_buffer(self, size: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._hosts)
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        if len(self._hosts[self._turn]) < size:
            pinned = self._device.type == "cuda"
            self._hosts[self._turn] = torch.empty(2 * size, dtype=torch.int32, pin_memory=pinned)
        return self._hosts[self._turn]
