"""The parts of the benchmark: what they run, and how long they may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record

_PACKAGE = "preble.bench.gpu"

Run = Callable[[Place, Record, tuple[int, int]], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does."""

    name: str
    """Unique."""
    function: str
    """With its module, so that a process can be told of it."""
    shard: tuple[int, int] = (0, 1)
    """Which of how many equal shares of the cases."""

    def load(self) -> Run:
        """The function."""
        module, _, name = self.function.rpartition(".")
        run: Run = getattr(import_module(module), name)
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
    """All parts in the order in which they run. On a GPU the seconds add up to less than ten minutes. A dry run has ten
    times as long: it shows that everything runs, on whatever machine."""
    times = 10 if dry_run else 1
    several = 1 if dry_run else 3
    correctness = (
        *_shared_out("decode", f"{_PACKAGE}.check_decode.run_decode", several),
        *_shared_out("extend", f"{_PACKAGE}.check_extend.run_extend", several),
        *_shared_out("shared prefix", f"{_PACKAGE}.check_decode.run_shared", 1 if dry_run else 2),
        Task("layers", f"{_PACKAGE}.check_layers.run_layers"),
        Task("sampling", f"{_PACKAGE}.check_sampling.run_sampling"),
        *_shared_out("tokens", f"{_PACKAGE}.check_tokens.run_tokens", several),
    )
    return (
        Part("correctness", 130 * times, correctness),
        Part("ceilings", 30 * times, (Task("ceilings", f"{_PACKAGE}.ceilings.run_ceilings"),)),
        Part("attention", 75 * times, (Task("attention", f"{_PACKAGE}.attention.run_attention"),)),
        Part("model", 100 * times, (Task("model", f"{_PACKAGE}.model.run_model"),)),
        Part("peer", 95 * times, (Task("peer", f"{_PACKAGE}.peer.run_peer"),)),
        Part("cluster", 140 * times, (Task("cluster", f"{_PACKAGE}.cluster.run_cluster"),)),
    )


PART_NAMES = tuple(part.name for part in make_parts(dry_run=False))
NEEDS_CEILINGS = ("attention", "model")
