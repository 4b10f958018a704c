"""A replica whose steps take the time that a cost model says."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from preble.sched.cost import CostModel
from preble.sched.events import Event, Evicted, StepTimed, Stored
from preble.sched.hashing import Tokens
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence
from preble.sched.step_plan import StepPlan
from preble.sim.flight import Flight

LEAP_SECONDS = 0.2
"""Decode steps are skipped for at most so long: the global scheduler hears of decoding requests at least that often."""


class SimulatedReplica:
    """The production `LocalScheduler`, with virtual time instead of forward passes.

    Runs of steps that only decode are done in one go (`LocalScheduler.leap`) and cut short at the end of the step in which a
    request arrives. Nothing happens earlier or later for it, only the reports of such steps come together.

    Args:
        local: the scheduler.
        cost: what steps really take.
        leap_seconds: … skipped at most; 0 reports every step.
    """

    def __init__(self, local: LocalScheduler, cost: CostModel, *, leap_seconds: float = LEAP_SECONDS) -> None:
        self.number = local.replica
        self.local = local
        self.cost = cost
        self.leap_seconds = leap_seconds
        self.busy_seconds = 0.0
        self.steps = 0
        self.evicted_tokens = 0
        self.cache_events = 0
        """The number of the last event about its cache."""
        self._inbox: list[Sequence] = []
        self._plan: StepPlan | None = None
        self._ends: list[float] = []
        """When the steps of the present leap end."""
        self._timed: tuple[int, int, int, int, float] | None = None
        """New tokens, decodes, context, pairs and seconds of the present step, or of the last one of a leap."""
        self._began = 0.0

    @property
    def working(self) -> bool:
        """Whether a step, or a leap over some, is going on."""
        return self._plan is not None or bool(self._ends)

    def receive(self, flight: Flight, prompt: Tokens) -> None:
        """A request was placed here; it is queued at the next boundary of a step, as in an engine."""
        tokens = prompt
        if flight.generated:
            tokens = np.concatenate((prompt, np.full(flight.generated, flight.token, np.int32)))
        self._inbox.append(
            Sequence(
                flight.request_id,
                tokens,
                prompt_length=len(prompt),
                max_length=len(prompt) + flight.max_tokens,
                payload=flight,
            )
        )

    def begin(self, now: float) -> float | None:
        """Start the next step, or leap over some; returns when it ends, `None` if there is nothing to do."""
        for sequence in self._inbox:
            self.local.add(sequence, now=now)
        self._inbox.clear()
        self._began = now
        if self._leap(now):
            return self._ends[-1]
        plan = self.local.plan(now=now)
        if plan is None:
            return None
        self._plan = plan
        prefills: list[tuple[int, int]] = []
        decodes = decode_context = pairs = context = 0
        for chunk in plan.chunks:
            attended = chunk.start + chunk.count
            flight: Flight = chunk.sequence.payload
            if flight.admitted != flight.admitted:
                flight.admitted = now
                flight.cached_tokens = min(chunk.sequence.cached, chunk.sequence.prompt_length)
            if chunk.count == 1 and chunk.samples and attended > chunk.sequence.prompt_length:
                decodes += 1
                decode_context += attended
            else:
                prefills.append((chunk.count, attended))
                flight.computed_tokens += chunk.count
                pairs += chunk.count * attended
                context += attended
        seconds = self.cost.step_seconds(prefills, decodes, decode_context)
        singles = sum(count == 1 for count, _ in prefills)
        self._timed = (plan.tokens, decodes + singles, context + decode_context, pairs + decode_context, seconds)
        return now + seconds

    def interrupt(self, now: float) -> float | None:
        """A request came. Returns when the present step ends if that is earlier than said before."""
        if len(self._ends) < 2:
            return None
        keep = bisect_left(self._ends, now) + 1
        if keep >= len(self._ends):
            return None
        del self._ends[keep:]
        return self._ends[-1]

    def finish(self, now: float) -> tuple[list[Event], list[Flight]]:
        """The present step ends; returns what the global scheduler is to hear, and the requests that have ended."""
        assert self._timed is not None
        ended: list[Flight] = []
        new_tokens, decodes, context, pairs, seconds = self._timed
        if self._plan is None:
            count = len(self._ends)
            context += (count - 1) * decodes
            pairs = context
            if count > 1:
                seconds = self._ends[-1] - self._ends[-2]
            running = self.local.running
            self.local.leap(count, [one.payload.token for one in running])
            for one in running:
                one.payload.generated = one.generated
            self.steps += count
            self._ends.clear()
        else:
            ended = self._commit(self._plan, now)
            self._plan = None
            self.steps += 1
        self.busy_seconds += now - self._began
        step = StepTimed(self.number, new_tokens, decodes, context, seconds, pairs)
        self.local.learn(step)
        events = self._take_events()
        events.append(step)
        return events, ended

    def lose(self) -> list[Flight]:
        """The replica fails: its pages are gone. Returns the requests that were there; they have left it."""
        lost = [*self.local.running, *self.local.waiting]
        for sequence in lost:
            self.local.abort(sequence.request_id)
        self.local.cache.clear()
        self._take_events()
        lost += self._inbox
        self._inbox.clear()
        self._plan = None
        self._ends.clear()
        return [sequence.payload for sequence in lost]

    def _take_events(self) -> list[Event]:
        events = self.local.take_events()
        for event in events:
            if isinstance(event, Stored | Evicted):
                self.cache_events = event.sequence
                if isinstance(event, Evicted):
                    self.evicted_tokens += len(event.hashes) * self.local.page_size
        return events

    def _leap(self, now: float) -> bool:
        """Start to skip steps that only decode, but not the one in which a request ends."""
        running = self.local.running
        steps = self.local.decode_steps() if self.leap_seconds else 0
        if not steps:
            return False
        steps = min(steps, min([one.payload.traced.output_tokens - one.payload.generated for one in running]) - 1)
        if steps < 2 or not all([one.payload.generated for one in running]):
            return False  # one that lacks but the last token of its prompt is about to get its first
        decodes = len(running)
        context = sum([one.length for one in running])
        self._timed = (decodes, decodes, context, context, 0.0)
        decode_seconds = self.cost.decode_seconds
        ends = self._ends
        limit = now + self.leap_seconds
        time = now
        for _ in range(steps):
            time += decode_seconds(decodes, context)
            context += decodes
            ends.append(time)
            if time >= limit:
                break
        new_tokens, _, context, pairs, _ = self._timed
        self._timed = (new_tokens, decodes, context, pairs, ends[0] - now)
        return True

    def _commit(self, plan: StepPlan, now: float) -> list[Flight]:
        sampled: list[tuple[int, bool]] = []
        ended: list[Flight] = []
        for chunk in plan.chunks:
            if chunk.samples:
                flight: Flight = chunk.sequence.payload
                if not flight.generated:
                    flight.first_token = now
                flight.generated += 1
                finished = flight.generated >= flight.traced.output_tokens
                if finished:
                    flight.ended = now
                    flight.preemptions += chunk.sequence.preemptions
                    ended.append(flight)
                sampled.append((flight.token, finished))
        self.local.commit(plan, sampled)
        return ended
