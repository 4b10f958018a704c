"""The door by itself: whose turn it is, what is refused, and that nobody who leaves takes a slot along."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from preble import ClusterOverloaded
from preble.admission import LONGEST_RETRY, OLDEST_EVERY, SHORTEST_RETRY, Admission, Slot

pytestmark = pytest.mark.anyio


class Visitors:
    """Callers of a door, on a clock that is set by hand."""

    def __init__(self, group: anyio.abc.TaskGroup, limit: int, *, refuses: bool = False) -> None:
        self.now = 0.0
        self.door = Admission(limit, refuses=refuses, clock=lambda: self.now)
        self.entered: list[str] = []
        self.slots: dict[str, Slot] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._group = group

    async def come(self, name: str, count: int = 1, *, priority: int = 0, deadline: float | None = None) -> None:
        """Return when the visitor is in, or stands in line."""
        before = self.door._arrivals
        scope = self.scopes[name] = anyio.CancelScope()

        async def visit() -> None:
            with scope:
                slot = await self.door.enter(count, priority=priority, deadline=deadline, patient=True)
                try:
                    await anyio.lowlevel.checkpoint_if_cancelled()
                except BaseException:
                    slot.release()
                    raise
                self.slots[name] = slot
                self.entered.append(name)

        self._group.start_soon(visit)
        while self.door._arrivals == before:
            await anyio.lowlevel.checkpoint()
        await settle()

    async def leave(self, name: str) -> None:
        self.slots.pop(name).release()
        await settle()

    async def empty(self) -> None:
        while self.slots:
            await self.leave(next(iter(self.slots)))
        assert self.door.free == self.door.limit
        assert self.door.waiting == 0
        assert not self.door._classes


async def settle() -> None:
    """Everybody whose turn it is has moved."""
    await anyio.wait_all_tasks_blocked()


@asynccontextmanager
async def visitors(limit: int, *, refuses: bool = False) -> AsyncIterator[Visitors]:
    async with anyio.create_task_group() as group:
        here = Visitors(group, limit, refuses=refuses)
        yield here
        await here.empty()


async def test_higher_priority_goes_first_then_the_earlier_deadline_then_age() -> None:
    async with visitors(1) as here:
        await here.come("in")
        await here.come("old")
        await here.come("young")
        await here.come("far", deadline=100.0)
        await here.come("near", deadline=50.0)
        await here.come("high", priority=1)
        await here.come("low", priority=-1, deadline=1.0)
        for name in ("in", "high", "near", "far", "old", "young"):
            await here.leave(name)
        assert here.entered == ["in", "high", "near", "far", "old", "young", "low"]


async def test_no_stream_of_deadlines_keeps_out_who_has_none() -> None:
    async with visitors(1) as here:
        await here.come("in")
        await here.come("patient")
        await here.come("another")
        turns = 0
        while "another" not in here.entered:
            await here.come(f"hasty {turns}", deadline=here.now + 10.0)
            await here.leave(here.entered[-1])
            here.now += 0.01
            turns += 1
            assert turns <= 2 * OLDEST_EVERY
        assert here.entered.index("patient") == OLDEST_EVERY


async def test_who_has_waited_for_half_of_its_time_lets_others_pass() -> None:
    """Else, in lasting overload, everybody would be let in just before the deadline, and nobody would finish."""
    async with visitors(1) as here:
        await here.come("in")
        await here.come("stale", deadline=10.0)
        await here.come("staler", deadline=9.0)
        here.now = 5.0
        await here.come("fresh", deadline=15.0)
        await here.leave("in")
        assert here.entered[-1] == "fresh"
        await here.leave("fresh")
        assert here.entered[-1] == "stale", "rather late than never, and who has more time left first"
        await here.leave("stale")
        assert here.entered[-1] == "staler"


async def test_whose_time_is_up_is_not_let_in() -> None:
    async with visitors(1) as here:
        await here.come("in")
        await here.come("expired", priority=1, deadline=10.0)
        await here.come("next")
        here.now = 10.0
        await here.leave("in")
        assert here.entered[-1] == "next"
        here.scopes["expired"].cancel()
        await settle()
        assert "expired" not in here.entered


async def test_a_wide_request_is_waited_for_and_narrow_ones_use_what_it_leaves() -> None:
    async with visitors(4) as here:
        for name in "abcd":
            await here.come(name)
        await here.come("wide", 3)
        await here.come("narrow")
        await here.leave("a")
        await here.leave("b")
        assert here.entered == [*"abcd"], "two are free; it is the wide one's turn"
        await here.leave("c")
        assert here.entered == [*"abcd", "wide"]
        await here.come("wider", 4)
        await here.come("slim")
        await here.leave("d")
        assert here.entered[-1] == "narrow"
        here.scopes["wider"].cancel()  # now nobody waits for it any more
        await here.leave("narrow")
        assert here.entered[-1] == "slim"


@pytest.mark.parametrize("its_turn", ["later", "just before", "just after"])
async def test_who_is_cancelled_while_waiting_leaves_nothing_behind(its_turn: str) -> None:
    """Its turn may come in the very turn of the event loop in which it is cancelled."""
    async with visitors(1) as here:
        await here.come("in")
        await here.come("leaves")
        await here.come("stays")
        if its_turn == "just before":
            here.slots.pop("in").release()
        here.scopes["leaves"].cancel()
        if its_turn == "just after":
            here.slots.pop("in").release()
        assert here.door.free == 0
        await settle()
        assert here.entered == (["in"] if its_turn == "later" else ["in", "stays"])
        assert here.door.waiting == (1 if its_turn == "later" else 0)


async def test_a_door_that_refuses_says_when_to_come_back() -> None:
    async with visitors(4, refuses=True) as here:
        for round_ in range(40):  # each stays for two seconds
            for name in "abcd":
                await here.come(f"{name}{round_}")
            here.now += 2.0
            for name in "abcd":
                await here.leave(f"{name}{round_}")
        for name in "abcd":
            await here.come(name)
        waits = []
        for _ in range(6):
            with pytest.raises(ClusterOverloaded, match="4 of max_pending=4 requests are in flight") as caught:
                await here.door.enter()
            waits.append(caught.value.retry_after)
        # One slot comes free every half second; after two seconds all who are in will have left.
        assert waits == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
        here.now += 30.0  # nothing moves
        with pytest.raises(ClusterOverloaded) as caught:
            await here.door.enter()
        assert caught.value.retry_after == 30.0
        here.now += 1e6
        with pytest.raises(ClusterOverloaded) as caught:
            await here.door.enter()
        assert caught.value.retry_after == LONGEST_RETRY


async def test_a_suggestion_is_never_zero() -> None:
    async with visitors(1, refuses=True) as here:
        for turn in range(3):
            await here.come(str(turn))  # all in no time
            with pytest.raises(ClusterOverloaded) as caught:
                await here.door.enter()
            assert SHORTEST_RETRY <= caught.value.retry_after <= LONGEST_RETRY
            await here.leave(str(turn))


async def test_refusing_gives_other_tasks_a_turn() -> None:
    """An application that tries again and again must not stop its own event loop."""
    door = Admission(1, refuses=True)
    slot = await door.enter()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        for _ in range(50):
            with pytest.raises(ClusterOverloaded):
                await door.enter()
        group.cancel_scope.cancel()
    assert ticks >= 25
    slot.release()
    slot.release()
    assert door.free == 1, "given back once"


@pytest.mark.parametrize("seed", range(8))
async def test_the_slots_add_up_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    door = Admission(5)
    inside = 0

    async def visit(number: int) -> None:
        nonlocal inside
        count = rng.choice([1, 1, 1, 2, 5])
        deadline = rng.choice([None, math.nextafter(door._clock(), math.inf), door._clock() + 1e-3, 1e9])
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            for _ in range(rng.randrange(30)):
                await anyio.lowlevel.checkpoint()
            slot = await door.enter(count, priority=rng.randrange(3), deadline=deadline)
            inside += count
            assert inside + door.free <= door.limit
            try:
                for _ in range(rng.randrange(4)):
                    await anyio.lowlevel.checkpoint()
            finally:
                inside -= count
                slot.release()

    async with anyio.create_task_group() as group:
        scopes: list[anyio.CancelScope] = []
        for number in range(400):
            group.start_soon(visit, number)
        for _ in range(200):
            if scopes:
                rng.choice(scopes).cancel()
            await anyio.lowlevel.checkpoint()
        # Whose deadline passed is not let in; its caller gives up.
        while door.waiting:
            await anyio.lowlevel.checkpoint()
            if door.free == door.limit:
                for scope in scopes:
                    scope.cancel()
    assert (door.free, door.waiting, inside) == (5, 0, 0)


async def test_thousands_who_leave_at_once_cost_no_walk_through_the_line() -> None:
    """Counted in comparisons, which do not depend on the machine: a logarithm per leave, and no scan."""
    from preble import admission

    compared = 0
    key = admission._by_deadline

    def counting(caller: admission._Caller) -> tuple[float, int]:
        nonlocal compared
        compared += 1
        return key(caller)

    costs = []
    for crowd in (500, 4000):
        door = Admission(1)
        held = await door.enter()
        async with anyio.create_task_group() as group:

            async def wait(door: Admission, number: int) -> None:
                await door.enter(priority=number % 3, deadline=1e9 + number % 7)

            for number in range(crowd):
                group.start_soon(wait, door, number)
            while door.waiting < crowd:
                await anyio.lowlevel.checkpoint()
            compared = 0
            admission._by_deadline = counting
            try:
                group.cancel_scope.cancel()
                while door.waiting:
                    with anyio.CancelScope(shield=True):
                        await anyio.lowlevel.checkpoint()
            finally:
                admission._by_deadline = key
        costs.append(compared / crowd)
        held.release()
        assert door.free == 1
    assert 1 <= costs[0] <= costs[1] < costs[0] + 8, costs
