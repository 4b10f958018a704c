"""An engine that computes nothing but notices when it is told to read the wrong KV, or KV that should be forgotten."""

from __future__ import annotations

import random
from collections import deque

import numpy as np

from preble.sched.block_table import BlockTable
from preble.sched.events import Admitted, Event, Evicted, Finished, Preempted, Progressed, Stored
from preble.sched.hashing import namespace_salt, page_hashes
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence
from preble.sched.step_plan import StepPlan


class PretendEngine:
    """Runs plans; a slot holds the hash of the prefix that ends there, so a mixed-up page is noticed at once.

    Args:
        scheduler: what to obey.
        rng: tokens, ends of outputs and durations of steps are drawn from it.
        ending: how likely an output is to end with any token.
        ahead: how many steps are launched before the results of one are known.
    """

    def __init__(self, scheduler: LocalScheduler, rng: random.Random, ending: float = 0.05, ahead: int = 0) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.ending = ending
        self.ahead = ahead
        self.flying: deque[tuple[StepPlan, list[int]]] = deque()
        """Steps whose results the scheduler does not know, and the tokens they sample."""
        self.unknown: dict[Sequence, list[int]] = {}
        """The same tokens by request."""
        self.slots: dict[int, tuple[int, int]] = {}
        """Slot -> hash of the prefix that ends there, and the epoch in which it was begun."""
        self.epoch = 0
        """How often the prefix cache was reset."""
        self.begun: dict[Sequence, tuple[BlockTable, int]] = {}
        """Request -> the block table that it was admitted with last, and the epoch of that admission."""
        self.finished: dict[str, list[int]] = {}
        self.resident: dict[str, set[int]] = {}
        self.now = 0.0
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        self.told_finished: list[str] = []

    def step(self) -> bool:
        """Plan and launch a step, then take in the results of the oldest one that is more than `ahead` steps back;
        False where there was nothing to do."""
        self.now += self.rng.random()
        plan = self.scheduler.plan(now=self.now)
        if plan is not None:
            self.flying.append((plan, self._launch(plan)))
        busy = bool(self.flying)
        while len(self.flying) > (0 if plan is None else self.ahead):
            self._land(*self.flying.popleft())
        self.take_events()
        return busy

    def _launch(self, plan: StepPlan) -> list[int]:
        """What the device does, in the order of launches; the tokens that it samples."""
        scheduler = self.scheduler
        assert 0 < plan.tokens == sum(chunk.count for chunk in plan.chunks) <= scheduler.max_batched_tokens
        assert len({chunk.sequence.request_id for chunk in plan.chunks}) == len(plan.chunks)
        sampled: list[int] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            stop = chunk.start + chunk.count
            assert stop == sequence.computed
            tokens = [*sequence.tokens.tolist(), *self.unknown.get(sequence, [])]
            assert len(tokens) == sequence.length + sequence.pending - chunk.samples
            assert not sequence.lockstep or stop <= sequence.length, "a token in lockstep is unknown"
            prefixes = page_hashes(np.array(tokens, np.int32), 1, base=namespace_salt(sequence.namespace)).tolist()
            places = self._places(sequence, stop)
            table, epoch = self.begun.get(sequence, (None, 0))
            if table is not sequence.table:  # it was admitted for this step
                epoch = self.epoch
                self.begun[sequence] = (sequence.table, epoch)
            for position in range(chunk.start):
                prefix, of_epoch = self.slots[places[position]]
                assert prefix == prefixes[position], "KV of another prefix"
                assert of_epoch == epoch, "KV from before the cache was reset, or that depends on such"
            for position in range(chunk.start, stop):
                self.slots[places[position]] = prefixes[position], epoch
            assert chunk.samples == (stop == len(tokens))
            if chunk.samples:
                token = self.rng.randrange(3)
                self.unknown.setdefault(sequence, []).append(token)
                sampled.append(token)
        return sampled

    def _land(self, plan: StepPlan, sampled: list[int]) -> None:
        """Tell the scheduler what a step has sampled."""
        results: list[tuple[int, bool] | None] = []
        before = [(chunk.sequence, chunk.sequence.finished) for chunk in plan.chunks]
        tokens = iter(sampled)
        for chunk in plan.chunks:
            if chunk.samples:
                sequence, token = chunk.sequence, next(tokens)
                assert self.unknown[sequence].pop(0) == token
                ends = sequence.length + 1 >= sequence.max_length or self.rng.random() < self.ending
                results.append((token, ends))
        self.scheduler.commit(plan, results)
        for sequence, ended_before in before:
            if sequence.finished and not ended_before:
                self.finished[sequence.request_id] = sequence.tokens.tolist()

    def _places(self, sequence: Sequence, tokens: int) -> list[int]:
        size = self.scheduler.page_size
        spans = sequence.table.slots(tokens, size)
        places = [slot for start, length in spans for slot in range(start, start + length)]
        assert places == [sequence.table.pages[i // size] * size + i % size for i in range(tokens)]
        return places

    def reset_prefix_cache(self) -> None:
        """As when the weights change."""
        self.epoch += 1
        self.scheduler.reset_prefix_cache()
        self.take_events()
        assert not any(self.resident.values()), "some pages are still said to be cached"

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
