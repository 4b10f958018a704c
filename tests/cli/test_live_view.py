"""The live view, of a cluster that works."""

from __future__ import annotations

import io
import re

import anyio
import pytest
from rich.console import Console

import preble
from preble.cli.demo_workload import Workload
from preble.cli.graded_answer import GradedAnswer
from preble.cli.live_view import LiveView
from preble.cli.watched import watched
from preble.outputs import ClusterStats

pytestmark = pytest.mark.anyio


def console(*, terminal: bool) -> Console:
    """One that keeps what is printed."""
    return Console(file=io.StringIO(), width=80, height=24, force_terminal=terminal, highlight=False)


def printed(where: Console) -> str:
    """Without colors."""
    assert isinstance(where.file, io.StringIO)
    return re.sub(r"\x1b\[[\d;]*m", "", where.file.getvalue())


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


async def test_it_shows_what_the_statistics_say() -> None:
    tasks = Workload.generate(12, 8).tasks
    async with preble.Cluster("demo", replicas=2, kv_memory="20MiB", policy="round-robin") as cluster:
        await cluster.generate(tasks[0].prompt, max_tokens=2)  # what came before the burst does not count
        snapshots: list[ClusterStats] = []

        def stats() -> ClusterStats:
            snapshots.append(cluster.stats())
            return snapshots[-1]

        view = LiveView(len(tasks), stats)
        before = snapshots[-1]
        answers = []
        for number, task in enumerate(tasks):
            output = await cluster.generate(task.prompt, max_tokens=2)
            answers.append(GradedAnswer(task, output, right=number % 4 > 0))
            view.add(answers[-1])
        running = cluster.stream(tasks[0].prompt, max_tokens=1000, ignore_eos=True)
        async with running:
            await anext(running)
            terminal, log = console(terminal=True), console(terminal=False)
            terminal.print(view.frame(3.4))
            now = snapshots[-1]
            log.print(view.line(3.4), soft_wrap=True)
    prompts = sum(one.prompt_tokens for one in now.replicas) - sum(one.prompt_tokens for one in before.replicas)
    cached = sum(one.cached_tokens for one in now.replicas) - sum(one.cached_tokens for one in before.replicas)
    progress = f"3 s: 12 of 12 answered, 75.0% right, hit rate {cached / prompts:.0%}"
    assert progress in printed(terminal)
    assert progress in printed(log)
    rows = [line for line in printed(terminal).splitlines() if re.match(r" +\d ", line)]
    assert len(rows) == 2
    assert sum(one.running for one in now.replicas) == 1
    for row, one in zip(rows, now.replicas, strict=True):
        seen = numbers(row)
        assert seen[:3] == [one.replica, one.waiting, one.running]
        assert seen[3:6] == [one.pages_in_use, one.pages_cached, one.pages_free]
        assert seen[7] == sum(answer.output.placement.replica == one.replica for answer in answers) == 6
        assert (row.count("█"), row.count("▒")) == (
            round(20 * one.pages_in_use / one.pages_total),
            round(20 * one.pages_cached / one.pages_total),
        )
        assert len(re.findall("[█▒·]", row)) == 20


async def test_a_terminal_is_drawn_on_and_left_clean() -> None:
    class Counting:
        frames = 0

        def frame(self, seconds: float) -> str:
            self.frames += 1
            if self.frames == 3:
                drawn.set()
            return f"frame {self.frames}"

        def line(self, seconds: float) -> str:
            raise AssertionError("a log's")

    drawn, view, where = anyio.Event(), Counting(), console(terminal=True)
    await watched(where, view, drawn.wait)
    text = printed(where)
    assert [f"frame {number}" in text for number in (1, 2, 3)] == [True] * 3
    assert text.endswith("\x1b[2K")  # the last thing done is erasing


@pytest.mark.parametrize("terminal", [True, False])
async def test_the_first_failure_ends_the_work(terminal: bool) -> None:
    class Still:
        def frame(self, seconds: float) -> str:
            return ""

        def line(self, seconds: float) -> str:
            return ""

    async def fail() -> None:
        raise preble.RequestFailed("no")

    with pytest.raises(preble.RequestFailed, match="no"):
        await watched(console(terminal=terminal), Still(), anyio.sleep_forever, fail, anyio.sleep_forever)
