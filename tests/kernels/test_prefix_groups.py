"""Groups of decodes that share a prefix: valid, never at a loss, close to the best, and kept from step to step."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from itertools import combinations, count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.kernels.prefix_groups import PrefixGroups, SharedPrefixes, SharingCosts

PAGE = 16
LLAMA_3_8B = SharingCosts.estimate(query_heads=32, kv_heads=8, head_dim=128, kv_itemsize=2, splits=32)
FREE = SharingCosts(token_seconds=1.0, piece_seconds=0.0, launch_seconds=0.0, most_pieces=4)
"""Whatever is read twice is worth a tile."""


class Pages(list[int]):
    """A list that can be referred to weakly."""


def complete(table: list[int], context_length: int, query_length: int = 1) -> list[int]:
    """The pages that end before the last token that the request had before this step."""
    return [page for i, page in enumerate(table) if (i + 1) * PAGE < context_length - query_length]


def common_pages(tables: list[list[int]]) -> int:
    return next((i for i, pages in enumerate(zip(*tables, strict=False)) if len(set(pages)) > 1), min(map(len, tables)))


def groups_of(shared: SharedPrefixes) -> list[tuple[list[int], int]]:
    """(members, tokens) of the tiles that are needed; the arrays are checked to say nothing else."""
    groups = []
    starts = np.zeros_like(shared.starts)
    for tile, (row, tokens) in enumerate(zip(shared.members, shared.prefix_lengths.tolist(), strict=True)):
        members = [place for place in row.tolist() if place >= 0]
        assert row.tolist() == members + [-1] * (len(row) - len(members))
        assert bool(members) == (tokens > 0) == (tile < shared.tiles)
        assert not starts[members].any()  # in no other tile
        starts[members] = tokens
        groups += [(members, tokens)] if members else []
    np.testing.assert_array_equal(shared.starts, starts)
    assert {array.dtype for array in (shared.members, shared.prefix_lengths, shared.starts)} == {np.dtype(np.int32)}
    return groups


def saving_of(shared: SharedPrefixes, costs: SharingCosts) -> float:
    return sum(costs.saving(len(members), tokens) for members, tokens in groups_of(shared))


@st.composite
def batches(draw: st.DrawFn, most: int, longest: int = 40) -> list[Pages]:
    """Tables of up to `most` requests, many of which begin with pages of another."""
    fresh = count()
    tables: list[Pages] = []
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.sampled_from(tables)) if tables and draw(st.integers(0, 5)) else Pages()
        taken = draw(st.integers(0, len(parent)))
        tables.append(Pages([*parent[:taken], *(next(fresh) for _ in range(draw(st.integers(1, longest))))]))
    return tables


costs = st.builds(
    SharingCosts,
    token_seconds=st.just(1.0),
    piece_seconds=st.sampled_from([0.0, 5.0, 40.0]),
    launch_seconds=st.sampled_from([0.0, 300.0]),
    most_pieces=st.sampled_from([1, 4, 32]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(most=12), costs, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.data())
def test_groups_are_valid_and_no_tile_is_a_loss(
    tables: list[Pages], costs: SharingCosts, requests: int, query_length: int, tiles: int, data: st.DataObject
) -> None:
    # Contexts end on the last page of each, or before: pages may have been reserved.
    contexts = [data.draw(st.integers(1, len(table) * PAGE)) for table in tables]
    groups = PrefixGroups(costs, requests_per_tile=requests, page_size=PAGE, query_length=query_length)
    batch = len(tables) + data.draw(st.integers(0, 2))
    shared = groups.update(tables, contexts, batch=batch, tiles=tiles)
    assert shared.members.shape == (tiles, requests)
    assert shared.starts.shape == (batch,)
    for members, tokens in groups_of(shared):
        assert tokens % PAGE == 0
        pages = [complete(tables[place], contexts[place], query_length) for place in members]
        assert common_pages(pages) >= tokens // PAGE
        assert costs.saving(len(members), tokens) > 0
    assert shared.tiles == 0 or saving_of(shared, costs) > costs.launch_seconds


def partitions(places: list[int], largest: int) -> Iterator[list[list[int]]]:
    """All ways to put requests into tiles."""
    if not places:
        yield []
        return
    first, *others = places
    for size in range(min(len(others) + 1, largest)):
        for company in combinations(others, size):
            rest = [place for place in others if place not in company]
            yield from ([[first, *company], *more] for more in partitions(rest, largest))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches(most=6), costs, st.integers(2, 4))
def test_what_is_chosen_saves_at_least_half_of_what_can_be_saved(
    tables: list[Pages], costs: SharingCosts, requests: int
) -> None:
    contexts = [len(table) * PAGE for table in tables]
    shared = PrefixGroups(costs, requests_per_tile=requests, page_size=PAGE).update(
        tables, contexts, batch=len(tables), tiles=len(tables)
    )
    pages = [complete(table, context) for table, context in zip(tables, contexts, strict=True)]
    best = max(
        sum(
            max(0.0, costs.saving(len(tile), PAGE * common_pages([pages[place] for place in tile])))
            for tile in tiles
            if len(tile) > 1
        )
        for tiles in partitions(list(range(len(tables))), requests)
    )
    chosen = saving_of(shared, costs)
    assert chosen <= best * (1 + 1e-9)
    assert chosen >= best / 2 or best / 2 <= costs.launch_seconds


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches(most=14, longest=6), costs, st.data())
def test_keeping_the_tree_changes_nothing(tables: list[Pages], costs: SharingCosts, data: st.DataObject) -> None:
    """Requests come, go, change places and get pages of their own: as if everything were found out anew."""
    fresh = count(100_000)
    contexts = {id(table): len(table) * PAGE + 2 for table in tables}
    kept = PrefixGroups(costs, requests_per_tile=3, page_size=PAGE)
    for _ in range(6):
        running = data.draw(st.permutations(tables))[: data.draw(st.integers(0, len(tables)))]
        lengths = [contexts[id(table)] for table in running]
        shared = kept.update(running, lengths, batch=16, tiles=5)
        anew = PrefixGroups(costs, requests_per_tile=3, page_size=PAGE).update(running, lengths, batch=16, tiles=5)
        for name in ("members", "prefix_lengths", "starts"):
            np.testing.assert_array_equal(getattr(shared, name), getattr(anew, name))
        for table in running:
            table.append(next(fresh))
        contexts = {table: length + PAGE for table, length in contexts.items()}


def test_the_same_batch_gets_the_same_answer() -> None:
    document = list(range(128))
    tables = [Pages([*document, 200 + i]) for i in range(4)]
    groups = PrefixGroups(LLAMA_3_8B, requests_per_tile=16, page_size=64)
    shared = groups.update(tables, [8200] * 4, batch=4, tiles=2)
    assert groups_of(shared) == [([0, 1, 2, 3], 8192)]
    tables[2].append(300)
    assert groups.update(tables, [8201, 8201, 8257, 8201], batch=4, tiles=2) is shared
    assert groups_of(groups.update(tables, [8201] * 4, batch=8, tiles=1)) == [([0, 1, 2, 3], 8192)]
    assert groups.update(tables, [8201] * 4, batch=8, tiles=1).starts.tolist() == [8192] * 4 + [0] * 4
    # Another list is another request, even if it is equal to one that was there.
    tables[1] = Pages([*document[:40], *range(400, 490)])
    assert groups_of(groups.update(tables, [8201] * 4, batch=4, tiles=2)) == [([0, 2, 3], 8192)]
    tables[0], tables[1] = tables[1], tables[0]
    assert groups_of(groups.update(tables, [8201] * 4, batch=4, tiles=2)) == [([1, 2, 3], 8192)]


def test_a_context_that_has_become_shorter_shares_less() -> None:
    tables = [list(range(128)), [*range(127), 500]]
    groups = PrefixGroups(FREE, requests_per_tile=16, page_size=64)
    assert groups_of(groups.update(tables, [8192] * 2, batch=2, tiles=1)) == [([0, 1], 127 * 64)]
    assert groups_of(groups.update(tables, [127 * 64 + 1, 8192], batch=2, tiles=1)) == [([0, 1], 126 * 64)]
    assert groups_of(groups.update(tables, [2, 8192], batch=2, tiles=1)) == []


def test_what_saves_most_is_shared() -> None:
    """A short system prompt that all share, and long documents that some do."""
    system, documents = list(range(16)), [list(range(1000 * i, 1000 * i + 112)) for i in range(1, 4)]
    tables = [[*system, *documents[i % 3], 9000 + i] for i in range(12)] + [[*system, 9100 + i] for i in range(4)]
    contexts = [len(table) * 64 for table in tables]
    groups = PrefixGroups(LLAMA_3_8B, requests_per_tile=16, page_size=64)
    shared = groups.update(tables, contexts, batch=16, tiles=8)
    by_document = [([i, i + 3, i + 6, i + 9], 8192) for i in range(3)]
    assert groups_of(shared) == [*by_document, ([12, 13, 14, 15], 1024)]
    # The best are kept where there is no room for all.
    assert groups_of(groups.update(tables, contexts, batch=16, tiles=3)) == by_document
    # Short documents are worth less than the system prompt for all.
    tables = [[*system, *documents[i // 3][:2], 9000 + i] for i in range(9)]
    shared = groups.update(tables, [len(table) * 64 for table in tables], batch=9, tiles=8)
    assert groups_of(shared) == [([*range(9)], 1024)]


def test_those_below_a_node_part_where_that_pays() -> None:
    """A long document is worth a tile of its own; two more pages for two requests are not."""
    system, document, note = list(range(64)), list(range(1000, 1112)), [2000, 2001]
    begins = [[*system, *document]] * 8 + [[*system, *note]] * 2 + [system] * 6
    tables = [[*begin, 9000 + i] for i, begin in enumerate(begins)]
    shared = PrefixGroups(LLAMA_3_8B, requests_per_tile=16, page_size=64).update(
        tables, [len(table) * 64 for table in tables], batch=16, tiles=4
    )
    assert groups_of(shared) == [([*range(8)], 176 * 64), ([*range(8, 16)], 64 * 64)]


def test_large_groups_are_cut_and_one_request_shares_nothing() -> None:
    tables = [[*range(128), 500 + i] for i in range(33)]
    shared = PrefixGroups(LLAMA_3_8B, requests_per_tile=16, page_size=64).update(tables, [8200] * 33, batch=33, tiles=4)
    assert groups_of(shared) == [([*range(16)], 8192), ([*range(16, 32)], 8192)]
    alone = PrefixGroups(FREE, requests_per_tile=1, page_size=64).update(tables, [8200] * 33, batch=33, tiles=4)
    assert alone.tiles == 0


def test_little_is_not_worth_a_launch() -> None:
    def tiles(requests: int, pages: int) -> int:
        tables = [[*range(pages), 500 + i] for i in range(requests)]
        groups = PrefixGroups(LLAMA_3_8B, requests_per_tile=16, page_size=64)
        return groups.update(tables, [pages * 64 + 9] * requests, batch=64, tiles=4).tiles

    assert tiles(requests=2, pages=16) == 0
    assert tiles(requests=16, pages=2) == 0
    assert tiles(requests=2, pages=128) == 1
    assert tiles(requests=16, pages=16) == 1
    assert tiles(requests=64, pages=16) == 4


def test_prefixes_nested_deeper_than_calls_may_be() -> None:
    depth = sys.getrecursionlimit() + 10
    document = list(range(depth))
    tables = [[*document[:i], depth + i] for i in range(depth)]
    groups = PrefixGroups(FREE, requests_per_tile=depth, page_size=PAGE)
    shared = groups.update(tables, [len(table) * PAGE + 2 for table in tables], batch=depth, tiles=depth)
    assert saving_of(shared, FREE) > depth
    assert groups.update([], [], batch=depth, tiles=depth).tiles == 0


def test_requests_that_are_gone_are_let_go() -> None:
    tables = [Pages([*range(9), 100 + i]) for i in range(4)]
    held = [weakref.ref(table) for table in tables]
    groups = PrefixGroups(FREE, requests_per_tile=16, page_size=PAGE)
    groups.update(tables, [160] * 4, batch=4, tiles=2)
    del tables[1:]
    groups.update(tables, [160], batch=4, tiles=2)
    assert [table() is not None for table in held] == [True, False, False, False]


def test_the_scheduling_side_needs_no_torch() -> None:
    code = "import sys, preble.kernels.prefix_groups; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
