"""Values that nobody should hand to an API, and how many inputs the fuzz tests try."""

from __future__ import annotations

import array
import datetime
import decimal
import enum
import fractions
import itertools
from collections import UserDict, UserList, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

INPUTS = {
    "sampling": 24_000,
    "terms and prompts": 16_000,
    "requests": 12_000,
    "requests that start": 2_000,
    "frames": 28_000,
    "messages of workers": 16_000,
    "config.json": 3_000,
    "safetensors": 2_000,
    "tokenizer files": 200,
    "templates": 2_000,
}
"""How many inputs each test tries. Where hypothesis takes far longer for an example than the code under test, one
example drives a batch of seeded mutations, each of which is counted."""


class Broken:
    """Raises whatever is done to it."""

    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        self._error = error

    def _raise(self, *_: object) -> Any:
        raise self._error("broken on purpose")

    __repr__ = __str__ = __len__ = __iter__ = __getitem__ = __index__ = __float__ = __int__ = _raise
    __eq__ = __lt__ = __gt__ = __bool__ = __contains__ = _raise
    __hash__ = object.__hash__


class BrokenSequence(Broken, Sequence[int]):
    """Says that it is a sequence."""


class LyingSequence(Sequence[int]):
    """Longer than it says, or shorter."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if index > 5:
            raise IndexError
        return index


class Text(str):
    """A string of somebody's own."""


class Number(int):
    """An integer of somebody's own."""

    def __repr__(self) -> str:
        raise ValueError("broken on purpose")


class Color(enum.IntEnum):
    RED = 1


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def in_itself() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


MAKERS: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, False, Ellipsis, NotImplemented, int, Broken, Color.RED)),
    *(lambda value=value: value for value in (0, 1, -1, 2, 255, 271, 272, 2**31 - 1, 2**31, -(2**31), 2**63 - 1)),
    *(lambda value=value: value for value in (2**63, 2**64, -(2**63) - 1, 10**400, -(10**400), 10**5000, 10**9)),
    *(lambda value=value: value for value in (0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, float("inf"), float("-inf"))),
    *(lambda value=value: value for value in (float("nan"), 1j, decimal.Decimal("NaN"), fractions.Fraction(1, 3))),
    *(lambda value=value: value for value in ("", "a", "stop", "\ud800", "\x00", "é😀", "x" * 70_000, "1", "{{ 1 }}")),
    *(lambda value=value: value for value in (b"", b"abc", bytearray(b"abc"), memoryview(b"abc"), Text("text"))),
    *(lambda value=value: value for value in ((), (1, 2), (5, 1.0), ((5, 1.0),), range(0), range(5), range(10**12))),
    *(lambda value=value: value for value in (frozenset({1}), {1, 2}, Number(5), Path("a"), datetime.date(2020, 1, 1))),
    *(lambda value=value: value for value in (np.int64(7), np.float32("nan"), np.bool_(True), np.str_("a"))),
    list,
    dict,
    lambda: [1, 2, 3],
    lambda: [1, "a"],
    lambda: ["a", "b"],
    lambda: [[1], [2, 3]],
    lambda: [[1, 2], [3, 4]],
    lambda: [10**400],
    lambda: [1.0, 2.0],
    lambda: [None],
    lambda: [True, False],
    lambda: {5: 1.0},
    lambda: {"5": 1.0},
    lambda: {5: float("nan"), 6: "a"},
    lambda: {"role": "user"},
    lambda: [{"role": "user", "content": "a"}],
    lambda: [{"role": "user", "content": nested(500)}],
    lambda: [{"role": "user", "content": in_itself()}],
    lambda: [{"role": Broken(), "content": Broken()}],
    lambda: [{5: 6}],
    lambda: UserDict(role="user", content="a"),
    lambda: UserList([1, 2]),
    lambda: deque([1, 2]),
    lambda: array.array("i", [1, 2]),
    lambda: nested(10),
    lambda: nested(5000),
    in_itself,
    lambda: iter([1, 2]),
    lambda: itertools.repeat(1),
    lambda: itertools.repeat("a"),
    lambda: itertools.repeat((1, 1.0)),
    lambda: itertools.count(),
    lambda: (x for x in [1]),
    lambda: np.array(5),
    lambda: np.array([]),
    lambda: np.array([1, 2]),
    lambda: np.array([1, 2], np.uint64) << np.uint64(40),
    lambda: np.array([1.5]),
    lambda: np.array([True]),
    lambda: np.array(["a"]),
    lambda: np.array([None, {}], object),
    lambda: np.array([[1, 2]]),
    lambda: np.array("2020", "datetime64[Y]"),
    lambda: np.ma.masked_array([1, 2], [True, False]),
    lambda: torch.tensor(5),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor([0.5]),
    Broken,
    lambda: Broken(ValueError),
    lambda: Broken(TypeError),
    lambda: Broken(OverflowError),
    BrokenSequence,
    lambda: [Broken()],
    lambda: {1: Broken()},
    lambda: LyingSequence(10),
    lambda: LyingSequence(3),
    lambda: LyingSequence(10**12),
    lambda: LyingSequence(-1),
    lambda: RuntimeError("a"),
    lambda: lambda: None,
]


def hostile(random: Random) -> Any:
    """One of them, or some of them in a container."""
    value = random.choice(MAKERS)()
    while random.random() < 0.15:
        value = random.choice([lambda v: [v], lambda v: (v, v), lambda v: {"a": v}, lambda v: iter([v])])(value)
    return value


def fuzz(
    name: str, batch: int, examples: st.SearchStrategy[Any], attempt: Callable[[Any, Random], object], *, each: int = 1
) -> None:
    """Try `INPUTS[name]` inputs: for each example `batch` attempts, of `each` inputs, with a source of randomness."""
    tried = 0

    @settings(
        max_examples=INPUTS[name] // (batch * each),
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples, st.integers(0, 2**64 - 1))
    def run(example: Any, seed: int) -> None:
        nonlocal tried
        random = Random(seed)
        for _ in range(batch):
            attempt(example, random)
            tried += each

    run()
    assert tried >= INPUTS[name]


def mutated(content: bytes, random: Random) -> bytes:
    """`content` with some bytes changed, cut out, doubled or inserted."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1)
        length = random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(6):
            case 0:
                data[at : at + length] = random.randbytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * random.choice((1, 1, 100))
            case 3:
                data[at : at + 1] = random.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b'"', b"{", b"[", b"-", b"9"))
            case 4:
                data[at : at + length] = random.choice((b"\xff" * length, b"\x00" * length, b"9" * length))
            case 5 if data:
                data[at - 1] ^= 1 << random.randrange(8)
    return bytes(data)


def check_brief(error: Exception) -> None:
    """An error tells what is wrong in few words, however much was handed in."""
    assert 0 < len(str(error)) < 2000, repr(error)[:500]
