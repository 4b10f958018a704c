"""Events on their way from a replica: late, out of order, twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from hypothesis import strategies as st

E = TypeVar("E")


def deliveries(events: Sequence[E], *, held_back: int = 4, repeats: int = 2) -> st.SearchStrategy[list[E]]:
    """A way in which `events` may arrive: each at least once, overtaken by at most `held_back` of those after it, up to
    `repeats` of them again at any later time. Meant for the cache events (`Stored`, `Evicted`) of one replica."""
    count = len(events)
    delays = st.lists(st.integers(0, held_back), min_size=count, max_size=count)
    again = st.tuples(st.integers(0, max(count - 1, 0)), st.integers(0, count + held_back))
    return st.builds(partial(_arrange, events), delays, st.lists(again, max_size=repeats if events else 0))


def _arrange(events: Sequence[E], delays: list[int], again: list[tuple[int, int]]) -> list[E]:
    times = [(number + delay, number) for number, delay in enumerate(delays)]
    times += [(max(time, number + delays[number]), number) for number, time in again]
    return [events[number] for _, number in sorted(times)]
