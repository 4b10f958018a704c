"""The replicas of a cluster: starts them, notices when they fail, starts them again, and ends them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.to_thread
import numpy as np

from preble.engine.messages import Command, Pause, Ready, StepReport, Submit
from preble.errors import ClusterStateError, PrebleError, ReplicaCrashed
from preble.post import Enlistment, Post
from preble.replica.lifecycle import Lifecycle
from preble.sampling import SamplingParams
from preble.ticker import Ticker

if TYPE_CHECKING:
    import torch

    from preble.health import ReplicaHealth
    from preble.outputs import ReplicaStats
    from preble.replica.base import Replica
    from preble.replica.launch import Launcher

logger = logging.getLogger("preble.cluster")

PROBE = "\0probe"
"""Id and namespace of the request that a restarted replica must answer before any other."""
LOOKS = 4
"""How often, within a limit, one looks whether it has passed."""


class Owner(Protocol):
    """Who uses the replicas. Called in the event loop's thread."""

    def step_reported(self, report: StepReport) -> None:
        """A replica that serves finished a step."""
        ...

    def replica_down(self, number: int, cause: BaseException) -> None:
        """A replica that served is gone, with its requests and its KV pages. It may come back."""
        ...

    def replica_up(self, number: int) -> None:
        """A replica that was down serves again, with nothing in its KV pages."""
        ...

    def is_busy(self, number: int) -> bool:
        """Whether the replica has requests to work on."""
        ...

    def time_passed(self, now: float) -> None:
        """Called now and then, about every second."""
        ...


class Roster:
    """Owns the replicas. Belongs to the event loop's thread, but for what replicas report (`Listener`).

    Args:
        launcher: starts replicas.
        owner: is told what they report and what becomes of them.
        call_soon: runs a function in the event loop's thread, from any thread.
        hang_timeout: seconds without a report after which a replica with work counts as failed.
        start_timeout: seconds after which a restart that is not through counts as failed.
    """

    def __init__(
        self,
        launcher: Launcher,
        owner: Owner,
        call_soon: Callable[..., None],
        *,
        hang_timeout: float,
        start_timeout: float,
    ) -> None:
        self._launcher = launcher
        self._owner = owner
        self._call_soon = call_soon
        self._hang_timeout = hang_timeout
        self._start_timeout = start_timeout
        self._posts: dict[int, Post] = {}
        self._lives: set[Replica] = set()
        """All that have not ended, also those that failed or were dismissed."""
        self._enlistment: Enlistment | None = None
        self._enlisting = anyio.Lock()
        self._numbers_used = 0
        self._closed = False
        self.paused = False
        self._looked = time.monotonic()
        self._ticker = Ticker(lambda: call_soon(self._tick))
        self._ticker.at(self._looked)

    # Coming and going

    async def enlist(
        self, devices: Sequence[torch.device], pages: int | None, admit: Callable[[dict[int, Ready]], None]
    ) -> list[int]:
        """Start new replicas on these devices and wait until they serve; returns their numbers.

        Args:
            devices: one for each.
            pages: KV pages that each gets; by default as many as fit.
            admit: is called with the numbers and what each said, before the first of them may report a step.

        Raises:
            PrebleError: one could not be started; the others are ended.
        """
        async with self._enlisting:
            if self._closed:
                raise ClusterStateError("the cluster was closed")
            now = time.monotonic()
            posts = [
                Post(self._numbers_used + index, device, Lifecycle(now), pages=pages)
                for index, device in enumerate(devices)
            ]
            here = self._enlistment = Enlistment(posts)
            try:
                try:
                    for post in posts:
                        self._posts[post.number] = post
                        self._start(post)
                except RuntimeError as error:  # there are no threads left, say
                    here.error = error
                    here.settled.set()
                await here.settled.wait()
                if here.error is not None:
                    raise _start_error(here.error)
                admit({post.number: post.ready for post in posts if post.ready is not None})
                for post in posts:
                    post.enlisted = True
                    self._pause_newcomer(post)
            except BaseException:
                for post in posts:
                    self.dismiss(post.number)
                raise
            finally:
                self._enlistment = None
            self._numbers_used += len(posts)
            return [post.number for post in posts]

    def dismiss(self, number: int) -> Replica | None:
        """Forget a replica and ask it to end; returns it, to be joined, where it still lives."""
        post = self._posts.pop(number, None)
        if post is None:
            return None
        post.acknowledge(float("inf"))
        if post.life is not None:
            post.life.stop()
        return post.life

    def stop(self) -> None:
        """Ask every replica to end. Nothing is reported any more."""
        self._closed = True
        for post in self._posts.values():
            post.acknowledge(float("inf"))
        if self._enlistment is not None:
            self._fail_enlistment(self._enlistment, ClusterStateError("the cluster was closed"))
        self.abandon()

    def abandon(self) -> None:
        """Ask every replica to end, from any thread: the event loop is gone."""
        self._ticker.stop()
        for life in list(self._lives):
            life.stop()

    async def join(self) -> None:
        """Wait until everything that was started has ended. After `stop`."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._ticker.join)
            for life in list(self._lives):
                await self.bury(life)

    async def bury(self, life: Replica) -> None:
        """Wait until a replica that was asked to end has ended. A thread that takes longer than a step may take hangs,
        and is left behind."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(life.join, self._hang_timeout)

    # Telling them something

    def send(self, number: int, command: Command) -> int:
        """Tell a replica something before its next step; dropped where it is down. Returns the command's number in the
        replica's life, from 1."""
        post = self._posts.get(number)
        if post is None or post.life is None:
            return 0
        post.sent += 1
        post.life.send(command)
        return post.sent

    def taken(self, number: int) -> int:
        """How many commands a replica is known to have taken in, in its present or last life."""
        return self._posts[number].taken

    async def tell(self, numbers: Sequence[int], command: Command) -> None:
        """Tell replicas something and wait until each has taken it in. One that is down or goes down needs no telling:
        it loses what it has."""
        waiting = []
        for number in numbers:
            post = self._posts[number]
            if post.lifecycle.state == "serving" and post.life is not None:
                self.send(number, command)
                waiting.append(anyio.Event())
                post.acknowledgements.append((post.sent, waiting[-1]))
        for event in waiting:
            await event.wait()

    # How they are

    @property
    def numbers(self) -> list[int]:
        """All replicas that belong to the cluster, up or down."""
        return [post.number for post in self._posts.values() if post.enlisted]

    def stats(self) -> list[ReplicaStats]:
        """Every replica as of its last step."""
        return [post.stats for post in self._posts.values() if post.enlisted and post.stats is not None]

    @property
    def serving(self) -> list[int]:
        """The replicas that are up."""
        return [post.number for post in self._posts.values() if post.enlisted and post.lifecycle.state == "serving"]

    def last_error(self) -> str:
        """Of the failures that replicas are down for, the latest one's cause."""
        down = [post for post in self._posts.values() if post.last_error is not None]
        return max(down, key=lambda post: post.lifecycle.since).last_error or "" if down else "none is left"

    def health(self, in_flight: Callable[[int], int], draining: Callable[[int], bool]) -> list[ReplicaHealth]:
        """Every replica, now."""
        now = time.monotonic()
        return [
            post.health(now, in_flight=in_flight(post.number), draining=draining(post.number))
            for post in self._posts.values()
            if post.enlisted
        ]

    # What replicas report, from their threads

    def ready(self, replica: Replica, ready: Ready) -> None:
        """See `Listener`."""
        self._call_soon(self._loaded, replica, ready)

    def reported(self, replica: Replica, report: StepReport) -> None:
        """See `Listener`."""
        self._call_soon(self._took_report, replica, report)

    def failed(self, replica: Replica, cause: BaseException) -> None:
        """See `Listener`."""
        self._call_soon(self._lost, replica, cause)

    def ended(self, replica: Replica) -> None:
        """See `Listener`."""
        self._call_soon(self._ended, replica)

    # In the event loop's thread

    def _start(self, post: Post) -> None:
        post.sent = post.taken = 0
        post.told_at = time.monotonic()
        post.life = self._launcher.start(post.number, post.device, post.pages, self)
        self._lives.add(post.life)

    def _post_of(self, replica: Replica) -> Post | None:
        """The place that a life has now; `None` for one that is over."""
        post = self._posts.get(replica.number)
        return post if post is not None and post.life is replica and not self._closed else None

    def _loaded(self, replica: Replica, ready: Ready) -> None:
        post = self._post_of(replica)
        if post is None:
            return
        now = post.told_at = post.alive_at = time.monotonic()
        post.stats = ready.stats
        post.lifecycle.loaded(now)
        if post.lifecycle.state == "probing":
            self.send(post.number, _probe())
            return
        post.ready, post.pages = ready, ready.pages
        here = self._enlistment
        if here is not None and all(one.ready is not None for one in here.posts):
            here.settled.set()

    def _took_report(self, replica: Replica, report: StepReport) -> None:
        post = self._post_of(replica)
        if post is None:
            return
        now = post.told_at = post.alive_at = time.monotonic()
        post.stats, post.taken = report.stats, report.taken
        post.acknowledge(post.taken)
        if post.lifecycle.state == "probing":
            answers = [delta for delta in report.deltas if delta.request_id == PROBE]
            if not answers:
                return
            if answers[0].error is not None:
                self._fail(post, RuntimeError(f"the probe failed: {answers[0].error}"))
                return
            post.lifecycle.proved(now)
            logger.info("replica %d serves again", post.number)
            self._pause_newcomer(post)
            self._owner.replica_up(post.number)
        self._owner.step_reported(report)

    def _pause_newcomer(self, post: Post) -> None:
        if self.paused:
            self.send(post.number, Pause(True))

    def _lost(self, replica: Replica, cause: BaseException) -> None:
        post = self._post_of(replica)
        if post is not None:
            self._fail(post, cause)

    def _fail(self, post: Post, cause: BaseException) -> None:
        """Take a replica out, and start it again when its time has come."""
        now = time.monotonic()
        life, served = post.life, post.lifecycle.state == "serving"
        if life is not None:  # it could be started
            life.kill()
        post.life, post.previous = None, life if life in self._lives else None
        post.last_error = f"{type(cause).__name__}: {cause}"
        post.acknowledge(float("inf"))
        if not post.enlisted:
            if self._enlistment is not None:
                self._fail_enlistment(self._enlistment, cause)
            return
        post.lifecycle.failed(now)
        wait = post.lifecycle.retry_at - now
        logger.error("replica %d failed and will be started again in %.1f s: %s", post.number, wait, post.last_error)
        self._ticker.at(post.lifecycle.retry_at)
        if served:
            self._owner.replica_down(post.number, cause)

    @staticmethod
    def _fail_enlistment(enlistment: Enlistment, cause: BaseException) -> None:
        enlistment.error = enlistment.error or cause
        enlistment.settled.set()

    def _ended(self, replica: Replica) -> None:
        replica.join()  # saying so was the last that its thread did; whoever waits for the cluster's end sees it gone
        self._lives.discard(replica)
        post = self._posts.get(replica.number)
        if post is not None and post.previous is replica:
            post.previous = None
            self._ticker.at(post.lifecycle.retry_at)

    def _tick(self) -> None:
        """Look after restarts that are due, and replicas that do not move."""
        if self._closed:
            return
        now = time.monotonic()
        # After a standstill of this process, what replicas told meanwhile may not be read yet.
        standstill = now - self._looked > self._hang_timeout / 2
        self._looked = now
        for post in list(self._posts.values()):
            cycle = post.lifecycle
            if cycle.state == "waiting" and post.previous is None:
                if cycle.may_restart(now):
                    cycle.restarted(now)
                    try:
                        self._start(post)
                    except Exception as error:  # there is no thread to be had, say
                        self._fail(post, error)
                else:
                    self._ticker.at(cycle.retry_at)
            elif cycle.state == "starting" and post.enlisted and now - cycle.since > self._start_timeout:
                self._fail(post, TimeoutError(f"it did not start within {self._start_timeout:g} s"))
            elif cycle.state in ("serving", "probing"):
                self._look_at(post, now, standstill)
        self._owner.time_passed(now)
        self._ticker.at(now + min(self._hang_timeout / LOOKS, 1.0))

    def _look_at(self, post: Post, now: float, standstill: bool) -> None:
        busy = post.sent > post.taken or (post.enlisted and not self.paused and self._owner.is_busy(post.number))
        if standstill or not busy:
            post.alive_at = now
        elif now - post.alive_at > self._hang_timeout:
            self._fail(post, TimeoutError(f"no step within {self._hang_timeout:g} s, with work to do"))


def _start_error(cause: BaseException) -> BaseException:
    """What whoever starts a replica is told."""
    if isinstance(cause, PrebleError):
        return cause
    error = ReplicaCrashed(f"a replica could not be started: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _probe() -> Submit:
    """A prompt of one token and one token of answer: a step through the whole model."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return Submit(
        PROBE, np.zeros(1, np.int32), prompt_length=1, max_length=2, sampling=sampling, seed=0, namespace=PROBE
    )
