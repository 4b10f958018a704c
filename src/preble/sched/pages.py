"""The free KV pages of one replica, as plain integers."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page numbers, neighbours where it can.

    A sequence whose pages are neighbours is one contiguous run of KV, which the CPU attention reads in place. So a
    sequence's first allocation looks for a gap with `room` to grow and leaves that room alone until the pool wraps.
    """

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a pool needs at least one page, not {pages}")
        self.total = pages
        self.free = pages
        self._is_free = bytearray(b"\x01" * pages)
        self._cursor = 0

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take `count` free pages, starting right behind page `after` where that one is free.

        The caller makes sure that `count <= free`.
        """
        assert count <= self.free
        taken: list[int] = []
        if after is not None:
            page = after + 1
            while len(taken) < count and page < self.total and self._is_free[page]:
                taken.append(page)
                page += 1
            self._take(taken)
        while len(taken) < count:
            run = self._run(count - len(taken), max(room - len(taken), 0))
            self._take(run)
            taken += run
        self.free -= count
        return taken

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} was released twice"
            self._is_free[page] = 1
            self.free += 1

    def free_pages(self) -> set[int]:
        """The free pages, for integrity checks."""
        return {page for page, free in enumerate(self._is_free) if free}

    def _take(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._is_free[page] = 0

    def _run(self, count: int, room: int) -> list[int]:
        """Up to `count` neighbours: from a gap with room to grow, else one that fits, else whatever is free first."""
        for length in sorted({max(count, room), count}, reverse=True):
            gap = b"\x01" * length
            start = self._is_free.find(gap, self._cursor)
            if start < 0:
                start = self._is_free.find(gap)
            if start >= 0:
                self._cursor = (start + length) % self.total
                return list(range(start, start + count))
        start = stop = self._is_free.find(1)
        while stop < self.total and self._is_free[stop]:
            stop += 1
        return list(range(start, stop))
