"""Steps skipped in one go leave a replica as it would be had each been planned and committed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.sched.events import Admitted, Event, Evicted, Finished, Preempted, Progressed, Stored
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence

ADDS = st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 20), st.integers(1, 60))
OTHERS = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([1, 2, 7, 30]), st.just(0), st.just(0)),
    st.tuples(st.just("leap"), st.sampled_from([2, 100, 100]), st.just(0), st.just(0)),
    st.tuples(st.just("leap"), st.sampled_from([2, 100, 100]), st.just(0), st.just(0)),
    st.tuples(st.just("end"), st.integers(0, 9), st.just(0), st.just(0)),
    ADDS,
)
"""What happens, and up to three numbers that say how."""


def token_of(request_id: str) -> int:
    return 1000 + int(request_id)


def step(scheduler: LocalScheduler, now: float) -> bool:
    """One step; whoever has its `max_length` ends."""
    plan = scheduler.plan(now=now)
    if plan is None:
        return False
    sampled = [
        (token_of(chunk.sequence.request_id), chunk.sequence.length + 1 >= chunk.sequence.max_length)
        for chunk in plan.chunks
        if chunk.samples
    ]
    scheduler.commit(plan, sampled)
    return True


def joined(events: list[Event]) -> tuple[dict[str, list[Any]], list[Any]]:
    """What each request did, neighbouring steps joined; and which pages came and went, in any order between two turns
    of that."""
    of_request: dict[str, list[Any]] = {}
    of_cache: list[Any] = []
    for event in events:
        match event:
            case Stored() | Evicted():
                kind, hashes = type(event).__name__, set(event.hashes.tolist())
                if of_cache and of_cache[-1][0] == kind:
                    of_cache[-1][1].update(hashes)
                else:
                    of_cache.append((kind, hashes))
            case Progressed():
                mine = of_request.setdefault(event.request_id, [])
                if mine and isinstance(mine[-1], Progressed):
                    last = mine.pop()
                    event = Progressed(
                        event.replica, event.request_id, event.computed_tokens, last.new_tokens + event.new_tokens
                    )
                mine.append(event)
            case Admitted() | Preempted() | Finished():
                of_request.setdefault(event.request_id, []).append(event)
    return of_request, of_cache


def state(scheduler: LocalScheduler) -> dict[str, Any]:
    """All that later decisions depend on; which page has which number is no part of that."""

    def of(one: Sequence) -> tuple[Any, ...]:
        return (
            one.request_id,
            one.tokens.tolist(),
            one.computed,
            one.cached,
            one.preemptions,
            len(one.table),
            one.matched,
            one.looked == scheduler.cache.version,
        )

    cache = scheduler.cache
    return {
        "running": [of(one) for one in scheduler.running],
        "waiting": [of(one) for one in scheduler.waiting],
        "pages": (cache.pool.free, cache.cached, cache.in_use),
        "cached": {int(hash) for run in cache._tree.nodes() for hash in run.hashes},
        "counts": (scheduler.preemptions, scheduler.prompt_tokens, scheduler.cached_tokens),
        "next": scheduler.decode_steps(),
    }


@settings(max_examples=400, deadline=None)
@given(
    adds=st.lists(ADDS, min_size=2, max_size=9),
    others=st.lists(OTHERS, min_size=5, max_size=40),
    page_size=st.sampled_from([1, 2, 4]),
    pages=st.integers(10, 60),
    max_running=st.sampled_from([2, 3, 64]),
    budget=st.sampled_from([4, 16, 64]),
    order=st.sampled_from(["hrrn", "fcfs"]),
)
def test_a_leap_is_as_many_steps(
    adds: list[tuple[str, int, int, int]],
    others: list[tuple[str, int, int, int]],
    page_size: int,
    pages: int,
    max_running: int,
    budget: int,
    order: str,
) -> None:
    leaping, stepping = (
        LocalScheduler(
            pages=pages, page_size=page_size, max_batched_tokens=budget, max_running=max_running, order=order
        )
        for _ in range(2)
    )
    added = 0
    now = 0.0
    for action, first, second, third in (*adds, *others):
        now += 1.0
        if action == "add":
            tokens = ([first] * (second // 2) + [first + 1] * (second - second // 2))[: leaping.capacity_tokens - 1]
            room = leaping.capacity_tokens - len(tokens)
            for scheduler in (leaping, stepping):
                scheduler.add(
                    Sequence(
                        str(added),
                        np.array(tokens, np.int32),
                        prompt_length=len(tokens),
                        max_length=len(tokens) + min(third, room),
                        expected_tokens=2.0 if second % 3 else None,
                    ),
                    now=now,
                )
            added += 1
        elif action == "step":
            for _ in range(first):
                assert step(leaping, now) == step(stepping, now)
        elif action == "end":
            assert (leaping.abort(str(first)) is None) == (stepping.abort(str(first)) is None)
        else:
            left = min((one.max_length - one.length for one in leaping.running), default=1) - 1
            steps = min(first, leaping.decode_steps(), left)
            if steps < 1:
                continue
            leaping.leap(steps, [token_of(one.request_id) for one in leaping.running])
            for _ in range(steps):
                assert step(stepping, now)
        leaping.check()
        assert state(leaping) == state(stepping)
        if added % 3 == 0:  # else changes of several turns come together
            assert joined(leaping.take_events()) == joined(stepping.take_events())
    assert joined(leaping.take_events()) == joined(stepping.take_events())


def running(*outputs: int, pages: int = 64, waiting: int = 0, **options: Any) -> LocalScheduler:
    """A replica that decodes requests of 8 tokens with so much output to come, with pages of 4. They are
    expected to end soon, so that they are admitted although the pages will not suffice."""
    scheduler = LocalScheduler(pages=pages, page_size=4, max_batched_tokens=64, **options)
    for number, output in enumerate((*outputs, *[4] * waiting)):
        tokens = np.full(8, number, np.int32)
        scheduler.add(
            Sequence(str(number), tokens, prompt_length=8, max_length=8 + output, expected_tokens=1.0), now=0.0
        )
    step(scheduler, 0.0)
    return scheduler


def test_a_leap_ends_before_the_longest_allowed_output() -> None:
    scheduler = running(20, 10)
    assert scheduler.decode_steps() == 9
    scheduler.leap(9, [1, 2])
    assert [one.length for one in scheduler.running] == [18, 18]
    assert scheduler.decode_steps() == 0


def test_a_leap_never_preempts() -> None:
    scheduler = running(40, 40, pages=13)
    while steps := scheduler.decode_steps():
        scheduler.leap(steps, [1, 2])
        scheduler.check()
    assert scheduler.preemptions == 0
    assert [one.length for one in scheduler.running] == [25, 25]  # 12 of the 13 pages are in use
    step(scheduler, 0.0)
    assert scheduler.preemptions == 1


def test_there_is_no_leap_while_something_else_may_happen() -> None:
    idle = LocalScheduler(pages=8, page_size=4, max_batched_tokens=8)
    assert idle.decode_steps() == 0
    idle.add(Sequence("0", np.zeros(12, np.int32), prompt_length=12, max_length=20), now=0.0)
    assert idle.decode_steps() == 0, "it waits and could be admitted"
    step(idle, 0.0)
    assert idle.running[0].remaining == 4
    assert idle.decode_steps() == 0, "its prompt is not computed"
    step(idle, 0.0)
    assert idle.decode_steps() == 7
    plan = idle.plan(now=0.0)
    assert plan is not None
    assert idle.decode_steps() == 0, "a step is in flight"
    idle.commit(plan, [(1, False)])
    assert idle.decode_steps() == 6


def test_a_full_replica_leaps_past_those_who_wait() -> None:
    scheduler = running(20, 20, waiting=1, max_running=2)
    step(scheduler, 0.0)
    assert len(scheduler.waiting) == 1
    assert scheduler.decode_steps() == 18


def test_a_leap_lasts_as_long_as_the_patience_with_who_does_not_fit() -> None:
    scheduler = running(40, 40, pages=12)
    scheduler.add(Sequence("big", np.full(20, 7, np.int32), prompt_length=20, max_length=24), now=0.0)
    assert scheduler.decode_steps() == 0
    step(scheduler, 0.0)
    assert len(scheduler.waiting) == 1
    assert scheduler.decode_steps() == 8
    scheduler.leap(8, [1, 2])
    assert scheduler.decode_steps() == 0


@pytest.mark.parametrize("steps", [1, 5])
def test_a_leap_reports_its_tokens_at_once(steps: int) -> None:
    scheduler = running(20)
    scheduler.take_events()
    scheduler.leap(steps, [77])
    assert scheduler.take_events() == [Progressed(0, "0", 8 + steps, (77,) * steps)]
