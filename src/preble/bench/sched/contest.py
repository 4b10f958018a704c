"""The scheduler and its peers on the same prompts, in turns."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import preble
from preble.bench.peers.process import PeerFailed
from preble.bench.sched.peers import PEERS
from preble.bench.sched.peers.worker import ANSWER, CASES, Case, Tally
from preble.bench.sched.plan import REPLICAS, Plan
from preble.bench.sched.results import ContestResult, Pace
from preble.bench.sched.traffic import CAPACITY_TOKENS, OUTPUT_TOKENS, QUEUED, Traffic, in_flight_per_replica
from preble.bench.sched.workload import VOCABULARY, Workload
from preble.sched import GlobalScheduler

if TYPE_CHECKING:
    from rich.console import Console

PREFIXES = 20
PAGE_SIZE = 16
"""Dynamo's default."""


class Contest:
    """Every engine on prompts of every length.

    Args:
        plan: how many rounds and requests.
        peers: keys of `PEERS`.
        python: the interpreter that has the peers' packages.
        folder: a scratch folder.
        console: for what happens meanwhile.
    """

    def __init__(self, plan: Plan, peers: list[str], python: str, folder: Path, console: Console) -> None:
        self.results = [ContestResult(prompt_tokens) for prompt_tokens in plan.peer_measured]
        self.versions: dict[str, str] = {}
        self.settings: dict[str, dict[str, str]] = {}
        self.skipped: dict[str, str] = {}
        """Peer -> why it did not run."""
        self._plan = plan
        self._peers = peers
        self._python = python
        self._folder = folder
        self._console = console

    def run(self) -> None:
        """Let all engines take turns within each round."""
        for number in range(1, self._plan.rounds + 1):
            prompts, cases = self._make_cases(seed=number)
            self._record("preble", [_schedule(case, tokens) for case, tokens in zip(cases, prompts, strict=True)])
            for peer in self._peers:
                if peer in self.skipped:
                    continue
                try:
                    tallies = self._ask(peer)
                except PeerFailed as error:
                    self._drop(peer, str(error))
                    continue
                self._record(peer, tallies)
            for result in self.results:
                paces = ", ".join(
                    f"{name} {rounds[-1].decision:.0f} / {rounds[-1].whole:.0f}"
                    for name, rounds in result.rounds.items()
                )
                self._console.print(
                    f"round {number} of {self._plan.rounds}, {result.prompt_tokens:,} tokens, "
                    f"decision / whole life: {paces} µs"
                )

    def _make_cases(self, seed: int) -> tuple[list[NDArray[np.int32]], list[Case]]:
        """The prompts of a round, int32 [requests, prompt_tokens], in memory and as files."""
        prompts, cases = [], []
        for prompt_tokens, measured in self._plan.peer_measured.items():
            source = Workload(f"{prompt_tokens}", prompt_tokens, PREFIXES, goal=0).prompts(seed)
            tokens = np.stack(list(islice(source, self._plan.peer_fill + measured)))
            case = Case(
                prompt_tokens=prompt_tokens,
                file=f"prompts-{prompt_tokens}.int32",
                fill=self._plan.peer_fill,
                vocabulary=VOCABULARY,
                replicas=REPLICAS,
                page_size=PAGE_SIZE,
                capacity_tokens=CAPACITY_TOKENS,
                in_flight=in_flight_per_replica(prompt_tokens, CAPACITY_TOKENS) * REPLICAS,
                queued=QUEUED,
                output_tokens=OUTPUT_TOKENS,
            )
            tokens.tofile(self._folder / case.file)
            prompts.append(tokens)
            cases.append(case)
        (self._folder / CASES).write_text(json.dumps([asdict(case) for case in cases]))
        return prompts, cases

    def _ask(self, peer: str) -> list[Tally]:
        answer = run_peer(peer, self._python, self._folder)
        self.versions |= answer["versions"]
        self.settings[peer] = answer["settings"]
        return [Tally(**fields) for fields in answer["tallies"]]

    def _record(self, engine: str, tallies: list[Tally]) -> None:
        for result, tally in zip(self.results, tallies, strict=True):
            result.rounds.setdefault(engine, []).append(Pace.of(tally))

    def _drop(self, peer: str, reason: str) -> None:
        """A peer that fails once is left out of all rounds."""
        self.skipped[peer] = reason
        for result in self.results:
            result.rounds.pop(peer, None)
        self._console.print(f"[yellow]left out: {reason}")


def run_peer(peer: str, python: str, folder: Path) -> dict[str, Any]:
    """Run the cases of the folder in a peer's process; returns its answer.

    Raises:
        PeerFailed: its package is missing, say; the message has the last line that it wrote to stderr.
    """
    source = folder / "source"
    source.mkdir(exist_ok=True)
    link = source / "preble"
    if not link.exists():
        link.symlink_to(Path(preble.__file__).parent, target_is_directory=True)
    # -P: the current folder must not shadow a peer's packages.
    command = [python, "-P", "-m", f"preble.bench.sched.peers.{PEERS[peer]}", str(folder)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": str(source)},
        )
    except OSError as error:
        raise PeerFailed(f"{peer} did not start: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise PeerFailed(f"{peer} ended: {lines[-1] if lines else f'exit status {done.returncode}'}")
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text())
    return answer


def _schedule(case: Case, tokens: NDArray[np.int32]) -> Tally:
    """A case through the scheduler itself, output reported as two events."""
    gc.collect()
    scheduler = GlobalScheduler(
        replicas=case.replicas, capacity_tokens=case.capacity_tokens, page_size=case.page_size, seed=0
    )
    traffic = Traffic(scheduler, iter(tokens), replicas=case.replicas, page_size=case.page_size)
    traffic.run(case.fill)
    traffic.forget_hits()
    times = traffic.run(len(tokens) - case.fill)
    traffic.drain()
    return Tally(
        decision=times.submit.tolist(),
        whole=times.whole.tolist(),
        decision_wall=times.submit_wall.tolist(),
        whole_wall=times.whole_wall.tolist(),
        hit_rate=traffic.hit_rate,
    )
