"""Work that somebody watches: a view that is drawn anew while it goes on, or a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import anyio

from preble.errors import PrebleError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

DRAWN = 0.125
"""Seconds between two pictures on a terminal."""
LOGGED = 2.0
"""Seconds between two lines elsewhere."""


class View(Protocol):
    """What there is to see."""

    def frame(self, seconds: float) -> RenderableType:
        """A picture for a terminal, so many seconds after the start."""
        ...

    def line(self, seconds: float) -> str:
        """The same in a line."""
        ...


async def watched(console: Console, view: View, *workers: Callable[[], Awaitable[object]]) -> None:
    """Run the workers side by side while the view is shown. On a terminal nothing is left of it.

    Raises:
        PrebleError: as the first of the workers raised it, which ends the others.
    """
    show = _draw if console.is_terminal and not console.is_dumb_terminal else _log
    began = time.perf_counter()
    errors: list[PrebleError] = []

    async def run(worker: Callable[[], Awaitable[object]]) -> None:
        try:
            await worker()
        except PrebleError as error:  # which the group would put into another one
            errors.append(error)
            work.cancel_scope.cancel()

    async with anyio.create_task_group() as shown:
        shown.start_soon(show, console, view, began)
        async with anyio.create_task_group() as work:
            for worker in workers:
                work.start_soon(run, worker)
        shown.cancel_scope.cancel()
    if errors:
        raise errors[0]


async def _draw(console: Console, view: View, began: float) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(view.frame(time.perf_counter() - began), refresh=True)
            await anyio.sleep(DRAWN)


async def _log(console: Console, view: View, began: float) -> None:
    while True:
        await anyio.sleep(LOGGED)
        console.print(view.line(time.perf_counter() - began), markup=False, soft_wrap=True)
