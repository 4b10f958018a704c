"""Preble itself, as an application uses it: a cluster of one replica in a thread, all prompts as streams at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from anyio import create_task_group
from anyio.from_thread import BlockingPortal, start_blocking_portal

import preble
from preble.bench.peers.worker import Setup, Trace, Work, serve


class Preble:
    """Hands work to the event loop of a running cluster."""

    def __init__(self, portal: BlockingPortal, cluster: preble.Cluster) -> None:
        self._portal = portal
        self._cluster = cluster
        self.versions = {"preble": preble.__version__, "torch": torch.__version__, "anyio": version("anyio")}
        (replica,) = portal.call(cluster.stats).replicas
        self.settings = {"dtype": "bfloat16", "attention": replica.attention, "workers": "thread"}

    def run(self, work: Work) -> Trace:
        """All prompts at once; the cluster is not told what they share."""
        return self._portal.call(self._serve, work)

    async def _serve(self, work: Work) -> Trace:
        count = len(work.prompts)
        trace = Trace(time.perf_counter(), [[] for _ in range(count)], [[] for _ in range(count)])

        async def consume(number: int) -> None:
            stream = self._cluster.stream(
                work.prompts[number], max_tokens=work.new_tokens, temperature=0, ignore_eos=True
            )
            async for chunk in stream:
                trace.tokens[number] += chunk.token_ids
                trace.arrivals[number] += [time.perf_counter()] * len(chunk.token_ids)

        async with create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(consume, number)
        return trace


@contextmanager
def open_preble(setup: Setup) -> Iterator[Preble]:
    """A cluster whose event loop runs beside the main thread, which waits for the next work."""
    cluster = preble.Cluster(setup.checkpoint, replicas=1, devices=["cpu"], workers="thread", dtype="bfloat16")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(cluster) as running:
        yield Preble(portal, running)


if __name__ == "__main__":
    serve(open_preble)
