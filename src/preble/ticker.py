"""Calls back at times that are due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Ticker:
    """A thread that calls a function when it is due. Made for a cluster that is entered in one task and left in
    another, as notebooks do: a task of its own would have to belong to one of them.

    Args:
        tick: called from the thread; must not block.
    """

    def __init__(self, tick: Callable[[], object]) -> None:
        self._tick = tick
        self._wake = threading.Condition()
        self._due: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="preble-ticker", daemon=True)
        self._thread.start()

    def at(self, when: float) -> None:
        """Call back at this time of `time.monotonic`, or earlier if that was asked for before."""
        with self._wake:
            if self._due is None or when < self._due:
                self._due = when
                self._wake.notify()

    def stop(self) -> None:
        """Never call back again. Returns at once; see `join`."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._stopped and (self._due is None or self._due > time.monotonic()):
                    self._wake.wait(None if self._due is None else max(self._due - time.monotonic(), 0.0))
                if self._stopped:
                    return
                self._due = None
            self._tick()
