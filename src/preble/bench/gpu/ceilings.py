"""What the GPU can do at most, measured in the same run: copying, reading, and multiplying large matrices."""

from __future__ import annotations

from itertools import pairwise

import torch

from preble.bench.gpu.place import Place, time_work
from preble.bench.gpu.predictions import COPY, MATMUL, READ
from preble.bench.gpu.record import Record

BYTES = 4 << 30
"""Copied at a time: far more than the L2 cache holds."""
SIDE = 8192
"""Of the matrices."""


def run_ceilings(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Three figures, by operations of PyTorch."""
    _bandwidth(place, record)
    side = 128 if place.toy else SIDE
    matrices = [torch.randn(side, side, device=place.device).to(place.dtype) for _ in range(4)]

    def multiply() -> None:
        for left, right in pairwise(matrices):
            left @ right

    multiply()
    times = time_work(place, multiply, parts=len(matrices) - 1, graph=False)
    record.rate(MATMUL, 2 * side**3 / 1e12, times, "TFLOP/s")


def _bandwidth(place: Place, record: Record) -> None:
    numbers = (1 << 20 if place.toy else BYTES) // 4
    source = torch.randn(numbers, device=place.device)
    target = torch.empty_like(source)
    nbytes = source.nbytes
    times = time_work(place, lambda: target.copy_(source), graph=False)
    record.rate(COPY, 2 * nbytes / 1e12, times, "TB/s")
    times = time_work(place, source.sum, graph=False)
    record.rate(READ, nbytes / 1e12, times, "TB/s")
