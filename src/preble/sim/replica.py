"""A replica whose steps take the time that a cost model says."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import numpy as np

from preble.sched.cost import CostModel
from preble.sched.events import Event, Evicted, StepTimed, Stored
from preble.sched.hashing import Tokens
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence
from preble.sched.step_plan import StepPlan
from preble.sim.flight import Flight


class SimulatedReplica:
    """The production `LocalScheduler`, with virtual time instead of forward passes.

    Runs of steps that only decode are done in one go (`LocalScheduler.leap`) and cut short at the end of the step in
    which a request arrives. Nothing happens earlier or later for it, only the reports of such steps come together.

    Args:
        local: the scheduler.
        cost: what steps really take.
        leap_seconds: … skipped at most; 0 reports every step.
    """

    def __init__(self, local: LocalScheduler, cost: CostModel, *, leap_seconds: float) -> None:
        self.number = local.replica
        self.local = local
        self.cost = cost
        self.leap_seconds = leap_seconds
        self.busy_seconds = 0.0
        self.steps = 0
        self.evicted_tokens = 0
        """Tokens that left its cache to make room."""
        self.cache_events = 0
        """The number of the last event about its cache."""
        self._inbox: list[Sequence] = []
        self._plan: StepPlan | None = None
        """The present step, if it is a single one."""
        self._ends: list[float] = []
        """When the steps of the present leap end."""
        self._timed: StepTimed | None = None
        """The present step, or the first one of a leap."""
        self._began = 0.0

    @property
    def working(self) -> bool:
        """Whether a step, or a leap over some, is going on."""
        return self._plan is not None or bool(self._ends)

    @property
    def waiting(self) -> int:
        """Requests placed here that do not run."""
        return len(self.local.waiting) + len(self._inbox)

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
        if self.leap_seconds and self._leap(now):
            return self._ends[-1]
        self._plan = self.local.plan(now=now)
        if self._plan is None:
            return None
        self._timed = self._time(self._plan, now)
        return now + self._timed.seconds

    def interrupt(self, now: float) -> float | None:
        """A request came. Returns when the present step ends if that is earlier than said before."""
        keep = bisect_left(self._ends, now) + 1
        if keep >= len(self._ends):
            return None
        del self._ends[keep:]
        return self._ends[-1]

    def finish(self, now: float) -> tuple[list[Event], list[Flight]]:
        """The present step ends; returns what the global scheduler is to hear, and the requests that have ended."""
        assert self._timed is not None
        self.busy_seconds += now - self._began
        ended: list[Flight] = []
        if self._plan is None:
            timed = self._end_leap(self._timed)
        else:
            timed, ended = self._timed, self._commit(self._plan, now)
            self._plan = None
            self.steps += 1
        self.local.learn(timed)
        events = self.local.take_events()
        for event in events:
            if isinstance(event, Stored | Evicted):
                self.cache_events = event.sequence
                if isinstance(event, Evicted):
                    self.evicted_tokens += len(event.hashes) * self.local.page_size
        events.append(timed)
        return events, ended

    def fail(self, now: float) -> tuple[list[Event], list[Flight]]:
        """Its pages are gone, and so is the step that was going on. Returns what it did before that step, for the
        global scheduler, and the requests that were there; they have left it."""
        events: list[Event] = []
        done = bisect_left(self._ends, now)
        if done:
            del self._ends[done:]
            last = self._ends[-1]
            events, _ = self.finish(last)
            self._began = last
            self.busy_seconds += now - last
        elif self.working:
            self.busy_seconds += now - self._began
        self._plan = None
        self._ends.clear()
        lost = [*self.local.running, *self.local.waiting]
        for sequence in lost:
            self.local.abort(sequence.request_id)
            sequence.payload.preemptions += sequence.preemptions
        self.local.cache.clear()
        for event in self.local.take_events():
            if isinstance(event, Stored | Evicted):
                self.cache_events = event.sequence
        lost += self._inbox
        self._inbox.clear()
        return events, [sequence.payload for sequence in lost]

    def _time(self, plan: StepPlan, now: float) -> StepTimed:
        """What the step takes; notes which requests it is the first one of."""
        prefills: list[tuple[int, int]] = []
        decodes = decode_context = singles = pairs = context = 0
        for chunk in plan.chunks:
            attended = chunk.start + chunk.count
            flight: Flight = chunk.sequence.payload
            if flight.admitted != flight.admitted:
                flight.admitted = now
                flight.cached_tokens = chunk.sequence.cached
            if chunk.count == 1 and chunk.samples and attended > chunk.sequence.prompt_length:
                decodes += 1
                decode_context += attended
            else:
                prefills.append((chunk.count, attended))
                flight.computed_tokens += chunk.count
                singles += chunk.count == 1
                pairs += chunk.count * attended
                context += attended
        return StepTimed(
            self.number,
            plan.tokens,
            decodes + singles,
            context + decode_context,
            self.cost.step_seconds(prefills, decodes, decode_context),
            pairs + decode_context,
        )

    def _commit(self, plan: StepPlan, now: float) -> list[Flight]:
        """Every request whose prefill is complete generates its token; returns those for which it is the last."""
        sampled: list[tuple[int, bool]] = []
        ended: list[Flight] = []
        for chunk in plan.chunks:
            if chunk.samples:
                flight: Flight = chunk.sequence.payload
                if not flight.generated:
                    flight.first_token = now
                flight.generated += 1
                finished = flight.generated == flight.traced.output_tokens
                if finished:
                    flight.ended = now
                    flight.preemptions += chunk.sequence.preemptions
                    ended.append(flight)
                sampled.append((flight.token, finished))
        self.local.commit(plan, sampled)
        return ended

    def _leap(self, now: float) -> bool:
        """Start to skip steps that only decode, but not the one in which a request ends."""
        steps = self.local.decode_steps()
        if not steps:
            return False
        running = self.local.running
        steps = min(steps, min([one.payload.traced.output_tokens - one.payload.generated for one in running]) - 1)
        if steps < 2 or not all(one.payload.generated for one in running):
            return False  # one that lacks but the last token of its prompt is about to get its first
        decodes = len(running)
        context = sum([one.length for one in running])
        step_seconds, ends = self.cost.step_seconds, self._ends  # the very sums of single steps, to the last bit
        first = step_seconds((), decodes, context)
        self._timed = StepTimed(self.number, decodes, decodes, context, first, context)
        time = now + first
        ends.append(time)
        limit = now + self.leap_seconds
        for step in range(1, steps):
            if time >= limit:
                break
            time += step_seconds((), decodes, context + step * decodes)
            ends.append(time)
        return True

    def _end_leap(self, first: StepTimed) -> StepTimed:
        """Do all steps of the leap; returns the last one."""
        steps = len(self._ends)
        running = self.local.running
        self.local.leap(steps, [one.payload.token for one in running])
        for one in running:
            one.payload.generated = one.generated
        self.steps += steps
        context = first.context_tokens + (steps - 1) * first.decodes
        seconds = self._ends[-1] - self._ends[-2] if steps > 1 else first.seconds
        self._ends.clear()
        return replace(first, context_tokens=context, attended_pairs=context, seconds=seconds)
