"""Program generation: the same examples before every problem, and several programs wanted for each."""

from __future__ import annotations

from collections.abc import Iterator

from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session, Turn
from preble.sim.workloads.workload import Means, Workload

EXAMPLES = Segment("examples", 2_310)
PROBLEM = Skewed(1_561, 0.75, 150, 8_000)
PROGRAM = Skewed(190, 0.8, 10, 1_500)
SAMPLES = 4.0
MOST_SAMPLES = 20


def _sessions(draws: Draws) -> Iterator[Session]:
    problems = draws.lengths(PROBLEM)
    while True:
        problem = draws.prefix()
        path = (EXAMPLES, Segment(("problem", problem), problems[problem]))
        samples = draws.turns(SAMPLES, MOST_SAMPLES)
        yield Session(tuple(Turn(path, PROGRAM.draw_tokens(draws.sessions)) for _ in range(samples)), waits=False)


PROGRAMMING = Workload(
    name="programming",
    summary="long examples before every problem; several samples per problem, sent in a row",
    source="APPS as measured in Preble (arXiv 2407.00023)",
    prefixes=160,
    requests=2_812,
    rate=4.5,
    block_size=16,
    means=Means(prompt_tokens=3_871, output_tokens=190, shared=0.97, requests_per_key_portion=126),
    sessions=_sessions,
)
