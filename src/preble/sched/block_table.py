"""A sequence's pages in order, and the contiguous runs they form."""

from __future__ import annotations

from collections.abc import Iterable


class BlockTable:
    """Page i holds tokens `i * page_size` onwards. `runs` says the same in (first page, number of pages) stretches.

    Runs are kept as pages are added, because an attention that reads KV in place needs them at every step.
    """

    __slots__ = ("pages", "runs")

    def __init__(self, pages: Iterable[int] = ()) -> None:
        self.pages: list[int] = []
        self.runs: list[tuple[int, int]] = []
        self.extend(pages)

    def __len__(self) -> int:
        return len(self.pages)

    def extend(self, pages: Iterable[int]) -> None:
        """Add pages at the end."""
        runs = self.runs
        for page in pages:
            self.pages.append(page)
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))

    def replace(self, start: int, pages: list[int]) -> list[int]:
        """Put `pages` in place of those from index `start` on; returns the ones that were there."""
        stop = start + len(pages)
        replaced = self.pages[start:stop]
        everything = self.pages[:start] + pages + self.pages[stop:]
        self.pages, self.runs = [], []
        self.extend(everything)
        return replaced

    def slots(self, tokens: int, page_size: int) -> tuple[tuple[int, int], ...]:
        """(first slot, length) of the runs that hold the first `tokens` tokens."""
        spans = []
        for page, count in self.runs:
            length = min(count * page_size, tokens)
            spans.append((page * page_size, length))
            tokens -= length
            if not tokens:
                break
        return tuple(spans)
