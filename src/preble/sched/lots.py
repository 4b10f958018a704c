"""Drawing lots: the only chance in a scheduler, and the same for the same seed on every machine."""

from __future__ import annotations

_MASK = (1 << 64) - 1


class Lots:
    """A splitmix64 generator (Steele et al., 2014)."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def draw(self, count: int) -> int:
        """One of 0 … count - 1, all equally likely (to within count / 2^64)."""
        self._state = mixed = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        return (mixed ^ mixed >> 31) * count >> 64

    def copy(self) -> Lots:
        """A generator that will draw the same."""
        return Lots(self._state)
