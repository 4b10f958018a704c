"""What is trained on when: few facts first, since looking up does not start to be learned among many."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """A length of handbook and what is asked about it."""

    facts: int
    tokens: int = 2560
    """Tokens of a step. The first heads form under gradients with less noise; later, more steps are worth more."""
    plain: float = 0.0
    """Share of questions that are worded exactly like the fact. The same tokens at the same distances are matched
    first; questions as users ask them follow, once heads exist that can be adapted."""
    one_attribute: float = 0.25
    """Share of handbooks that list one attribute only. There nothing but both words of the name tells facts apart: a
    model that matches attribute and one word is right nearly always elsewhere. From the start they delay everything,
    since the easy cues that lead to the first heads are missing."""
    alike: float = 0.25
    """Share of handbooks with one attribute whose values have two tokens, of which the first is one of a few. There the
    second token cannot be found by the first: elsewhere that is such a good guess that a model stays with it."""
    absent: float = 0.0
    """Share of questions about what is not listed. Before lookups work, "unknown" is the cheapest guess there is, and
    the model stays with it."""
    two_facts: float = 0.0
    """Share of questions whose answer takes two lookups, where a handbook has such pairs."""


LEVELS = (
    Level(4, tokens=4096, plain=1.0, one_attribute=0.0, alike=0.0),
    Level(8, plain=1.0, one_attribute=0.0, alike=0.0),
    Level(16, plain=0.5, one_attribute=0.0, alike=0.0),
    Level(32, plain=0.5, one_attribute=0.0, alike=0.0),
    Level(64, plain=0.25, absent=0.15),
    Level(128, absent=0.2, two_facts=0.15),
    Level(270, absent=0.2, two_facts=0.15),
)
PASSED = 0.8
"""The share of right answer tokens, in a moving average, from which the next level is trained on. What is wrong by then
are facts taken for similar ones, which is learned as well among more of them."""
REPEATED = 0.3
"""The share of steps with as few facts as in one of the levels so far, so that short handbooks stay known. All else is
as at the present level: what is asked there is asked about short handbooks as well."""
SPREAD = (0.75, 1.1)
"""Facts of a step's handbooks, as a factor of the level's."""


class Curriculum:
    """Chooses the level of each step, and moves on with what has been learned."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"curriculum {seed}")
        self._reached = 0
        self._judged = True
        """Whether the last step had as many facts as its level."""
        self.accuracy = 0.0
        """Moving average of the share of right tokens in answers of lookups at this level."""

    @property
    def done(self) -> bool:
        """Whether the last level has been reached."""
        return self._reached == len(LEVELS) - 1

    @property
    def level(self) -> Level:
        """What is trained on."""
        return LEVELS[self._reached]

    def choose(self) -> int:
        """The number of facts of the next step's handbooks."""
        repeated = self._rng.random() < REPEATED
        self._judged = not repeated
        level = LEVELS[self._rng.randrange(self._reached + 1)] if repeated else self.level
        return max(3, int(level.facts * self._rng.uniform(*SPREAD)))

    def learned(self, accuracy: float) -> bool:
        """Take note of the accuracy in the step that was chosen last. True if that led to the next level."""
        if self._judged:
            self.accuracy = 0.9 * self.accuracy + 0.1 * accuracy
        if self.accuracy <= PASSED or self.done:
            return False
        self._reached += 1
        self.accuracy = 0.0
        return True
