"""Spreads what thousands of requests do at once over as many turns of the event loop."""

from __future__ import annotations

from collections import OrderedDict

import anyio
import anyio.lowlevel


class Turnstile:
    """Lets one task pass in each turn of the event loop, in the order in which they came. If each then works for a
    fraction of a millisecond, a crowd of them delays nobody else for longer than that.

    It belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._crowded = False
        self._waiting: OrderedDict[anyio.Event, None] = OrderedDict()

    async def pass_through(self) -> None:
        """Wait for a turn that nobody else passes in. It lasts until the caller awaits something again."""
        called = None
        try:
            if self._crowded:
                called = anyio.Event()
                self._waiting[called] = None
                await called.wait()
            else:
                self._crowded = True
                await anyio.lowlevel.checkpoint()
        finally:
            if called is None or called.is_set():
                self._call_next()
            else:
                del self._waiting[called]

    def _call_next(self) -> None:
        # Whoever is called here runs in the next turn.
        if self._waiting:
            self._waiting.popitem(last=False)[0].set()
        else:
            self._crowded = False
