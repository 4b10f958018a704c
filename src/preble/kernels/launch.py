"""The one place from which kernels are launched, so that a launch can also be recorded instead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
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


_one_at_a_time: AbstractContextManager[object] = nullcontext()
if os.environ.get("TRITON_INTERPRET") == "1":
    _one_at_a_time = Lock()  # the interpreter keeps the program it is in where all threads see it


def launch(kernel: Any, grid: Grid, *, warps: int, stages: int, **arguments: Any) -> None:
    """Run `kernel` on a grid of programs; with 0 programs, nothing happens."""
    if 0 in grid:
        return
    record = _recorder.get()
    if record is not None:
        record(Launch(kernel, grid, arguments, warps, stages))
        return
    with _one_at_a_time:
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
