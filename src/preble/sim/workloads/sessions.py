"""Sessions: requests that follow from one another, and how many sessions share the time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from preble.sim.workloads.prompts import Segment

SECONDS_PER_TOKEN = 0.05
"""What a generated token is taken to last when the next turn of an open loop is timed: 20 tokens/s, a busy replica."""


class Turn(NamedTuple):
    """One request of a session."""

    path: tuple[Segment, ...]
    """Its prompt."""
    output_tokens: int
    """At least 1."""
    think: float = 0.0
    """Seconds from the end of the turn before to this one."""


class Session(NamedTuple):
    """Requests of one user or program."""

    turns: tuple[Turn, ...]
    """At least one."""
    waits: bool = True
    """Whether a turn is sent after the one before has been answered; else all of them are sent in a row."""


class Sent(NamedTuple):
    """A turn in its place among all requests."""

    session: int | None
    """Number of the session; None where nobody waits for anybody."""
    turn: Turn
    think: float
    """Seconds after the turn before; 0 for a session's first."""


def interleave(sessions: Iterator[Session], rate: float) -> Iterator[Sent]:
    """Requests of all sessions in the order in which they are sent, without end.

    Requests leave at an even `rate` (1/s) here. Each is the turn that has been ready for longest; when none is ready,
    a new session begins. So there are as many sessions at a time as the rate needs, and neither the kind of arrivals
    nor the number of requests asked for changes what is in a request.
    """
    ready: list[tuple[float, int, int]] = []  # when, session, turn; a session has one entry at most
    running: dict[int, Session] = {}
    begun = count()
    for slot in count():
        now = slot / rate
        if ready and ready[0][0] <= now:
            _, number, index = heapq.heappop(ready)
        else:
            number, index = next(begun), 0
            running[number] = next(sessions)
        session = running[number]
        turn = session.turns[index]
        yield Sent(number if session.waits else None, turn, turn.think if session.waits and index else 0.0)
        if index + 1 == len(session.turns):
            del running[number]
        else:
            pause = turn.output_tokens * SECONDS_PER_TOKEN + session.turns[index + 1].think if session.waits else 0.0
            heapq.heappush(ready, (now + pause, number, index + 1))
