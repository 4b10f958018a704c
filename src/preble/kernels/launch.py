"""The one place from which kernels are launched, so that a launch can also be recorded instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything it would be called with."""

    kernel: Any
    """The function that `triton.jit` made."""
    grid: Grid
    arguments: dict[str, Any]
    """By name: tensors, numbers and constants."""
    warps: int
    stages: int


_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("launch_recorder", default=None)


def launch(kernel: Any, grid: Grid, *, warps: int, stages: int, **arguments: Any) -> None:
    """Run `kernel` on a grid of programs; with 0 programs, nothing happens."""
    if 0 in grid:
        return
    record = _recorder.get()
    if record is not None:
        record(Launch(kernel, grid, arguments, warps, stages))
        return
    kernel[grid](**arguments, num_warps=warps, num_stages=stages)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it nothing runs: launches go to the list, so that tensors on the device "meta" will do."""
    launches: list[Launch] = []
    token = _recorder.set(launches.append)
    try:
        yield launches
    finally:
        _recorder.reset(token)
