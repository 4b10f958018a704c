"""The child's side of a peer process: read the cases from a folder, run them, leave the answer there.

Nothing here or in `preble` itself needs more than the standard library, so that a peer may live in an environment of
its own.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import NamedTuple

CASES = "cases.json"
ANSWER = "answer.json"


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of one length, and how they come and go."""

    prompt_tokens: int
    file: str
    """int32 [requests, prompt_tokens], in the folder."""
    fill: int
    """Requests before the first measured one."""
    vocabulary: int
    replicas: int
    page_size: int
    capacity_tokens: int
    """Of each replica."""
    in_flight: int
    """A request ends when so many came after it."""
    queued: int
    """… and its prompt is computed when so many did."""
    output_tokens: int


class Clocks(NamedTuple):
    """A moment in nanoseconds: of processor time of the whole process, and on the wall."""

    processor: int
    wall: int


def read_clocks() -> Clocks:
    """Now."""
    return Clocks(process_time_ns(), perf_counter_ns())


@dataclass(slots=True)
class Tally:
    """What a peer's run of one case cost, in nanoseconds per measured request."""

    decision: list[int] = field(default_factory=list)
    """Processor time to choose a replica and to book the request."""
    whole: list[int] = field(default_factory=list)
    """… with everything else that was due between two arrivals, so in all of one request's life."""
    decision_wall: list[int] = field(default_factory=list)
    """The same on the wall clock, whatever else the machine did."""
    whole_wall: list[int] = field(default_factory=list)
    hit_rate: float = 0.0
    """Prompt tokens that the peer believed to be cached."""

    def add(self, began: Clocks, decided: Clocks, ended: Clocks) -> None:
        """A request."""
        self.decision.append(decided.processor - began.processor)
        self.whole.append(ended.processor - began.processor)
        self.decision_wall.append(decided.wall - began.wall)
        self.whole_wall.append(ended.wall - began.wall)


@dataclass(frozen=True, slots=True)
class Peer:
    """A scheduler under test."""

    versions: dict[str, str]
    settings: dict[str, str]
    run: Callable[[Case, list[list[int]]], Tally]
    """Runs a case from scratch."""


def serve(make: Callable[[], Peer]) -> None:
    """Run all cases of the folder that the process was started with."""
    folder = Path(sys.argv[1])
    peer = make()
    tallies = []
    for fields in json.loads((folder / CASES).read_text()):
        case = Case(**fields)
        tallies.append(asdict(peer.run(case, _prompts(folder, case))))
    answer = {"versions": peer.versions, "settings": peer.settings, "tallies": tallies}
    (folder / ANSWER).write_text(json.dumps(answer))


def _prompts(folder: Path, case: Case) -> list[list[int]]:
    tokens = array("i")
    tokens.frombytes((folder / case.file).read_bytes())
    # One object per token id, however often it occurs: a tenth of the memory.
    shared = list(range(case.vocabulary))
    length = case.prompt_tokens
    return [list(map(shared.__getitem__, tokens[start : start + length])) for start in range(0, len(tokens), length)]
