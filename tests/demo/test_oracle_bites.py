"""The oracle finds what it is there for: mistakes made on purpose make answers wrong; without them all are right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mutations
import pytest
from grading import (
    Desk,
    Exam,
    Item,
    WrongAnswers,
    ask,
    edited,
    exam,
    handbook,
    require_right,
    serving,
    tokens_of,
)
from watching import faulty_steps

from preble.engine.engine import Engine


def of_whole_pages(items: Exam, page_size: int) -> list[Item]:
    return [item for item in items if item.page < tokens_of(item.handbook.text) // page_size]


def finds(mutation: AbstractContextManager[None], items: Exam, answers: Callable[[], list[str]]) -> None:
    """Nothing is found without the mutation, and something with it."""
    require_right(items, answers())
    with mutation:
        texts = answers()
    with pytest.raises(WrongAnswers):
        require_right(items, texts)


def wrong_page(desk: Desk, page: int, neighbour: int, foreign: int) -> AbstractContextManager[None]:
    return mutations.wrong_page(desk, page, foreign)


def its_neighbour_twice(desk: Desk, page: int, neighbour: int, foreign: int) -> AbstractContextManager[None]:
    return mutations.wrong_page(desk, page, neighbour)


def zeros(desk: Desk, page: int, neighbour: int, foreign: int) -> AbstractContextManager[None]:
    return mutations.spoiled_page(desk, page, None)


def stale(desk: Desk, page: int, neighbour: int, foreign: int) -> AbstractContextManager[None]:
    return mutations.spoiled_page(desk, page, foreign)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("mistake", [wrong_page, its_neighbour_twice, zeros, stale])
def test_every_single_page_counts(
    mistake: Callable[[Desk, int, int, int], AbstractContextManager[None]], page_size: int
) -> None:
    """One page at a time, and the question about that page, which is in the cache."""
    number, facts = {16: (0, 60), 64: (3, 150)}[page_size]
    items = of_whole_pages(exam(handbook(number, facts), page_size), page_size)
    desk = Desk(page_size=page_size, pages=4096 // page_size)
    desk.ask(items)
    desk.ask(exam(handbook(1), 16)[-1:])
    ours, others = mutations.pages_of(desk, handbook(number, facts)), mutations.pages_of(desk, handbook(1))
    for item in items:
        at = item.page
        with mistake(desk, ours[at], ours[at - 1], others[at % len(others)]):
            texts = desk.ask([item])
        with pytest.raises(WrongAnswers):
            require_right([item], texts)
    require_right(items, desk.ask(items))


def test_pages_exchanged_between_two_requests() -> None:
    """Both notice. (Two pages of one table may change places: K carries its position, and a sum has no order.)"""
    ours, theirs = ({item.page: item for item in exam(handbook(number), 16)} for number in (0, 1))
    for page in sorted(ours.keys() & theirs.keys())[1:-4:5]:
        desk = Desk()
        both = [ours[page], theirs[page]]
        require_right(both, desk.ask(both))
        with mutations.tables_exchanged(desk, page):
            texts = desk.ask(both)
        for item, text in zip(both, texts, strict=True):
            with pytest.raises(WrongAnswers):
                require_right([item], [text])


def test_a_prefix_matched_one_page_too_far() -> None:
    """The page behind the last one that matches holds the value that the handbook had before it was edited."""
    items = [item for item in edited(handbook(0), 16)[::3] if item.page < 30]

    def answers() -> list[str]:
        desk.engine.scheduler.reset_prefix_cache()
        desk.ask(exam(handbook(0), 16)[:1])
        return desk.ask_in_turn(items)

    desk = Desk()
    finds(mutations.matched_too_far(desk), items, answers)


def test_pages_given_to_others_too_early() -> None:
    """The pages that a question is about are overwritten by another handbook when half of the question is computed."""
    first, *items = exam(handbook(0), 16)
    items = [item for item in items if item.page >= 10][::4]
    other = exam(handbook(1), 16)[0]

    def answers() -> list[str]:
        texts = []
        for item in items:
            desk = Desk(pages=tokens_of(item.handbook.text) // 16 + 8)
            desk.ask([first])
            desk.engine.scheduler.max_batched_tokens = 4
            name = desk.put(item)
            desk.step()
            desk.engine.scheduler.max_batched_tokens = 1024
            desk.put(other)
            desk.run_until(name, tokens_of(f" {item.question.answer}") - 1)
            texts.append(desk.text(name))
        return texts

    finds(mutations.never_locked(), items, answers)


def test_slots_off_by_one() -> None:
    """On pages that are no neighbours: within a run of neighbours, everything is still there but for its end."""
    items = exam(handbook(0), 16)

    def answers() -> list[str]:
        desk.engine.scheduler.reset_prefix_cache()
        return desk.ask(items)

    desk = Desk()
    pool = desk.engine.scheduler.cache.pool
    pool.release(pool.allocate(pool.free - 1)[::2])
    finds(mutations.slots_off_by_one(desk), items, answers)


def test_positions_counted_from_a_hit() -> None:
    items = exam(handbook(0), 16)
    desk = Desk()
    desk.ask(items)
    finds(mutations.positions_from_the_hit(desk), items, lambda: desk.ask(items))


def test_chunks_that_see_only_themselves() -> None:
    items = exam(handbook(0), 16)

    def answers() -> list[str]:
        desk.engine.scheduler.reset_prefix_cache()
        return desk.ask(items)

    desk = Desk(max_batched_tokens=100)
    finds(mutations.only_its_own_chunk(desk), items, answers)


def test_answers_mixed_up_within_a_step() -> None:
    items = exam(handbook(0), 16)
    desk = Desk()
    finds(mutations.rows_mixed_up(desk), items, lambda: desk.ask(items))


def test_a_preempted_request_that_forgets_its_answer() -> None:
    items = exam(handbook(0), 16)

    def answers() -> list[str]:
        names = [desk.put(item) for item in items]
        desk.run_until(names[-1], 1)
        for name in names:
            desk.engine.scheduler.preempt(name)
        desk.finish()
        return [desk.text(name) for name in names]

    desk = Desk()
    finds(mutations.preempted_forgetful(desk), items, answers)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("mutated", [False, True])
async def test_a_resumed_request_that_forgets_its_answer(mutated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    items = exam(handbook(0), 16)
    struck: list[int] = []

    def fail(engine: Engine) -> None:
        if not struck and any(one.generated for one in engine.scheduler.running):
            struck.append(engine._replica)
            raise RuntimeError("injected")

    with faulty_steps(monkeypatch, fault=fail), mutations.resumed_forgetful() if mutated else nullcontext():
        async with serving(replicas=2, policy="round-robin") as cluster:
            with pytest.raises(WrongAnswers) if mutated else nullcontext():
                await ask(cluster, items)
    assert struck
