"""Dynamo's `RadixTree` alone: an index of pages that decides nothing and knows no load.

A decision is to hash the prompt and to find the matches; the rest is to apply the events that the chosen worker would
send for the prompt's pages. They are made and serialized beforehand, outside the time.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from preble.bench.sched.peers.worker import Case, Clocks, Peer, Tally, read_clocks, serve

MASK = (1 << 64) - 1
MULTIPLIER = 6364136223846793005
"""Of Knuth's linear congruential generator."""


@dataclass(slots=True)
class _Cache:
    """What a worker holds: pages by the name of the prefix that ends with them, the first to go first."""

    worker: int
    capacity: int
    pages: OrderedDict[int, None] = field(default_factory=OrderedDict)
    events: int = 0

    def use(self, page_hashes: list[int]) -> list[bytes]:
        """A prompt was computed: the events that tell what changed."""
        names = []
        name = 0
        for page_hash in page_hashes:
            name = (name * MULTIPLIER + page_hash) & MASK
            names.append(name)
        held = sum(name in self.pages for name in names)
        for name in reversed(names):
            self.pages[name] = None
            self.pages.move_to_end(name)
        removed = [self.pages.popitem(last=False)[0] for _ in range(len(self.pages) - self.capacity)]
        events = []
        if held < len(names):
            blocks = [
                {"block_hash": name, "tokens_hash": page_hash}
                for name, page_hash in zip(names[held:], page_hashes[held:], strict=True)
            ]
            events.append(self._event({"stored": {"parent_hash": names[held - 1] if held else None, "blocks": blocks}}))
        if removed:
            events.append(self._event({"removed": {"block_hashes": removed}}))
        return events

    def _event(self, data: dict[str, Any]) -> bytes:
        self.events += 1
        return json.dumps({"event_id": self.events, "dp_rank": 0, "data": data}).encode()


def _run(case: Case, prompts: list[list[int]]) -> Tally:
    from dynamo.llm import (  # type: ignore[import-not-found,unused-ignore]  # only where it is measured
        RadixTree,
        compute_block_hash_for_seq,
    )

    tree: Any = RadixTree()
    caches = [_Cache(number, case.capacity_tokens // case.page_size) for number in range(case.replicas)]
    in_flight: deque[int] = deque()
    tally = Tally()
    matched = 0
    for number, tokens in enumerate(prompts):
        began = read_clocks()
        hashes = compute_block_hash_for_seq(tokens, case.page_size)
        scores = tree.find_matches(hashes).scores
        decided = read_clocks()
        load = Counter(in_flight)
        best = max(range(case.replicas), key=lambda worker: (scores.get((worker, 0), 0), -load[worker]))
        in_flight.append(best)
        if len(in_flight) > case.in_flight:
            in_flight.popleft()
        events = caches[best].use(hashes)
        paused = read_clocks()
        for event in events:
            tree.apply_event(best, event)
        ended = read_clocks()
        if number >= case.fill:
            # The time in which the events were made does not count.
            pause = Clocks(paused.processor - decided.processor, paused.wall - decided.wall)
            tally.add(began, decided, Clocks(ended.processor - pause.processor, ended.wall - pause.wall))
            matched += scores.get((best, 0), 0) * case.page_size
    tally.hit_rate = matched / (len(tally.whole) * case.prompt_tokens)
    return tally


def make_peer() -> Peer:
    """The peer, once its package is loaded."""
    import dynamo.llm  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

    return Peer(
        {"ai-dynamo-runtime": version("ai-dynamo-runtime")},
        {"timed": "hashing and find_matches; apply_event for the prompt's pages"},
        _run,
    )


if __name__ == "__main__":
    serve(make_peer)
