"""The local scheduler against a pretend engine whose KV slots remember exactly which prefix was written to them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.sched.events import Admitted, Evicted, Finished, Progressed, Stored
from preble.sched.hashing import namespace_salt, page_hashes
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence


class PretendEngine:
    """Runs plans; a slot holds the hash of the prefix that ends there, so a mixed-up page is noticed at once."""

    def __init__(self, scheduler: LocalScheduler, rng: random.Random) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.slots: dict[int, int] = {}
        self.finished: dict[str, list[int]] = {}
        self.resident: dict[str, set[int]] = {}
        self.admitted: list[str] = []
        self.told_finished: list[str] = []

    def step(self) -> bool:
        scheduler = self.scheduler
        plan = scheduler.plan()
        if plan is None:
            self._apply_events()
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
                ends = sequence.length + 1 >= sequence.max_length or self.rng.random() < 0.05
                results.append((token, ends))
        before = [(chunk.sequence, chunk.sequence.request_id) for chunk in plan.chunks]
        scheduler.commit(plan, results)
        for sequence, request_id in before:
            if scheduler.get(request_id) is None:
                self.finished[request_id] = sequence.tokens.tolist()
        self._apply_events()
        return True

    def _places(self, sequence: Sequence, tokens: int) -> list[int]:
        size = self.scheduler.page_size
        spans = sequence.table.slots(tokens, size)
        places = [slot for start, length in spans for slot in range(start, start + length)]
        assert places == [sequence.table.pages[i // size] * size + i % size for i in range(tokens)]
        return places

    def _apply_events(self) -> None:
        for event in self.scheduler.take_events():
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
                    self.admitted.append(event.request_id)
                case Finished():
                    self.told_finished.append(event.request_id)
                case Progressed():
                    pass


def drain(engine: PretendEngine) -> None:
    scheduler = engine.scheduler
    steps = 0
    while scheduler.running or scheduler.waiting:
        assert engine.step(), "requests are left and nothing is planned"
        scheduler.check()
        steps += 1
        assert steps < 20_000, "no progress"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 16, 64]),
    budget=st.integers(1, 200),
    pool_factor=st.floats(1.0, 4.0),
    requests=st.integers(1, 40),
    cancel_share=st.floats(0, 0.4),
)
def test_every_request_ends_and_every_page_is_accounted_for(
    seed: int, page_size: int, budget: int, pool_factor: float, requests: int, cancel_share: float
) -> None:
    rng = random.Random(seed)
    longest = rng.choice([8, 40, 150])
    pages = max(int(-(-longest // page_size) * pool_factor), 1)
    scheduler = LocalScheduler(pages=pages, page_size=page_size, max_batched_tokens=budget, max_running=16)
    engine = PretendEngine(scheduler, rng)
    stems = [[rng.randrange(3) for _ in range(longest)] for _ in range(3)]
    prompts: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    for i in range(requests):
        stem = rng.choice(stems)[: rng.randrange(longest)]
        prompt = (stem + [rng.randrange(3) for _ in range(1 + rng.randrange(6))])[: longest - 1]
        prompts[str(i)] = prompt
        length = min(len(prompt) + rng.randint(1, longest), longest)
        scheduler.add(
            Sequence(
                str(i),
                np.array(prompt, np.int32),
                prompt_length=len(prompt),
                max_length=length,
                namespace=rng.choice(["", "", "tenant"]),
                priority=rng.choice([0, 0, 1]),
            )
        )
        for _ in range(rng.randrange(4)):
            engine.step()
            scheduler.check()
        if rng.random() < cancel_share:
            victim = str(rng.randrange(i + 1))
            if scheduler.abort(victim) is not None:
                cancelled.add(victim)
            assert scheduler.get(victim) is None
            scheduler.check()
    drain(engine)
    assert set(engine.finished) | cancelled == set(prompts)
    engine.step()
    assert sorted(engine.told_finished) == sorted(prompts)
    assert len(engine.admitted) == len(set(engine.admitted))
    for request_id, tokens in engine.finished.items():
        assert tokens[: len(prompts[request_id])] == prompts[request_id]
        assert len(tokens) > len(prompts[request_id])
    cache = scheduler.cache
    assert cache.in_use == 0
    assert cache.pool.free + cache.cached == pages
    assert sum(map(len, engine.resident.values())) == cache.cached
    cache.clear()
    engine.step()
    assert cache.pool.free == pages
    assert not any(engine.resident.values())


def sequence(request_id: str, tokens: list[int], new: int = 4, **options: object) -> Sequence:
    return Sequence(
        request_id,
        np.array(tokens, np.int32),
        prompt_length=len(tokens),
        max_length=len(tokens) + new,
        **options,  # type: ignore[arg-type]
    )


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=16)
    prefix = list(range(40))
    for i in range(8):
        scheduler.add(sequence(str(i), [*prefix, 100 + i]))
    computed = 0
    while scheduler.waiting or any(one.remaining > 1 for one in scheduler.running):
        plan = scheduler.plan()
        assert plan is not None
        computed += sum(chunk.count for chunk in plan.chunks if chunk.start < 41)
        scheduler.commit(plan, [(1, False) for chunk in plan.chunks if chunk.samples])
    assert computed == 41 + 7
    assert scheduler.cached_tokens == 7 * 40


def test_decodes_share_a_step_with_a_prefill_chunk() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=10)
    scheduler.add(sequence("decoding", [1, 2, 3]))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, [(7, False)])
    scheduler.add(sequence("long", list(range(50))))
    plan = scheduler.plan()
    assert plan is not None
    assert [(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks] == [("decoding", 1), ("long", 9)]
    assert [chunk.samples for chunk in plan.chunks] == [True, False]


def start(scheduler: LocalScheduler, *sequences: Sequence) -> None:
    """Admit sequences one after the other and compute their prompts."""
    for one in sequences:
        scheduler.add(one)
        plan = scheduler.plan()
        assert plan is not None
        assert plan.chunks[-1].sequence is one
        scheduler.commit(plan, [(9, False)] * sum(chunk.samples for chunk in plan.chunks))


def test_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    scheduler = LocalScheduler(pages=9, page_size=2, max_batched_tokens=16)
    old, young, important = (
        sequence("old", [1, 2, 3], new=8),
        sequence("young", [4, 5, 6], new=8),
        sequence("important", [7], new=8, priority=1),
    )
    start(scheduler, old, young, important)
    while not scheduler.preemptions:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.check()
        assert plan.tokens == sum(chunk.count for chunk in plan.chunks)
        scheduler.commit(plan, [(9, False)] * len(plan.chunks))
    assert (old.preemptions, young.preemptions, important.preemptions) == (0, 1, 0)
    assert scheduler.waiting == [young]
    assert young.generated > 0, "its tokens are kept"


def test_a_victim_that_is_in_the_plan_already_leaves_it() -> None:
    scheduler = LocalScheduler(pages=4, page_size=2, max_batched_tokens=8)
    first, urgent = sequence("first", [1, 2, 3], new=4), sequence("urgent", [4, 5], new=5, priority=1)
    start(scheduler, first, urgent)
    plan = scheduler.plan()
    while not scheduler.preemptions:
        assert plan is not None
        scheduler.commit(plan, [(9, False)] * len(plan.chunks))
        plan = scheduler.plan()
    assert plan is not None
    assert [chunk.sequence for chunk in plan.chunks] == [urgent]
    assert plan.tokens == 1


def test_what_would_be_preempted_at_once_is_not_admitted() -> None:
    scheduler = LocalScheduler(pages=5, page_size=2, max_batched_tokens=16)
    start(scheduler, sequence("running", [1, 2, 3, 4, 5], new=5))
    scheduler.add(sequence("large", [6, 7, 8, 9], new=2))
    plan = scheduler.plan()
    assert plan is not None
    assert [chunk.sequence.request_id for chunk in plan.chunks] == ["running"]
    scheduler.abort("running")
    plan = scheduler.plan()
    assert plan is not None
    assert [chunk.sequence.request_id for chunk in plan.chunks] == ["large"]


def test_a_prefix_in_the_making_is_waited_for_only_within_a_namespace() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=10)
    prompt = list(range(15))
    scheduler.add(sequence("first", prompt))
    scheduler.add(sequence("same", prompt))
    scheduler.add(sequence("other tenant", prompt, namespace="b"))
    planned = []
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        planned.append([(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks])
        scheduler.commit(plan, [(9, False)] * sum(chunk.samples for chunk in plan.chunks))
    assert planned[:2] == [[("first", 10)], [("first", 5), ("other tenant", 5)]]
    assert planned[2] == [("first", 1), ("other tenant", 9)]
    plan = scheduler.plan()
    assert plan is not None
    assert ("same", 3) in [(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks]


def test_order_is_priority_then_deadline_then_arrival() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=4, max_running=1)
    scheduler.add(sequence("plain", [1]))
    scheduler.add(sequence("late deadline", [1], deadline=9.0))
    scheduler.add(sequence("early deadline", [1], deadline=5.0))
    scheduler.add(sequence("urgent", [1], priority=3))
    assert [one.request_id for one in scheduler.waiting] == ["urgent", "early deadline", "late deadline", "plain"]


@pytest.mark.parametrize(("length", "room"), [(0, 5), (9, 0)])
def test_a_request_that_can_never_fit_is_refused(length: int, room: int) -> None:
    scheduler = LocalScheduler(pages=2, page_size=4, max_batched_tokens=8)
    with pytest.raises(ValueError, match="on pages for 8"):
        scheduler.add(sequence("x", list(range(length)), new=room))
