"""The rule of NVIDIA Dynamo's KV router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preble.sched.policies.base import Choice, Policy, View, draw


@dataclass(frozen=True)
class Dynamo(Policy):
    """Fewest blocks, to prefill and to hold: the worker selector of Dynamo's KV router at its default temperature of 0,
    where ties are drawn by lot. A block is a page.

    cost = prefill blocks + decode blocks + `decode_active_request_weight` x requests in flight

    Prefill blocks are what the replica has yet to compute plus the part of the prompt that it does not have. Decode
    blocks are the unique ones that its requests hold, those still in prefill included, plus what this prompt adds to
    them: a block in nobody's use counts although it is cached. Overlap credit and prefill scale are at their default of
    1. Dynamo also holds requests back when every worker has much to prefill; that is a queue, not part of the choice,
    and left out.

    Unique blocks hide identical load: a prompt that a replica has, and that others use there right now, costs nothing
    more, so all its repeats go to that one replica unless requests are counted as well. The default weight is Dynamo's.

    The knowledge is ours, and differs in two points. Blocks to hold include the expected output, which Dynamo counts
    only if told to (`router_track_output_blocks`): they show a little of the load that it hides. And which blocks are
    in use is known for the cluster as a whole: one that is cached here and in use elsewhere counts as in use here.

    Reason: `least-blocks`.
    """

    decode_active_request_weight: float = 0.0
    """Blocks that a request in flight counts for."""

    name = "dynamo"

    def choose(self, view: View) -> Choice:
        in_use = _in_use(view)
        scores = [sum(self._blocks(view, index, in_use)) for index in range(len(view.replicas))]
        least = min(scores)
        index = draw(view, [index for index, score in enumerate(scores) if score == least])
        return Choice(index, "least-blocks", _named(self._blocks(view, index, in_use)))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        return _named(self._blocks(view, index, _in_use(view)))

    def _blocks(self, view: View, index: int, in_use: int) -> tuple[float, float, float]:
        replica, matched, prompt = view.replicas[index], view.matched[index], view.request.prompt_tokens
        size = replica.page_size
        added = -(-prompt // size) - min(matched, in_use) // size
        return (
            (replica.queued_prefill_tokens + prompt - matched) / size,
            replica.unique_pages + added,
            self.decode_active_request_weight * replica.in_flight,
        )


def _in_use(view: View) -> int:
    """Prompt tokens from the start that requests in flight have, too."""
    return max((stretch.end for stretch in view.stretches if stretch.in_flight), default=0)


def _named(blocks: tuple[float, float, float]) -> Mapping[str, float]:
    prefill, decode, requests = blocks
    return {"prefill_blocks": prefill, "decode_blocks": decode, "request_blocks": requests}
