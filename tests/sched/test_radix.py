"""The radix tree against a set of prefixes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched.radix import LONG, Node, RadixTree


class Counted(Node):
    """Carries its page numbers, so that a split can be seen to divide them."""

    __slots__ = ("pages",)

    def __init__(self, tokens: np.ndarray, hashes: np.ndarray, parent: Node | None, start: int) -> None:
        super().__init__(tokens, hashes, parent, start)
        self.pages: list[int] = []


class CountedTree(RadixTree[Counted]):
    def _split_payload(self, upper: Counted, lower: Counted, pages: int) -> None:
        upper.pages, lower.pages = lower.pages[:pages], lower.pages[pages:]


def insert(tree: CountedTree, namespace: str, prompt: np.ndarray) -> Counted:
    node, matched = tree.match(namespace, prompt)
    if matched < node.end:
        node = tree.split(node, matched)
    if len(prompt) - matched >= tree.page_size:
        node = tree.extend(node, prompt)
        node.pages = list(range(node.start // tree.page_size, node.end // tree.page_size))
    return node


prompts = st.lists(st.integers(0, 2), max_size=12)
namespaces = st.sampled_from(["", "tenant"])


@given(st.integers(1, 4), st.lists(st.tuples(namespaces, prompts), max_size=12), prompts, namespaces)
def test_a_match_is_the_longest_known_prefix(
    page_size: int, inserted: list[tuple[str, list[int]]], query: list[int], namespace: str
) -> None:
    tree = CountedTree(Counted, page_size)
    known = set()
    for where, prompt in inserted:
        end = insert(tree, where, np.array(prompt, np.int32))
        whole = len(prompt) - len(prompt) % page_size
        assert end.end == whole
        known |= {(where, *prompt[:stop]) for stop in range(page_size, whole + 1, page_size)}
        tree.check()
    node, matched = tree.match(namespace, np.array(query, np.int32))
    expected = 0
    while expected + page_size <= len(query) and (namespace, *query[: expected + page_size]) in known:
        expected += page_size
    assert matched == expected
    assert node.start <= matched <= node.end
    assert sum(len(one.tokens) for one in tree.nodes()) == page_size * len(known)
    for one in tree.nodes():
        assert one.pages == list(range(one.start // page_size, one.end // page_size))


@given(st.integers(1, 3), st.lists(prompts, min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_leaves_can_be_removed_until_nothing_is_left(page_size: int, inserted: list[list[int]], random) -> None:
    tree = CountedTree(Counted, page_size)
    for prompt in inserted:
        insert(tree, "", np.array(prompt, np.int32))
    while leaves := [node for node in tree.nodes() if not node.children]:
        leaf = random.choice(leaves)
        tree.remove(leaf)
        assert leaf.parent is None
        tree.check()
    assert not list(tree.nodes())


def test_a_walk_goes_on_from_any_node() -> None:
    tree = CountedTree(Counted, 2)
    end = insert(tree, "", np.array([1, 2, 3, 4], np.int32))
    longer = np.array([1, 2, 3, 4, 5, 6, 7], np.int32)
    leaf = insert(tree, "", longer)
    assert tree.walk(end, longer) == (leaf, 6)
    assert tree.walk(end, longer[:5]) == (end, 4)
    assert tree.walk(end, longer[:4]) == (end, 4)
    assert tree.extend(leaf, np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], np.int32)).tokens.tolist() == [7, 8, 9, 9]
    tree.check()
    assert tree.walk(leaf, longer[:4]) == (leaf, 6), "a prompt that ends before the node has nothing to walk"


@pytest.mark.parametrize("length", [LONG // 2, 2 * LONG])
def test_edges_of_any_length_match_up_to_the_first_difference(length: int) -> None:
    tree = CountedTree(Counted, 4)
    tokens = np.arange(length, dtype=np.int32)
    leaf = insert(tree, "", tokens)
    assert tree.match("", tokens) == (leaf, length)
    assert tree.match("", tokens[:-1]) == (leaf, length - 4)
    assert tree.match("", np.append(tokens, tokens)) == (leaf, length)
    for differs in (5, length // 2, length - 1):
        changed = tokens.copy()
        changed[differs] += 1
        assert tree.match("", changed) == (leaf, differs - differs % 4)


def test_a_split_keeps_the_old_node_below() -> None:
    tree = CountedTree(Counted, 2)
    end = insert(tree, "", np.array([1, 2, 3, 4], np.int32))
    upper = insert(tree, "", np.array([1, 2], np.int32))
    assert upper.end == 2
    assert end.parent is upper
    assert end.end == 4
    assert upper.tokens.base is None, "a copy, which does not keep the memory of the lower part"


def test_a_page_has_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 1, not 0"):
        RadixTree(Node, 0)


def shorten(tree: CountedTree, node: Counted) -> None:
    node.tokens = node.tokens[:-1]


def rename(tree: CountedTree, node: Counted) -> None:
    node.hashes = node.hashes + np.uint64(1)


def misplace(tree: CountedTree, node: Counted) -> None:
    assert node.parent is not None
    node.parent.children = {b"elsewhere": node}


def shift(tree: CountedTree, node: Counted) -> None:
    node.start += 2
    node.end += 2


@pytest.mark.parametrize("damage", [shorten, rename, misplace, shift])
def test_check_notices_damage(damage: Callable[[CountedTree, Counted], None]) -> None:
    tree = CountedTree(Counted, 2)
    node = insert(tree, "", np.array([1, 2, 3, 4], np.int32))
    tree.check()
    damage(tree, node)
    with pytest.raises(AssertionError):
        tree.check()
