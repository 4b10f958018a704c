"""A request in flight, on the event loop's side: what its replicas reported and who waits for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from preble.errors import PrebleError, RequestFailed
from preble.outputs import Chunk, Completion, FinishReason, GenerationOutput, Timing, TokenLogprob, Usage
from preble.sampling import SamplingParams
from preble.sched.placement import Placement
from preble.terms import Terms

if TYPE_CHECKING:
    from preble.engine.messages import Delta
    from preble.sched.hashing import Tokens


class Branch:
    """One of a request's `n` continuations."""

    def __init__(self, flight: Flight, index: int) -> None:
        self.flight = flight
        self.index = index
        self.request_id = ""
        """The name under which schedulers and replicas know it, once it is there: never used twice, so that what is
        still told of an aborted request is not taken for the next one to which the caller gives the same name."""
        self.seed = flight.seed + index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.placement: Placement | None = None
        """The first one; a request moves only when its replica is lost."""
        self.replica: int | None = None
        """Where it runs now."""
        self.arrived: float | None = None
        """When it was first handed to a replica."""
        self.command = 0
        """The number of the command that handed it over, in the life of its replica."""
        self.crashes = 0
        """Replicas that failed after they had received this request, and before it ended."""
        self.losses = 0
        """… and those that failed while it was on its way to them, too."""
        self.lost: float | None = None
        """When its replica was found to have failed, until it goes on."""
        self.cached_tokens = 0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._delivered = (0, 0)
        """Tokens and text pieces that the stream has handed out."""

    def take(self, delta: Delta, now: float) -> None:
        """Add what a step reported."""
        flight = self.flight
        if not self.token_ids:
            self.cached_tokens = delta.cached_tokens
        if self.index == 0 and flight.started is None:
            flight.started = delta.started
        if delta.token_ids:
            flight.first_token = flight.first_token or now
            flight.last_token = now
        self.token_ids += delta.token_ids
        self._texts.append(delta.text)
        self._logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    def next_chunk(self) -> Chunk | None:
        """What is new since the last call; `None` if that is nothing."""
        tokens, texts = self._delivered
        if tokens == len(self.token_ids) and texts == len(self._texts):
            return None
        self._delivered = (len(self.token_ids), len(self._texts))
        return Chunk(
            text="".join(self._texts[texts:]),
            token_ids=tuple(self.token_ids[tokens:]),
            logprobs=tuple(self._logprobs[tokens:]),
            index=self.index,
            finish_reason=self.finish_reason,
        )

    def completion(self) -> Completion:
        """The continuation as far as it went."""
        return Completion(
            index=self.index,
            text="".join(self._texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            logprobs=tuple(self._logprobs),
        )


class Flight:
    """A request from its acceptance to its end. Touched only by the event loop's thread."""

    def __init__(
        self,
        request_id: str,
        prompt: Tokens,
        sampling: SamplingParams,
        terms: Terms,
        *,
        cluster_seed: int,
        submitted: float,
        on_end: Callable[[], object],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.sampling = sampling
        self.seed = sampling.seed if sampling.seed is not None else _derived_seed(cluster_seed, request_id)
        self.terms = terms
        self.submitted = submitted
        self.deadline = None if terms.timeout is None else submitted + terms.timeout
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.ended: float | None = None
        self.error: PrebleError | None = None
        self.branches = [Branch(self, index) for index in range(sampling.n)]
        self._news = anyio.Event()
        self._wants_chunks = False
        self._on_end = on_end

    @property
    def done(self) -> bool:
        """Every continuation ended, or the request failed."""
        return self.ended is not None

    def took(self, now: float) -> None:
        """Tell whoever waits that branches took something in."""
        if self.ended is None and all(branch.finish_reason is not None for branch in self.branches):
            self._end(now)
        if self.done or self._wants_chunks:
            self._news.set()

    def fail(self, error: PrebleError, now: float) -> None:
        """End with an error."""
        if self.ended is None:
            self.error = error
            self._end(now)
            self._news.set()

    def _end(self, now: float) -> None:
        self.ended = now
        self._on_end()

    async def wait(self, *, for_chunks: bool) -> None:
        """Until there is a new chunk, or (not `for_chunks`) until the request is done."""
        self._wants_chunks = for_chunks
        if self._news.is_set():
            self._news = anyio.Event()
        if not self.done:
            await self._news.wait()

    def next_chunk(self) -> Chunk | None:
        """What is new on any branch."""
        for branch in self.branches:
            chunk = branch.next_chunk()
            if chunk is not None:
                return chunk
        return None

    def output(self) -> GenerationOutput:
        """The request as far as it went."""
        first = self.branches[0]
        assert first.placement is not None
        ended = self.ended if self.ended is not None else self.last_token or self.submitted
        started = self.started if self.started is not None else ended
        first_token = self.first_token if self.first_token is not None else ended
        tokens = len(first.token_ids)
        return GenerationOutput(
            request_id=self.request_id,
            completions=tuple(branch.completion() for branch in self.branches),
            usage=Usage(
                prompt_tokens=len(self.prompt),
                cached_tokens=first.cached_tokens,
                completion_tokens=sum(len(branch.token_ids) for branch in self.branches),
            ),
            timing=Timing(
                queued=started - self.submitted,
                ttft=first_token - self.submitted,
                tpot=((self.last_token or first_token) - first_token) / (tokens - 1) if tokens > 1 else 0.0,
                total=ended - self.submitted,
            ),
            placement=first.placement,
        )


def request_failed(request_id: str, why: str) -> RequestFailed:
    """The error of a request that its engine gave up."""
    return RequestFailed(f"request {request_id!r}: {why}")


def _derived_seed(cluster_seed: int, request_id: str) -> int:
    digest = hashlib.blake2b(f"{cluster_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2  # leaves room for `seed + n` below 2^63
