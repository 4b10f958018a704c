"""What there is to know about a workload before any of it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from preble.sim.workloads.draws import Draws
from preble.sim.workloads.sessions import Session


@dataclass(frozen=True, slots=True)
class Means:
    """Averages of the requests of a workload at its default size."""

    prompt_tokens: float
    output_tokens: float
    shared: float
    """Share of all prompt tokens that lie in a prefix which another request has too."""
    requests_per_key_portion: float
    """Requests divided by distinct key portions. The key portion of a prompt is the deepest node on its path in the
    prefix tree whose own tokens outnumber all tokens before it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of traffic that can be made in any amount."""

    name: str
    summary: str
    """One line: what is shared, what is not."""
    source: str
    """Where its figures come from."""
    prefixes: int
    """Different prefixes that requests choose from; 0 where nothing is shared."""
    requests: int
    """How many are a fair sample for two GPUs."""
    rate: float
    """Requests per second that two GPUs can serve."""
    block_size: int
    """Tokens per block of the trace."""
    means: Means
    """What its requests are meant to average to."""
    sessions: Callable[[Draws], Iterator[Session]]
    """Its sessions, without end."""
