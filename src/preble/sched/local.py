"""The local scheduler: which tokens of which requests the next step of one replica computes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from preble.sched.block_table import BlockTable
from preble.sched.events import Admitted, Event, Evicted, Finished, Progressed, Stored
from preble.sched.hashing import Tokens
from preble.sched.prefix_cache import CachedRun, PrefixCache
from preble.sched.sequence import Sequence

MOST_DEFERRED = 32
"""How many waiting requests a step looks past because a running one is computing their prefix."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether the chunk ends the known tokens, so that the step yields the next one."""


@dataclass(slots=True)
class StepPlan:
    """One step's work: decodes and prefill chunks together, `tokens` in all."""

    chunks: list[Chunk] = field(default_factory=list)
    tokens: int = 0


class LocalScheduler:
    """Continuous batching on one replica: a sans-I/O state machine that the engine obeys and the simulator too.

    Every step first gives each running request that decodes its one token, then continues prefills in order of
    admission, then admits waiting requests, within `max_batched_tokens`. When pages run out it evicts unused prefixes,
    then preempts the youngest request of the lowest priority: its computed pages go to the prefix cache, it goes back
    to the queue with its tokens.

    Waiting requests are served by priority (higher first), then deadline, then arrival. The order is strict, so among
    equals nobody starves: a request waits at most for those before it. One exception: a request whose prefix a running
    one is just computing lets others pass until that prefix is there, rather than computing it a second time.
    """

    def __init__(
        self, *, pages: int, page_size: int, max_batched_tokens: int, max_running: int = 256, replica: int = 0
    ) -> None:
        self.replica = replica
        self.page_size = page_size
        self.max_batched_tokens = max_batched_tokens
        self.max_running = min(max_running, max_batched_tokens)
        self.cache = PrefixCache(pages, page_size)
        self.running: list[Sequence] = []
        """Admitted requests, in order of admission."""
        self.waiting: list[Sequence] = []
        """In the order in which they will be admitted."""
        self.preemptions = 0
        self.prompt_tokens = 0
        """Prompt tokens of all requests admitted, each counted once."""
        self.cached_tokens = 0
        """… of which these were found in the cache."""
        self._by_id: dict[str, Sequence] = {}
        self._serials = count(1)
        self._cache_events = count(1)
        self._events: list[Event] = []

    @property
    def capacity_tokens(self) -> int:
        """The longest request, prompt and output, that the pages can hold."""
        return self.cache.pool.total * self.page_size

    def get(self, request_id: str) -> Sequence | None:
        """The request, waiting or running."""
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        if sequence.request_id in self._by_id:
            raise ValueError(f"request {sequence.request_id!r} is already here")
        if not 0 < sequence.length <= sequence.max_length <= self.capacity_tokens:
            raise ValueError(
                f"request {sequence.request_id!r}: {sequence.length} tokens, at most {sequence.max_length}, "
                f"on pages for {self.capacity_tokens}"
            )
        sequence.serial = next(self._serials)
        self._by_id[sequence.request_id] = sequence
        self._queue(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """End a request between two steps; its pages are free or cached at once. `None` if it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence)
        return sequence

    def preempt(self, request_id: str) -> bool:
        """Take a running request off its pages between two steps; it goes on from the queue, no token is lost.

        Returns:
            Whether the request was running.
        """
        sequence = self._by_id.get(request_id)
        if sequence is None or sequence.node is None:
            return False
        self._leave(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self._queue(sequence)
        return True

    def plan(self) -> StepPlan | None:
        """Choose the next step's work and reserve its pages; `None` where there is nothing to do.

        The engine computes the chunks and reports with `commit`, before the next `plan`.
        """
        plan = StepPlan()
        for sequence in self.running[:]:
            if sequence.remaining == 1 and sequence.node is not None:
                self._schedule(plan, sequence)
        for sequence in self.running[:]:
            if sequence.remaining > 1 and sequence.node is not None:
                self._schedule(plan, sequence)
        if self.waiting:
            self._admit(plan)
        return plan if plan.chunks else None

    def commit(self, plan: StepPlan, sampled: Iterable[tuple[int, bool] | None]) -> None:
        """Take in a step's results.

        Args:
            plan: what `plan` returned.
            sampled: per chunk that samples, in order: the token and whether the request ends with it, or `None` where
                the request ends without one.
        """
        results = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.count
            new_tokens: tuple[int, ...] = ()
            finished = False
            if chunk.samples:
                result = next(results)
                finished = result is None
                if result is not None:
                    token, finished = result
                    sequence.append(token)
                    new_tokens = (token,)
            self._events.append(Progressed(self.replica, sequence.request_id, sequence.computed, new_tokens))
            if finished:
                self._finish(sequence)
            elif chunk.count > 1:
                self._publish(sequence)

    def take_events(self) -> list[Event]:
        """What happened since the last call, for the global scheduler."""
        for change in self.cache.take_changes():
            kind = Stored if change.stored else Evicted
            hashes = np.concatenate(change.hashes)
            self._events.append(kind(self.replica, next(self._cache_events), change.namespace, hashes))
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Prove from scratch that every page and every request is accounted for."""
        holders: dict[CachedRun, int] = {}
        private: list[int] = []
        for sequence in self.running:
            node = sequence.node
            assert node is not None
            holders[node] = holders.get(node, 0) + 1
            shared = node.end // self.page_size
            pages = sequence.table.pages
            assert pages[:shared] == self.cache.pages_of(node)
            assert sequence.table.runs == BlockTable(pages).runs
            assert sequence.computed <= len(pages) * self.page_size
            private += pages[shared:]
        for sequence in self.waiting:
            assert sequence.node is None
            assert not sequence.table.pages
            assert sequence.computed == 0
        assert self.waiting == sorted(self.waiting, key=_urgency)
        assert len(self._by_id) == len(self.running) + len(self.waiting)
        self.cache.check(holders, private)
        cache = self.cache
        assert cache.pool.free + cache.cached + cache.in_use == cache.pool.total

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_urgency)

    def _schedule(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Give a running sequence its share of the step; False where the budget or the pages are used up."""
        count = min(sequence.remaining, self.max_batched_tokens - plan.tokens)
        if count <= 0 or not self._reserve(plan, sequence, sequence.computed + count):
            return False
        samples = count == sequence.remaining
        plan.chunks.append(Chunk(sequence, sequence.computed, count, samples))
        plan.tokens += count
        return True

    def _reserve(self, plan: StepPlan, sequence: Sequence, tokens: int) -> bool:
        """Pages for the first `tokens` tokens; preempts others for them, or the sequence itself if it is the victim."""
        table = sequence.table
        missing = -(-tokens // self.page_size) - len(table)
        if missing <= 0:
            return True
        after = table.pages[-1] if table.pages else None
        room = -(-sequence.max_length // self.page_size) - len(table)
        while True:
            pages = self.cache.allocate(missing, after=after, room=room)
            if pages is not None:
                table.extend(pages)
                return True
            victim = max(self.running, key=lambda one: (-one.priority, one.serial))
            for chunk in plan.chunks:
                if chunk.sequence is victim:
                    plan.chunks.remove(chunk)
                    plan.tokens -= chunk.count
                    break
            self.preempt(victim.request_id)
            if victim is sequence:
                return False

    def _admit(self, plan: StepPlan) -> None:
        deferred = 0
        promised = sum(self._pages_for(one) - len(one.table) for one in self.running)
        for sequence in self.waiting[:]:
            if len(self.running) >= self.max_running or plan.tokens >= self.max_batched_tokens:
                return
            matched, unused = self._reusable(sequence)
            if self._is_computed_now(sequence, matched):
                deferred += 1
                if deferred == MOST_DEFERRED:
                    return
                continue
            # Pages for the whole prompt, and one to grow for each running request, so that what is admitted is not
            # preempted at once. Alone, a request always fits.
            needed = self._pages_for(sequence) - matched // self.page_size + unused
            if self.running and needed + promised + len(self.running) > self.cache.available:
                return
            promised += needed - unused
            self._start(sequence)
            if not self._schedule(plan, sequence):
                return

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.node = self.cache.lock(sequence.namespace, self._reusable_tokens(sequence))
        sequence.table = BlockTable(self.cache.pages_of(sequence.node))
        sequence.computed = sequence.node.end
        self.running.append(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = sequence.computed
            self.prompt_tokens += sequence.prompt_length
            self.cached_tokens += min(sequence.cached, sequence.prompt_length)
            self._events.append(Admitted(self.replica, sequence.request_id, sequence.cached))

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.length // self.page_size)

    @staticmethod
    def _reusable_tokens(sequence: Sequence) -> Tokens:
        """All tokens but the last: at least one must be computed, for its logits."""
        return sequence.tokens[:-1]

    def _reusable(self, sequence: Sequence) -> tuple[int, int]:
        return self.cache.lookup(sequence.namespace, self._reusable_tokens(sequence))

    def _is_computed_now(self, sequence: Sequence, matched: int) -> bool:
        """Whether a running prefill is about to publish at least one page more of this sequence's prefix."""
        stop = matched + self.page_size
        if stop >= sequence.length:
            return False
        prefix = sequence.tokens[:stop]
        return any(
            other.remaining > 1
            and other.length >= stop
            and other.namespace == sequence.namespace
            and np.array_equal(other.tokens[matched:stop], prefix[matched:])
            and np.array_equal(other.tokens[:matched], prefix[:matched])
            for other in self.running
        )

    def _publish(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        sequence.node = self.cache.publish(sequence.node, sequence.tokens[: sequence.computed], sequence.table)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running: computed whole pages stay in the cache, the rest is freed."""
        self._publish(sequence)
        assert sequence.node is not None
        self.cache.pool.release(sequence.table.pages[sequence.node.end // self.page_size :])
        self.cache.release(sequence.node)
        self.running.remove(sequence)
        sequence.node = None
        sequence.table = BlockTable()
        sequence.computed = 0

    def _finish(self, sequence: Sequence) -> None:
        if sequence.node is not None:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        del self._by_id[sequence.request_id]
        self._events.append(Finished(self.replica, sequence.request_id))


def _urgency(sequence: Sequence) -> tuple[int, float, int]:
    return (-sequence.priority, sequence.deadline, sequence.serial)
