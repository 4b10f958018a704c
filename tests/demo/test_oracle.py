"""One replica: whatever its pages, steps and pressure, every answer is the reference's, and that one is right."""

from __future__ import annotations

from typing import Any

import pytest
from grading import (
    GREEDY,
    Desk,
    Item,
    ask,
    compositions,
    edited,
    exam,
    facts_by_page,
    handbook,
    is_known,
    kv_memory,
    require_right,
    serving,
    tokens_of,
)
from watching import faulty_steps

from preble.engine.engine import Engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Nothing here depends on the event loop."""
    return "asyncio"


def test_the_reference_is_right() -> None:
    """So that few questions have to be left out, and every page still has one."""
    items = [item for number in (0, 1) for items in facts_by_page(handbook(number), 16).values() for item in items]
    wrong = [item.question.text for item in items if not is_known(item)]
    assert len(wrong) <= 0.03 * len(items), wrong


def test_an_exam_asks_for_every_page() -> None:
    for page_size, number, facts in ((16, 0, 60), (64, 3, 150)):
        book = handbook(number, facts)
        assert {item.page for item in exam(book, page_size)} >= set(range(tokens_of(book.text) // page_size))


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"page_size": 1},
        {"page_size": 3, "max_batched_tokens": 61},
        {"page_size": 64, "max_batched_tokens": 100},
        {"max_batched_tokens": 7},
        {"max_running": 1},
        {"max_running": 16, "local_order": "preble"},
        {"dtype": "bfloat16", "local_order": "fcfs"},
    ],
    ids=str,
)
async def test_pages_and_steps_of_any_size(chosen: dict[str, Any]) -> None:
    items = [*exam(handbook(3, 150), 64), *exam(handbook(0), 16)[::2], *compositions(handbook(0))]
    async with serving(**chosen) as cluster:
        await ask(cluster, items)
        hot = await ask(cluster, items)
        page_size = chosen.get("page_size", 16)
        for item, output in zip(items, hot, strict=True):
            tokens = tokens_of(item.prompt) - 1  # the last one is always computed
            assert output.usage.cached_tokens == tokens - tokens % page_size, "not all that can be was reused"


async def test_one_at_a_time_and_nothing_reused() -> None:
    async with serving() as cluster:
        for number, item in enumerate(exam(handbook(0), 16)):
            (output,) = await ask(cluster, [item], namespace=str(number))
            assert output.usage.cached_tokens == 0


def test_a_prompt_is_cut_anywhere_within_a_fact() -> None:
    """The first chunk ends behind each token of the line that is asked for."""
    desk = Desk()
    for item in exam(handbook(0), 16)[5::9]:
        book = item.handbook
        (line,) = (fact.line for fact in book.facts if item.question.text == f"{fact.attribute} of {fact.subject}?")
        start = tokens_of(book.text[: book.text.index(line)])
        for cut in range(start, start + tokens_of(line)):
            desk.engine.scheduler.max_batched_tokens = cut
            before = desk.engine.computed_tokens
            require_right([item], desk.ask([item], namespace=f"{item.page} {cut}"))
            assert desk.engine.computed_tokens - before >= tokens_of(item.prompt), "nothing was reused"
    desk.engine.scheduler.check()


@pytest.mark.long
def test_a_prompt_is_cut_anywhere() -> None:
    desk = Desk()
    item = exam(handbook(0), 16)[-1]
    for cut in range(1, tokens_of(item.prompt)):
        desk.engine.scheduler.max_batched_tokens = cut
        require_right([item], desk.ask([item], namespace=f"{cut}"))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_handbooks_that_differ_in_one_value(page_size: int) -> None:
    """They share the pages before it, and none from there on."""
    book = handbook(0)
    items = edited(book, 16)[::3]
    desk = Desk(page_size=page_size, pages=20_000 // page_size)
    desk.ask(exam(book, 16)[:1])
    for item in items:
        known = desk.engine.scheduler.cached_tokens
        require_right([item], desk.ask([item]))
        assert desk.engine.scheduler.cached_tokens - known < (item.page + 1) * 16, "reused behind the edited value"
    require_right(items, desk.ask(items))
    desk.engine.scheduler.check()


def test_preempted_for_want_of_pages() -> None:
    """Everybody says to need but one token of output, and goes on behind the answer."""
    items = [*exam(handbook(0), 16), *compositions(handbook(0))]
    desk = Desk(page_size=1, pages=tokens_of(handbook(0).text) + 100)
    require_right(items, desk.ask(items, expected_tokens=1, ignore_eos=True))
    assert desk.engine.scheduler.preemptions > 0
    desk.engine.scheduler.check()


async def test_preempted_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    preempted: set[str] = set()

    def preempt(engine: Engine) -> None:
        for sequence in engine.scheduler.running[:]:
            if sequence.generated and sequence.request_id not in preempted:
                preempted.add(sequence.request_id)
                engine.scheduler.preempt(sequence.request_id)

    items = [*exam(handbook(0), 16), *compositions(handbook(0))]
    with faulty_steps(monkeypatch, preempt):
        async with serving(max_batched_tokens=61) as cluster:
            await ask(cluster, items)
            assert cluster.stats().replicas[0].preemptions >= len(items)


async def test_more_handbooks_than_the_cache_holds() -> None:
    books = [exam(handbook(number), 16)[::2] for number in range(3)]
    mixed: list[Item] = [item for three in zip(*books, strict=False) for item in three]
    async with serving(kv_memory=kv_memory(900)) as cluster:
        for max_at_once in (1, 5, len(mixed)):
            for first in range(0, min(len(mixed), 6 * max_at_once), max_at_once):
                await ask(cluster, mixed[first : first + max_at_once])
        stats = cluster.stats().replicas[0]
        assert stats.pages_total * 16 < sum(tokens_of(handbook(number).text) for number in range(3))
        assert 0 < stats.hit_rate < 0.9, "some was evicted before it was needed again"


async def test_several_continuations() -> None:
    items = exam(handbook(0), 16)
    async with serving() as cluster:
        several = GREEDY | {"n": 3, "temperature": 1.0, "top_k": 1}
        outputs = await cluster.generate_many([item.prompt for item in items], **several)
        for index in range(3):
            require_right(items, [output.completions[index].text for output in outputs])
