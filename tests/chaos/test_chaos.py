"""Replicas are killed, stopped, made to raise and to send garbage while requests run: no request notices but by the
time it takes, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from chaos_requests import Case, Text, begin, make_cases, require_same, texts_of
from chaos_worker import EXHAUST, FLAWS, RAISE, SPOIL, FlawedWriter

import preble
from preble import Cluster
from preble.engine.messages import StepReport
from preble.replica import lifecycle, process, worker_stream
from preble.sched import Preempted

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc, which only Linux has"),
]

REPLICAS = 4
AT_ONCE = 16
"""Requests in flight."""
CASES, SOME_CASES = 160, 32
"""Different requests, of each kind and prefix some; they are made again and again."""
OPTIONS: dict[str, Any] = {"page_size": 16, "kv_memory": "80KiB", "dtype": "float32", "seed": 5}
"""20 pages for each replica, and up to 16 for a request: some are preempted, and cached prefixes evicted."""
ABANDONED = 0.05
"""Of the requests, so many are first left after some chunks, and made again at once, under the same name."""
HANG_TIMEOUT = 8.0
STANDSTILL = 600.0
"""Seconds without a token after which the test gives up. Nothing else here depends on time."""

FAULTS: dict[str, tuple[str, ...]] = {
    "kill": ("killed by SIGKILL",),
    "kill all": ("killed by SIGKILL",),
    "stop": ("no step within",),
    "raise": ("RuntimeError: chaos",),
    "exhaust": ("OutOfMemoryError: chaos",),
    # What a frame lacks is missed when the next one comes, or when none comes.
    **{f"{flaw.__name__} frame from it": ("FrameError", "no step within") for flaw in FLAWS},
    **{f"{flaw.__name__} frame to it": ("FrameError", "no step within") for flaw in FLAWS},
    "kill while it loads": ("killed by SIGKILL",),
    "flipped probe": ("FrameError",),
}
"""What is done to a replica, and what the cluster must then say of it."""
AT_ONCE_FATAL = ("kill", "raise", "exhaust")
"""What a replica fails of at once."""
LOADING = ("kill while it loads", "flipped probe")
"""What is done to a replica that has failed before and is started again."""


@dataclass(frozen=True)
class Recovery:
    """How a request went on that lost its replica."""

    seconds: float
    """From when the loss was noticed to the next token."""
    losses: int
    """Replicas that it had lost by then."""
    stranded: bool
    """For a while no replica served that it could have gone to."""


@dataclass
class Chronicle:
    """What happens in a cluster: hears what its dispatcher hears of replicas, and proves the books right each time."""

    cluster: Cluster
    outages: list[bool] = field(default_factory=list)
    """Of each time that a replica failed which served: whether no other one did."""
    restarts: list[float] = field(default_factory=list)
    """Seconds from a failure until the replica served again."""
    recoveries: list[Recovery] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        dispatcher: Any = self.cluster._dispatcher
        roster, scheduler, branches = dispatcher.roster, dispatcher._scheduler, dispatcher._branches
        down, up, reported = dispatcher.replica_down, dispatcher.replica_up, dispatcher.step_reported
        since: dict[int, float] = {}
        stranded: set[str] = set()
        """Requests that at some time had no replica to go to."""

        def replica_down(number: int, cause: BaseException) -> None:
            since[number] = time.monotonic()
            self.outages.append(not roster.serving)
            down(number, cause)
            if not roster.serving:
                stranded.update(name for name, branch in branches.items() if branch.lost is not None)
            scheduler.check()

        def replica_up(number: int) -> None:
            self.restarts.append(time.monotonic() - since[number])
            up(number)
            scheduler.check()

        def step_reported(report: StepReport) -> None:
            self.preemptions += sum(isinstance(event, Preempted) for event in report.events)
            for delta in report.deltas:
                branch = branches.get(delta.request_id)
                if branch is not None and branch.lost is not None and delta.token_ids:
                    seconds = time.monotonic() - branch.lost
                    self.recoveries.append(Recovery(seconds, branch.losses, delta.request_id in stranded))
            reported(report)

        dispatcher.replica_down, dispatcher.replica_up = replica_down, replica_up
        dispatcher.step_reported = step_reported

    def quick(self) -> list[float]:
        """Recoveries of requests that had another replica to go to, and got there, shortest first."""
        return sorted(one.seconds for one in self.recoveries if one.losses == 1 and not one.stranded)


class Progress:
    """How many requests have ended, and when the last one did."""

    def __init__(self) -> None:
        self.ended = 0
        self.began = self.heard = time.monotonic()
        self._waiting: list[tuple[int, anyio.Event]] = []

    def end(self) -> None:
        self.ended += 1
        self.heard = time.monotonic()
        for count, event in self._waiting:
            if self.ended >= count:
                event.set()
        self._waiting = [(count, event) for count, event in self._waiting if self.ended < count]

    async def reach(self, count: int) -> None:
        if self.ended < count:
            event = anyio.Event()
            self._waiting.append((count, event))
            await event.wait()


@dataclass(frozen=True)
class Struck:
    """A replica that something was done to."""

    fault: str
    post: Any
    life: Any
    at: float

    def is_over(self) -> bool:
        """Whether that was noticed."""
        return self.post.life is not self.life


class Injector:
    """Does something to a replica every so many requests.

    A request that was on two replicas when they failed is suspected to be the cause, and fails: so no replica is struck
    that has, or could be given, a request which lost another one before.
    """

    def __init__(self, cluster: Cluster, progress: Progress, rng: random.Random) -> None:
        self._dispatcher: Any = cluster._dispatcher
        self._posts: dict[int, Any] = self._dispatcher.roster._posts
        self._progress = progress
        self._rng = rng
        self._stopped: Struck | None = None
        """A replica that stands still, which is not noticed yet."""
        self.struck: Counter[str] = Counter()
        self.downs = 0
        """How many replicas that served were struck."""

    async def strike_all(self, faults: list[str], every: int) -> None:
        """One fault after the other: each when `every` more requests have ended and the one before was noticed. Only
        that a replica was stopped is found out late, and others may fail meanwhile."""
        for fault in faults:
            if fault in LOADING:
                await self._strike_who_loads(fault)
            else:
                await self._progress.reach(self._progress.ended + every)
                await self._strike_who_serves(fault)
            self.struck[fault] += 1
        await self._settle()

    async def _strike_who_loads(self, fault: str) -> None:
        await self._settle()
        if all(post.lifecycle.state == "serving" for post in self._posts.values()):
            await self._strike_who_serves("kill")
            self.struck["kill"] += 1
        await until(lambda: bool(self._loading()))
        await self._notice(self._strike(fault, self._loading()[0]))

    def _loading(self) -> list[int]:
        return [
            number
            for number, post in self._posts.items()
            if post.lifecycle.state == "starting" and post.life.process_id is not None
        ]

    async def _strike_who_serves(self, fault: str) -> None:
        stopped = self._stopped
        if stopped and (fault not in AT_ONCE_FATAL or time.monotonic() - stopped.at > HANG_TIMEOUT / 2):
            await self._settle()
        victims = await self._victims(everybody=fault == "kill all")
        struck = [self._strike(fault, number) for number in victims]
        self.downs += len(struck)
        if fault == "stop":
            (self._stopped,) = struck
            return
        for one in struck:
            await self._notice(one)

    async def _victims(self, *, everybody: bool) -> list[int]:
        """One with requests to work on, or all that serve."""
        while True:
            branches = list(self._dispatcher._branches.values())
            hit = {branch.replica for branch in branches if branch.crashes}
            if everybody and not hit:
                return list(self._dispatcher.roster.serving)
            busy = {branch.replica for branch in branches if branch.replica is not None and branch.token_ids} - hit
            if self._stopped:
                busy -= {self._stopped.post.number}
            if not everybody and busy and None not in hit:
                return [self._rng.choice(sorted(busy))]
            await self._progress.reach(self._progress.ended + 1)

    async def _settle(self) -> None:
        """Wait until it is noticed that the replica which stands still does."""
        if self._stopped:
            await self._notice(self._stopped)
            self._stopped = None

    async def _notice(self, struck: Struck) -> None:
        await until(struck.is_over)
        error = struck.post.last_error
        assert any(cause in error for cause in FAULTS[struck.fault]), (struck.fault, error)

    def _strike(self, fault: str, number: int) -> Struck:
        post = self._posts[number]
        pid = post.life.process_id
        flaws = {flaw.__name__: flaw for flaw in FLAWS}
        match fault.split():
            case ["kill", *_]:
                os.kill(pid, signal.SIGKILL)
            case ["stop"]:
                os.kill(pid, signal.SIGSTOP)
            case ["raise"]:
                os.kill(pid, RAISE)
            case ["exhaust"]:
                os.kill(pid, EXHAUST)
            case [flaw, "frame", "from", "it"]:
                os.kill(pid, SPOIL[flaws[flaw]])
            case [flaw, *_]:
                FlawedWriter.orders[f"preble-replica-{number}"] = flaws[flaw]
        return Struck(fault, post, post.life, time.monotonic())


async def until(condition: Callable[[], bool]) -> None:
    """Needs no time limit: `watch` has one."""
    while not condition():  # noqa: ASYNC110 - no event is set when this becomes true
        await anyio.sleep(0.005)


def anything_of_ours() -> dict[str, Any]:
    """What this process has: children, dead ones not buried included, descriptors, threads."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, rest = stat.read_text().rsplit(")", 1)
            if int(rest.split()[1]) == os.getpid():
                children.append(name)
    descriptors = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # of the directory that is being read
            descriptors[link.name] = os.readlink(link)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("preble")]
    return {"children": children, "descriptors": descriptors, "threads": threads}


def tasks(backend: str) -> int:
    if backend == "trio":
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


def expected(model: Path, cases: int) -> dict[str, list[Text]]:
    """What comes of each case where nothing happens."""
    texts: dict[str, list[Text]] = {}

    async def ask(cluster: Cluster, todo: Iterator[Case]) -> None:
        for case in todo:
            texts[case.name] = await texts_of(case, cluster)

    async def undisturbed() -> None:
        async with Cluster(model, replicas=1, **OPTIONS) as cluster, anyio.create_task_group() as group:
            todo = iter(make_cases(cases, seed=1))
            for _ in range(AT_ONCE):
                group.start_soon(ask, cluster, todo)

    anyio.run(undisturbed)
    return texts


@pytest.fixture(scope="module")
def texts(llama: Path) -> dict[str, list[Text]]:
    """What comes of many cases."""
    return expected(llama, CASES)


@pytest.fixture(scope="module")
def some_texts(llama: Path) -> dict[str, list[Text]]:
    """What comes of the cases of a short test."""
    return expected(llama, SOME_CASES)


@pytest.fixture
def flawed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with faults in them, and on this side frames that can be spoilt, too."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(process, "WORKER_MODULE", "chaos_worker")
    monkeypatch.setattr(worker_stream, "FrameWriter", FlawedWriter)
    # So many faults in so little time would keep the breakers open.
    monkeypatch.setattr(lifecycle, "LONGEST_DELAY", 1.0)


async def chaos(
    model: Path,
    expected: dict[str, list[Text]],
    backend: str,
    *,
    requests: int,
    rounds: Iterable[list[str]],
    every: int,
    seed: int,
    seconds: float = 0.0,
) -> None:
    """Serve requests, strike meanwhile, and look whether all is as it should be.

    Args:
        model: the checkpoint.
        expected: what comes of each request.
        backend: of the two, the one that runs this.
        requests: how many shall end at least.
        rounds: lists of faults; a round begins only while there are requests or seconds to go.
        every: requests that end between two faults.
        seed: of what is left to chance.
        seconds: how long it shall last at least.
    """
    before, tasks_before = anything_of_ours(), tasks(backend)
    async with Cluster(
        model, replicas=REPLICAS, workers="process", hang_timeout=HANG_TIMEOUT, restart_timeout=STANDSTILL, **OPTIONS
    ) as cluster:
        progress, chronicle = Progress(), Chronicle(cluster)
        rng = random.Random(seed)
        injector = Injector(cluster, progress, rng)
        idle = deque(make_cases(len(expected), seed=1))
        striking = True
        began = time.monotonic()

        async def ask() -> None:
            while striking or progress.ended < requests:
                case = idle.popleft()
                if rng.random() < ABANDONED:
                    await begin(case, cluster, chunks=rng.randrange(10))
                require_same(case, await texts_of(case, cluster), expected[case.name])
                idle.append(case)
                progress.end()

        async def watch() -> None:
            while True:
                await anyio.sleep(1.0)
                if time.monotonic() - progress.heard > STANDSTILL:
                    raise AssertionError(f"nothing moves after {injector.struck}: {cluster.health()} {cluster.stats()}")

        async with anyio.create_task_group() as watching:
            watching.start_soon(watch)
            async with anyio.create_task_group() as asking:
                for _ in range(AT_ONCE):
                    asking.start_soon(ask)
                for faults in rounds:
                    await injector.strike_all(faults, every)
                    print(report(progress, injector, chronicle, began), flush=True)
                    if progress.ended >= requests and time.monotonic() - began >= seconds:
                        break
                striking = False
            await until(lambda: cluster.health().status == "ok")
            await cluster.reset_prefix_cache()  # every worker proves its books right, too
            watching.cancel_scope.cancel()
        print(report(progress, injector, chronicle, began))
        require_nothing_left(cluster)
        assert len(chronicle.outages) == injector.downs, "a replica failed that nobody struck"
        quick, restarts = chronicle.quick(), sorted(chronicle.restarts)
        # Whoever has another replica to go to does not wait for a restart. How long that takes depends on the machine.
        assert percentile(quick, 0.99) < percentile(restarts, 0.5)
    assert anything_of_ours() == before
    assert tasks(backend) == tasks_before


def require_nothing_left(cluster: Cluster) -> None:
    """No request is anywhere, and no page belongs to one or is remembered."""
    dispatcher: Any = cluster._dispatcher
    scheduler = dispatcher._scheduler
    scheduler.check()
    assert not dispatcher._flights
    assert not dispatcher._branches
    assert not scheduler.waiting
    assert (cluster._door.free, cluster._door.waiting) == (cluster._door.limit, 0)
    assert not cluster._reception.at_the_door
    assert not FlawedWriter.orders
    for stats in cluster.stats().replicas:
        assert (stats.running, stats.waiting, stats.pages_in_use, stats.pages_cached) == (0, 0, 0, 0)
        assert stats.pages_free == stats.pages_total
        assert not scheduler.in_flight(stats.replica)
        assert not scheduler.resident_pages(stats.replica)


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def report(progress: Progress, injector: Injector, chronicle: Chronicle, began: float) -> str:
    quick, restarts = chronicle.quick(), sorted(chronicle.restarts)
    every = sorted(one.seconds for one in chronicle.recoveries)
    faults = ", ".join(f"{count} x {fault}" for fault, count in sorted(injector.struck.items()))
    seconds = time.monotonic() - began
    lines = [f"{progress.ended} requests in {seconds:.0f} s, {chronicle.preemptions} preemptions; {faults}"]
    for name, times in (("to another replica", quick), ("all recoveries", every), ("restarts", restarts)):
        if times:
            p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
            lines.append(f"    {name}: {len(times)}, p50 {p50:.3f} s, p99 {p99:.3f} s, longest {times[-1]:.3f} s")
    return "\n".join(lines)


A_FEW = ["exhaust", "repeated frame to it", "kill while it loads", "raise"]
EACH_TWICE = [
    *("raise", "kill", "flipped frame from it", "kill while it loads", "stop", "exhaust", "cut frame to it", "raise"),
    *("repeated frame from it", "exhaust", "flipped probe", "stop", "kill all", "lost frame to it"),
]
"""… at least; and a damaged frame in each of four ways."""


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_nothing_is_lost_under_trio(
    llama: Path, some_texts: dict[str, list[Text]], flawed: None, anyio_backend: str
) -> None:
    await chaos(llama, some_texts, anyio_backend, requests=50, rounds=[A_FEW], every=8, seed=2)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_of_a_thousand_is_lost(
    llama: Path, texts: dict[str, list[Text]], flawed: None, anyio_backend: str
) -> None:
    await chaos(llama, texts, anyio_backend, requests=1000, rounds=[EACH_TWICE], every=75, seed=1)


async def test_a_cluster_is_left_in_the_middle_of_it(llama: Path, flawed: None, anyio_backend: str) -> None:
    before, tasks_before = anything_of_ours(), tasks(anyio_backend)
    async with Cluster(llama, replicas=2, workers="process", policy="round-robin", **OPTIONS) as cluster:
        streams = [cluster.stream("Once upon a time", max_tokens=100, ignore_eos=True) for _ in range(6)]
        for stream in streams:
            await anext(stream)
        posts: Any = cluster._dispatcher.roster._posts
        stopped, killed = posts[0].life, posts[1].life
        os.kill(stopped.process_id, signal.SIGSTOP)
        os.kill(killed.process_id, signal.SIGKILL)
        await until(lambda: posts[1].life not in (killed, None))
        # One stands still, the other one starts again, and somebody waits for each.
    for stream in streams:
        with pytest.raises(preble.ClusterStateError, match="the cluster was closed"):
            await stream.finish()
    assert anything_of_ours() == before
    assert tasks(anyio_backend) == tasks_before


@pytest.mark.long
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_is_lost_in_half_an_hour(
    llama: Path, texts: dict[str, list[Text]], flawed: None, anyio_backend: str
) -> None:
    rng = random.Random(3)
    rounds = (["kill", *rng.sample(list(FAULTS), len(FAULTS))] for _ in repeat(None))
    await chaos(llama, texts, anyio_backend, requests=20_000, rounds=rounds, every=80, seed=3, seconds=1800.0)
