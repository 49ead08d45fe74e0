from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.stops import StopMatcher

LETTERS = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Grow the text by one character at a time and look for a stop string at its end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop=include)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.flush(), None


@given(text=LETTERS, stops=STOPS, include=st.booleans(), data=st.data())
def test_equals_the_naive_search_for_every_split(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(pieces, stops, include) == naive(text, stops, include)


@given(text=LETTERS, stops=STOPS)
def test_what_is_held_is_the_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for char in text:
        given_out += matcher.push(char)
        if matcher.matched is not None:
            return
    assert text.startswith(given_out)
    held = text[len(given_out) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_that_cannot_become_a_stop_goes_out_at_once() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("ab\n") == "ab"
    assert matcher.push("c") == "\nc"
    assert matcher.push("\n") == ""
    assert matcher.push("\nd") == ""
    assert matcher.matched == "\n\n"


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
