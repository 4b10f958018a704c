"""Tool use: a system prompt, the descriptions of a set of tools, and a few calls of them in a row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from preble.sim.workloads.conversation import Conversation
from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

SYSTEM = Segment("system", 300)
SETS_PER_TOOL = 13
"""Tool sets that begin with the same tool: its description, then the functions picked from it."""
TOOL = Skewed(940, 0.4, 350, 4_000)
FUNCTIONS = Skewed(150, 0.6, 20, 600)
CALLS = Conversation(
    opening=Skewed(240, 0.7, 20, 2_000),
    answer=Skewed(43, 0.6, 8, 300),
    message=Skewed(200, 0.8, 10, 2_000),
    pause=Skewed(1, 0.8, 0.05, 20),
    turns=Skewed(1.9, 0.6, 1, 8),
    context=16_384,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    functions = draws.lengths(FUNCTIONS)
    tools = max(len(functions) // SETS_PER_TOOL, 1)  # the sets of one tool are spread over all ranks
    weights = np.array([draws.weights[tool::tools].sum() for tool in range(tools)])
    descriptions = draws.lengths(TOOL, weights)
    for number in count():
        chosen = draws.prefix()
        tool = chosen % tools
        shared = (SYSTEM, Segment(("tool", tool), descriptions[tool]), Segment(("set", chosen), functions[chosen]))
        yield CALLS.session(number, shared, draws.sessions)


TOOL_USE = Workload(
    name="tool-use",
    summary="a system prompt and tool descriptions, shared by all who use the same tools; then a few calls",
    source="ToolBench as measured for Preble (arXiv 2407.00023)",
    prefixes=1_000,
    requests=3_600,
    rate=18,
    block_size=16,
    means=Means(prompt_tokens=1_835, output_tokens=43, shared=0.85, requests_per_key_portion=39),
    sessions=_sessions,
)
