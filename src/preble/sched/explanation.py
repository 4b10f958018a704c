"""What the global scheduler would do with a prompt, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica in the eyes of the policy."""

    replica: int
    """Its number."""
    state: str
    """`up`, `draining` or `down`; only replicas that are up are considered."""
    cached_tokens: int
    """Prompt tokens that are, or will soon be, in its prefix cache; whole pages."""
    confirmed_tokens: int
    """… of which the replica itself has reported these."""
    in_flight: int
    """Requests placed there that have not ended."""
    queued_prefill_tokens: int
    """Tokens it has yet to compute before all of them decode."""
    decoding: int
    """Requests there that generate, one token per step."""
    costs: Mapping[str, float]
    """The terms the policy judges it by; empty unless it is up."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision that `submit` would take now. `print` it for a table."""

    policy: str
    """Name of the policy."""
    prompt_tokens: int
    """Length of the prompt."""
    replica: int | None
    """The replica that would get the request; `None` if it would wait."""
    reason: str
    """The rule that decided, or what the request would wait for."""
    candidates: tuple[Candidate, ...]
    """All replicas, by number."""

    def __str__(self) -> str:
        decision = "wait" if self.replica is None else f"replica {self.replica}"
        terms = sorted({term for one in self.candidates for term in one.costs})
        rows = [["", "replica", "state", "cached", "confirmed", "in flight", "to prefill", "decoding", *terms]]
        for one in self.candidates:
            mark = "*" if one.replica == self.replica else ""
            numbers = (one.cached_tokens, one.confirmed_tokens, one.in_flight, one.queued_prefill_tokens, one.decoding)
            costs = [f"{one.costs[term]:g}" if term in one.costs else "-" for term in terms]
            rows.append([mark, str(one.replica), one.state, *map(str, numbers), *costs])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.policy}: {decision} ({self.reason}), prompt of {self.prompt_tokens} tokens"]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)
