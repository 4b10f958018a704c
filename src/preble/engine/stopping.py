"""Stop strings: text that may be shown, and where it ends."""

from __future__ import annotations


class StopMatcher:
    """Cuts a text that comes in pieces before the first of several stop strings, wherever the pieces are cut.

    Text is held back only while it could be the beginning of a stop string. When one piece completes several stop
    strings, the one that begins first counts.
    """

    __slots__ = ("_exempt", "_held", "_stop", "stopped")

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stopped = False
        """Whether a stop string was found; the text is over and `feed` must not be called again."""
        self._stop = stop
        self._held = ""
        self._exempt = 0
        """Leading characters of `_held` at the last of which no stop string may end."""

    def feed(self, text: str, *, search: bool = True) -> str:
        """Take in more text and return what may be shown.

        Args:
            text: what follows the text of the last call.
            search: `False` while `min_tokens` is not reached: no stop string may end in this piece. One may begin in
                it and end in a later one.
        """
        if not self._stop:
            return text
        self._held += text
        if search:
            found = self._first()
            if found is not None:
                shown, self._held, self.stopped = self._held[:found], "", True
                return shown
        else:
            self._exempt = len(self._held)
        keep = self._possible_start()
        shown, self._held = self._held[:keep], self._held[keep:]
        self._exempt = max(0, self._exempt - keep)
        return shown

    def flush(self) -> str:
        """What was held back, when the text ends for another reason."""
        shown, self._held = self._held, ""
        return shown

    def _first(self) -> int | None:
        """Where the first stop string begins that ends behind the exempt text."""
        found = [self._held.find(stop, max(0, self._exempt - len(stop) + 1)) for stop in self._stop]
        return min((start for start in found if start >= 0), default=None)

    def _possible_start(self) -> int:
        """Where the longest tail begins that more text could complete to a stop string; the end if there is none."""
        end = first = len(self._held)
        for stop in self._stop:
            start = self._held.find(stop[0], max(0, end - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(self._held[start:]):
                    first = start
                    break
                start = self._held.find(stop[0], start + 1, first)
        return first
