"""Page hashes are the definition's, in whichever pieces and with whichever table they are computed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched import hashing
from preble.sched.hashing import namespace_salt, page_hashes

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def by_definition(tokens: list[int], page_size: int, start: int, base: int) -> list[int]:
    total, hashes = base, []
    for offset, token in enumerate(tokens):
        total = (total + (token + 1) * (mix(start + offset) | 1)) & MASK
        if (offset + 1) % page_size == 0:
            hashes.append(total)
    return hashes


token_lists = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 300), max_size=40)


@given(token_lists, st.integers(1, 9), st.integers(0, 10_000), st.integers(0, MASK))
def test_hashes_are_those_of_the_definition(tokens: list[int], page_size: int, start: int, base: int) -> None:
    hashes = page_hashes(np.array(tokens, np.int32), page_size, start=start, base=base)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == by_definition(tokens, page_size, start, base)


@given(token_lists, st.integers(1, 5), st.integers(0, 8))
def test_a_hash_can_be_continued_from_any_boundary(tokens: list[int], page_size: int, pages: int) -> None:
    prompt = np.array(tokens, np.int32)
    cut = min(pages, len(tokens) // page_size) * page_size
    base = namespace_salt("tenant")
    head = page_hashes(prompt[:cut], page_size, base=base)
    tail = page_hashes(prompt[cut:], page_size, start=cut, base=int(head[-1]) if len(head) else base)
    assert [*head, *tail] == list(page_hashes(prompt, page_size, base=base))


def test_equal_pages_of_different_prefixes_differ() -> None:
    prompts = [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 3, 4], [1, 1, 1, 1], [1, 2, 1, 2]]
    hashes = [int(one) for prompt in prompts for one in page_hashes(np.array(prompt, np.int32), 2)]
    # Only the first page [1, 2] occurs as the same prefix twice.
    assert len(set(hashes)) == len(hashes) - 1


def test_no_two_of_many_prefixes_hash_alike() -> None:
    """Small tokens, long runs of one token, and prompts that differ in one or two places."""
    prompts = {(token,) * length for token in range(8) for length in range(1, 40)}
    prompts |= {tuple(int(digit) for digit in np.binary_repr(number, 12)) for number in range(4096)}
    base = (5,) * 30
    for first in range(30):
        for second in range(first + 1, 30):
            for change in (1, 2, 1000):
                prompts.add((*base[:first], 5 + change, *base[first + 1 : second], 5 - 1, *base[second + 1 :]))
    hashes = {int(page_hashes(np.array(prompt, np.int32), 1)[-1]) for prompt in prompts}
    assert len(hashes) == len(prompts)


def test_namespaces_have_salts_of_their_own() -> None:
    names = ["", *(f"tenant-{n}" for n in range(1000)), "tenant", "🦙", "\udcff"]
    assert len({namespace_salt(name) for name in names}) == len(names)
    assert namespace_salt("") == 0
    assert namespace_salt("tenant") == 0xAF20B309BD126329, "processes must agree on it"


def test_the_table_grows_without_changing_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.arange(0, 60_000, 7, dtype=np.int32)
    before = page_hashes(prompt, 16)
    monkeypatch.setattr(hashing, "_position_weights", np.empty(0, np.uint64))
    page_hashes(prompt[:16], 16)
    assert np.array_equal(page_hashes(prompt, 16), before)


def test_threads_may_hash_while_the_table_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs the longer table must get it, whichever assignment comes last."""
    short, long = np.arange(5_000, dtype=np.int32), np.arange(200_000, dtype=np.int32)
    expected = {len(one): page_hashes(one, 16) for one in (short, long)}
    wrong: list[int] = []

    def work(prompt: np.ndarray) -> None:
        try:
            if not np.array_equal(page_hashes(prompt, 16), expected[len(prompt)]):
                wrong.append(len(prompt))
        except ValueError:
            wrong.append(len(prompt))

    for _ in range(10):
        monkeypatch.setattr(hashing, "_position_weights", np.empty(0, np.uint64))
        threads = [threading.Thread(target=work, args=(prompt,)) for prompt in (short, long, short, long)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
