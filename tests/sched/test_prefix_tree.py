"""Residency, predictions and the bound of the global prefix tree, case by case; the state machine does the rest."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched.event_order import REORDERING, EventOrder
from preble.sched.hashing import Hashes, Tokens, page_hashes
from preble.sched.prefix_node import PrefixNode
from preble.sched.prefix_tree import MOST_SWEPT, PrefixTree
from preble.sched.replica_cache import ReplicaCache

PAGE = 2
WINDOW = 10.0


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree(PAGE, WINDOW)


@pytest.fixture
def cache(tree: PrefixTree) -> ReplicaCache:
    return tree.open_cache(100)


def prompt(*tokens: int) -> Tokens:
    return np.array(tokens, np.int32)


def hashes(tokens: Tokens) -> Hashes:
    return page_hashes(tokens, PAGE)


def use(tree: PrefixTree, tokens: Tokens, now: float = 0.0) -> PrefixNode:
    node = tree.use("", tokens, *tree.find("", tokens), now)
    assert node is not None
    return node


def cached(tree: PrefixTree, cache: ReplicaCache, tokens: Tokens, *, confirmed: bool = False) -> int:
    return tree.cached(*tree.find("", tokens), cache.bit, confirmed=confirmed)[cache.slot]


def check(tree: PrefixTree, *caches: ReplicaCache) -> None:
    tree.check_residency(
        caches, [end for node in tree.nodes() for end in node.ends.values() for _ in range(end.requests)]
    )


LONG = prompt(1, 2, 3, 4, 5, 6, 7, 8)


def test_what_is_stored_counts_as_cached_from_the_first_page_on(tree: PrefixTree, cache: ReplicaCache) -> None:
    use(tree, LONG)
    names = hashes(LONG)
    tree.store(cache, names[:1])
    assert cached(tree, cache, LONG) == 2
    tree.store(cache, names[2:])
    assert cached(tree, cache, LONG) == 2, "the second page is missing"
    tree.store(cache, names[1:2])
    assert cached(tree, cache, LONG) == 8
    assert cached(tree, cache, prompt(1, 2, 3, 4, 9, 9)) == 4, "the match ends inside the edge"
    tree.evict(cache, names[3:])
    assert cached(tree, cache, LONG) == 6
    assert cached(tree, cache, LONG, confirmed=True) == 6
    assert cached(tree, cache, prompt(1, 2, 9, 9)) == 2, "no more than matches"
    check(tree, cache)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_an_event_may_name_its_pages_in_any_order(
    tree: PrefixTree, cache: ReplicaCache, order: tuple[int, ...]
) -> None:
    use(tree, LONG)
    use(tree, prompt(1, 2, 3, 4, 9, 9))
    names = hashes(LONG)
    tree.store(cache, names[list(order)])
    assert tree.resident(cache) == set(names.tolist())
    assert cached(tree, cache, LONG) == 8
    tree.evict(cache, names[list(order)])
    assert not tree.resident(cache)
    assert cache.pages == 0
    check(tree, cache)


def test_evicting_a_leaf_does_not_forget_its_ancestors(tree: PrefixTree, cache: ReplicaCache) -> None:
    other = prompt(1, 2, 3, 4, 9, 9)
    use(tree, LONG)
    use(tree, other)
    tree.store(cache, hashes(LONG))
    tree.store(cache, hashes(other)[2:])
    tree.evict(cache, hashes(other)[2:])
    assert cached(tree, cache, other) == 4
    assert cached(tree, cache, LONG) == 8


def test_a_split_divides_residency(tree: PrefixTree, cache: ReplicaCache) -> None:
    use(tree, LONG)
    tree.store(cache, hashes(LONG)[:3])
    use(tree, prompt(1, 2, 3, 4, 9, 9))
    assert cached(tree, cache, LONG) == 6
    use(tree, prompt(1, 2, 3, 4, 5, 6, 9, 9))
    assert cached(tree, cache, LONG) == 6
    check(tree, cache)


def test_pages_are_recognised_when_their_tokens_become_known(tree: PrefixTree, cache: ReplicaCache) -> None:
    other = tree.open_cache(100)
    tree.store(cache, hashes(LONG))
    tree.store(other, hashes(LONG)[:2])
    assert tree.resident(cache) == set(hashes(LONG).tolist())
    tree.evict(cache, hashes(LONG)[3:])
    check(tree, cache, other)
    use(tree, LONG)
    assert (cached(tree, cache, LONG), cached(tree, other, LONG)) == (6, 4)
    check(tree, cache, other)


def test_unknown_pages_are_no_more_than_the_replica_has(tree: PrefixTree) -> None:
    cache = tree.open_cache(3)
    tree.store(cache, hashes(LONG))
    assert tree.resident(cache) == set(hashes(LONG)[1:].tolist()), "the oldest is forgotten"
    check(tree, cache)


def test_a_replica_that_leaves_leaves_no_trace(tree: PrefixTree, cache: ReplicaCache) -> None:
    other = tree.open_cache(100)
    use(tree, LONG)
    for one in (cache, other):
        tree.store(one, hashes(LONG))
        tree.store(one, hashes(prompt(7, 7, 7, 7)))
    tree.close_cache(cache)
    check(tree, other)
    assert cached(tree, other, LONG) == 8
    newcomer = tree.open_cache(100)
    assert newcomer.slot == cache.slot
    assert cached(tree, newcomer, LONG) == 0


def test_a_prediction_lasts_until_every_page_is_confirmed(tree: PrefixTree, cache: ReplicaCache) -> None:
    prediction = tree.predict(cache, use(tree, LONG))
    assert prediction is not None
    assert cached(tree, cache, LONG) == 8
    assert cached(tree, cache, LONG, confirmed=True) == 0
    use(tree, prompt(1, 2, 9, 9))
    tree.store(cache, hashes(LONG)[1:])
    assert cached(tree, cache, LONG) == 8
    tree.store(cache, hashes(LONG)[:1])
    tree.evict(cache, hashes(LONG)[2:])
    assert cached(tree, cache, LONG) == 4, "confirmed, so only what is resident counts"
    tree.retract(prediction)
    check(tree, cache)


def test_a_prediction_ends_with_the_last_of_its_requests(tree: PrefixTree, cache: ReplicaCache) -> None:
    first = tree.predict(cache, use(tree, LONG))
    second = tree.predict(cache, use(tree, LONG))
    shorter = tree.predict(cache, use(tree, LONG[:4]))
    assert first is second is not None
    assert shorter is not None
    tree.retract(first)
    assert cached(tree, cache, LONG) == 8
    tree.retract(first)
    assert cached(tree, cache, LONG) == 4
    tree.retract(shorter)
    assert cached(tree, cache, LONG) == 0
    check(tree, cache)


def test_nothing_is_predicted_that_is_there(tree: PrefixTree, cache: ReplicaCache) -> None:
    use(tree, LONG)
    tree.store(cache, hashes(LONG))
    assert tree.predict(cache, use(tree, LONG)) is None
    assert tree.predict(cache, use(tree, LONG[:4])) is None


def test_what_nobody_holds_is_kept_for_the_window(tree: PrefixTree, cache: ReplicaCache) -> None:
    use(tree, LONG, now=0.0)
    use(tree, prompt(1, 2, 9, 9), now=5.0)
    tree.sweep(WINDOW)
    assert tree.pages == 5
    tree.sweep(WINDOW + 1)
    assert tree.pages == 2, "what was used later keeps its prefix"
    tree.sweep(5.0 + WINDOW + 1)
    assert tree.pages == 0
    assert not tree.roots, "an empty namespace is forgotten"
    check(tree, cache)


def test_what_is_held_is_kept_and_the_rest_of_its_edge_is_not(tree: PrefixTree, cache: ReplicaCache) -> None:
    use(tree, LONG)
    tree.store(cache, hashes(LONG)[:3])
    tree.sweep(WINDOW + 1)
    assert tree.pages == 3
    check(tree, cache)
    tree.evict(cache, hashes(LONG)[2:])
    assert tree.pages == 2
    use(tree, LONG, now=WINDOW + 1)
    assert cached(tree, cache, LONG) == 4
    tree.evict(cache, hashes(LONG))
    assert tree.pages == 4, "used within the window"
    tree.sweep(3 * WINDOW)
    assert tree.pages == 0
    check(tree, cache)


def test_predicted_prefixes_outlive_the_window(tree: PrefixTree, cache: ReplicaCache) -> None:
    prediction = tree.predict(cache, use(tree, LONG))
    assert prediction is not None
    tree.sweep(WINDOW + 1)
    assert tree.pages == 4
    tree.retract(prediction)
    use(tree, LONG, now=WINDOW + 1)
    tree.sweep(3 * WINDOW)
    assert tree.pages == 0


def test_a_sweep_after_a_pause_takes_turns(tree: PrefixTree) -> None:
    for token in range(3 * MOST_SWEPT):
        use(tree, prompt(token, token))
    for left in (2, 1, 0):
        tree.sweep(100 * WINDOW)
        assert tree.pages == left * MOST_SWEPT
        check(tree)


# Which statements are news


@given(st.permutations(range(1, 9)), st.data())
def test_the_newest_statement_about_a_page_wins(order: list[int], data: st.DataObject) -> None:
    pages = st.sets(st.integers(0, 3), min_size=1)
    statements = {sequence: (data.draw(pages), data.draw(st.booleans())) for sequence in order}
    events, have, newest = EventOrder(), set(), dict.fromkeys(range(4), 0)
    for sequence in [*order, *data.draw(st.lists(st.sampled_from(order)))]:
        about, stored = statements[sequence]
        news = events.news(sequence, np.array(sorted(about), np.uint64))
        if news is not None:
            have = have | set(news.tolist()) if stored else have - set(news.tolist())
        newest.update({page: sequence for page in about if sequence > newest[page]})
        assert have == {page for page, sequence in newest.items() if sequence and statements[sequence][1]}
    assert events.remembered == 0, "nothing is missing, so nothing need be remembered"


def test_events_in_order_are_not_remembered() -> None:
    events = EventOrder(after=7)
    assert events.news(7, hashes(LONG)) is None
    for sequence in range(8, 20):
        assert events.news(sequence, hashes(LONG)) is not None
        assert events.news(sequence, hashes(LONG)) is None
        assert events.remembered == 0


def test_a_lost_event_is_given_up_in_the_end() -> None:
    events = EventOrder()
    for sequence in range(2, REORDERING + 2):
        assert events.news(sequence, np.array([sequence], np.uint64)) is not None
    assert events.remembered == REORDERING
    assert events.news(REORDERING + 2, np.array([0], np.uint64)) is not None
    assert events.remembered == 0
    assert events.news(1, np.array([0], np.uint64)) is None
