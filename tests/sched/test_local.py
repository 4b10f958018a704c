"""The local scheduler against a pretend engine whose KV slots remember exactly which prefix was written to them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_engine import PretendEngine

from preble.sched.events import Admitted, Preempted
from preble.sched.local import LOOKS, MOST_PASSED, LocalScheduler
from preble.sched.orders import ORDERS
from preble.sched.sequence import Sequence


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
    order=st.sampled_from(sorted(ORDERS)),
)
def test_every_request_ends_and_every_page_is_accounted_for(
    seed: int, page_size: int, budget: int, pool_factor: float, requests: int, cancel_share: float, order: str
) -> None:
    rng = random.Random(seed)
    longest = rng.choice([8, 40, 150])
    pages = max(int(-(-longest // page_size) * pool_factor), 1)
    scheduler = LocalScheduler(pages=pages, page_size=page_size, max_batched_tokens=budget, max_running=16, order=order)
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
                deadline=rng.choice([None, engine.now + rng.uniform(-1, 50)]),
                expected_tokens=rng.choice([None, float(rng.randint(1, longest))]),
            ),
            now=engine.now,
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
    assert len(engine.preempted) == scheduler.preemptions
    admissions, preemptions = Counter(engine.admitted), Counter(engine.preempted)
    assert all(0 <= admissions[one] - preemptions[one] <= 1 for one in prompts)
    assert all(admissions[one] == preemptions[one] + 1 for one in engine.finished)
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
        scheduler.add(sequence(str(i), [*prefix, 100 + i]), now=0.0)
    computed = 0
    while scheduler.waiting or any(one.remaining > 1 for one in scheduler.running):
        plan = scheduler.plan(now=0.0)
        assert plan is not None
        computed += sum(chunk.count for chunk in plan.chunks if chunk.start < 41)
        scheduler.commit(plan, [(1, False) for chunk in plan.chunks if chunk.samples])
    assert computed == 41 + 7
    assert scheduler.cached_tokens == 7 * 40


def test_decodes_share_a_step_with_a_prefill_chunk() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=10)
    scheduler.add(sequence("decoding", [1, 2, 3]), now=0.0)
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    scheduler.commit(plan, [(7, False)])
    scheduler.add(sequence("long", list(range(50))), now=0.0)
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert [(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks] == [("decoding", 1), ("long", 9)]
    assert [chunk.samples for chunk in plan.chunks] == [True, False]


def start(scheduler: LocalScheduler, *sequences: Sequence) -> None:
    """Admit sequences one after the other and compute their prompts."""
    for one in sequences:
        scheduler.add(one, now=0.0)
        plan = scheduler.plan(now=0.0)
        assert plan is not None
        assert plan.chunks[-1].sequence is one
        scheduler.commit(plan, [(9, False)] * sum(chunk.samples for chunk in plan.chunks))


def test_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    scheduler = LocalScheduler(pages=11, page_size=2, max_batched_tokens=16)
    old, young, important = (
        sequence("old", [1, 2, 3], new=8, expected_tokens=3),
        sequence("young", [4, 5, 6], new=8, expected_tokens=3),
        sequence("important", [7], new=8, priority=1, expected_tokens=3),
    )
    start(scheduler, old, young, important)
    while not scheduler.preemptions:
        plan = scheduler.plan(now=0.0)
        assert plan is not None
        scheduler.check()
        assert plan.tokens == sum(chunk.count for chunk in plan.chunks)
        scheduler.commit(plan, [(9, False)] * len(plan.chunks))
    assert (old.preemptions, young.preemptions, important.preemptions) == (0, 1, 0)
    assert list(scheduler.waiting) == [young]
    assert young.generated > 0, "its tokens are kept"


def test_a_victim_that_is_in_the_plan_already_leaves_it() -> None:
    scheduler = LocalScheduler(pages=8, page_size=2, max_batched_tokens=8)
    first, urgent = (
        sequence("first", [1, 2, 3], new=10, expected_tokens=3),
        sequence("urgent", [4, 5], new=10, priority=1, expected_tokens=3),
    )
    start(scheduler, first, urgent)
    plan = scheduler.plan(now=0.0)
    while not scheduler.preemptions:
        assert plan is not None
        scheduler.commit(plan, [(9, False)] * len(plan.chunks))
        plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert [chunk.sequence for chunk in plan.chunks] == [urgent]
    assert plan.tokens == 1


def test_what_would_be_preempted_at_once_is_not_admitted() -> None:
    scheduler = LocalScheduler(pages=5, page_size=2, max_batched_tokens=16)
    start(scheduler, sequence("running", [1, 2, 3, 4, 5], new=5))
    scheduler.add(sequence("large", [6, 7, 8, 9], new=2), now=0.0)
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert [chunk.sequence.request_id for chunk in plan.chunks] == ["running"]
    scheduler.abort("running")
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert [chunk.sequence.request_id for chunk in plan.chunks] == ["large"]


def test_a_prefix_in_the_making_is_waited_for_only_within_a_namespace() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=10)
    prompt = list(range(15))
    scheduler.add(sequence("first", prompt), now=0.0)
    scheduler.add(sequence("same", prompt), now=0.0)
    scheduler.add(sequence("other tenant", prompt, namespace="b"), now=0.0)
    planned = []
    for _ in range(3):
        plan = scheduler.plan(now=0.0)
        assert plan is not None
        planned.append([(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks])
        scheduler.commit(plan, [(9, False)] * sum(chunk.samples for chunk in plan.chunks))
    assert planned[:2] == [[("first", 10)], [("first", 5), ("other tenant", 5)]]
    assert planned[2] == [("first", 1), ("other tenant", 9)]
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert ("same", 3) in [(chunk.sequence.request_id, chunk.count) for chunk in plan.chunks]


def test_nobody_waits_for_a_prefix_that_will_not_be_shared_any_more() -> None:
    """The running one began before the cache was reset."""
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=10)
    prompt = list(range(15))
    start(scheduler, sequence("before", prompt))
    scheduler.reset_prefix_cache()
    scheduler.add(sequence("after", prompt), now=0.0)
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert [(chunk.sequence.request_id, chunk.start, chunk.count) for chunk in plan.chunks] == [
        ("before", 10, 5),
        ("after", 0, 5),
    ]


def test_after_a_reset_a_preempted_request_is_computed_from_its_first_token() -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=100)
    runs, waits = sequence("runs", list(range(15))), sequence("waits", [7] * 15)
    start(scheduler, runs, waits)
    scheduler.preempt("waits")
    assert waits.matched == 12
    scheduler.reset_prefix_cache()
    scheduler.check()
    scheduler.preempt("runs")
    assert scheduler.cache.pool.free == 64, "nothing of it is kept"
    plan = scheduler.plan(now=0.0)
    assert plan is not None
    assert {(chunk.sequence.request_id, chunk.start) for chunk in plan.chunks} == {("runs", 0), ("waits", 0)}
    scheduler.check()


def test_a_reset_makes_room_for_who_did_not_fit() -> None:
    scheduler = LocalScheduler(pages=5, page_size=2, max_batched_tokens=16)
    start(scheduler, sequence("running", [1, 2, 3, 4, 5], new=5))
    scheduler.add(sequence("large", [6, 7, 8, 9], new=2), now=0.0)
    assert scheduler.plan(now=0.0) is not None
    assert scheduler._patience > 0
    scheduler.reset_prefix_cache()
    assert scheduler._patience == 0, "it is looked at again"


def admission_order(scheduler: LocalScheduler, now: float = 0.0) -> list[str]:
    """Let every request generate one token and end; who was admitted when."""
    admitted: list[str] = []
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan(now=now)
        assert plan is not None
        scheduler.commit(plan, [(9, True)] * sum(chunk.samples for chunk in plan.chunks))
        admitted += [event.request_id for event in scheduler.take_events() if isinstance(event, Admitted)]
        scheduler.check()
    return admitted


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_order_is_priority_then_pressing_deadline_then_arrival(order: str) -> None:
    scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=4, max_running=1, order=order)
    scheduler.add(sequence("plain", [1]), now=0.0)
    scheduler.add(sequence("distant deadline", [1], deadline=1000.0), now=0.0)
    scheduler.add(sequence("late deadline", [1], deadline=9.0), now=0.0)
    scheduler.add(sequence("early deadline", [1], deadline=5.0), now=0.0)
    scheduler.add(sequence("important", [1], priority=3), now=0.0)
    expected = ["important", "early deadline", "late deadline", "plain", "distant deadline"]
    assert admission_order(scheduler, now=3.0) == expected


def test_a_deadline_presses_when_a_quarter_of_its_time_is_gone() -> None:
    for now, expected in ((1.99, ["plain", "pressed"]), (2.0, ["pressed", "plain"])):
        scheduler = LocalScheduler(pages=64, page_size=4, max_batched_tokens=4, max_running=1, order="fcfs")
        scheduler.add(sequence("plain", [1]), now=0.0)
        scheduler.add(sequence("pressed", [1], deadline=5.0), now=1.0)
        assert admission_order(scheduler, now) == expected


def test_a_preempted_request_keeps_its_age() -> None:
    scheduler = LocalScheduler(pages=64, page_size=2, max_batched_tokens=4, max_running=1, order="fcfs")
    start(scheduler, sequence("first", [1, 2, 3]))
    scheduler.add(sequence("second", [4, 5]), now=1.0)
    scheduler.preempt("first")
    assert admission_order(scheduler, now=2.0)[1:] == ["first", "second"], "it was admitted once before"


def test_a_request_preempted_with_a_token_on_its_way_gets_it_in_the_queue() -> None:
    scheduler = LocalScheduler(pages=64, page_size=1, max_batched_tokens=16)
    one = sequence("one", [1, 2, 3, 4, 5], new=4)
    scheduler.add(one, now=0.0)
    first = scheduler.plan(now=0.0)
    assert first is not None
    assert scheduler.preempt("one")
    assert scheduler.plan(now=1.0) is None, "its last token is not known"
    assert one.matched == 4, "the fifth is computed again, for its logits"
    scheduler.commit(first, [(6, False)])
    assert one.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert one.matched == 5
    scheduler.check()
    again = scheduler.plan(now=2.0)
    assert again is not None
    assert [(chunk.start, chunk.count) for chunk in again.chunks] == [(5, 1)]
    scheduler.commit(again, [(7, True)])
    assert one.finished


def test_a_preempted_request_is_reported_and_counted_once() -> None:
    scheduler = LocalScheduler(pages=64, page_size=2, max_batched_tokens=16)
    one = sequence("one", [1, 2, 3, 4, 5], new=4)
    start(scheduler, one)
    scheduler.take_events()
    assert scheduler.preempt("one")
    assert not scheduler.preempt("one"), "it is not running"
    assert Preempted(0, "one") in scheduler.take_events()
    assert list(scheduler.waiting) == [one]
    plan = scheduler.plan(now=1.0)
    assert plan is not None
    # Of the 6 tokens it has by now, the two whole pages that were computed are still there.
    assert scheduler.take_events()[0] == Admitted(0, "one", 4)
    assert [(chunk.start, chunk.count) for chunk in plan.chunks] == [(4, 2)]
    assert (scheduler.prompt_tokens, scheduler.cached_tokens, one.cached) == (5, 0, 0)


def test_hit_ratios_follow_the_cache() -> None:
    scheduler = LocalScheduler(pages=64, page_size=2, max_batched_tokens=16, max_running=1)
    prefix = list(range(10))
    start(scheduler, sequence("first", prefix))
    waits = sequence("waits", [*prefix[:8], 77, 78])
    scheduler.add(waits, now=0.0)
    assert waits.matched == 8, "it is looked up when it comes"
    late = sequence("late", [*prefix, 1, 2, 3])
    scheduler.add(late, now=0.0)
    assert late.matched == 10
    scheduler.abort("first")
    scheduler.cache.clear()
    # The only free place goes to somebody else: those that keep waiting are looked up as well.
    scheduler.add(sequence("urgent", [5], priority=1), now=0.0)
    scheduler.plan(now=0.0)
    assert (waits.matched, late.matched) == (0, 0)
    scheduler.check()


def test_a_stale_hit_ratio_gives_nobody_the_turn() -> None:
    """Whose turn it seems to be is looked up again; with its prefix gone, the shorter one goes first."""
    scheduler = LocalScheduler(pages=200, page_size=2, max_batched_tokens=64, max_running=1)
    prefix = list(range(40))
    start(scheduler, sequence("first", prefix))
    for number in range(2 * LOOKS):  # more than a step looks up
        scheduler.add(sequence(f"middle {number}", [100 + number] * 30), now=0.0)
    for number in range(2 * LOOKS):
        scheduler.add(sequence(f"had a prefix {number}", [*prefix, number]), now=0.0)
    scheduler.abort("first")
    scheduler.cache.clear()
    plan = scheduler.plan(now=10.0)
    assert plan is not None
    assert plan.chunks[0].sequence.request_id == "middle 0"
    scheduler.check()


def test_who_lets_others_pass_does_so_only_so_often() -> None:
    scheduler = LocalScheduler(pages=2000, page_size=2, max_batched_tokens=200, order="fcfs")
    prefix = list(range(20))
    scheduler.add(sequence("first", prefix), now=0.0)
    scheduler.add(sequence("behind", [*prefix, 1]), now=0.0)
    for number in range(100):
        scheduler.add(sequence(f"passer {number}", [50 + number]), now=0.0)
    admitted = []
    for _ in range(2):
        plan = scheduler.plan(now=0.0)
        assert plan is not None
        scheduler.commit(plan, [(9, False)] * sum(chunk.samples for chunk in plan.chunks))
        admitted.append([event.request_id for event in scheduler.take_events() if isinstance(event, Admitted)])
        scheduler.check()
    assert admitted[0] == ["first", *(f"passer {number}" for number in range(MOST_PASSED))]
    assert admitted[1][0] == "behind"


@pytest.mark.parametrize(("length", "room"), [(0, 5), (9, 0)])
def test_a_request_that_can_never_fit_is_refused(length: int, room: int) -> None:
    scheduler = LocalScheduler(pages=2, page_size=4, max_batched_tokens=8)
    with pytest.raises(ValueError, match="on pages for 8"):
        scheduler.add(sequence("x", list(range(length)), new=room), now=0.0)
