"""The names of the pages in a replica's prefix cache, and which of them goes first."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict


class _Run:
    """Pages that were always used together, `start` pages behind the beginning of their prompts."""

    __slots__ = ("pages", "parent", "start")

    def __init__(self, pages: list[int], parent: _Run | None, start: int) -> None:
        self.pages = pages
        self.parent = parent
        self.start = start


class PageCache:
    """As in an engine, the page that goes first is the one whose prompt was not used for longest, from the far end.
    So a prompt's pages that are here are its first ones. Touches what is new of a prompt and little more, to leave the
    processor's caches to the scheduler.

    Args:
        capacity: the most pages it holds.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._where: dict[int, _Run] = {}
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        """The first one to go first; a run comes before the one that it continues."""

    def __len__(self) -> int:
        return len(self._where)

    @property
    def pages(self) -> set[int]:
        """All pages."""
        return set(self._where)

    def held(self, pages: list[int]) -> int:
        """How many of a prompt's pages are here."""
        where = self._where
        return bisect_left(pages, True, key=lambda page: page not in where)

    def use(self, pages: list[int]) -> tuple[list[int], list[int]]:
        """A prompt was computed up to the end of these pages, at least one; returns the pages that entered the cache
        and those that had to go."""
        held = self.held(pages)
        run = self._run_until(pages, held) if held else None
        stored = pages[held:]
        if stored:
            run = _Run(stored.copy(), run, held)
            self._where.update(dict.fromkeys(stored, run))
        while run is not None:
            self._runs[run] = None
            self._runs.move_to_end(run)
            run = run.parent
        return stored, self._evict()

    def _run_until(self, pages: list[int], held: int) -> _Run:
        """The run that ends with the last held page."""
        run = self._where[pages[held - 1]]
        inside = held - run.start
        if inside == len(run.pages):
            return run
        upper = _Run(run.pages[:inside], run.parent, run.start)
        self._where.update(dict.fromkeys(upper.pages, upper))
        run.pages = run.pages[inside:]
        run.parent = upper
        run.start = held
        return upper

    def _evict(self) -> list[int]:
        evicted: list[int] = []
        while len(self._where) > self._capacity:
            run = next(iter(self._runs))
            keep = max(len(run.pages) - (len(self._where) - self._capacity), 0)
            gone = run.pages[keep:]
            for page in gone:
                del self._where[page]
            evicted += gone
            del run.pages[keep:]
            if not keep:
                del self._runs[run]
        return evicted
