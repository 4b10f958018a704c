"""How `check()` methods complain: an assertion that `python -O` does not remove."""

from __future__ import annotations

import math


def require(condition: bool, complaint: str) -> None:
    """Raise `AssertionError(complaint)` unless the condition holds."""
    if not condition:
        raise AssertionError(complaint)


def require_close(kept: float, expected: float, what: str) -> None:
    """Raise `AssertionError` unless two sums of seconds agree but for rounding."""
    if not math.isclose(kept, expected, rel_tol=1e-6, abs_tol=1e-6):
        raise AssertionError(f"{what}: kept {kept!r}, recomputed {expected!r}")
