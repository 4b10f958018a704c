"""The prefix cache and its page pool: what is kept, what goes first, and where pages lie."""

from __future__ import annotations

import numpy as np
import pytest

from preble.sched.block_table import BlockTable
from preble.sched.pages import PagePool
from preble.sched.prefix_cache import CacheChange, PrefixCache


def tokens(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def store(cache: PrefixCache, *values: int, namespace: str = "") -> None:
    """Compute a prefix and let go of it."""
    node = cache.lock(namespace, tokens(*values))
    table = BlockTable(cache.pages_of(node))
    pages = cache.allocate(len(values) // cache.page_size - len(table))
    assert pages is not None
    table.extend(pages)
    cache.release(cache.publish(node, tokens(*values), table))


def cached(cache: PrefixCache, *values: int, namespace: str = "") -> int:
    return cache.lookup(namespace, tokens(*values))[0]


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = PrefixCache(pages=6, page_size=1)
    store(cache, 1, 2)
    store(cache, 3, 4)
    store(cache, 5, 6)
    store(cache, 1, 2)  # used again
    assert cache.allocate(2) is not None
    assert [cached(cache, 1, 2), cached(cache, 3, 4), cached(cache, 5, 6)] == [2, 0, 2]
    cache.check({}, [2, 3])


def test_a_prefix_is_evicted_from_its_far_end_and_no_further_than_needed() -> None:
    cache = PrefixCache(pages=8, page_size=1)
    store(cache, 1, 2, 3, 4, 5, 6)
    cache.take_changes()
    assert len(cache.allocate(3) or []) == 3  # two are free
    assert cached(cache, 1, 2, 3, 4, 5, 6) == 5
    [change] = cache.take_changes()
    assert (change.stored, [len(part) for part in change.hashes]) == (False, [1])


def test_a_leaf_goes_before_its_ancestors_and_a_used_one_never() -> None:
    cache = PrefixCache(pages=6, page_size=1)
    store(cache, 1, 2, 3)
    store(cache, 1, 2, 4)
    used = cache.lock("", tokens(1, 2, 3))
    assert cache.available == 3
    assert cache.allocate(3) is not None
    assert cached(cache, 1, 2, 4) == 2
    assert cached(cache, 1, 2, 3) == 3
    assert cache.allocate(1) is None
    cache.release(used)
    assert cache.available == 3


def test_two_that_computed_the_same_share_one_copy() -> None:
    cache = PrefixCache(pages=8, page_size=2)
    root = cache.lock("", tokens(1))
    other = cache.lock("", tokens(1))
    first, second = BlockTable([0, 1]), BlockTable([2, 3, 4])
    assert cache.allocate(5) == [0, 1, 2, 3, 4]
    one = cache.publish(root, tokens(1, 2, 3, 4), first)
    two = cache.publish(other, tokens(1, 2, 3, 4, 5, 6), second)
    assert second.pages == [0, 1, 4]
    assert second.runs == [(0, 2), (4, 1)]
    assert cache.pool.free == 8 - 3
    cache.check({one: 1, two: 1}, [])
    cache.release(one)
    cache.release(two)
    assert cache.cached == 3


def test_namespaces_come_and_go_without_a_trace() -> None:
    cache = PrefixCache(pages=4, page_size=1)
    for tenant in range(50):
        store(cache, 1, 2, 3, namespace=str(tenant))
        assert cached(cache, 1, 2, 3, namespace=str(tenant)) == 3
        assert cached(cache, 1, 2, 3, namespace="nobody") == 0
        cache.check({}, [])
    cache.clear()
    cache.check({}, [])
    assert cache.pool.free == 4
    assert not cache._tree.roots


def test_a_hot_prefix_does_not_grow_the_books() -> None:
    cache = PrefixCache(pages=8, page_size=1)
    for _ in range(5_000):
        store(cache, 1, 2, 3)
    assert len(cache._evictable) < 200


@pytest.mark.parametrize("sequences", [2, 5])
def test_sequences_that_grow_side_by_side_keep_contiguous_pages(sequences: int) -> None:
    pool = PagePool(200)
    tables = [BlockTable(pool.allocate(4, room=30)) for _ in range(sequences)]
    for _ in range(26):
        for table in tables:
            table.extend(pool.allocate(1, after=table.pages[-1], room=1))
    assert [len(table.runs) for table in tables] == [1] * sequences
    assert pool.free == 200 - 30 * sequences


def test_a_fragmented_pool_still_gives_every_page() -> None:
    pool = PagePool(20)
    everything = pool.allocate(20)
    assert sorted(everything) == list(range(20))
    pool.release(everything[::2])
    assert sorted(pool.allocate(10, after=3, room=40)) == everything[::2]
    assert pool.free == 0
    with pytest.raises(AssertionError):
        pool.release([3, 3])


def test_the_version_changes_with_what_is_cached_and_with_nothing_else() -> None:
    cache = PrefixCache(pages=4, page_size=1)
    versions = [cache.version]
    for change in (
        lambda: store(cache, 1, 2),
        lambda: store(cache, 1, 3),
        lambda: cache.allocate(2),  # evicts
    ):
        change()
        versions.append(cache.version)
    assert len(set(versions)) == 4
    cache.release(cache.lock("", tokens(1)))
    cached(cache, 1, 2)
    assert cache.version == versions[-1]


def test_what_others_have_locked_too_is_not_held_alone() -> None:
    cache = PrefixCache(pages=10, page_size=1)
    store(cache, 1, 2, 3, 4, 5)
    long = cache.lock("", tokens(1, 2, 3, 4, 5))
    assert cache.held_alone(long) == 5
    short = cache.lock("", tokens(1, 2))
    assert (cache.held_alone(long), cache.held_alone(short)) == (3, 0)
    before = cache.available
    cache.release(long)
    assert cache.available - before == 3
    assert cache.held_alone(short) == 2


def names(changes: list[CacheChange], namespace: str) -> list[int]:
    return sorted(int(name) for one in changes if one.namespace == namespace for part in one.hashes for name in part)


def test_a_reset_frees_what_nobody_uses_and_keeps_the_rest_for_its_users_alone() -> None:
    cache = PrefixCache(pages=8, page_size=1)
    store(cache, 1, 2, 3)
    store(cache, 1, 2, 4)
    store(cache, 1, 2, 5, namespace="tenant")
    first = cache.lock("", tokens(1, 2, 3))
    second = cache.lock("", tokens(1, 2))
    stored = cache.take_changes()
    cache.reset()
    evicted = cache.take_changes()
    assert not any(change.stored for change in evicted)
    for namespace, pages in (("", 4), ("tenant", 3)):
        assert names(evicted, namespace) == names(stored, namespace)
        assert len(names(evicted, namespace)) == pages
    assert (cached(cache, 1, 2, 3), cached(cache, 1, 2, 5, namespace="tenant")) == (0, 0)
    assert (cache.pool.free, cache.cached, cache.in_use) == (5, 0, 3)
    assert len(cache.pages_of(first)) == 3
    assert (cache.held_alone(first), cache.held_alone(second)) == (1, 0)
    cache.check({first: 1, second: 1}, [])
    cache.release(first)
    assert cache.in_use == 2, "the other still reads these"
    cache.check({second: 1}, [])
    cache.release(second)
    assert (cache.pool.free, cache.take_changes()) == (8, [])
    cache.check({}, [])


def test_what_continues_a_forgotten_prefix_is_not_cached_and_new_copies_are() -> None:
    cache = PrefixCache(pages=8, page_size=1)
    old, table = cache.lock("", tokens(1, 2)), BlockTable(cache.allocate(2) or [])
    cache.reset()
    assert cache.publish(old, tokens(1, 2), table) is old, "it had locked nothing, and is forgotten all the same"
    assert cached(cache, 1, 2) == 0
    store(cache, 1, 2)
    assert cached(cache, 1, 2) == 2
    assert cache.publish(old, tokens(1, 2), table) is old
    cache.check({old: 1}, table.pages)
    cache.release(old)
    assert cached(cache, 1, 2) == 2, "another's namespace is not forgotten with it"
    cache.check({}, table.pages)
