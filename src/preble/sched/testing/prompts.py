"""Prompts that share prefixes: the input that placement is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from hypothesis import strategies as st

Prompt: TypeAlias = tuple[int, ...]
"""Token ids."""


def prompts(page_size: int, *, max_pages: int = 4, vocabulary: int = 3) -> st.SearchStrategy[Prompt]:
    """Prompts of one token up to `max_pages` pages and a part of one more. Where the vocabulary is small some share a
    prefix by chance.

    Args:
        page_size: tokens in a page.
        max_pages: whole pages at most.
        vocabulary: how many different tokens there are.
    """
    longest = (max_pages + 1) * page_size - 1
    return st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=max(longest, 1)).map(tuple)


@st.composite
def continuations(
    draw: st.DrawFn, earlier: Sequence[Prompt], page_size: int, *, max_pages: int = 4, vocabulary: int = 3
) -> Prompt:
    """A prompt that starts like one of `earlier` (at least one): all of it, or a part of it cut at the end of a page or
    anywhere; then ends, which makes it an exact repeat in the first case, or goes on with tokens of its own, which are
    as in `prompts`."""
    longest = max((max_pages + 1) * page_size - 1, 1)
    base = draw(st.sampled_from(earlier))[:longest]
    cut = draw(st.sampled_from(["repeat", "all", "pages", "anywhere"]))
    if cut == "repeat":
        return base
    if cut == "pages":
        base = base[: draw(st.integers(0, len(base) // page_size)) * page_size]
    elif cut == "anywhere":
        base = base[: draw(st.integers(0, len(base)))]
    # Two tokens in turn make up the tail: few draws, and tails that seldom agree.
    one, other = draw(st.tuples(*[st.integers(0, vocabulary - 1)] * 2))
    count = draw(st.integers(0 if base else 1, longest - len(base)))
    return base + ((one, other) * longest)[:count]


@st.composite
def prompt_families(
    draw: st.DrawFn, page_size: int, *, max_prompts: int = 8, max_pages: int = 4, vocabulary: int = 3
) -> list[Prompt]:
    """From one to `max_prompts` prompts, trees of shared prefixes: each is new, as in `prompts`, or continues an
    earlier one."""
    family = [draw(prompts(page_size, max_pages=max_pages, vocabulary=vocabulary))]
    for _ in range(draw(st.integers(0, max_prompts - 1))):
        family.append(draw(related_prompts(family, page_size, max_pages=max_pages, vocabulary=vocabulary)))
    return family


def related_prompts(
    earlier: Sequence[Prompt], page_size: int, *, max_pages: int = 4, vocabulary: int = 3
) -> st.SearchStrategy[Prompt]:
    """A new prompt, or a continuation of an earlier one if there is any."""
    fresh = prompts(page_size, max_pages=max_pages, vocabulary=vocabulary)
    if not earlier:
        return fresh
    related = continuations(earlier, page_size, max_pages=max_pages, vocabulary=vocabulary)
    return st.one_of(fresh, related, related)
