"""Residency, pins and the bound of the global prefix tree, case by case; the state machine does the rest."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched.event_order import REORDERING, EventOrder
from preble.sched.hashing import Hashes, Tokens, namespace_salt, page_hashes
from preble.sched.prefix_node import PrefixNode
from preble.sched.prefix_stats import PrefixStats
from preble.sched.prefix_tree import MOST_SWEPT, PrefixTree
from preble.sched.replica_cache import MOST_CHANGES, MOST_VICTIMS, ReplicaCache
from preble.sched.testing import deliveries, prompt_families

PAGE = 2
WINDOW = 10.0


def seconds(new_tokens: int, cached_tokens: int) -> float:
    """Attention to what lies before makes late tokens dearer."""
    return new_tokens * (1.0 + cached_tokens / 100)


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree(PAGE, WINDOW)


@pytest.fixture
def cache(tree: PrefixTree) -> ReplicaCache:
    return tree.open_cache(100, seconds)


@pytest.fixture
def other(tree: PrefixTree) -> ReplicaCache:
    return tree.open_cache(100, seconds)


def prompt(*tokens: int) -> Tokens:
    return np.array(tokens, np.int32)


def hashes(tokens: Tokens, namespace: str = "") -> Hashes:
    return page_hashes(tokens, PAGE, base=namespace_salt(namespace))


def enter(tree: PrefixTree, cache: ReplicaCache, tokens: Tokens, now: float = 0.0, namespace: str = "") -> PrefixNode:
    node = tree.enter(namespace, tokens, tree.find(namespace, tokens), cache, now)
    assert node is not None
    return node


def share(tree: PrefixTree, cache: ReplicaCache, tokens: Tokens, now: float = 0.0) -> None:
    """Two prompts alike come and go, so that their pages are remembered for the window."""
    ends = [enter(tree, cache, tokens, now) for _ in range(2)]
    for end in ends:
        tree.leave(cache, end)


def cached(
    tree: PrefixTree, cache: ReplicaCache, tokens: Tokens, *, confirmed: bool = False, namespace: str = ""
) -> int:
    return tree.cached(tree.find(namespace, tokens), cache.bit, confirmed=confirmed)[cache.slot]


def check(tree: PrefixTree, *caches: ReplicaCache, in_flight: tuple[tuple[PrefixNode, ReplicaCache], ...] = ()) -> None:
    tree.check_residency(caches, [(node, cache.slot) for node, cache in in_flight])


LONG = prompt(1, 2, 3, 4, 5, 6, 7, 8)
BRANCH = prompt(1, 2, 3, 4, 9, 9)


# Residency


def test_what_is_stored_counts_as_cached_from_the_first_page_on(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache
) -> None:
    share(tree, other, LONG)
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
    assert cached(tree, other, LONG) == 0
    check(tree, cache, other)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_an_event_may_name_its_pages_in_any_order(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache, order: tuple[int, ...]
) -> None:
    share(tree, other, LONG)
    share(tree, other, BRANCH)
    names = hashes(LONG)
    tree.store(cache, names[list(order)])
    assert tree.resident(cache) == set(names.tolist())
    assert cached(tree, cache, LONG) == 8
    tree.evict(cache, names[list(order)])
    assert not tree.resident(cache)
    assert cache.pages == cache.evictable_pages == 0
    check(tree, cache, other)


def test_evicting_a_leaf_does_not_forget_its_ancestors(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache
) -> None:
    for tokens in (LONG, BRANCH):
        tree.leave(other, enter(tree, other, tokens))
        tree.store(cache, hashes(tokens))
    share(tree, other, BRANCH)
    tree.evict(cache, hashes(BRANCH)[2:])
    assert cached(tree, cache, BRANCH) == 4
    assert cached(tree, cache, LONG) == 8
    tree.evict(cache, hashes(LONG)[2:])
    assert cached(tree, cache, LONG) == 4
    assert tree.resident(cache) == set(hashes(LONG)[:2].tolist())
    check(tree, cache, other)


def test_a_split_divides_residency_and_pins(tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache) -> None:
    first = enter(tree, cache, LONG)
    tree.store(cache, hashes(LONG)[:3])
    second = enter(tree, other, BRANCH)
    assert cached(tree, cache, LONG, confirmed=True) == 6
    assert cached(tree, cache, LONG) == 8
    third = enter(tree, other, prompt(1, 2, 3, 4, 5, 6, 9, 9))
    check(tree, cache, other, in_flight=((first, cache), (second, other), (third, other)))
    assert (cache.pinned_pages, other.pinned_pages) == (4, 5)
    assert (cache.idle_pages, other.idle_pages) == (0, 0)
    tree.leave(cache, first)
    assert cached(tree, cache, LONG) == 6
    assert cache.idle_pages == 3
    check(tree, cache, other, in_flight=((second, other), (third, other)))


# Pins: a prompt's pages count as cached where it was placed, until it ends


def test_a_prompt_in_flight_counts_as_cached(tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache) -> None:
    end = enter(tree, cache, LONG)
    assert cached(tree, cache, LONG) == 8
    assert cached(tree, cache, BRANCH) == 4
    assert cached(tree, cache, LONG, confirmed=True) == 0
    assert cached(tree, other, LONG) == 0
    check(tree, cache, other, in_flight=((end, cache),))


def test_a_pin_holds_whatever_the_replica_reports_until_the_prompt_ends(tree: PrefixTree, cache: ReplicaCache) -> None:
    end = enter(tree, cache, LONG)
    tree.store(cache, hashes(LONG))
    tree.evict(cache, hashes(LONG)[2:])
    assert (cached(tree, cache, LONG), cached(tree, cache, LONG, confirmed=True)) == (8, 4)
    check(tree, cache, in_flight=((end, cache),))
    tree.leave(cache, end)
    assert cached(tree, cache, LONG) == 4
    tree.evict(cache, hashes(LONG)[:2])
    assert cached(tree, cache, LONG) == 0
    check(tree, cache)


def test_a_pin_ends_with_the_last_prompt_that_contains_the_page(tree: PrefixTree, cache: ReplicaCache) -> None:
    ends = [enter(tree, cache, tokens) for tokens in (LONG, LONG, LONG[:4])]
    assert cache.pinned_pages == 4, "shared pages are counted once"
    tree.leave(cache, ends[0])
    assert cached(tree, cache, LONG) == 8
    tree.leave(cache, ends[1])
    assert cached(tree, cache, LONG) == 4
    assert cache.pinned_pages == 2
    tree.leave(cache, ends[2])
    assert cached(tree, cache, LONG) == 0
    assert cache.pinned_pages == 0
    check(tree, cache)


def test_pages_in_use_cannot_be_evicted(tree: PrefixTree, cache: ReplicaCache) -> None:
    tree.store(cache, hashes(prompt(5, 5)))
    end = enter(tree, cache, LONG[:4])
    tree.store(cache, hashes(LONG))
    assert cache.evictable_pages == 3, "two pages are in use; output and strangers are not known to be"
    tree.leave(cache, end)
    assert cache.evictable_pages == 5
    check(tree, cache)


# Strangers: pages whose tokens no prompt has told yet, as those of output


def test_a_prompt_finds_output_that_no_prompt_contained(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache
) -> None:
    end = enter(tree, cache, LONG[:4])
    tree.store(cache, hashes(LONG))
    tree.store(other, hashes(LONG)[2:3])
    assert (tree.pages, cached(tree, cache, LONG)) == (2, 8)
    assert cached(tree, cache, LONG, confirmed=True) == 8
    assert cached(tree, other, LONG) == 0, "it has none of what comes before"
    tree.leave(cache, end)
    tree.evict(cache, hashes(LONG)[3:])
    assert cached(tree, cache, LONG) == 6
    assert cached(tree, cache, prompt(1, 2, 3, 4, 5, 6, 9, 9)) == 6
    assert cached(tree, cache, prompt(1, 2, 3, 4, 5, 5, 7, 8)) == 4
    check(tree, cache, other)


def test_strangers_go_on_where_a_match_ends_inside_an_edge(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache
) -> None:
    share(tree, other, BRANCH)
    tree.store(cache, hashes(LONG))
    assert cached(tree, cache, LONG) == 8, "though the rest of the known prompt is not here"
    tree.evict(cache, hashes(LONG)[1:2])
    assert cached(tree, cache, LONG) == 2


def test_pages_are_recognised_when_a_prompt_tells_their_tokens(
    tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache
) -> None:
    third = tree.open_cache(100, seconds)
    tree.store(cache, hashes(LONG))
    tree.store(other, hashes(LONG)[:2])
    assert tree.resident(cache) == set(hashes(LONG).tolist())
    tree.evict(cache, hashes(LONG)[3:])
    check(tree, cache, other, third)
    end = enter(tree, third, LONG)
    assert (cached(tree, cache, LONG), cached(tree, other, LONG)) == (6, 4)
    assert (cache.pages, len(cache.unknown), cache.evictable_pages) == (3, 0, 3)
    check(tree, cache, other, third, in_flight=((end, third),))


def test_strangers_are_no_more_than_the_replica_has_pages(tree: PrefixTree, other: ReplicaCache) -> None:
    cache = tree.open_cache(3, seconds)
    for one in (cache, other):
        tree.store(one, hashes(LONG))
    assert tree.resident(cache) == set(hashes(LONG)[1:].tolist()), "the oldest is forgotten"
    assert tree.resident(other) == set(hashes(LONG).tolist())
    check(tree, cache, other)


def test_no_stranger_crosses_a_namespace(tree: PrefixTree, cache: ReplicaCache) -> None:
    tree.store(cache, hashes(LONG, "tenant"))
    assert cached(tree, cache, LONG, namespace="tenant") == 8
    assert cached(tree, cache, LONG) == cached(tree, cache, LONG, namespace="other") == 0
    tree.leave(cache, enter(tree, cache, LONG, namespace="tenant"))
    assert cached(tree, cache, LONG, namespace="tenant") == 8
    assert cached(tree, cache, LONG) == cached(tree, cache, LONG, namespace="other") == 0
    check(tree, cache)


def test_a_page_dropped_by_the_window_and_stored_again_is_a_stranger(tree: PrefixTree, cache: ReplicaCache) -> None:
    share(tree, cache, LONG)
    tree.sweep(2 * WINDOW)
    assert tree.pages == 0
    tree.store(cache, hashes(LONG))
    assert (tree.pages, cached(tree, cache, LONG)) == (0, 8)
    check(tree, cache)


@given(prompt_families(PAGE, max_prompts=5), st.data())
def test_residency_does_not_depend_on_the_order_of_events(family: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Statements about the pages of prompts that share prefixes, late and repeated, while these become known."""
    tree = PrefixTree(PAGE, WINDOW)
    cache, other = tree.open_cache(100, seconds), tree.open_cache(100, seconds)
    prompts = [prompt(*tokens) for tokens in family]
    held: set[int] = set()
    events: list[tuple[int, bool, Hashes]] = []
    for tokens in prompts:
        stored = data.draw(st.booleans())
        about = [name for name in hashes(tokens).tolist() if (name in held) is not stored]
        held = held | set(about) if stored else held - set(about)
        events.append((len(events) + 1, stored, np.array(about, np.uint64)))
    order = EventOrder()
    for number, (sequence, stored, about) in enumerate(data.draw(deliveries(events, held_back=3))):
        if number % 2 and len(prompts[sequence - 1]) >= PAGE:
            tree.leave(other, enter(tree, other, prompts[sequence - 1]))
        news = order.news(sequence, about)
        if news is not None:
            (tree.store if stored else tree.evict)(cache, news)
        check(tree, cache, other)
    assert tree.resident(cache) == held
    for tokens in prompts:
        names = hashes(tokens).tolist()
        run = next((page for page, name in enumerate(names) if name not in held), len(names))
        assert cached(tree, cache, tokens) == cached(tree, cache, tokens, confirmed=True) == run * PAGE


# What is remembered


def test_a_replica_that_leaves_leaves_no_trace(tree: PrefixTree, cache: ReplicaCache, other: ReplicaCache) -> None:
    share(tree, other, LONG)
    for one in (cache, other):
        tree.store(one, hashes(LONG))
        tree.store(one, hashes(prompt(7, 7, 7, 7)))
    tree.close_cache(cache)
    check(tree, other)
    assert cached(tree, other, LONG) == 8
    newcomer = tree.open_cache(100, seconds)
    assert newcomer.slot == cache.slot
    assert cached(tree, newcomer, LONG) == cached(tree, newcomer, prompt(7, 7, 7, 7)) == 0


def test_what_two_prompts_shared_is_kept_for_the_window(tree: PrefixTree, cache: ReplicaCache) -> None:
    for tokens in (LONG, LONG, prompt(1, 2, 9, 9)):
        tree.leave(cache, enter(tree, cache, tokens))
    assert tree.pages == 0, "whatever ended before the next one came was not shared"
    ends = [enter(tree, cache, *one) for one in ((LONG, 1.0), (LONG, 5.0), (prompt(1, 2, 9, 9), 6.0))]
    for end in ends:
        tree.leave(cache, end)
    assert tree.pages == 4, "nobody shared the last page of the third prompt"
    tree.sweep(WINDOW + 1)
    assert tree.pages == 4
    tree.sweep(WINDOW + 2)
    assert tree.pages == 1, "the first page has two uses still"
    check(tree, cache)
    tree.sweep(5.0 + WINDOW + 1)
    assert tree.pages == 0
    assert not tree.roots, "an empty namespace is forgotten"
    check(tree, cache)


def test_what_one_prompt_alone_contained_goes_with_it(tree: PrefixTree, cache: ReplicaCache) -> None:
    end = enter(tree, cache, LONG)
    tree.store(cache, hashes(LONG)[:3])
    tree.leave(cache, end)
    assert tree.pages == 3, "what is held is kept, and the rest of its edge is not"
    assert cached(tree, cache, LONG) == 6
    tree.evict(cache, hashes(LONG)[2:3])
    assert tree.pages == 2
    tree.evict(cache, hashes(LONG)[:2])
    assert tree.pages == 0
    check(tree, cache)


def test_a_page_behind_keeps_those_before_it(tree: PrefixTree, cache: ReplicaCache) -> None:
    share(tree, cache, LONG)
    tree.store(cache, hashes(LONG)[2:3])
    tree.sweep(2 * WINDOW)
    assert tree.pages == 3
    assert cached(tree, cache, LONG) == 0
    tree.evict(cache, hashes(LONG)[2:3])
    assert tree.pages == 0
    check(tree, cache)


def test_a_prompt_in_flight_outlives_the_window(tree: PrefixTree, cache: ReplicaCache) -> None:
    end = enter(tree, cache, LONG)
    tree.sweep(2 * WINDOW)
    assert (tree.pages, cached(tree, cache, LONG)) == (4, 8)
    check(tree, cache, in_flight=((end, cache),))
    tree.leave(cache, end)
    assert tree.pages == 0


def test_uses_that_outlive_their_pages_are_forgotten_in_turn(tree: PrefixTree, cache: ReplicaCache) -> None:
    """A prompt is gone before its use is outdated; the pages it shared count it until then."""
    for tokens, now in ((LONG[:4], 0.0), (LONG, 1.0)):
        tree.store(cache, hashes(LONG[:4]))
        tree.leave(cache, enter(tree, cache, tokens, now))
    tree.evict(cache, hashes(LONG))
    check(tree, cache)
    assert tree.pages == 2
    end = enter(tree, cache, BRANCH, 2.0)
    tree.sweep(WINDOW + 0.5)
    check(tree, cache, in_flight=((end, cache),))
    tree.leave(cache, end)
    assert tree.pages == 2
    tree.sweep(WINDOW + 1.5)
    assert tree.pages == 0
    check(tree, cache)


def test_a_sweep_after_a_pause_takes_turns(tree: PrefixTree, cache: ReplicaCache) -> None:
    for token in range(3 * MOST_SWEPT // 2):
        share(tree, cache, prompt(token, token))
    for left in (2, 1, 0):
        tree.sweep(100 * WINDOW)
        assert tree.pages == left * MOST_SWEPT // 2
        check(tree, cache)


# Key portions


def test_the_key_portion_is_the_deepest_run_longer_than_all_before_it(tree: PrefixTree, cache: ReplicaCache) -> None:
    documents = [prompt(*[0] * 4, *[token] * 20) for token in (1, 2)]
    questions = [np.concatenate((documents[0], prompt(*[token] * 6))) for token in (3, 4)]
    ends = [enter(tree, cache, tokens) for tokens in (*documents, *questions)]
    key = tree.key_portion(ends[2], ends[2].end)
    assert key is ends[0], "the document, neither the instructions before it nor the question behind"
    assert (key.start, key.end) == (4, 24)
    match = tree.find("", documents[0][:6])
    assert match.node is key
    instructions = tree.key_portion(match.node, match.matched)
    assert instructions is key.parent, "of the document's own tokens only those matched count"
    assert tree.key_portion(tree.root(""), 0) is None


def test_books_of_a_key_portion_move_up_with_it(tree: PrefixTree, cache: ReplicaCache) -> None:
    end = enter(tree, cache, LONG)
    end.stats = stats = PrefixStats(0.0)
    enter(tree, cache, LONG[:2])
    assert end.stats is None
    upper = end.parent
    assert isinstance(upper, PrefixNode)
    assert upper.stats is stats, "the first page alone is the key portion now"
    deep = enter(tree, cache, prompt(*LONG, *[9] * 20))
    deep.stats = stats
    enter(tree, cache, prompt(*LONG, *[9] * 6))
    assert deep.stats is stats, "six tokens are fewer than the eight before them"


# The price of an eviction (M)


def test_an_eviction_costs_what_is_computed_again_for_all_who_used_it(tree: PrefixTree, cache: ReplicaCache) -> None:
    for tokens in (LONG[:4], prompt(5, 5, 5, 5, 5, 5)):
        tree.store(cache, hashes(tokens))
        share(tree, cache, tokens)
    assert cache.eviction_seconds(0) == 0.0
    assert cache.eviction_seconds(2) == 2 * seconds(4, 0), "the least recently used first, twice used"
    assert cache.eviction_seconds(5) == 2 * seconds(4, 0) + 2 * seconds(6, 0)
    assert cache.eviction_seconds(1) == seconds(4, 0), "half of a run at half of its price"
    assert cache.recomputing_seconds(0) == 0.0
    assert cache.recomputing_seconds(2) == seconds(4, 0), "once, whoever misses it"
    assert cache.recomputing_seconds(5) == seconds(4, 0) + seconds(6, 0)
    assert cache.recomputing_seconds(1) == seconds(4, 0) / 2
    tree.leave(cache, enter(tree, cache, LONG[:4]))
    assert cache.eviction_seconds(3) == 2 * seconds(6, 0), "it was used again, so the other goes first"
    assert cache.recomputing_seconds(3) == seconds(6, 0)
    tree.sweep(2 * WINDOW)
    tree.store(cache, hashes(prompt(8, 8)))
    assert cache.eviction_seconds(6) == 0.0, "nobody used any of it within the window"
    assert cache.recomputing_seconds(6) == 0.0


def test_pages_in_use_have_no_price_and_strangers_go_first(tree: PrefixTree, cache: ReplicaCache) -> None:
    tree.store(cache, hashes(LONG))
    share(tree, cache, LONG[:4])
    end = enter(tree, cache, prompt(5, 5))
    tree.store(cache, hashes(prompt(5, 5)))
    assert cache.evictable_pages == 4
    assert cache.eviction_seconds(2) == cache.recomputing_seconds(2) == 0.0, "strangers cost nothing"
    assert cache.eviction_seconds(4) == 2 * seconds(4, 0)
    assert cache.recomputing_seconds(4) == seconds(4, 0)
    tree.leave(cache, end)
    assert cache.eviction_seconds(5) == 2 * seconds(4, 0) + seconds(2, 0)
    assert cache.recomputing_seconds(5) == seconds(4, 0) + seconds(2, 0)


def test_prices_are_kept_up_to_date_now_and_then(tree: PrefixTree, other: ReplicaCache) -> None:
    """With many runs not every change prices them anew; in between, what went is taken off."""
    cache = tree.open_cache(10_000, seconds)
    runs = [prompt(token, token) for token in range(8 * MOST_CHANGES)]
    for tokens in runs:
        tree.store(cache, hashes(tokens))
        share(tree, other, tokens)
    assert cache.eviction_seconds(1) in (0.0, 2 * seconds(2, 0))
    for _ in range(MOST_CHANGES):
        cache.changed()
    each = 2 * seconds(2, 0)
    assert cache.eviction_seconds(3) == 3 * each
    assert cache.eviction_seconds(10 * MOST_VICTIMS) == pytest.approx(10 * MOST_VICTIMS * each)
    assert cache.recomputing_seconds(10 * MOST_VICTIMS) == pytest.approx(5 * MOST_VICTIMS * each)
    tree.evict(cache, hashes(runs[0]))
    assert cache.eviction_seconds(3) == 3 * each, "the next three"
    assert cache.recomputing_seconds(3) == 3 * each / 2


def test_recomputing_counts_used_pages_once_however_many_used_them(tree: PrefixTree, cache: ReplicaCache) -> None:
    """5, 2 and 3 uses of three prompts; the tree never heard of the tokens of a fourth one. Those of the first were
    used before the window began."""
    prompts = [prompt(token, token, token, token) for token in (1, 2, 3)]
    for tokens, uses in zip(prompts, (5, 2, 3), strict=True):
        now = 0.0 if tokens is prompts[0] else WINDOW
        tree.store(cache, hashes(tokens))
        share(tree, cache, tokens, now)
        for _ in range(uses - 2):
            tree.leave(cache, enter(tree, cache, tokens, now))
    tree.store(cache, hashes(prompt(4, 4)))
    tree.sweep(WINDOW + 1)
    tree.leave(cache, enter(tree, cache, prompts[0][:2], WINDOW + 1))
    for one, pages, recomputed, weighed in (
        ("the stranger", 1, 0.0, 0.0),
        ("the unused half of the first", 2, 0.0, 0.0),
        ("the second", 4, 4.0, 8.0),
        ("the third", 6, 8.0, 20.0),
        ("the half of the first that was used again", 7, 10.0, 22.0),
    ):
        assert cache.recomputing_seconds(pages) == pytest.approx(recomputed), one
        assert cache.eviction_seconds(pages) == pytest.approx(weighed), one


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
