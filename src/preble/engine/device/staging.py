"""One copy per step from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from preble.engine.device.queue import Mark, Queue

ALIGNMENT = 4
"""Integers: every array begins at a multiple of 16 bytes."""


class Staging:
    """Packs the int32 arrays of a step into host memory and copies them at once, without waiting for the device.

    What `send` returns is valid for work that is queued before the next `send`: both go through the same queue.

    Args:
        queue: that of the work.
        device: where to.
        depth: buffers to take in turn, so that one is filled while others are on their way.
    """

    def __init__(self, queue: Queue, device: torch.device, *, depth: int) -> None:
        self._queue = queue
        self._device = device
        self._hosts = [torch.empty(0, dtype=torch.int32)] * depth
        self._sent: list[Mark | None] = [None] * depth
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
        self._sent[self._turn] = self._queue.mark()
        return [
            self._target[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _next_buffer(self, size: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._hosts)
        sent = self._sent[self._turn]
        if sent is not None:
            sent.wait()
        if len(self._hosts[self._turn]) < size:
            self._hosts[self._turn] = self._queue.host_tensor((2 * size,), torch.int32)
        return self._hosts[self._turn]
