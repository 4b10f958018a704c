"""The hottest stretches of the prefix tree, and who has them."""

from __future__ import annotations

import numpy as np

from preble.sched import Finished, GlobalScheduler, HotPrefix, Placement, Stored
from preble.sched.hashing import namespace_salt, page_hashes

PAGE = 4


def scheduler(policy: str = "round-robin") -> GlobalScheduler:
    return GlobalScheduler(3, capacity_tokens=4000, page_size=PAGE, policy=policy, window=100.0)


def run(
    one: GlobalScheduler, name: str, tokens: list[int], now: float = 0.0, namespace: str = "", keep: int = 99
) -> int:
    """A request comes, leaves `keep` pages in the cache of its replica, and goes. Returns the replica: another one for
    each of three requests in a row."""
    placement = one.submit(name, tokens, now=now, namespace=namespace)
    assert isinstance(placement, Placement)
    one.apply(Stored(placement.replica, 1, "", hashes(tokens, namespace)[:keep]), now=now)
    one.apply(Finished(placement.replica, name), now=now)
    return placement.replica


def hashes(tokens: list[int], namespace: str = "") -> np.ndarray:
    return page_hashes(np.array(tokens, np.int32), PAGE, base=namespace_salt(namespace))


SYSTEM = list(range(8))
"""Two pages."""
BOOK = [*SYSTEM, *range(100, 140)]
"""… and ten more."""


def test_the_stretch_whose_sharing_saves_most_comes_first_with_those_who_have_it() -> None:
    one = scheduler()
    some = run(one, "a", [*BOOK, 1, 1, 1, 1])
    other = run(one, "b", [*BOOK, 2, 2, 2, 2])
    third = run(one, "c", [*SYSTEM, 3, 3, 3, 3])
    book, system = one.hottest_prefixes()
    assert book == HotPrefix("", 8, 48, int(hashes(BOOK)[-1]), 2, {some: 40, other: 40})
    assert system == HotPrefix("", 0, 8, int(hashes(SYSTEM)[-1]), 3, {some: 8, other: 8, third: 8})
    assert (book.tokens, book.shared_tokens) == (40, 40)
    assert (system.tokens, system.shared_tokens) == (8, 16)
    assert one.hottest_prefixes(1) == [book]
    assert one.hottest_prefixes(0) == []


def test_what_one_prompt_alone_contains_is_not_hot() -> None:
    one = scheduler()
    run(one, "a", BOOK)
    assert one.hottest_prefixes() == []


def test_a_replica_that_has_a_part_of_it_says_how_much() -> None:
    one = scheduler()
    all_of_it = run(one, "a", BOOK)
    a_part = run(one, "b", BOOK, keep=5)
    run(one, "c", BOOK, keep=0)
    (book,) = one.hottest_prefixes()
    assert book.replicas == {all_of_it: 48, a_part: 5 * PAGE}


def test_few_uses_of_a_long_stretch_are_less_than_many_of_a_short_one() -> None:
    one = scheduler()
    for number in range(2):
        run(one, f"long{number}", BOOK[8:])
    for number in range(5):
        run(one, f"short{number}", list(range(12)))
    assert [(hot.tokens, hot.uses, hot.shared_tokens) for hot in one.hottest_prefixes()] == [(12, 5, 48), (40, 2, 40)]


def test_namespaces_share_nothing_and_equals_are_in_order_of_their_names() -> None:
    one = scheduler()
    for number in range(2):
        for namespace in ("middle", "right", "left"):
            run(one, f"{namespace}{number}", BOOK, namespace=namespace)
    hot = one.hottest_prefixes()
    assert [(one.namespace, one.uses) for one in hot] == [("left", 2), ("middle", 2), ("right", 2)]
    assert hot[0].name == int(hashes(BOOK, "left")[-1])


def test_uses_from_before_the_window_no_longer_count() -> None:
    one = scheduler()
    for number in range(3):
        run(one, f"old{number}", BOOK, now=0.0)
    for number in range(2):
        run(one, f"new{number}", SYSTEM, now=150.0)
    assert [(hot.end, hot.uses) for hot in one.hottest_prefixes()] == [(8, 2)]


def test_replicas_go_by_their_numbers_also_where_a_slot_is_used_again() -> None:
    one = scheduler()
    one.remove_replica(0, now=0.0)
    late = one.add_replica()
    assert late == 3
    for number in range(3):
        run(one, f"{number}", BOOK)
    (book,) = one.hottest_prefixes()
    assert list(book.replicas) == [1, 2, 3]


def test_looking_changes_nothing() -> None:
    one = scheduler("e2")
    run(one, "a", BOOK)
    run(one, "b", BOOK)
    first = one.hottest_prefixes()
    assert one.hottest_prefixes() == first
    one.check()
