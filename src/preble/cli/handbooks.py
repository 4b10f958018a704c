"""The demo's prompts: questions about a few long handbooks, some more popular than others. The same every time."""

from __future__ import annotations

import random

HANDBOOKS = 6
ENTRIES = 90
NOUNS = (
    "book city door field garden horse house island king letter map mountain paper river road school song star".split()
)
KINDS = (
    "big close cold dark early good great green high last little long new old open quick red small strong young".split()
)
PLACES = "north south east west".split()


def handbook(number: int) -> str:
    """A document of some 1,500 words that many questions share."""
    rng = random.Random(number)
    lines = [f"Handbook {number}. Answer from these notes alone."]
    for entry in range(ENTRIES):
        kind, noun, other = rng.choice(KINDS), rng.choice(NOUNS), rng.choice(NOUNS)
        steps, place = rng.randrange(2, 60), rng.choice(PLACES)
        lines.append(
            f"Note {entry}: the {kind} {noun} is {steps} miles {place} of the {other}, and it is open all year."
        )
    return "\n".join(lines)


def questions(count: int) -> list[str]:
    """Prompts in a random but repeatable order, popular handbooks more often than others."""
    rng = random.Random(0)
    books = [handbook(number) for number in range(HANDBOOKS)]
    popularity = [1 / (rank + 1) for rank in range(HANDBOOKS)]
    return [
        f"{rng.choices(books, popularity)[0]}\nQuestion: where is the {rng.choice(KINDS)} {rng.choice(NOUNS)}?\nAnswer:"
        for _ in range(count)
    ]
