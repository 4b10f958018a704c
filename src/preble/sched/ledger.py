"""What one replica has to do: the requests placed there and how far each is."""

from __future__ import annotations

from preble.sched.invariants import require
from preble.sched.replica_cache import ReplicaCache
from preble.sched.request import Request


class Ledger:
    """The books of one replica. A placement is entered at once, so that the next decision sees it; engine events then
    correct the estimate until the request ends.

    Args:
        replica: the replica's number.
        capacity_tokens: tokens that its KV pages hold.
        cache: what its prefix cache holds.
    """

    __slots__ = (
        "cache",
        "capacity_tokens",
        "decoding",
        "draining",
        "in_flight",
        "last_placed",
        "page_size",
        "queued",
        "queued_prefill_tokens",
        "replica",
        "requests",
        "up",
    )

    def __init__(self, replica: int, capacity_tokens: int, page_size: int, cache: ReplicaCache) -> None:
        self.replica = replica
        self.capacity_tokens = capacity_tokens
        self.page_size = page_size
        self.cache = cache
        self.up = True
        self.draining = False
        self.requests: dict[str, Request] = {}
        self.in_flight = 0
        self.queued = 0
        self.queued_prefill_tokens = 0
        self.decoding = 0
        self.last_placed = -1
        """Number of the last placement it got, -1 before the first."""

    @property
    def eligible(self) -> bool:
        """Whether requests may be placed here."""
        return self.up and not self.draining

    @property
    def state(self) -> str:
        """`up`, `draining` or `down`."""
        return "down" if not self.up else "draining" if self.draining else "up"

    @property
    def resident_tokens(self) -> int:
        """Tokens in the replica's prefix cache, as far as the tree knows them."""
        return self.cache.pages * self.page_size

    def place(self, request: Request, cached_tokens: int, number: int) -> None:
        """Enter a request of which `cached_tokens` are believed to be in the prefix cache."""
        request.ledger = self
        request.queued = True
        request.decoding = False
        request.prefill_tokens = _to_compute(request, cached_tokens)
        self.requests[request.request_id] = request
        self.in_flight += 1
        self.queued += 1
        self.queued_prefill_tokens += request.prefill_tokens
        self.last_placed = number

    def admit(self, request: Request, cached_tokens: int) -> None:
        """The replica started on the request and found `cached_tokens` of it in the cache."""
        self._leave_queue(request)
        self._set(request, _to_compute(request, cached_tokens), decoding=False)

    def progress(self, request: Request, computed_tokens: int) -> None:
        """The KV of `computed_tokens` tokens is there. One that decodes has all but its last token's."""
        self._leave_queue(request)
        missing = len(request.tokens) + len(request.output) - computed_tokens
        if missing <= 1 and computed_tokens >= len(request.tokens):
            self._set(request, 0, decoding=True)
        else:
            self._set(request, missing, decoding=False)

    def release(self, request: Request) -> None:
        """The request is no longer here."""
        self._leave_queue(request)
        self._set(request, 0, decoding=False)
        del self.requests[request.request_id]
        self.in_flight -= 1
        request.ledger = None

    def check(self) -> None:
        """Prove the sums from scratch."""
        where = f"replica {self.replica}"
        requests = self.requests.values()
        require(self.in_flight == len(requests), f"{where} counts {self.in_flight} requests, has {len(requests)}")
        require(all(one.ledger is self for one in requests), f"{where} has a request of another")
        require(all(key == one.request_id for key, one in self.requests.items()), f"{where} mislabels a request")
        require(self.queued == sum(one.queued for one in requests), f"{where} miscounts queued requests")
        require(self.decoding == sum(one.decoding for one in requests), f"{where} miscounts decoding requests")
        prefill = sum(one.prefill_tokens for one in requests)
        require(self.queued_prefill_tokens == prefill, f"{where} miscounts prefill tokens")
        require(all(one.prefill_tokens >= 0 for one in requests), f"{where} has less than nothing to compute")
        require(not any(one.decoding and one.prefill_tokens for one in requests), f"{where} decodes during prefill")
        require(self.up or not requests, f"{where} is down and has requests")

    def _leave_queue(self, request: Request) -> None:
        self.queued -= request.queued
        request.queued = False

    def _set(self, request: Request, prefill_tokens: int, *, decoding: bool) -> None:
        self.queued_prefill_tokens += prefill_tokens - request.prefill_tokens
        request.prefill_tokens = prefill_tokens
        self.decoding += decoding - request.decoding
        request.decoding = decoding


def _to_compute(request: Request, cached_tokens: int) -> int:
    """At least the last token is computed, for its logits."""
    return max(len(request.tokens) + len(request.output) - cached_tokens, 1)
