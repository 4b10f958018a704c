from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preble.engine.stopping import StopMatcher

letters = st.text(alphabet="ab\n", max_size=30)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text, places):
    places = sorted({min(place, len(text)) for place in places})
    return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]


@given(letters, stops, st.lists(st.integers(0, 30), max_size=8))
def test_text_ends_before_the_first_stop_string(text, stop, places):
    matcher = StopMatcher(tuple(stop))
    shown, fed = "", ""
    for piece in cut(text, places):
        shown += matcher.feed(piece)
        fed += piece
        assert matcher.stopped == any(one in fed for one in stop)
        if matcher.stopped:
            break
        held = fed[len(shown) :]
        assert shown + held == fed
        # Held back is what a stop string may begin with, and no more.
        tails = [fed[start:] for start in range(len(fed)) if any(one.startswith(fed[start:]) for one in stop)]
        assert held == max(tails, key=len, default="")
    else:
        shown += matcher.flush()
    found = [fed.find(one) for one in stop if one in fed]
    assert shown == fed[: min(found, default=len(fed))]


@given(letters, stops, st.lists(st.integers(0, 30), max_size=8), st.integers(0, 8))
def test_no_stop_string_ends_before_the_search_begins(text, stop, places, exempt_pieces):
    matcher = StopMatcher(tuple(stop))
    shown, fed, exempt = "", "", 0
    for number, piece in enumerate(cut(text, places)):
        search = number >= exempt_pieces
        shown += matcher.feed(piece, search=search)
        fed += piece
        if matcher.stopped:
            break
        if not search:
            exempt = len(fed)
    else:
        shown += matcher.flush()
    found = [
        start for one in stop for start in range(len(fed)) if fed.startswith(one, start) and start + len(one) > exempt
    ]
    assert matcher.stopped == bool(found)
    assert shown == fed[: min(found, default=len(fed))]


def test_a_stop_string_over_many_tokens():
    matcher = StopMatcher(("\n\nUser:",))
    shown = [matcher.feed(piece) for piece in ("Hi", "\n", "\n", "Use", "r", ": no")]
    assert shown == ["Hi", "", "", "", "", ""]
    assert matcher.stopped


def test_a_false_start_is_shown_as_soon_as_it_is_one():
    matcher = StopMatcher(("###", "END"))
    assert [matcher.feed(piece) for piece in ("a#", "#", "b", "E", "N", "Q")] == ["a", "", "##b", "", "", "ENQ"]
    assert matcher.flush() == ""


def test_the_stop_string_that_begins_first_counts():
    matcher = StopMatcher(("bc", "abcd"))
    assert matcher.feed("xabcdy") == "x"
    assert matcher.stopped


def test_what_ended_before_the_search_does_not_count_while_it_is_held():
    matcher = StopMatcher(("b", "abab"))
    assert matcher.feed("ab", search=False) == ""
    assert matcher.feed("x") == "abx"
    assert not matcher.stopped


def test_without_stop_strings_nothing_is_held():
    matcher = StopMatcher(())
    assert matcher.feed("anything", search=False) == "anything"
    assert matcher.flush() == ""


def test_long_stop_strings_and_texts_that_almost_match():
    matcher = StopMatcher(("a" * 500 + "b",))
    shown = "".join(matcher.feed("a") for _ in range(3000))
    assert len(shown) == 2500
    assert shown + matcher.flush() == "a" * 3000
