"""Dynamo's `SelectionService` in process: `select_and_reserve`, later `prefill_complete` and `free_reservation`.

It keeps its own estimate of what workers have cached (`DYN_ROUTER_USE_KV_EVENTS=false`), so that it chooses by prefix
without a message bus; what maintaining that costs is in the figures. Tokens go in as lists, which is what it takes.
"""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version
from typing import Any

from preble.bench.sched.peers.worker import Case, Peer, Tally, read_clocks, serve

ENVIRONMENT = {"DYN_ROUTER_USE_KV_EVENTS": "false", "DYN_LOG": "error"}
"""Read when the package is loaded. At its default it writes a line for each decision."""
MODEL = "model"


async def _run(case: Case, prompts: list[list[int]]) -> Tally:
    from dynamo.llm import SelectionService  # type: ignore[import-not-found,unused-ignore]  # only where it is measured

    service: Any = SelectionService(indexer_threads=1)
    for number in range(case.replicas):
        worker = {
            "worker_id": number,
            "model_name": MODEL,
            "endpoint": f"http://127.0.0.1:{9000 + number}",
            "block_size": case.page_size,
            "total_kv_blocks": case.capacity_tokens // case.page_size,
            "max_num_batched_tokens": 8192,
        }
        record = await service.upsert_worker(worker)
        if record["lifecycle"] != "schedulable":
            raise RuntimeError(f"worker {number} is not schedulable: {record.get('not_schedulable_reasons')}")
    tally = Tally()
    cached = 0
    for number, tokens in enumerate(prompts):
        request = {
            "model_name": MODEL,
            "selection_id": str(number),
            "token_ids": tokens,
            "expected_output_tokens": case.output_tokens,
        }
        began = read_clocks()
        selection = await service.select_and_reserve(request)
        decided = read_clocks()
        if number >= case.queued:
            await service.prefill_complete(str(number - case.queued))
        if number >= case.in_flight:
            await service.free_reservation(str(number - case.in_flight))
        ended = read_clocks()
        if number >= case.fill:
            tally.add(began, decided, ended)
            cached += selection["overlap"]["longest_matched"]
    tally.hit_rate = cached / (len(tally.whole) * case.prompt_tokens)
    service.shutdown()
    return tally


def make_peer() -> Peer:
    """The peer, once its package is loaded."""
    os.environ.update(ENVIRONMENT)
    import dynamo.llm  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

    return Peer(
        {"ai-dynamo-runtime": version("ai-dynamo-runtime")},
        {"indexer_threads": "1", "cache estimate": "its own, by routing decisions", **ENVIRONMENT},
        lambda case, prompts: asyncio.run(_run(case, prompts)),
    )


if __name__ == "__main__":
    serve(make_peer)
