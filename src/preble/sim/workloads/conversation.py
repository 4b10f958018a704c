"""Conversations that grow: every prompt is all that was said before and what came since."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preble.sim.workloads.draws import Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session, Turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """What conversations of one kind are made of. Lengths are in tokens."""

    opening: Skewed
    """What the first prompt adds to what is shared with other conversations."""
    answer: Skewed
    message: Skewed
    """What comes after an answer: the user's next message, a tool's result, what a step led to."""
    pause: Skewed
    """Seconds from an answer to the next prompt."""
    turns: Skewed
    """Prompts of a conversation."""
    context: int
    """A conversation ends before a prompt would be longer than this, its first one excepted."""

    def session(self, number: int, shared: tuple[Segment, ...], generator: np.random.Generator) -> Session:
        """One conversation.

        Args:
            number: No other conversation has it.
            shared: How its prompts begin.
            generator: Where chance comes from.
        """
        room = self.context - sum(segment.tokens for segment in shared)
        own = self.opening.draw_tokens(generator)
        turns: list[Turn] = []
        for _ in range(self.turns.draw_tokens(generator)):
            answer = self.answer.draw_tokens(generator)
            turns.append(Turn((*shared, Segment(number, own)), answer, self.pause.draw(generator)))
            own += answer + self.message.draw_tokens(generator)
            if own > room:
                break
        return Session(tuple(turns))
