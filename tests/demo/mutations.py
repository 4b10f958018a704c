"""Mistakes that an engine could make, made on purpose: what the oracle is worth is which of these it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from grading import Desk, tokenizer

from preble.demo import Handbook
from preble.engine.batch import ForwardBatch
from preble.engine.engine import Engine
from preble.engine.messages import Submit
from preble.sched.block_table import BlockTable
from preble.sched.prefix_cache import CachedRun, PrefixCache
from preble.sched.sequence import Sequence
from preble.sched.step_plan import Chunk, StepPlan


def pages_of(desk: Desk, handbook: Handbook) -> list[int]:
    """The cached pages that hold the handbook, in order."""
    cache = desk.engine.scheduler.cache
    node, matched = cache._tree.match("", tokenizer().encode(handbook.text))
    return cache.pages_of(node)[: matched // cache.page_size]


def kv_of(desk: Desk, page: int) -> list[torch.Tensor]:
    """K and V of a page in all layers."""
    kv: Any = desk.engine._runner._kv  # type: ignore[attr-defined]
    slots = slice(page * kv.page_size, (page + 1) * kv.page_size)
    return [kv.keys[:, slots], kv.values[:, slots]]


# What is wrong with one page


@contextmanager
def wrong_page(desk: Desk, page: int, instead: int) -> Iterator[None]:
    """Block tables name another page where a request starts from one that is cached."""

    def exchange(sequence: Sequence) -> None:
        assert page in sequence.table.pages
        sequence.table = BlockTable([instead if one == page else one for one in sequence.table.pages])

    with _started(desk, exchange):
        yield


@contextmanager
def spoiled_page(desk: Desk, page: int, source: int | None) -> Iterator[None]:
    """A cached page holds zeros, or what another one holds."""
    kept = [one.clone() for one in kv_of(desk, page)]
    for at, one in enumerate(kv_of(desk, page)):
        one.copy_(torch.zeros_like(one) if source is None else kv_of(desk, source)[at])
    yield
    for one, before in zip(kv_of(desk, page), kept, strict=True):
        one.copy_(before)


# What is wrong with the bookkeeping


@contextmanager
def tables_exchanged(desk: Desk, at: int) -> Iterator[None]:
    """Every second request that starts exchanges a page with the one before it."""
    met: list[Sequence] = []

    def exchange(sequence: Sequence) -> None:
        met.append(sequence)
        if len(met) % 2 == 0:
            tables = [list(one.table.pages) for one in met[-2:]]
            tables[0][at], tables[1][at] = tables[1][at], tables[0][at]
            for one, pages in zip(met[-2:], tables, strict=True):
                one.table = BlockTable(pages)

    with _started(desk, exchange):
        yield


@contextmanager
def matched_too_far(desk: Desk) -> Iterator[None]:
    """A request takes one page more from the cache than its tokens match: a page of whoever went on from there."""
    cache = desk.engine.scheduler.cache

    def go_on(sequence: Sequence) -> None:
        assert sequence.node is not None
        further: Any = list(sequence.node.children.values())
        if further and sequence.remaining > cache.page_size:
            pages = cache.allocate(1)
            assert pages is not None
            for one, other in zip(kv_of(desk, pages[0]), kv_of(desk, further[0].pages[0]), strict=True):
                one.copy_(other)
            sequence.table.extend(pages)
            sequence.computed += cache.page_size

    with _started(desk, go_on):
        yield


@contextmanager
def never_locked() -> Iterator[None]:
    """Pages that a running request reads may be given to others: nobody counts who uses them."""

    def release(cache: PrefixCache, node: CachedRun) -> None:
        cache._clock += 1
        for run in cache._path(node):
            run.last_used = cache._clock
            if not run.children:
                cache._offer(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "_use", lambda cache, run: None)
        patch.setattr(PrefixCache, "release", release)
        yield


@contextmanager
def preempted_forgetful(desk: Desk) -> Iterator[None]:
    """A preempted request begins its answer anew."""
    scheduler = desk.engine.scheduler
    original = scheduler.preempt

    def preempt(request_id: str) -> bool:
        done = original(request_id)
        sequence = scheduler.get(request_id)
        assert sequence is not None
        sequence.length = sequence.prompt_length
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "preempt", preempt)
        yield


@contextmanager
def resumed_forgetful() -> Iterator[None]:
    """A request that comes from another replica begins its answer anew."""
    original = Engine.submit

    def submit(engine: Engine, request: Submit) -> None:
        original(engine, replace(request, token_ids=request.token_ids[: request.prompt_length]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", submit)
        yield


# What is wrong with a step


@contextmanager
def slots_off_by_one(desk: Desk) -> Iterator[None]:
    """K and V are written one slot too far, which at the end of a page is the beginning of the next one's memory."""

    def shift(plan: StepPlan, batch: ForwardBatch) -> None:
        batch.slots += 1

    with _prepared(desk, shift):
        yield


@contextmanager
def positions_from_the_hit(desk: Desk) -> Iterator[None]:
    """Positions are counted from the end of what was found in the cache."""

    def shift(plan: StepPlan, batch: ForwardBatch) -> None:
        for chunk, rows in _rows(plan):
            batch.positions[rows] -= chunk.sequence.cached

    with _prepared(desk, shift):
        yield


@contextmanager
def only_its_own_chunk(desk: Desk) -> Iterator[None]:
    """A chunk of a prompt attends to nothing before it."""

    def cut(plan: StepPlan, batch: ForwardBatch) -> None:
        for at, chunk in enumerate(plan.chunks):
            (first, length), *more = batch.sequences[at].runs
            if chunk.count > 1 and not more:
                runs = ((first + length - chunk.count, chunk.count),)
                batch.sequences[at] = replace(batch.sequences[at], context_length=chunk.count, runs=runs)

    with _prepared(desk, cut):
        yield


@contextmanager
def rows_mixed_up(desk: Desk) -> Iterator[None]:
    """What one request samples is given to another one in the same step."""
    runner: Any = desk.engine._runner
    original = runner.launch

    def launch(plan: StepPlan) -> Any:
        computed = original(plan)
        outcome = computed.outcome
        return replace(computed, outcome=replace(outcome, tokens=outcome.tokens[::-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch", launch)
        yield


@contextmanager
def _started(desk: Desk, change: Callable[[Sequence], object]) -> Iterator[None]:
    """Does `change` to every request that has just taken its prefix from the cache."""
    scheduler = desk.engine.scheduler
    original = scheduler._start

    def start(sequence: Sequence) -> None:
        original(sequence)
        change(sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_start", start)
        yield


@contextmanager
def _prepared(desk: Desk, change: Callable[[StepPlan, ForwardBatch], object]) -> Iterator[None]:
    """Does `change` to what every step shall compute."""
    runner: Any = desk.engine._runner
    original = runner._prepare

    def prepare(plan: StepPlan) -> ForwardBatch:
        batch: ForwardBatch = original(plan)
        change(plan, batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_prepare", prepare)
        yield


def _rows(plan: StepPlan) -> Iterator[tuple[Chunk, slice]]:
    """Chunks, and which rows of the batch are theirs."""
    row = 0
    for chunk in plan.chunks:
        yield chunk, slice(row, row + chunk.count)
        row += chunk.count
