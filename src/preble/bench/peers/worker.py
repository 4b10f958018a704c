"""The child's side of a peer process: read work from stdin, run it, answer on stdout.

Nothing here or in `preble` itself needs more than the standard library, so that a peer may live in an environment of
its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Setup:
    """What every peer is told when it starts."""

    checkpoint: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts to run at once, greedily, to exactly `new_tokens` tokens each."""

    prompts: list[list[int]]
    new_tokens: int
    shared: int = 0
    """Tokens that all prompts have in common at their beginning, for peers that must be told."""


@dataclass(slots=True)
class Trace:
    """What came of the work, as `time.perf_counter()` saw it."""

    began: float
    tokens: list[list[int]] = field(default_factory=list)
    """Generated tokens of each prompt."""
    arrivals: list[list[float]] = field(default_factory=list)
    """When each of them was there."""


class Peer(Protocol):
    """An engine under test."""

    versions: dict[str, str]
    settings: dict[str, str]

    def run(self, work: Work) -> Trace:
        """Do the work once."""
        ...


def serve(make: Callable[[Setup], AbstractContextManager[Peer]]) -> None:
    """Answer requests until stdin ends. The arguments of the process are the checkpoint and the number of threads."""
    setup = Setup(Path(sys.argv[1]), int(sys.argv[2]))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
    # Libraries that print must not end up between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        with make(setup) as peer:
            answers.write(json.dumps({"versions": peer.versions, "settings": peer.settings}) + "\n")
            for line in sys.stdin:
                trace = peer.run(Work(**json.loads(line)))
                answers.write(
                    json.dumps({"began": trace.began, "tokens": trace.tokens, "arrivals": trace.arrivals}) + "\n"
                )
