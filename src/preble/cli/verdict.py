"""What a comparison of two bursts says, in a sentence that is true whichever way it went."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble.cli.burst import Burst

LEVEL = 1.05
"""Two speeds are level up to this ratio: one run tells no smaller difference from chance."""
FEW = 50
"""Fewer questions than these say little."""


def verdict(one: Burst, other: Burst) -> str:
    """Whether the first policy was ahead, level or behind in requests per second, and the ratios of the rest."""
    speed = one.requests_per_second / other.requests_per_second
    if speed >= LEVEL:
        result = f"{one.policy} is ahead of {other.policy}"
    elif speed > 1 / LEVEL:
        result = f"{one.policy} and {other.policy} are level"
    else:
        result = f"{one.policy} is behind {other.policy}"
    said = (
        f"{result}: {speed:.2f} times as many questions answered per second, "
        f"{_tokens(one.computed_tokens / other.computed_tokens)}, {_ttft(one.ttft.mean / other.ttft.mean)}, "
        f"{_right(one, other)}."
    )
    if len(one.replicas) == 1:
        return f"{said} With one replica no policy has a choice."
    if one.requests < FEW:
        return f"{said} With so few questions this says little."
    return said


def _tokens(ratio: float) -> str:
    if round(ratio, 2) == 1:
        return "as many tokens computed"
    return f"{_change(ratio, 'fewer', 'more', 'as many')} tokens computed"


def _ttft(ratio: float) -> str:
    if round(ratio, 2) == 1:
        return "the same mean TTFT"
    return f"a mean TTFT {_change(ratio, 'shorter', 'longer', 'as long')}"


def _change(ratio: float, less: str, more: str, times: str) -> str:
    if ratio >= 2:
        return f"{ratio:.1f} times {times}"
    return f"{abs(1 - ratio):.0%} {less if ratio < 1 else more}"


def _right(one: Burst, other: Burst) -> str:
    if one.right is None or other.right is None:
        return "answers not graded"
    if one.right == other.right:
        return f"{one.right} of {one.requests} answers right with both"
    return f"{one.right} instead of {other.right} of {one.requests} answers right"
