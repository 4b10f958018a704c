"""Where requests come in: checks them, has them wait at the door, reads their prompts, hands them over."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from preble.errors import InvalidRequest, PromptTooLong
from preble.flight import Flight, request_failed
from preble.prompts import Prompt, check_text, is_long, prompt_tokens
from preble.sampling import SamplingParams
from preble.stream import Stream
from preble.terms import Terms
from preble.turnstile import Turnstile

if TYPE_CHECKING:
    from preble.admission import Admission
    from preble.dispatcher import Dispatcher
    from preble.engine.config import ModelConfig
    from preble.engine.tokenizer import Tokenizer
    from preble.sched.hashing import Tokens

LONG_LIST = 20_000
"""Token ids in a list from which it is read in a worker thread, as long texts are: before that it takes half a
millisecond."""
SHORT_LIST = 1_000
"""Token ids in a list up to which they are checked before the request has a slot: that takes some microseconds."""
READERS = 2
"""Prompts read in worker threads at a time. More of them would compete with the event loop for the interpreter, and for
the threads that the application uses."""

Message = Mapping[str, Any]


class Reception:
    """Makes streams of calls. A stream that begins takes a slot, then its prompt is read, then a replica is found.

    Args:
        tokenizer: of the checkpoint.
        config: of the model.
        dispatcher: is handed the requests.
        door: where they wait for a slot.
        seed: what requests without a seed derive theirs from.
        must_be_open: raises where no requests are taken any more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        dispatcher: Dispatcher,
        door: Admission,
        *,
        seed: int,
        must_be_open: Callable[[], None],
    ) -> None:
        self.tokenizer = tokenizer
        self.at_the_door: dict[str, anyio.CancelScope] = {}
        """Requests that no replica has heard of yet, by the names that their callers gave them."""
        self._config = config
        self._dispatcher = dispatcher
        self._door = door
        self._seed = seed
        self._must_be_open = must_be_open
        self._turnstile = Turnstile()
        self._readers = anyio.CapacityLimiter(READERS)
        self._ids = count(1)

    def prompt(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        options: Mapping[str, Any],
        terms: Terms,
        *,
        patient: bool = False,
    ) -> Stream:
        """A request for what follows a prompt. A patient one waits for its turn, also where others are refused.

        Raises:
            InvalidRequest: a sampling value is out of its range.
        """

        def check() -> None:
            # No turn is waited for: whoever is refused must not stand in the way of those who have a slot.
            if isinstance(prompt, str):
                check_text(prompt)
            elif not is_long(prompt, SHORT_LIST):
                self._check_length(prompt_tokens(prompt))

        async def tokenize() -> Tokens:
            if isinstance(prompt, str):
                return await self._read(lambda: self.tokenizer.encode(prompt), quick=self.tokenizer.is_quick(prompt))
            return await self._read(lambda: prompt_tokens(prompt), quick=not is_long(prompt, LONG_LIST))

        return self._stream(check, tokenize, sampling, options, terms, patient=patient)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        sampling: SamplingParams | None,
        options: Mapping[str, Any],
        terms: Terms,
    ) -> Stream:
        """A request for the next message of a conversation.

        Raises:
            InvalidRequest: a sampling value is out of its range.
        """

        async def tokenize() -> Tokens:
            return await self._read(lambda: self.tokenizer.chat(messages, tools=tools), quick=False)

        return self._stream(None, tokenize, sampling, options, terms)

    def abort(self, request_id: str) -> bool:
        """End a request, wherever it is; whether there was one of this name."""
        scope = self.at_the_door.get(request_id)
        if scope is None:
            return self._dispatcher.abort(request_id)
        scope.cancel()
        return True

    def _stream(
        self,
        check: Callable[[], None] | None,
        tokenize: Callable[[], Awaitable[Tokens]],
        sampling: SamplingParams | None,
        options: Mapping[str, Any],
        terms: Terms,
        *,
        patient: bool = False,
    ) -> Stream:
        params = SamplingParams.from_options(sampling, options)
        params.check_vocabulary(self._config.vocabulary_size)
        if params.n > self._door.limit:
            raise InvalidRequest(f"n={params.n} is more than max_pending={self._door.limit}, and counts n times in it")

        async def start() -> Flight:
            self._must_be_open()
            submitted = time.monotonic()
            deadline = None if terms.timeout is None else submitted + terms.timeout
            if check is not None:
                check()
            with self._abortable(terms.request_id):
                slot = await self._door.enter(params.n, priority=terms.priority, deadline=deadline, patient=patient)
                # From here on the slot is given back, or the flight's to give back.
                try:
                    # A prompt that waits is not tokenized yet: what waits takes no memory but the caller's.
                    prompt = await tokenize()
                    await anyio.lowlevel.checkpoint_if_cancelled()
                    self._check_length(prompt)
                    self._must_be_open()
                except BaseException:
                    slot.release()
                    raise
            # From here to the end there is no await: a cancelled caller leaves either nothing or a flight to abort.
            try:
                flight = Flight(
                    terms.request_id or f"request-{next(self._ids)}",
                    prompt,
                    params,
                    terms,
                    cluster_seed=self._seed,
                    submitted=submitted,
                    on_end=slot.release,
                )
                self._dispatcher.start(flight)
            except BaseException:
                slot.release()
                raise
            return flight

        return Stream(start, self._dispatcher.end, self._dispatcher.end_soon, terms.timeout)

    async def _read(self, prompt: Callable[[], Tokens], *, quick: bool) -> Tokens:
        """The tokens of a prompt. What the caller does with them before it awaits anything else is part of a turn of
        the event loop that no other request passes in."""
        if quick:
            await self._turnstile.pass_through()
            return prompt()
        tokens = await anyio.to_thread.run_sync(prompt, limiter=self._readers)
        await self._turnstile.pass_through()
        return tokens

    @contextmanager
    def _abortable(self, request_id: str | None) -> Iterator[None]:
        """Let `abort` find a request of this name as long as no replica has heard of it."""
        if request_id is None:
            yield
            return
        if request_id in self.at_the_door:
            raise InvalidRequest(f"request_id {request_id!r} is in flight already")
        with anyio.CancelScope() as scope:
            self.at_the_door[request_id] = scope
            try:
                yield
            finally:
                del self.at_the_door[request_id]
        if scope.cancelled_caught:
            raise request_failed(request_id, "aborted before a replica took it")

    def _check_length(self, prompt: Tokens) -> None:
        config = self._config
        longest = self._dispatcher.longest
        if len(prompt) == 0:
            raise InvalidRequest("the prompt is empty: give at least one character or token id")
        if len(prompt) >= longest:
            limit = (
                f"the model's context of {config.context_length}. Shorten it"
                if longest == config.context_length
                else f"a replica's KV pages for {longest} tokens (raise kv_memory)"
            )
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens; with one to generate it is too long for {limit}")
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= config.vocabulary_size:
            wrong = low if low < 0 else high
            raise InvalidRequest(f"token id {wrong} is not in the vocabulary (0 to {config.vocabulary_size - 1})")
