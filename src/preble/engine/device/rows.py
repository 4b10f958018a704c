"""Which row of the device's tables belongs to which request, and what the tables do not say yet."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preble.sched.sequence import Sequence
from preble.sched.step_plan import Chunk


@dataclass(slots=True)
class Row:
    """A request's row, and the pages that the device was told: the first `told` of `pages`."""

    number: int
    sequence: Sequence
    pages: list[int]
    """The list that the request's block table held, which only ever grows; a table that changes takes another list."""
    told: int = 0

    def news(self) -> list[tuple[int, int, int]]:
        """What the device must be told now: (row, index, page). Free where nothing has changed, as in most steps."""
        pages = self.sequence.table.pages
        if pages is not self.pages:
            news = [
                (self.number, index, page)
                for index, page in enumerate(pages)
                if index >= self.told or self.pages[index] != page
            ]
            self.pages = pages
        elif len(pages) > self.told:
            news = [(self.number, index, pages[index]) for index in range(self.told, len(pages))]
        else:
            return []
        self.told = len(pages)
        return news


class RequestRows:
    """Gives every running request a row. Knows the requests by their sequences, so it needs to be told of no end.

    Args:
        count: rows; as many as requests run at once.
    """

    def __init__(self, count: int) -> None:
        self._free = list(reversed(range(count)))
        self._rows: dict[Sequence, Row] = {}

    def place(self, chunks: Several[Chunk]) -> tuple[list[int], list[Row], NDArray[np.int32]]:
        """The row of each chunk's request, those rows that are new, and what to enter into the page tables.

        The last is int32 [U, 3]: row, index of the page in the request, page.
        """
        numbers: list[int] = []
        new: list[Row] = []
        updates: list[tuple[int, int, int]] = []
        for chunk in chunks:
            row = self._rows.get(chunk.sequence)
            if row is None:
                row = Row(self._take(), chunk.sequence, chunk.sequence.table.pages)
                self._rows[chunk.sequence] = row
                new.append(row)
            numbers.append(row.number)
            updates += row.news()
        return numbers, new, np.array(updates, np.int32).reshape(-1, 3)

    def _take(self) -> int:
        if not self._free:
            for sequence, row in list(self._rows.items()):
                if sequence.node is None:  # ended, or preempted: it gets another row when it comes back
                    del self._rows[sequence]
                    self._free.append(row.number)
        return self._free.pop()
