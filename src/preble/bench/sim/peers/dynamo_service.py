"""Dynamo's `SelectionService` in process, with its defaults: it is told what workers of Dynamo tell it.

A request is reserved, its prefill completed and its reservation freed. What replicas store and evict goes to it as KV
events over ZeroMQ, in the form in which vLLM publishes them and the service subscribes to (docs.vllm.ai, "KV events
subscriber"): a topic, a number, and MessagePack of [time, events, rank]. The service takes them in when it gets to
it; so before every decision, the last message of a replica ends with a block that nothing else has, until the service
finds it there. Pages with generated tokens are left out, as no prompt of a trace contains any.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from importlib.metadata import version
from itertools import count
from typing import Any

from preble.bench.sim.peers import base
from preble.bench.sim.peers.base import Booked, PeerRouter
from preble.sched.events import Evicted, Stored
from preble.sched.hashing import Tokens, page_hashes
from preble.sim.settings import Settings

MODEL = "model"
PATIENCE = 20.0
"""Real seconds for which an answer of the service is awaited."""
MARK = 2**31
"""Tokens from here on are in no prompt."""


class DynamoRouter(PeerRouter):
    """A service, and a socket for each replica on which its events are published."""

    def __init__(self, fleet: Settings) -> None:
        os.environ["DYN_LOG"] = "error"  # read when the package is loaded; else it writes a line per decision
        import msgpack  # type: ignore[import-untyped,import-not-found,unused-ignore]
        import zmq  # type: ignore[import-not-found,unused-ignore]
        from dynamo.llm import SelectionService  # type: ignore[import-not-found,unused-ignore]

        super().__init__("dynamo-service", fleet.replicas)
        self._fleet = fleet
        self._pack: Any = msgpack.packb
        self._loop = asyncio.new_event_loop()
        self._context: Any = zmq.Context()
        self._sockets: list[Any] = []
        self._ports: list[int] = []
        self._numbers = [count() for _ in range(fleet.replicas)]
        self._events: list[list[Any]] = [[] for _ in range(fleet.replicas)]
        """By replica: what it is to hear before the next decision."""
        self._marks = count(MARK)
        self._pages: dict[int, tuple[Tokens, int, int | None]] = {}
        """Hash of a page -> a prompt that has it, its place there, and the hash of the page before."""
        for _ in range(fleet.replicas):
            socket = self._context.socket(zmq.PUB)
            socket.setsockopt(zmq.SNDHWM, 0)  # lose nothing
            socket.setsockopt(zmq.LINGER, 0)
            self._ports.append(socket.bind_to_random_port("tcp://127.0.0.1"))
            self._sockets.append(socket)
        self._service: Any = self._ask(self._start, SelectionService)
        for replica in sorted(self.up):
            self.joined(replica)

    def choose(self, request_id: str, tokens: Tokens, now: float) -> tuple[int, str]:
        for replica in sorted(self.up):
            if self._events[replica]:
                self._ask(self._publish, replica)
        hashes = page_hashes(tokens, self._fleet.page_size).tolist()
        for place, (page, before) in enumerate(zip(hashes, [None, *hashes], strict=False)):
            self._pages.setdefault(page, (tokens, place, before))
        request = {"model_name": MODEL, "selection_id": request_id, "token_ids": tokens.tolist()}
        selection = self._ask(self._service.select_and_reserve, request)
        return int(selection["worker_id"]), "selected"

    def computed(self, booked: Booked) -> None:
        self._ask(self._service.prefill_complete, booked.request_id)

    def finished(self, booked: Booked) -> None:
        self._ask(self._service.free_reservation, booked.request_id)

    def cached(self, event: Stored | Evicted) -> None:
        known = [page for page in event.hashes.tolist() if page in self._pages]
        if not known or event.replica not in self.up:
            return
        if isinstance(event, Evicted):
            self._events[event.replica].append(["BlockRemoved", known])
            return
        size = self._fleet.page_size
        for page in sorted(known, key=lambda one: self._pages[one][1]):
            prompt, place, parent = self._pages[page]
            block = prompt[place * size : (place + 1) * size].tolist()
            self._events[event.replica].append(["BlockStored", [page], parent, block, size, None])

    def left(self, replica: int) -> None:
        self._events[replica].clear()
        self._ask(self._service.delete_worker, replica)

    def joined(self, replica: int) -> None:
        worker = {
            "worker_id": replica,
            "model_name": MODEL,
            "endpoint": f"http://127.0.0.1:{9000 + replica}",
            "block_size": self._fleet.page_size,
            "total_kv_blocks": self._fleet.kv_tokens // self._fleet.page_size,
            "max_num_batched_tokens": self._fleet.max_batched_tokens,
            "data_parallel_size": 1,
            "kv_events_endpoints": {0: f"tcp://127.0.0.1:{self._ports[replica]}"},
        }
        self._ask(self._service.upsert_worker, worker)
        self._events[replica].append(["AllBlocksCleared"])
        self._ask(self._publish, replica)

    def close(self) -> None:
        self._service.shutdown()
        self._context.destroy()
        self._loop.close()

    async def _publish(self, replica: int) -> None:
        """Publish a replica's events, and wait until the service has taken them in."""
        size = self._fleet.page_size
        mark = next(self._marks)
        block = [mark] * size
        prompt = {"model_name": MODEL, "token_ids": block}
        events = [*self._events[replica], ["BlockStored", [mark], None, block, size, None]]
        self._events[replica] = [["BlockRemoved", [mark]]]
        looks = 0
        while True:
            if looks % 100 == 0:  # at first nobody may be listening yet
                message = self._pack([0.0, events, 0])
                self._sockets[replica].send_multipart([b"", next(self._numbers[replica]).to_bytes(8, "big"), message])
            looks += 1
            scores = await self._service.overlap_scores(prompt)
            if any(one["worker_id"] == replica and one["device_blocks"] for one in scores["workers"]):
                return
            await asyncio.sleep(0.0005)

    @staticmethod
    async def _start(service: Any) -> Any:
        return service(indexer_threads=1)

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call it while the event loop runs, which the service needs, and wait for its answer."""

        async def answer() -> Any:
            return await method(*arguments)

        return self._loop.run_until_complete(asyncio.wait_for(answer(), PATIENCE))


def make_router(fleet: Settings) -> DynamoRouter:
    """A fresh one.

    Raises:
        ImportError: this interpreter lacks ai-dynamo-runtime, pyzmq or msgpack.
    """
    return DynamoRouter(fleet)


def settings() -> base.Settings:
    """What it is run with."""
    return {"ai-dynamo-runtime": version("ai-dynamo-runtime"), "indexer_threads": 1, "KV events": "over ZeroMQ"}
