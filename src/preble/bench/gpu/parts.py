"""The parts of the benchmark: what they run, and how long they may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record

Run = Callable[[Place, Record, tuple[int, int]], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does."""

    name: str
    """Unique."""
    function: str
    """`module.function` of this package."""
    shard: tuple[int, int] = (0, 1)
    """Which of how many equal shares of the cases."""

    def load(self) -> Run:
        """The function."""
        module, name = self.function.split(".")
        run: Run = getattr(import_module(f"preble.bench.gpu.{module}"), name)
        return run


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the results."""

    name: str
    seconds: float
    """After this its processes are ended."""
    tasks: tuple[Task, ...]
    """Run at once; those that measure speed are alone in their part."""


def _shared_out(name: str, function: str, shares: int) -> tuple[Task, ...]:
    return tuple(Task(f"{name} {share + 1}", function, (share, shares)) for share in range(shares))


def make_parts(*, dry_run: bool) -> tuple[Part, ...]:
    """All parts in the order in which they run. On a GPU the seconds add up to less than ten minutes."""
    several = 1 if dry_run else 3
    correctness = (
        *_shared_out("decode", "check_decode.run_decode", several),
        *_shared_out("extend", "check_extend.run_extend", several),
        *_shared_out("shared prefix", "check_decode.run_shared", 1 if dry_run else 2),
        Task("layers", "check_layers.run_layers"),
        Task("sampling", "check_sampling.run_sampling"),
        *_shared_out("tokens", "check_tokens.run_tokens", several),
    )
    return (
        Part("correctness", 130, correctness),
        Part("ceilings", 30, (Task("ceilings", "ceilings.run_ceilings"),)),
        Part("attention", 75, (Task("attention", "attention.run_attention"),)),
        Part("model", 100, (Task("model", "model.run_model"),)),
        Part("peer", 95, (Task("peer", "peer.run_peer"),)),
        Part("cluster", 140, (Task("cluster", "cluster.run_cluster"),)),
    )


PART_NAMES = tuple(part.name for part in make_parts(dry_run=False))
NEEDS_CEILINGS = ("attention", "model")
