"""A request on its way through the simulation, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from preble.sim.trace import TracedRequest

OUTPUT_TOKEN = 2**31 - 1
"""The number that request 0 generates; every later one has the number below. No block of a prompt is named so high."""


@dataclass(slots=True, eq=False)
class Flight:
    """One request, from its arrival to its end. Times are seconds since the first arrival of the trace, NaN for what
    did not happen."""

    number: int
    """Position in the trace."""
    traced: TracedRequest
    """The request as the trace has it."""
    max_tokens: int
    """What the schedulers are told that it may generate at most. They don't know what it will."""
    arrived: float
    """When it came in."""
    placed: float = float("nan")
    """When the global scheduler gave it to a replica, the first time."""
    admitted: float = float("nan")
    """When a replica began to compute it, the first time."""
    first_token: float = float("nan")
    """When it had its first token."""
    ended: float = float("nan")
    """When it had its last one."""
    generated: int = 0
    """Tokens generated so far."""
    replica: int = -1
    """Where it is, or ended."""
    reason: str = ""
    """The rule that placed it there."""
    cached_tokens: int = 0
    """Prompt tokens found in the cache at its first admission."""
    computed_tokens: int = 0
    """Tokens that went through the model but for those decoded: of the prompt, and after a preemption or a failure once
    more, those of the output too."""
    preemptions: int = 0
    """How often it lost its pages and was put back into its replica's queue."""
    moves: int = 0
    """How often it was lost with a replica that failed, and placed anew."""

    @property
    def request_id(self) -> str:
        """What the scheduler calls it."""
        return str(self.number)

    @property
    def token(self) -> int:
        """What it generates, over and over: no other request does, so that nothing is shared by accident."""
        return OUTPUT_TOKEN - self.number
