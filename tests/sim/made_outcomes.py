"""Small simulations to report on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from preble.sim.outcome import Outcome
from preble.sim.settings import Settings
from preble.sim.simulate import simulate
from preble.sim.trace import Trace, TracedRequest

BLOCK = 64


def made_trace(requests: int = 40, *, output_tokens: int = 8, gap: float = 0.1, seed: int = 0) -> Trace:
    """Questions about three documents of eight blocks behind a system prompt of two."""
    draws = np.random.default_rng(seed)
    made = []
    for number in range(requests):
        document = 100 * int(draws.integers(1, 4))
        blocks = [0, 1, *range(document, document + 8), 10_000 + number]
        tokens = BLOCK * len(blocks) - int(draws.integers(0, BLOCK))
        output = output_tokens if output_tokens == 1 else int(draws.integers(2, 2 * output_tokens))
        made.append(TracedRequest(gap * number, tokens, output, np.array(blocks, np.int32)))
    return Trace("made", BLOCK, tuple(made))


def made_outcomes(
    policies: Sequence[str] = ("e2", "round-robin"), trace: Trace | None = None, **settings: Any
) -> list[Outcome]:
    """Real runs, as if every decision had taken a millisecond."""
    fleet = Settings(**({"replicas": 2, "cost": "mistral-7b-a6000"} | settings))
    outcomes = simulate(made_trace() if trace is None else trace, fleet, policies)
    return [replace(one, decide_seconds=0.001 * max(one.completed, 1)) for one in outcomes]
