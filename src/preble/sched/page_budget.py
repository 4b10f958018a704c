"""Whether the pages suffice for one more request, now and until the requests beside it have ended."""

from __future__ import annotations

from collections.abc import Sequence as Several

import numpy as np

from preble.sched.output_lengths import Array, OutputLengths
from preble.sched.prefix_cache import PrefixCache
from preble.sched.sequence import Sequence

EVERY = 16.0
"""Steps between two times for which the need for pages is forecast."""
AHEAD: Array = np.arange(0.0, 257.0, EVERY)
"""These times, in steps from now. Not further: what a request has done by then is worth computing its prompt once more,
should it be preempted after all."""
MARGIN = 1.0
"""Standard deviations of the forecast that are kept free."""


class PageBudget:
    """The pages that running requests will need and give back, forecast for the admissions of one step.

    Every request grows by a token per step until it ends, and then gives back what it held alone. With the probability
    that it is still going on (`OutputLengths`), that makes a number of pages needed in all that is to be expected at
    any time ahead. A request fits if with it that number and a margin are within the pages available now, at all those
    times. The margin is one standard deviation of the number, and a page for each running request. A hint
    (`Sequence.expected_tokens`) is believed until the output outgrows it.
    """

    def __init__(self, running: Several[Sequence], cache: PrefixCache, outputs: OutputLengths) -> None:
        self._outputs = outputs
        self._page_size = size = cache.page_size
        self._running = len(running)
        self._room = cache.available
        needed = np.array([-(-one.length // size) - len(one.table) for one in running], np.float64)
        held = np.array([self._held_alone(one, cache) for one in running], np.float64)
        self._needed, self._variance = self._forecast(list(running), needed + held)
        self._needed -= held.sum()

    def admit(self, candidate: Sequence, pages: int) -> bool:
        """Whether a waiting request fits that needs `pages` at once; one that does counts as running from here on.

        Alone it always fits: nobody else holds a page then, and it is never longer than all pages together.
        """
        needed, variance = self._forecast([candidate], np.array([pages], np.float64))
        needed += self._needed
        variance += self._variance
        if self._running and (needed + self._running + MARGIN * np.sqrt(variance)).max() > self._room:
            return False
        self._running += 1
        self._needed, self._variance = needed, variance
        return True

    def _forecast(self, sequences: list[Sequence], pages: Array) -> tuple[Array, Array]:
        """Pages that these will hold in all, to be expected at each time of `AHEAD`, and the variance; `pages` now."""
        generated = np.array([one.generated for one in sequences], np.float64)
        hints = np.array([one.expected_tokens or 0.0 for one in sequences], np.float64)
        most = np.array([one.max_length - one.prompt_length for one in sequences], np.float64)
        hinted = hints > generated
        left = np.where(hinted, np.minimum(hints, most), most) - generated
        likely = self._outputs.going_on(generated, AHEAD)
        likely[hinted] = 1.0
        likely[left[:, None] <= AHEAD] = 0.0
        likely[:, 0] = 1.0
        # As many as it may need until the next of these times.
        then = pages[:, None] + np.minimum(AHEAD + EVERY, left[:, None]) / self._page_size
        return (likely * then).sum(0), (likely * (1 - likely) * then**2).sum(0)

    @staticmethod
    def _held_alone(sequence: Sequence, cache: PrefixCache) -> int:
        """Pages that come free when the request ends, of those it has by now."""
        assert sequence.node is not None
        return len(sequence.table) - sequence.node.end // cache.page_size + cache.held_alone(sequence.node)
