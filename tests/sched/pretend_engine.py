"""An engine that computes nothing but notices when it is told to read the wrong KV."""

from __future__ import annotations

import random

from preble.sched.events import Admitted, Event, Evicted, Finished, Preempted, Progressed, Stored
from preble.sched.hashing import namespace_salt, page_hashes
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence


class PretendEngine:
    """Runs plans; a slot holds the hash of the prefix that ends there, so a mixed-up page is noticed at once.

    Args:
        scheduler: what to obey.
        rng: tokens, ends of outputs and durations of steps are drawn from it.
        ending: how likely an output is to end with any token.
    """

    def __init__(self, scheduler: LocalScheduler, rng: random.Random, ending: float = 0.05) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.ending = ending
        self.slots: dict[int, int] = {}
        self.finished: dict[str, list[int]] = {}
        self.resident: dict[str, set[int]] = {}
        self.now = 0.0
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        self.told_finished: list[str] = []

    def step(self) -> bool:
        """Run a step; False where there is nothing to do."""
        scheduler = self.scheduler
        self.now += self.rng.random()
        plan = scheduler.plan(now=self.now)
        if plan is None:
            self.take_events()
            return False
        assert 0 < plan.tokens == sum(chunk.count for chunk in plan.chunks) <= scheduler.max_batched_tokens
        assert len({chunk.sequence.request_id for chunk in plan.chunks}) == len(plan.chunks)
        results: list[tuple[int, bool] | None] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.computed
            prefixes = page_hashes(sequence.tokens, 1, base=namespace_salt(sequence.namespace)).tolist()
            places = self._places(sequence, chunk.start + chunk.count)
            for position in range(chunk.start):
                assert self.slots[places[position]] == prefixes[position], "KV of another prefix"
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[places[position]] = prefixes[position]
            assert chunk.samples == (chunk.start + chunk.count == sequence.length)
            if chunk.samples:
                token = self.rng.randrange(3)
                ends = sequence.length + 1 >= sequence.max_length or self.rng.random() < self.ending
                results.append((token, ends))
        before = [(chunk.sequence, chunk.sequence.request_id) for chunk in plan.chunks]
        scheduler.commit(plan, results)
        for sequence, request_id in before:
            if scheduler.get(request_id) is None:
                self.finished[request_id] = sequence.tokens.tolist()
        self.take_events()
        return True

    def _places(self, sequence: Sequence, tokens: int) -> list[int]:
        size = self.scheduler.page_size
        spans = sequence.table.slots(tokens, size)
        places = [slot for start, length in spans for slot in range(start, start + length)]
        assert places == [sequence.table.pages[i // size] * size + i % size for i in range(tokens)]
        return places

    def take_events(self) -> None:
        """Take in what the scheduler tells, as the global scheduler would."""
        for event in self.scheduler.take_events():
            self.apply(event)

    def apply(self, event: Event) -> None:
        match event:
            case Stored():
                known = self.resident.setdefault(event.namespace, set())
                new = set(event.hashes.tolist())
                assert not known & new, "stored twice"
                known |= new
            case Evicted():
                gone = set(event.hashes.tolist())
                assert gone <= self.resident[event.namespace], "evicted what was not stored"
                self.resident[event.namespace] -= gone
            case Admitted():
                assert self.admitted.count(event.request_id) == self.preempted.count(event.request_id)
                self.admitted.append(event.request_id)
            case Preempted():
                self.preempted.append(event.request_id)
                assert self.admitted.count(event.request_id) == self.preempted.count(event.request_id)
            case Finished():
                self.told_finished.append(event.request_id)
            case Progressed():
                assert self.admitted.count(event.request_id) == self.preempted.count(event.request_id) + 1
