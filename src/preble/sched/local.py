"""The local scheduler: which tokens of which requests the next step of one replica computes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import numpy as np

from preble.sched.block_table import BlockTable
from preble.sched.cost import CostModel
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import GENERIC
from preble.sched.events import Admitted, Event, Evicted, Finished, Preempted, Progressed, StepTimed, Stored
from preble.sched.invariants import require
from preble.sched.orders import find_order
from preble.sched.orders.queue import WaitingQueue
from preble.sched.output_lengths import OutputLengths
from preble.sched.page_budget import PageBudget
from preble.sched.prefix_cache import CachedRun, PrefixCache
from preble.sched.sequence import Sequence
from preble.sched.step_plan import Chunk, StepPlan

MOST_DEFERRED = 32
"""How many waiting requests a step looks past because a running one is computing their prefix."""
MOST_PASSED = 32
"""How many others such a request lets pass. Then nobody is admitted before it: that ends when its prefix is there."""
LOOKS = 16
"""How many waiting requests a step looks up again when the cache has changed."""
PATIENCE = 8
"""Steps until the next in line, for whom the pages did not suffice, is looked at again, if nobody came or left: by then
the others have grown, and the forecast of what they will need has changed a little."""


class LocalScheduler:
    """Continuous batching on one replica: a sans-I/O state machine that the engine obeys and the simulator too.

    Every step first gives each running request that decodes its one token, then continues prefills in order of
    admission, then admits waiting requests, within `max_batched_tokens`. When pages run out it evicts unused prefixes,
    then preempts the youngest request of the lowest priority: its computed pages go to the prefix cache, it goes back
    to the queue with its tokens.

    Waiting requests are served by priority (higher first), then those whose deadline presses, then in an order of
    choice (`preble.sched.orders`); `WaitingQueue` states the bound of every wait. There are no exceptions to whose
    turn it is but one: a request whose prefix a running one is just computing lets others pass until that prefix is
    there, rather than computing it a second time, and at most `MOST_PASSED` of them. Who is first and does not fit is
    waited for.

    A request is admitted when the pages will suffice for it and for those beside it, by the outputs expected rather
    than the longest allowed (`PageBudget`).

    Steps may be planned ahead: `plan` again before `commit` of the plan before. A request then decodes a token that is
    not known yet, unless it is in lockstep. One that turns out to have ended has a last token computed for nothing.
    Pages are given to others as soon as their owner leaves, be it that a step in flight still writes to them: a device
    must run steps in the order of their plans, and whoever gets a page uses it in a later one.

    Args:
        pages: KV pages of the replica.
        page_size: tokens in a page.
        max_batched_tokens: tokens that one step computes at most.
        max_running: requests that are running at most.
        replica: its number, for events.
        order: name of the order of waiting requests.
        cost: what steps cost; a `FittedCost` learns from `learn`. By default one that starts from `GENERIC`.

    Raises:
        InvalidRequest: there is no such order.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        max_batched_tokens: int,
        max_running: int = 256,
        replica: int = 0,
        order: str = "hrrn",
        cost: CostModel | None = None,
    ) -> None:
        self.replica = replica
        self.page_size = page_size
        self.max_batched_tokens = max_batched_tokens
        self.max_running = min(max_running, max_batched_tokens)
        self.cost = FittedCost(GENERIC) if cost is None else cost
        self.cache = PrefixCache(pages, page_size)
        self.running: list[Sequence] = []
        """Admitted requests, in order of admission."""
        self.waiting = WaitingQueue(find_order(order), self.cost)
        self.preemptions = 0
        self.prompt_tokens = 0
        """Prompt tokens of all requests admitted, each counted once."""
        self.cached_tokens = 0
        """… of which these were found in the cache."""
        self._outputs = OutputLengths()
        self._by_id: dict[str, Sequence] = {}
        self._serials = count(1)
        self._cache_events = count(1)
        self._events: list[Event] = []
        self._patience = 0
        """Steps for which nobody needs to be looked at for admission."""
        self._to_look_up: list[Sequence] = []
        """Waiting requests of the present round of looks."""
        self._round_version = 0
        """`PrefixCache.version` when that round began."""

    @property
    def capacity_tokens(self) -> int:
        """The longest request, prompt and output, that the pages can hold."""
        return self.cache.pool.total * self.page_size

    def get(self, request_id: str) -> Sequence | None:
        """The request, waiting or running."""
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence, *, now: float) -> None:
        """Queue a request. `now` is in seconds on the caller's clock, here and in `plan`."""
        if sequence.request_id in self._by_id:
            raise ValueError(f"request {sequence.request_id!r} is already here")
        if not 0 < sequence.length <= sequence.max_length <= self.capacity_tokens:
            raise ValueError(
                f"request {sequence.request_id!r}: {sequence.length} tokens, at most {sequence.max_length}, "
                f"on pages for {self.capacity_tokens}"
            )
        sequence.serial = next(self._serials)
        sequence.arrived = now
        self._by_id[sequence.request_id] = sequence
        self._queue(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """End a request between two steps; its pages are free or cached at once. `None` if it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence)
        return sequence

    def expire(self, now: float) -> list[Sequence]:
        """End the waiting requests whose deadline has passed, between two steps: nobody wants their output any more, so
        no step shall compute it. Those that run go on until they are aborted."""
        expired = self.waiting.expired(now)
        for sequence in expired:
            self._finish(sequence)
        return expired

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
        self._events.append(Preempted(self.replica, request_id))
        self._queue(sequence)
        return True

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, between two steps: nothing computed before is used for what is admitted from now
        on, as if the weights had changed.

        Pages that nobody uses are free at once, those of running requests when these leave. A running request goes on
        with its pages, and shares none: neither what it has computed nor what it will compute on top of that enters the
        cache. Preempted, it starts from nothing. Waiting requests hold no pages, and steps planned ahead belong to
        running requests or to ones that ended, so there is nothing else.

        `Evicted` events name all that was in the cache, the pages in use included.
        """
        self.cache.reset()
        self._patience = 0

    def plan(self, *, now: float) -> StepPlan | None:
        """Choose the next step's work and reserve its pages; `None` where there is nothing to do before a `commit`.

        The engine computes the chunks of all plans in order, and reports each with `commit`, in order. What a plan
        computes counts as computed from now on, for later plans.
        """
        plan = StepPlan()
        for sequence in self.running[:]:
            if sequence.remaining == 1 and sequence.node is not None and self._may_decode(sequence):
                self._schedule(plan, sequence)
        for sequence in self.running[:]:
            if sequence.remaining > 1 and sequence.node is not None:
                self._schedule(plan, sequence)
        if self._patience:
            self._patience -= 1
        elif self.waiting:
            self._look_again()
            self._admit(plan, now)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.count
            sequence.pending += chunk.samples
            sequence.in_flight += 1
            if chunk.count > 1:
                self._publish(sequence)
        return plan if plan.chunks else None

    def commit(self, plan: StepPlan, sampled: Iterable[tuple[int, bool] | None]) -> None:
        """Take in a step's results.

        Args:
            plan: the oldest that `plan` returned and whose results are not here yet.
            sampled: per chunk that samples, in order: the token and whether the request ends with it, or `None` where
                the request ends without one. For requests that have ended meanwhile (`Sequence.finished`), anything.
        """
        results = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            sequence.pending -= chunk.samples
            result = next(results) if chunk.samples else None
            if sequence.finished:
                continue
            new_tokens: tuple[int, ...] = ()
            finished = chunk.samples and result is None
            if result is not None:
                token, finished = result
                sequence.append(token)
                new_tokens = (token,)
                if finished:
                    self._outputs.observe(sequence.generated)
            if sequence.node is not None:
                stop = chunk.start + chunk.count
                self._events.append(Progressed(self.replica, sequence.request_id, stop, new_tokens))
            elif new_tokens and not finished:  # preempted meanwhile, and now longer
                self._found(sequence, self._look_up(sequence)[0])
            if finished:
                self._finish(sequence)

    def decode_steps(self) -> int:
        """For how many steps, at least, every running request just decodes and nobody is admitted or preempted, were
        none of them to end: what `leap` may skip. 0 where that is not known."""
        running, cache = self.running, self.cache
        if not running or any(one.remaining != 1 or one.in_flight for one in running):
            return 0
        steps = min([one.max_length - one.length for one in running])
        pages = cache.available
        if self.waiting:
            if self._patience:
                steps = min(steps, self._patience)
            elif len(running) < self.max_running or self._to_look_up or self._round_version != cache.version:
                return 0
            else:
                pages = cache.pool.free  # an eviction would be a reason to look up those who wait
        return min(steps, self.page_size * (pages // len(running)))

    def leap(self, steps: int, tokens: Iterable[int]) -> None:
        """Do in one go what `steps` times `plan` and `commit` would, at most `decode_steps()`: for simulations.

        Events are the same as well, but what a request did in these steps is one `Progressed`.

        Args:
            steps: at least 1.
            tokens: per running request the token that it generates in each of them.
        """
        for sequence, token in zip(self.running, tokens, strict=True):
            sequence.extend(token, steps)
            sequence.computed += steps
            reserved = self._reserve(StepPlan(), sequence, sequence.computed)
            assert reserved, "decode_steps() promised that the pages suffice"
            new_tokens = (token,) * steps
            self._events.append(Progressed(self.replica, sequence.request_id, sequence.computed, new_tokens))
        self._patience = max(self._patience - steps, 0)

    def learn(self, step: StepTimed) -> None:
        """Learn from a step's timing what steps cost here."""
        if isinstance(self.cost, FittedCost):
            self.cost.observe(step)

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
            name, node = sequence.request_id, sequence.node
            require(node is not None, f"{name!r} runs without a lock on the cache")
            assert node is not None
            holders[node] = holders.get(node, 0) + 1
            shared = node.end // self.page_size
            pages = sequence.table.pages
            require(pages[:shared] == self.cache.pages_of(node), f"{name!r} reads other pages than it has locked")
            require(sequence.table.runs == BlockTable(pages).runs, f"{name!r} has wrong runs of pages")
            require(sequence.computed <= len(pages) * self.page_size, f"{name!r} has no page for its last tokens")
            require(sequence.remaining > 0, f"{name!r} is computed further than it is sampled")
            private += pages[shared:]
        for sequence in self.waiting:
            name = sequence.request_id
            require(sequence.node is None and not sequence.table.pages, f"{name!r} waits and holds pages")
            require(sequence.computed == 0, f"{name!r} waits and is said to be computed")
            require(sequence.passed <= MOST_PASSED, f"{name!r} let {sequence.passed} others pass")
            if sequence.looked == self.cache.version:
                require(sequence.matched == self._look_up(sequence)[0], f"{name!r} has another hit ratio")
        self.waiting.check()
        here = [*self.running, *self.waiting]
        for one in here:
            require(0 <= one.pending <= one.in_flight, f"{one.request_id!r} has results to come from no step")
            require(one.length + one.pending <= one.max_length, f"{one.request_id!r} grows too long")
            require(not one.finished, f"{one.request_id!r} has ended and is still here")
        require(len({id(one) for one in here}) == len(here), "a request is waiting or running twice")
        require({one.request_id: one for one in here} == self._by_id, "a request is lost")
        self.cache.check(holders, private)
        cache = self.cache
        require(cache.pool.free + cache.cached + cache.in_use == cache.pool.total, "pages do not add up")

    def _queue(self, sequence: Sequence) -> None:
        self._patience = 0
        sequence.passed = 0
        sequence.matched, _ = self._look_up(sequence)
        sequence.looked = self.cache.version
        self.waiting.add(sequence)

    def _look_up(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens that need not be computed, and how many of their pages nobody uses. The last token always is computed,
        for its logits."""
        return self.cache.lookup(sequence.namespace, sequence.tokens[:-1])

    def _look_again(self) -> None:
        """Look up a few waiting requests whose hit ratios may have changed, by turns: thousands may wait."""
        version = self.cache.version
        if not self._to_look_up and self._round_version != version:
            self._to_look_up = list(self.waiting)
            self._round_version = version
        for sequence in self._to_look_up[-LOOKS:]:
            if sequence.looked != version and sequence in self.waiting:
                self._found(sequence, self._look_up(sequence)[0])
        del self._to_look_up[-LOOKS:]

    def _found(self, sequence: Sequence, matched: int) -> None:
        sequence.matched = matched
        sequence.looked = self.cache.version
        self.waiting.update(sequence)

    @staticmethod
    def _may_decode(sequence: Sequence) -> bool:
        """Whether the token to compute is known, or may be unknown and is not the last one."""
        if not sequence.pending:
            return True
        return not sequence.lockstep and sequence.length + sequence.pending < sequence.max_length

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

    def _admit(self, plan: StepPlan, now: float) -> None:
        """Start waiting requests while there is room in the step, among the running, and on the pages."""
        budget = PageBudget(self.running, self.cache, self._outputs)
        passing: set[Sequence] = set()
        looks = LOOKS
        while (
            len(self.running) < self.max_running
            and plan.tokens < self.max_batched_tokens
            and all(one.passed < MOST_PASSED for one in passing)
        ):
            sequence = self.waiting.next(now, passing)
            if sequence is None:
                return
            matched, unused = self._look_up(sequence)
            if matched != sequence.matched:
                self._found(sequence, matched)
                if looks:  # it may be no longer its turn
                    looks -= 1
                    continue
            if sequence.in_flight or self._is_computed_now(sequence, matched):
                passing.add(sequence)
                if len(passing) == MOST_DEFERRED:
                    return
                continue
            pages = self._pages_for(sequence) - matched // self.page_size + unused
            if not budget.admit(sequence, pages):
                self._patience = PATIENCE
                return
            for one in passing:
                one.passed += 1
            self._start(sequence)
            if not self._schedule(plan, sequence):
                return

    def _start(self, sequence: Sequence) -> None:
        self.waiting.serve(sequence)
        sequence.node = self.cache.lock(sequence.namespace, sequence.tokens[:-1])
        sequence.table = BlockTable(self.cache.pages_of(sequence.node))
        sequence.computed = sequence.node.end
        self.running.append(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = sequence.computed
            self.prompt_tokens += sequence.prompt_length
            self.cached_tokens += min(sequence.cached, sequence.prompt_length)
        self._events.append(Admitted(self.replica, sequence.request_id, sequence.computed))

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.length // self.page_size)

    def _is_computed_now(self, sequence: Sequence, matched: int) -> bool:
        """Whether a running prefill is about to publish at least one page more of this sequence's prefix."""
        stop = matched + self.page_size
        if stop >= sequence.length:
            return False
        prefix = sequence.tokens[:stop]
        return any(
            other.remaining > 1
            and other.node is not None
            and not other.node.retired
            and other.length >= stop
            and other.namespace == sequence.namespace
            and np.array_equal(other.tokens[matched:stop], prefix[matched:])
            and np.array_equal(other.tokens[:matched], prefix[:matched])
            for other in self.running
        )

    def _publish(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        computed = sequence.tokens[: sequence.computed]  # without those that nobody knows yet
        sequence.node = self.cache.publish(sequence.node, computed, sequence.table)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running: computed whole pages stay in the cache, the rest is freed."""
        self._patience = 0
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
            self._patience = 0
            self.waiting.remove(sequence)
        sequence.finished = True
        del self._by_id[sequence.request_id]
        self._events.append(Finished(self.replica, sequence.request_id))
