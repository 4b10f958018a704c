"""A replica that computes nothing: it keeps the page names of its prefix cache and reports events as an engine does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preble.bench.sched.page_cache import PageCache
from preble.sched.events import Admitted, Event, Evicted, Finished, Progressed, StepTimed, Stored
from preble.sched.hashing import Tokens, page_hashes

CHUNK = 8192
"""Most prompt tokens that one step computes."""
STEP_REQUESTS = 16
"""Requests that a step works on: it is timed once for so many `Progressed`."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way through a replica."""

    request_id: str
    prompt_tokens: int
    output: tuple[int, ...]
    """The tokens it will generate."""
    pages: list[int]
    """Names of the whole pages of prompt and output; the last output token has no KV."""
    told: int = 0
    """Output tokens reported so far."""


def make_flight(request_id: str, prompt: Tokens, output: Tokens, page_size: int) -> Flight:
    """A request with its pages named."""
    tokens = np.concatenate((prompt, output[:-1]))
    pages = page_hashes(tokens, page_size).tolist()
    return Flight(request_id, len(prompt), tuple(output.tolist()), pages)


@dataclass(slots=True)
class _Step:
    """What a step did, before it is timed."""

    requests: int = 0
    tokens: int = 0
    decodes: int = 0
    context: int = 0
    pairs: int = 0


class FakeReplica:
    """One replica.

    Args:
        number: in the scheduler.
        page_size: tokens in a page.
        capacity_pages: pages that it has.
    """

    def __init__(self, number: int, page_size: int, capacity_pages: int) -> None:
        self.number = number
        self.page_size = page_size
        self.cache = PageCache(capacity_pages)
        self.prompt_tokens = 0
        """Of the requests admitted."""
        self.cached_tokens = 0
        """… and how many of them were in the cache."""
        self._cache_events = 0
        self._step = _Step()

    def prefill(self, flight: Flight) -> list[Event]:
        """Admit a request and compute its prompt, which ends with the first token of its output."""
        # The last token is always computed, for its logits.
        cached = self.cache.held(flight.pages[: (flight.prompt_tokens - 1) // self.page_size]) * self.page_size
        self.prompt_tokens += flight.prompt_tokens
        self.cached_tokens += cached
        events: list[Event] = [Admitted(self.number, flight.request_id, cached)]
        computed = cached
        while computed < flight.prompt_tokens:
            count = min(CHUNK, flight.prompt_tokens - computed)
            computed += count
            last = computed == flight.prompt_tokens
            self._progress(events, flight, computed, count, flight.output[:1] if last else ())
            self._hold(events, flight.pages[: computed // self.page_size])
        flight.told = 1
        return events

    def decode(self, flight: Flight, count: int) -> list[Event]:
        """Report `count` more tokens at once."""
        events: list[Event] = []
        start, flight.told = flight.told, flight.told + count
        computed = flight.prompt_tokens + flight.told - 1
        self._progress(events, flight, computed, count, flight.output[start : flight.told])
        return events

    def finish(self, flight: Flight) -> list[Event]:
        """Report what is left of the output, and the end."""
        left = len(flight.output) - flight.told
        events = self.decode(flight, left) if left else []
        events.append(Finished(self.number, flight.request_id))
        self._hold(events, flight.pages)
        return events

    def _hold(self, events: list[Event], pages: list[int]) -> None:
        """The request has computed these pages."""
        if not pages:
            return
        stored, evicted = self.cache.use(pages)
        for kind, names in ((Evicted, evicted), (Stored, stored)):
            if names:
                self._cache_events += 1
                events.append(kind(self.number, self._cache_events, "", np.array(names, np.uint64)))

    def _progress(
        self, events: list[Event], flight: Flight, computed: int, count: int, new_tokens: tuple[int, ...]
    ) -> None:
        events.append(Progressed(self.number, flight.request_id, computed, new_tokens))
        step = self._step
        step.requests += 1
        step.tokens += count
        step.decodes += count == 1
        step.context += computed
        step.pairs += count * computed
        if step.requests == STEP_REQUESTS:
            # About what a 7B model takes on a large GPU; the scheduler fits its cost model to such figures.
            seconds = 6e-3 + 2e-5 * step.tokens + 3e-8 * step.context + 1e-9 * step.pairs
            events.append(StepTimed(self.number, step.tokens, step.decodes, step.context, seconds, step.pairs))
            self._step = _Step()
