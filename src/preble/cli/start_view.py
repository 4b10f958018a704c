"""A cluster that starts."""

from __future__ import annotations


class StartView:
    """How long it has been starting."""

    def frame(self, seconds: float) -> str:
        """For a terminal."""
        return f"{seconds:.0f} s, loading"

    def line(self, seconds: float) -> str:
        """For a log."""
        return f"  {seconds:.0f} s, loading"
