"""Tile sizes of the kernels, chosen ahead for each architecture: nothing is tuned while serving."""

from __future__ import annotations

from typing import NamedTuple

from preble.kernels.architecture import Architecture


class Tile(NamedTuple):
    """How one program of an attention kernel works."""

    rows: int
    """Query rows at a time."""
    tokens: int
    """KV tokens at a time."""
    warps: int
    stages: int
    """Depth of the pipeline of loads."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def decode_tile(architecture: Architecture, head_dim: int, rows: int, itemsize: int) -> Tile:
    """For `rows` = GQA group x query length rows of a KV head, with queries of `itemsize` bytes a number."""
    wide = head_dim > 128
    packed = max(16, power_of_two(rows))
    if itemsize == 4:
        return Tile(packed, 16, packed // 4, 1)
    if architecture.name == "sm_90":
        return Tile(packed, 32, 8 if packed > 32 else 4, 3) if wide else Tile(packed, 64, 4, 3)
    return Tile(packed, 32, 8, 2) if wide else Tile(packed, 32, 4, 3)


def extend_tile(architecture: Architecture, head_dim: int, itemsize: int) -> Tile:
    """For prefill chunks with queries of `itemsize` bytes a number: new tokens x GQA group rows of a KV head."""
    if itemsize == 4:
        return Tile(32, 16, 8, 1) if head_dim > 128 else Tile(32, 32, 4, 1)
    if architecture.name == "sm_90":
        if head_dim > 128:
            return Tile(128, 32, 8, 3)
        return Tile(128, 128, 8, 3) if head_dim > 64 else Tile(128, 64, 8, 3)
    if head_dim > 128:
        return Tile(64, 32, 8, 2)
    return Tile(64, 32, 4, 3) if head_dim > 64 else Tile(64, 64, 4, 3)


def shared_prefix_tile(architecture: Architecture, head_dim: int, itemsize: int) -> Tile:
    """For requests that share a prefix, their GQA groups stacked; queries of `itemsize` bytes a number."""
    if itemsize == 4:
        return Tile(32, 32, 8, 1)
    wide = head_dim > 128
    if architecture.name == "sm_90":
        return Tile(64, 32, 8, 3) if wide else Tile(64, 64, 4, 3)
    return Tile(64, 32, 8, 2) if wide else Tile(64, 32, 4, 3)
