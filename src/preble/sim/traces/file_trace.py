"""A trace that came from a file."""

from __future__ import annotations

from dataclasses import dataclass

from preble.sim.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class FileTrace(Trace):
    """A trace, and what reading it took."""

    format: str
    """The name of the file's format."""
    left_out: int = 0
    """Requests of the file that are not in the trace, because they failed when they were recorded."""
    without_output: int = 0
    """Requests recorded as generating nothing. In the trace they generate one token, as every request must."""
