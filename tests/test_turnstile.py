"""The turnstile: one task per turn of the event loop, in order, whoever gives up meanwhile."""

from __future__ import annotations

import random
from itertools import pairwise

import anyio
import anyio.lowlevel
import pytest

from preble.turnstile import Turnstile

pytestmark = pytest.mark.anyio


async def test_one_passes_in_each_turn_in_order() -> None:
    turnstile, turn, passed = Turnstile(), 0, []

    async def count_turns() -> None:
        nonlocal turn
        while len(passed) < 50:
            turn += 1
            await anyio.lowlevel.checkpoint()

    async def visit(number: int) -> None:
        for _ in range(2):
            await turnstile.pass_through()
            passed.append((turn, number))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        await anyio.lowlevel.checkpoint()
        for number in range(25):
            tasks.start_soon(visit, number)
    first, second = passed[:25], passed[25:]
    # Trio runs the tasks of a turn in any order, asyncio as they were started.
    assert sorted(number for _, number in first) == list(range(25))
    assert [number for _, number in second] == [number for _, number in first]
    turns = [at for at, _ in passed]
    assert all(later - earlier <= 2 for earlier, later in pairwise(turns))
    # The counter may run before or after those who pass: of two neighbours one may seem to be a turn off.
    assert all(later > earlier for earlier, later in zip(turns, turns[2:], strict=False))


async def test_those_who_give_up_hold_nobody_up() -> None:
    turnstile, source = Turnstile(), random.Random(0)
    scopes, passed = [anyio.CancelScope() for _ in range(300)], []

    async def visit(number: int) -> None:
        with scopes[number]:
            await turnstile.pass_through()
            passed.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(300):
            tasks.start_soon(visit, number)
        for number in source.sample(range(300), 100):
            for _ in range(source.randrange(3)):
                await anyio.lowlevel.checkpoint()
            scopes[number].cancel()
    given_up = {number for number, scope in enumerate(scopes) if scope.cancelled_caught}
    assert given_up
    assert len(passed) == len(set(passed)) == 300 - len(given_up)
    assert not given_up & set(passed)
    await turnstile.pass_through()
    assert not turnstile._crowded
    assert not turnstile._waiting
