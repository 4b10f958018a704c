"""Requests as they come in: what they ask for, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from preble.sched.testing.prompts import Prompt, related_prompts


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to be submitted: `scheduler.submit(request_id, one.token_ids, now=one.time, **one.options)`."""

    time: float
    """When it is submitted, in seconds."""
    token_ids: Prompt
    """The prompt."""
    namespace: str = ""
    """Prefixes are shared only within one."""
    priority: int = 0
    """Higher is served first."""
    deadline: float | None = None
    """Seconds on the clock of `time`."""
    session: str | None = None
    """The conversation that it belongs to, if any."""
    max_tokens: int = 8
    """The most tokens it may generate."""
    expected_tokens: int | None = None
    """The caller's hint of how many it will generate, if any."""

    @property
    def options(self) -> dict[str, Any]:
        """The keywords, but for `now`, of `GlobalScheduler.submit` and `explain`."""
        return {
            "namespace": self.namespace,
            "priority": self.priority,
            "deadline": self.deadline,
            "session": self.session,
            "max_tokens": self.max_tokens,
            "expected_tokens": self.expected_tokens,
        }


def steady_times(count: int, *, longest_gap: float = 1.0) -> st.SearchStrategy[list[float]]:
    """`count` times from 0.0 on with one gap between all of them."""
    gaps = st.integers(1, 8).map(lambda eighths: eighths * longest_gap / 8)
    return gaps.map(lambda gap: [number * gap for number in range(count)])


def bursty_times(count: int, *, longest_gap: float = 8.0) -> st.SearchStrategy[list[float]]:
    """`count` times from 0.0 on: several at the very same time, then a pause."""
    pauses = st.integers(-24, 8).map(lambda eighths: max(eighths, 0) * longest_gap / 8)
    return st.lists(pauses, min_size=count - 1, max_size=count - 1).map(_sums)


def _sums(pauses: list[float]) -> list[float]:
    times = [0.0]
    for pause in pauses:
        times.append(times[-1] + pause)
    return times


def namespaces() -> st.SearchStrategy[str]:
    """Mostly the common one, else that of a tenant."""
    return st.sampled_from(["", "", "tenant"])


@st.composite
def arrivals(
    draw: st.DrawFn,
    page_size: int,
    *,
    earlier: Sequence[Prompt] = (),
    start: float = 0.0,
    max_arrivals: int = 4,
    max_pages: int = 4,
    vocabulary: int = 3,
) -> list[Arrival]:
    """From one to `max_arrivals` requests in order of time, steady or in bursts, the first at `start`. They share
    prefixes among them and with `earlier` prompts, and may be urgent, belong to a session or expect some output. The
    prompts are as in `prompts`."""
    count = draw(st.integers(1, max_arrivals))
    times = draw(bursty_times(count) | steady_times(count))
    known = list(earlier)
    found: list[Arrival] = []
    for time in times:
        tokens = draw(related_prompts(known, page_size, max_pages=max_pages, vocabulary=vocabulary))
        known.append(tokens)
        priority, deadline, session, expected = draw(_wishes)
        found.append(
            Arrival(
                start + time,
                tokens,
                namespace=draw(namespaces()),
                priority=priority,
                deadline=None if deadline is None else start + time + deadline,
                session=session,
                expected_tokens=expected,
            )
        )
    return found


# Most requests wish for nothing, and some for several things at once.
_wishes = st.tuples(
    st.sampled_from([0, 0, 1]),
    st.sampled_from([None, None, 1.0, 30.0]),
    st.sampled_from([None, None, "a", "b"]),
    st.sampled_from([None, None, 1, 12]),
)
