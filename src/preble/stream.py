"""A streamed request: an async iterator of chunks that cleans up after itself."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import anyio

from preble.errors import ClusterStateError, RequestTimeout
from preble.outputs import Chunk, GenerationOutput

if TYPE_CHECKING:
    from preble.flight import Flight


class Stream:
    """Chunks of one request as they are generated. The request starts at the first `async for` step or `async with`.

    Leaving early, by `break`, an exception, cancellation or by dropping the stream, aborts the request: its pages are
    free by the engine's next step. After the last chunk `output` holds the whole result.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Flight]],
        abandon: Callable[[Flight], None],
        abandon_soon: Callable[[Flight], None],
        timeout: float | None,
    ) -> None:
        self._start = start
        self._abandon = abandon
        self._abandon_soon = abandon_soon
        self._timeout = timeout
        self._deadline = float("inf")
        self._flight: Flight | None = None
        self._closed = False

    @property
    def request_id(self) -> str:
        """The id under which `Cluster.abort` finds the request, once it started."""
        return self._begun().request_id

    @property
    def output(self) -> GenerationOutput:
        """The request as far as it went: whole after the last chunk.

        Raises:
            ClusterStateError: no replica has taken it.
        """
        flight = self._begun()
        if flight.branches[0].placement is None:
            raise ClusterStateError(f"request {flight.request_id!r} has no output: no replica has taken it")
        return flight.output()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._next(for_chunks=True)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Self:
        with self._time_limit():
            await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # a type checker finds this mistake before it is made

        def __enter__(self) -> NoReturn:
            raise ClusterStateError("a stream is entered with `async with`, not `with`")

        def __exit__(self, *_: object) -> None:
            raise AssertionError("a `with` block of a stream is never entered")

    def close(self) -> None:
        """Abort the request if it still runs. Harmless when called again. Call it where the cluster runs."""
        self._closed = True
        if self._flight is not None and not self._flight.done:
            self._abandon(self._flight)

    def __del__(self) -> None:
        # An `async for` that is left by `break` drops its stream without a word, and the collector may run anywhere.
        if self._flight is not None and not self._flight.done:
            self._abandon_soon(self._flight)

    async def finish(self) -> GenerationOutput:
        """Wait for the end without looking at chunks."""
        await self._next(for_chunks=False)
        return self.output

    async def _next(self, *, for_chunks: bool) -> Chunk | None:
        try:
            with self._time_limit():
                flight = await self._begin()
                while True:
                    if flight.error is not None:
                        raise flight.error
                    if for_chunks and (chunk := flight.next_chunk()) is not None:
                        return chunk
                    if flight.done:
                        return None
                    await flight.wait(for_chunks=for_chunks)
        except BaseException:
            self.close()
            raise
        self.close()
        partial = None
        if self._flight is not None and self._flight.first_token is not None:
            partial = self._flight.output()
        got = "had no token yet" if partial is None else f"had {partial.usage.completion_tokens} tokens, in `partial`"
        raise RequestTimeout(
            f"the request did not end within its timeout of {self._timeout:g} s, and {got}: raise timeout, which is in "
            "seconds, or lower max_tokens",
            partial,
        )

    async def _begin(self) -> Flight:
        if self._flight is None:
            if self._closed:
                raise ClusterStateError("this stream is closed; ask the cluster for a new one")
            self._flight = await self._start()
        return self._flight

    def _begun(self) -> Flight:
        if self._flight is None:
            raise ClusterStateError(
                "this stream has not started: iterate over it with `async for`, or enter it with `async with`"
            )
        return self._flight

    def _time_limit(self) -> anyio.CancelScope:
        if self._timeout is not None and self._deadline == float("inf"):
            self._deadline = time.monotonic() + self._timeout
        return anyio.move_on_after(max(self._deadline - time.monotonic(), 0) if self._timeout is not None else None)
