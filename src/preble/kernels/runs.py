"""Runs: where the tokens of a sequence lie in KV memory, as (first slot, length) of contiguous slots, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Run = tuple[int, int]


def tokens_in(runs: Iterable[Run]) -> int:
    """Tokens that `runs` hold."""
    return sum(length for _, length in runs)


def cut(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """The runs of tokens `start` to `stop` (exclusive), both counted from the first token of `runs`."""
    taken = []
    position = 0
    for first, length in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            taken.append((first + begin - position, end - begin))
        position += length
    return taken


def join(runs: Iterable[Run]) -> list[Run]:
    """The same tokens in the same order, with runs that touch made one."""
    joined: list[Run] = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return joined


def slots_of(runs: Iterable[Run]) -> NDArray[np.int64]:
    """The slot of every token, int64 [tokens]."""
    return np.concatenate([np.arange(first, first + length) for first, length in runs])


def split_shared(tables: Sequence[Sequence[Run]], minimum: int) -> list[tuple[list[int], list[Run]]]:
    """Split the tables of several sequences into what groups of them begin with in common and what each has alone.

    Returns (members, runs) pairs, members being indexes into `tables`; the runs of a member's pairs, in order, are its
    table. A group shares its runs only if that saves reading `minimum` tokens, members beyond the first counted.
    """
    shared: list[tuple[list[int], list[Run]]] = []
    alone: list[list[Run]] = [[] for _ in tables]
    rest = [list(reversed(table)) for table in tables]  # a stack each, so that its next run is popped from the end
    pending = [[member for member, table in enumerate(tables) if table]]
    while pending:
        members = pending.pop()
        together: list[Run] = []
        while True:  # as long as all members go on in the same slots
            by_slot: dict[int, list[int]] = {}
            for member in members:
                if rest[member]:
                    by_slot.setdefault(rest[member][-1][0], []).append(member)
            branches = list(by_slot.values())
            if len(branches) != 1 or len(branches[0]) != len(members) or len(members) == 1:
                break
            length = min(rest[member][-1][1] for member in members)
            together.append((rest[members[0]][-1][0], length))
            for member in members:
                first, remaining = rest[member].pop()
                if remaining > length:
                    rest[member].append((first + length, remaining - length))
        if (len(members) - 1) * tokens_in(together) >= minimum:
            shared.append((members, join(together)))
        else:
            for member in members:
                alone[member].extend(together)
        pending.extend(branches if len(members) > 1 else [])
    return shared + [([m], join([*alone[m], *reversed(rest[m])])) for m in range(len(tables)) if alone[m] or rest[m]]
