"""Video question answering: a long video as tokens, a short question, a word or two as the answer."""

from __future__ import annotations

from collections.abc import Iterator

from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.questions import Questions
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

ASKED = Questions(
    about="video",
    subject=Skewed(9_725, 0.6, 1_500, 40_000),
    question=Skewed(140, 0.4, 40, 500),
    answer=Skewed(4, 0.5, 1, 16),
    reading=Skewed(8, 0.7, 1, 60),
    per_visit=1.5,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    return ASKED.sessions(draws)


VIDEO_QA = Workload(
    name="video-qa",
    summary="long videos, each watched by some who ask one or two short questions about it",
    source="NExT-QA as measured in Preble (arXiv 2407.00023)",
    prefixes=150,
    requests=900,
    rate=3,
    block_size=64,
    means=Means(prompt_tokens=9_865, output_tokens=4, shared=0.88, requests_per_key_portion=8.6),
    sessions=_sessions,
)
