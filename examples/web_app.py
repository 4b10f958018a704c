"""A web app that answers prompts, whole or as a stream of server-sent events (Starlette and uvicorn; FastAPI is alike).

    python examples/web_app.py --port 8000
    curl localhost:8000/generate -d '{"prompt": "Handbook\\n- desk of Uma Lowe: 41\\nQ: desk of Uma Lowe?\\nA:"}'
    curl localhost:8000/generate -d '{"prompt": "Handbook\\n", "stream": true, "max_tokens": 20}'
    curl localhost:8000/stats

The app's lifespan enters the cluster and leaves it. A request whose client goes away is cancelled, and its pages are
free. What goes wrong has a status: 400 for what cannot be served, 503 with Retry-After when `--max-pending` are in
flight, 504 when the request's `timeout` passes. Run one server process: each would have a cluster of its own.

Needs `pip install 'preble[examples]'`.
"""

import argparse
import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import preble

Result = TypeVar("Result")


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /generate: the options that this app leaves to its clients. `Cluster` checks their values."""

    prompt: str
    stream: bool = False
    max_tokens: int = 64
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 60.0
    """Seconds for the whole answer, waiting included."""


async def generate(request: Request) -> Response:
    """One JSON object, or with `"stream": true` an event for each piece of text and a last one that counts tokens."""
    order = msgspec.json.decode(await request.body(), type=Order)
    cluster: preble.Cluster = request.state.cluster
    stream = cluster.stream(
        order.prompt,
        max_tokens=order.max_tokens,
        temperature=order.temperature,
        ignore_eos=order.ignore_eos,
        timeout=order.timeout,
    )
    if order.stream:
        # The status goes out before the first event, so who is refused or late until then must be known by now.
        first = await unless_client_leaves(request, anext(stream))
        return StreamingResponse(events(first, stream), media_type="text/event-stream")
    output = await unless_client_leaves(request, stream.finish())
    return JSONResponse({"text": output.text, "finish_reason": output.finish_reason, "usage": asdict(output.usage)})


async def events(chunk: preble.Chunk, stream: preble.Stream) -> AsyncIterator[bytes]:
    """Server-sent events. Starlette cancels this when the client leaves, which aborts the request."""
    try:
        yield event({"text": chunk.text})
        async for chunk in stream:
            yield event({"text": chunk.text})
        output = stream.output
        yield event({"finish_reason": output.finish_reason, "usage": asdict(output.usage)})
    except preble.PrebleError as error:
        yield event({"error": str(error)})


def event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives. It is cancelled, and `ClientDisconnect` raised, if nobody is there any more to read it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


def refuse(request: Request, error: Exception) -> Response:
    """What went wrong, as a status."""
    headers = {}
    match error:
        case msgspec.MsgspecError() | preble.InvalidRequest():
            status = 400
        case preble.ClusterOverloaded():
            status, headers = 503, {"Retry-After": str(math.ceil(error.retry_after))}
        case preble.RequestTimeout():
            status = 504
        case ClientDisconnect():
            status = 499  # nobody reads it; proxies log this number
        case _:
            status = 500
    return JSONResponse({"error": str(error)}, status, headers)


async def health(request: Request) -> Response:
    """503 while no replica serves: for a load balancer."""
    health = request.state.cluster.health()
    return JSONResponse(asdict(health), 503 if health.status == "down" else 200)


async def stats(request: Request) -> Response:
    stats = request.state.cluster.stats()
    return JSONResponse({"hit_rate": stats.hit_rate, **asdict(stats)})


def make_app(model: str, replicas: int | None, max_pending: int) -> Starlette:
    """The app, whose server enters and leaves the cluster."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, preble.Cluster]]:
        async with preble.Cluster(model, replicas=replicas, max_pending=max_pending, overload="refuse") as cluster:
            yield {"cluster": cluster}

    routes = [Route("/generate", generate, methods=["POST"]), Route("/health", health), Route("/stats", stats)]
    errors = (preble.PrebleError, msgspec.MsgspecError, ClientDisconnect)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(errors, refuse))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint folder, a hub id, or demo")
    parser.add_argument("--replicas", type=int, help="engines; one per device by default")
    parser.add_argument("--max-pending", type=int, default=64, help="requests in flight, at most (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    app = make_app(options.model, options.replicas, options.max_pending)
    uvicorn.run(app, port=options.port, timeout_graceful_shutdown=30)
