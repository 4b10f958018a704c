"""Traces to study, and their prefixes the slow way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from preble.sim.trace import Trace, TracedRequest

Prefix = tuple[int, ...]


def request(
    blocks: Sequence[int], tokens: int, *, arrival: float = 0.0, output: int = 1, session: str | None = None
) -> TracedRequest:
    return TracedRequest(arrival, tokens, output, np.array(blocks, np.int32), session)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Short prompts of few different blocks, some of them ending in a partial one."""
    size = draw(st.integers(1, 4))
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        blocks = draw(st.lists(st.integers(0, 1), max_size=6))
        partial = draw(st.integers(1 if not blocks else 0, size - 1)) if size > 1 else 0
        if not blocks and not partial:
            blocks = [0]
        tokens = len(blocks) * size + partial
        # The number of a partial block tells how long the prompt is, as `TracedRequest` demands.
        requests.append(request([*blocks, *([100 + tokens] if partial else [])], tokens))
    return Trace("drawn", size, tuple(requests))


def prefixes(trace: Trace, one: TracedRequest) -> list[tuple[Prefix, int]]:
    """Every prefix of whole blocks, and the tokens of its last block."""
    blocks = one.blocks.tolist()
    sizes = [min(trace.block_size, one.prompt_tokens - at * trace.block_size) for at in range(len(blocks))]
    return [(tuple(blocks[: at + 1]), size) for at, size in enumerate(sizes)]
