"""What really is on the replicas, kept the slow and obvious way, for comparison with the scheduler's books."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from preble.sched.events import Event, Evicted, Stored
from preble.sched.hashing import Hashes, namespace_salt, page_hashes
from preble.sched.prefix_tree import SHARED
from preble.sched.testing.arrivals import Arrival
from preble.sched.testing.prompts import Prompt

Page: TypeAlias = tuple[str, Prompt]
"""A namespace and the whole prefix that ends with the page."""


def pages_of(namespace: str, tokens: Prompt, page_size: int) -> list[Page]:
    """The whole pages of some tokens, in order."""
    return [(namespace, tokens[:stop]) for stop in range(page_size, len(tokens) + 1, page_size)]


@lru_cache(maxsize=1 << 14)
def name_of(page: Page, page_size: int) -> int:
    """The hash that events call the page by."""
    namespace, tokens = page
    return int(page_hashes(np.array(tokens, np.int32), page_size, base=namespace_salt(namespace))[-1])


def names_of(pages: Iterable[Page], page_size: int) -> Hashes:
    return np.array([name_of(page, page_size) for page in pages], np.uint64)


def run_length(pages: list[Page], *held: Iterable[Page]) -> int:
    """How many of the leading pages are held, in any of the collections."""
    for count, page in enumerate(pages):
        if not any(page in one for one in held):
            return count
    return len(pages)


class ModelRequest:
    """A request that has not ended, and how far it is."""

    def __init__(self, name: str, arrival: Arrival, number: int, page_size: int) -> None:
        self.name = name
        self.arrival = arrival
        self.page_size = page_size
        deadline = math.inf if arrival.deadline is None else arrival.deadline
        self.urgency = (-arrival.priority, deadline, number)
        self.prompt_pages = pages_of(arrival.namespace, arrival.token_ids, page_size)
        self.replica: int | None = None
        self.output: Prompt = ()
        self.queued = False
        """On a replica that has not started on it."""
        self.decoding = False
        self.to_prefill = 0
        """Tokens, as the scheduler may know."""
        self.computed: list[Page] = []
        """Pages that it uses on its replica."""
        self.last_event: Event | None = None
        """What its replica last reported of it."""

    def __repr__(self) -> str:
        return f"<{self.name} on {self.replica}: {self.arrival.token_ids} + {self.output}>"

    @property
    def history(self) -> Prompt:
        """Prompt and output."""
        return self.arrival.token_ids + self.output

    @property
    def pages_at_the_end(self) -> tuple[int, int]:
        """The fewest and the most pages that it may be expected to hold at its end."""
        most = self.arrival.max_tokens
        hint = self.arrival.expected_tokens
        low, high = (1, most) if hint is None else (min(hint, most),) * 2
        low, high = (-(-(len(self.arrival.token_ids) + output) // self.page_size) for output in (low, high))
        return low, high

    def place(self, replica: int, cached_tokens: int) -> None:
        self.replica = replica
        self.queue(max(len(self.history) - cached_tokens, 1))

    def queue(self, to_prefill: int) -> None:
        """It is in the queue of a replica, which has yet to compute so many tokens."""
        self.queued, self.decoding, self.computed, self.to_prefill = True, False, [], to_prefill

    def lose_replica(self) -> None:
        self.queue(0)
        self.replica, self.queued, self.last_event = None, False, None


class ModelReplica:
    """A replica: its cache, and what of that it told."""

    def __init__(self, capacity_pages: int, page_size: int) -> None:
        self.capacity_pages = capacity_pages
        self.page_size = page_size
        self.up = True
        self.draining = False
        self.cache: dict[Page, None] = {}
        """What the replica really holds, oldest first."""
        self.sequence = 0
        self.held_back: list[tuple[Stored | Evicted, list[Page]]] = []
        """Cache events that have not arrived yet, with the pages they speak of."""
        self.delivered: list[Stored | Evicted] = []
        self.last_placed = -math.inf
        """When it last got a request."""
        self._newest: dict[Page, int] = {}
        """The number of the newest statement that arrived about each page."""
        self.stated: set[Page] = set()
        """What it holds by the newest statement about each page."""
        self.doubtful: set[Page] = set()
        """Pages of which more were stated at one time than the replica can have, as statements were late. Of pages that
        no prompt contains the scheduler remembers no more than that, so it may have dropped some of these."""

    def missing(self, pages: list[Page]) -> list[Page]:
        return [page for page in pages if page not in self.cache]

    def victims(self, used: Iterable[Page], without: Collection[Page] = ()) -> list[Page]:
        """Pages that may be evicted once `without` are gone: not in use, and none of the others continues them."""
        here = [page for page in self.cache if page not in without]
        busy = {(namespace, tokens[: -self.page_size]) for namespace, tokens in here}
        busy.update(used)
        return [page for page in here if page not in busy]

    def say(self, replica: int, pages: list[Page], *, stored: bool) -> None:
        """Pages come into the cache or leave it; the events are held back."""
        for page in pages:
            if stored:
                self.cache[page] = None
            else:
                del self.cache[page]
        kind = Stored if stored else Evicted
        for namespace in sorted({namespace for namespace, _ in pages}):
            mine = [page for page in pages if page[0] == namespace]
            self.sequence += 1
            self.held_back.append((kind(replica, self.sequence, namespace, names_of(mine, self.page_size)), mine))

    def deliver(self, index: int) -> Stored | Evicted:
        """One of the events held back arrives."""
        event, pages = self.held_back.pop(index)
        self.delivered.append(event)
        if self.up:
            for page in pages:
                if event.sequence > self._newest.get(page, 0):
                    self._newest[page] = event.sequence
                    self.doubtful.discard(page)
                    if isinstance(event, Stored):
                        self.stated.add(page)
                    else:
                        self.stated.discard(page)
            if len(self.stated) > self.capacity_pages:
                self.doubtful |= self.stated
        return event

    def crash(self) -> None:
        self.up = False
        self.last_placed = -math.inf
        self.cache = {}
        self._newest, self.stated, self.doubtful = {}, set(), set()

    def restart(self) -> None:
        self.up = True
        # What is still held back belongs to the earlier life, and may come at any time.
        self.delivered += [event for event, _ in self.held_back]
        self.held_back = []

    def renew(self) -> None:
        """As `restart`, but nothing of the earlier life is on its way, and events are numbered from 1 again."""
        self.up = True
        self.held_back, self.delivered, self.sequence = [], [], 0


class ModelTree:
    """The prompts that a scheduler must remember, page by page.

    Args:
        window: H, in seconds.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self.uses: dict[Page, list[float]] = {}
        """When prompts with this page were placed, as long as it is remembered."""

    def use(self, pages: list[Page], now: float) -> None:
        """A prompt was placed."""
        for page in pages:
            self.uses.setdefault(page, []).append(now)

    def forget(self, now: float, in_flight: Iterable[ModelRequest], held: Iterable[set[Page]], page_size: int) -> None:
        """What must not be remembered any longer: too few placements within the window contain it, none in flight does,
        and nobody holds it or a page behind it."""
        kept = {page for request in in_flight for page in request.prompt_pages}
        for pages in held:
            for namespace, tokens in pages & self.uses.keys():
                kept.update(pages_of(namespace, tokens, page_size))
        recent = {page: [time for time in times if time >= now - self.window] for page, times in self.uses.items()}
        self.uses = {page: times for page, times in recent.items() if len(times) >= SHARED or page in kept}


def on(requests: Mapping[str, ModelRequest], replica: int) -> list[ModelRequest]:
    """The requests that are on a replica."""
    return [one for one in requests.values() if one.replica == replica]
