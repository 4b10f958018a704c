"""Visitors who ask a few independent questions about something long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session, Turn

MOST_QUESTIONS = 20


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked about, and how. A question's prompt is the subject and the question, not those asked before."""

    about: str
    subject: Skewed
    """Tokens of what is asked about."""
    question: Skewed
    answer: Skewed
    """Tokens."""
    reading: Skewed
    """Seconds from an answer to the visitor's next question."""
    per_visit: float
    """Questions of one visitor, on average."""

    def sessions(self, draws: Draws) -> Iterator[Session]:
        """The visits, without end."""
        subjects = draws.lengths(self.subject)
        asked = count()
        while True:
            chosen = draws.prefix()
            subject = Segment((self.about, chosen), subjects[chosen])
            turns: list[Turn] = []
            for _ in range(draws.turns(self.per_visit, MOST_QUESTIONS)):
                path = (subject, Segment(next(asked), self.question.draw_tokens(draws.sessions)))
                answer = self.answer.draw_tokens(draws.sessions)
                turns.append(Turn(path, answer, self.reading.draw(draws.sessions)))
            yield Session(tuple(turns))
