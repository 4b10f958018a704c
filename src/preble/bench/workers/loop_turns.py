"""How long an event loop's thread is kept: the processor time of every turn between two waits for events."""

from __future__ import annotations

import asyncio
import gc
import selectors
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


@dataclass(slots=True)
class LoopTurns:
    """What the turns of an event loop took. A turn is everything that the loop runs between two waits for events: a
    task that becomes ready as one begins is late by that much.

    Processor time of the loop's thread is what the turn itself asked for. On a busy machine it takes longer, and that
    is nobody's doing. The interpreter's garbage collections are counted apart, as they depend on all that the process
    has in memory.
    """

    count: int = 0
    longest: float = 0.0
    """Seconds of processor time."""
    total: float = 0.0
    collecting: float = 0.0
    """Seconds of processor time that garbage collections took in the loop's thread."""
    _thread: int = 0
    _began: float | None = None
    _collected: float = 0.0
    """In this turn."""

    def run(self, function: Callable[[], Awaitable[T]], backend: str = "asyncio") -> T:
        """`anyio.run`, with every turn noted, on `"asyncio"` or `"trio"`."""
        options: dict[str, Any]
        if backend == "asyncio":
            options = {"loop_factory": lambda: asyncio.SelectorEventLoop(_NotingSelector(self))}
        else:
            options = {"instruments": [_Instrument(self)]}
        self._thread = threading.get_ident()
        with self._noting_collections():
            return anyio.run(function, backend=backend, backend_options=options)

    def forget(self) -> None:
        """Begin anew, with the rest of the turn that calls this."""
        self.count, self.longest, self.total, self.collecting = 0, 0.0, 0.0, 0.0
        self.begins()

    def begins(self) -> None:
        """The loop has waited for events and now runs what is ready."""
        self._collected = 0.0
        self._began = time.thread_time()

    def ends(self) -> None:
        """The loop is about to wait for events."""
        if self._began is None:
            return
        seconds = time.thread_time() - self._began - self._collected
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    @contextmanager
    def _noting_collections(self) -> Iterator[None]:
        began = 0.0

        def note(phase: str, info: object) -> None:
            nonlocal began
            if threading.get_ident() != self._thread:
                return
            if phase == "start":
                began = time.thread_time()
                return
            seconds = time.thread_time() - began
            self._collected += seconds
            self.collecting += seconds

        gc.callbacks.append(note)
        try:
            yield
        finally:
            gc.callbacks.remove(note)


class _NotingSelector(selectors.DefaultSelector):
    """asyncio waits for events in `select`, and nowhere else."""

    def __init__(self, turns: LoopTurns) -> None:
        super().__init__()
        self._turns = turns

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns.ends()
        events = super().select(timeout)
        self._turns.begins()
        return events


class _Instrument:
    """The hooks that trio calls around its wait for events."""

    def __init__(self, turns: LoopTurns) -> None:
        self._turns = turns

    def before_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`."""
        self._turns.ends()

    def after_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`."""
        self._turns.begins()
