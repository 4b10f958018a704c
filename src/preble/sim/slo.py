"""What an application promises its users."""

from __future__ import annotations

import math
from dataclasses import dataclass

from preble.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class SLO:
    """Upper bounds for a request; it is good if it keeps all of them."""

    ttft: float = 2.0
    """Seconds to the first token."""
    tpot: float = 0.1
    """Seconds per token after the first one."""
    e2e: float = math.inf
    """Seconds to the end."""

    @classmethod
    def parse(cls, text: str) -> SLO:
        """From `ttft=2.0,tpot=0.05`; what is not named is not bounded.

        Raises:
            InvalidRequest: it is written otherwise, or a bound is not a positive number.
        """
        bounds = {"ttft": math.inf, "tpot": math.inf, "e2e": math.inf}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                bound = float(value)
            except ValueError:
                bound = math.nan
            if name not in bounds or not bound > 0:
                raise InvalidRequest(
                    f"an SLO names ttft, tpot or e2e with seconds, as in ttft=2.0,tpot=0.05; {part!r} does not"
                )
            bounds[name] = bound
        return cls(**bounds)

    def __str__(self) -> str:
        bounds = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        return ",".join(f"{name}={bound:g}" for name, bound in bounds.items() if bound < math.inf)
