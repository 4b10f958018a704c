"""A file format that traces come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """What a file leaves to its reader to decide. Only prompts use it."""

    seed: int = 0
    """Draws the arrivals of requests without times."""
    tokenize: Tokenize | None = None
    """Gives the token ids of a text."""


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """One format: what its lines look like, and how they are read."""

    name: str
    example: str
    """A line of JSON, or the line of a CSV that names its columns. For error messages."""
    is_json: bool
    recognises: Callable[[frozenset[str]], bool]
    """Whether a file whose first line has these keys (JSON) or columns (CSV) is of this format."""
    read: Callable[[Lines, ReadingOptions], FileTrace]
    """Raises InvalidRequest, naming the line, at the first one that is malformed."""
