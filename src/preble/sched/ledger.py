"""What one replica has to do: the requests placed there, how far each is, and what they cost."""

from __future__ import annotations

from collections import deque

from preble.sched.invariants import require, require_close
from preble.sched.replica_cache import ReplicaCache
from preble.sched.replica_cost import ReplicaCost
from preble.sched.request import Request


class Share:
    """What one placement adds to its replica's load of the window H, in GPU seconds."""

    __slots__ = (
        "admitted",
        "counted",
        "decode_seconds",
        "expected_tokens",
        "output_before",
        "placed",
        "prefill_seconds",
    )

    def __init__(
        self, placed: float, prefill_seconds: float, decode_seconds: float, expected_tokens: float, output_before: int
    ) -> None:
        self.placed = placed
        self.prefill_seconds = prefill_seconds
        self.decode_seconds = decode_seconds
        self.expected_tokens = expected_tokens
        """How many tokens the request will probably generate here."""
        self.output_before = output_before
        """How many it had generated elsewhere."""
        self.admitted = False
        """The replica has started on the request."""
        self.counted = True
        """The placement lies within the window."""


class Ledger:
    """The books of one replica. A placement is entered at once, so that the next decision sees it; engine events then
    correct the estimate until the request ends.

    Args:
        replica: the replica's number.
        capacity_tokens: tokens that its KV pages hold.
        page_size: tokens in a page.
        max_batched_tokens: tokens that one of its steps computes at most.
        cost: what its steps cost.
        cache: what its prefix cache holds.
    """

    __slots__ = (
        "cache",
        "capacity_tokens",
        "cost",
        "decode_context_tokens",
        "decoding",
        "draining",
        "in_flight",
        "last_placed",
        "max_batched_tokens",
        "page_size",
        "private_pages",
        "queued",
        "queued_prefill_seconds",
        "queued_prefill_tokens",
        "replica",
        "requests",
        "sessions",
        "shares",
        "total_pages",
        "up",
        "window_decode_seconds",
        "window_prefill_seconds",
    )

    def __init__(
        self,
        replica: int,
        *,
        capacity_tokens: int,
        page_size: int,
        max_batched_tokens: int,
        cost: ReplicaCost,
        cache: ReplicaCache,
    ) -> None:
        self.replica = replica
        self.capacity_tokens = capacity_tokens
        self.page_size = page_size
        self.max_batched_tokens = max_batched_tokens
        self.cost = cost
        self.cache = cache
        self.up = True
        self.draining = False
        self.requests: dict[str, Request] = {}
        self.sessions: dict[tuple[str, str], None] = {}
        """Sessions whose last request was placed here, by namespace and name."""
        self.in_flight = 0
        self.queued = 0
        self.queued_prefill_tokens = 0
        self.queued_prefill_seconds = 0.0
        self.decoding = 0
        self.decode_context_tokens = 0
        self.total_pages = 0
        self.private_pages = 0
        self.shares: deque[Share] = deque()
        """Of the placements within the window, oldest first."""
        self.window_prefill_seconds = 0.0
        self.window_decode_seconds = 0.0
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
        """Tokens in the replica's prefix cache."""
        return (self.cache.pages + len(self.cache.unknown)) * self.page_size

    @property
    def unique_pages(self) -> int:
        """Pages that the requests here will hold at their ends, prompt and expected output, shared ones counted
        once."""
        return self.cache.pinned_pages + self.private_pages

    def place(self, request: Request, cached_tokens: int, number: int, now: float) -> None:
        """Enter a request of which `cached_tokens` are believed to be in the prefix cache."""
        tokens, size, output = len(request.tokens), self.page_size, request.output_tokens
        known = tokens + output
        expected = max(request.expected_tokens - output, 1.0)
        cost = self.cost
        request.ledger = self
        request.queued = True
        request.decoding = False
        request.prefill_tokens = missing = max(known - cached_tokens, 1)
        request.prefill_seconds = prefill = cost.prefill_seconds(missing, known - missing)
        request.pages = -int(-(tokens + request.expected_tokens) // size)
        request.private_pages = request.pages - tokens // size
        request.share = share = Share(now, prefill, expected * self._token_seconds(known), expected, output)
        self.shares.append(share)
        self.window_prefill_seconds += prefill
        self.window_decode_seconds += share.decode_seconds
        self.requests[request.request_id] = request
        self.in_flight += 1
        self.queued += 1
        self.queued_prefill_tokens += missing
        self.queued_prefill_seconds += prefill
        self.total_pages += request.pages
        self.private_pages += request.private_pages
        self.last_placed = number

    def admit(self, request: Request, cached_tokens: int) -> None:
        """The replica started on the request and found `cached_tokens` of it in the cache."""
        if request.queued:
            self.queued -= 1
            request.queued = False
        share = request.share
        assert share is not None
        missing = max(request.known_tokens - cached_tokens, 1)
        if missing != request.prefill_tokens or request.decoding:
            seconds = self.cost.prefill_seconds(missing, request.known_tokens - missing)
            if share.counted and not share.admitted:
                self.window_prefill_seconds += seconds - share.prefill_seconds
                share.prefill_seconds = seconds
            self._set(request, missing, seconds, decoding=False)
        share.admitted = True

    def progress(self, request: Request, computed_tokens: int, generated: int) -> None:
        """A step ended with `computed_tokens` of the request on the replica, and so many generated in all."""
        if request.queued:
            self.queued -= 1
            request.queued = False
        if generated > request.output_tokens:
            if request.decoding:
                self.generate(request, generated)
            else:
                request.output_tokens = generated
        missing = len(request.tokens) + request.output_tokens - computed_tokens
        if missing <= 1 and computed_tokens >= len(request.tokens):
            if not request.decoding:
                self._set(request, 0, 0.0, decoding=True)
        elif missing != request.prefill_tokens:
            before = request.prefill_tokens
            if before > missing:
                seconds = request.prefill_seconds * missing / before
            else:
                seconds = self.cost.prefill_seconds(missing, max(computed_tokens, 0))
            self._set(request, missing, seconds, decoding=False)

    def generate(self, request: Request, generated: int) -> None:
        """A request that decodes has now generated so many tokens, more than before."""
        self.decode_context_tokens += generated - request.output_tokens
        request.output_tokens = generated

    def preempt(self, request: Request) -> None:
        """The request is back in the replica's queue. What it had computed is in the prefix cache, but for a page."""
        if not request.queued:
            self.queued += 1
            request.queued = True
        missing = min(self.page_size, request.known_tokens)
        self._set(request, missing, self.cost.prefill_seconds(missing, request.known_tokens - missing), decoding=False)

    def release(self, request: Request) -> None:
        """The request is no longer here."""
        if request.queued:
            self.queued -= 1
            request.queued = False
        if request.decoding or request.prefill_tokens:
            self._set(request, 0, 0.0, decoding=False)
        del self.requests[request.request_id]
        self.in_flight -= 1
        self.total_pages -= request.pages
        self.private_pages -= request.private_pages
        if not self.in_flight:
            self.queued_prefill_seconds = 0.0  # drops what rounding left
        share = request.share
        if share is not None:
            if share.counted:  # count what it did rather than what was expected of it
                output = request.output_tokens - share.output_before
                seconds = share.decode_seconds * output / share.expected_tokens
                self.window_decode_seconds += seconds - share.decode_seconds
                share.decode_seconds = seconds
            request.share = None
        request.ledger = None

    def expire(self, horizon: float) -> None:
        """Forget the load of placements from before `horizon`."""
        self.window_prefill_seconds, self.window_decode_seconds = self.load_since(horizon)
        shares = self.shares
        while shares and shares[0].placed < horizon:
            shares.popleft().counted = False

    def load_since(self, horizon: float) -> tuple[float, float]:
        """Prefill and decode seconds of the window, less those of placements from before `horizon`."""
        prefill, decode = self.window_prefill_seconds, self.window_decode_seconds
        for share in self.shares:
            if share.placed >= horizon:
                return prefill, decode
            prefill -= share.prefill_seconds
            decode -= share.decode_seconds
        return 0.0, 0.0

    def forget_load(self) -> None:
        """The replica, which has no requests, begins anew: what it did before tells nothing of what it will do."""
        self.shares.clear()
        self.window_prefill_seconds = self.window_decode_seconds = 0.0
        self.last_placed = -1

    def check(self) -> None:
        """Prove the sums from scratch."""
        where = f"replica {self.replica}"
        requests = self.requests.values()
        require(self.in_flight == len(requests), f"{where} counts {self.in_flight} requests, has {len(requests)}")
        require(all(one.ledger is self for one in requests), f"{where} has a request of another")
        require(all(key == one.request_id for key, one in self.requests.items()), f"{where} mislabels a request")
        require(self.queued == sum(one.queued for one in requests), f"{where} miscounts queued requests")
        require(self.decoding == sum(one.decoding for one in requests), f"{where} miscounts decoding requests")
        context = sum(one.known_tokens for one in requests if one.decoding)
        require(self.decode_context_tokens == context, f"{where} miscounts the context of decoding requests")
        prefill = sum(one.prefill_tokens for one in requests)
        require(self.queued_prefill_tokens == prefill, f"{where} miscounts prefill tokens")
        seconds = sum(one.prefill_seconds for one in requests)
        require_close(self.queued_prefill_seconds, seconds, f"{where}: queued prefill seconds")
        require(all(one.prefill_tokens >= 0 for one in requests), f"{where} has less than nothing to compute")
        require(not any(one.decoding and one.prefill_tokens for one in requests), f"{where} decodes during prefill")
        require(self.total_pages == sum(one.pages for one in requests), f"{where} miscounts pages")
        require(self.private_pages == sum(one.private_pages for one in requests), f"{where} miscounts private pages")
        shares = [share.prefill_seconds for share in self.shares]
        require_close(self.window_prefill_seconds, sum(shares), f"{where}: prefill seconds of the window")
        shares = [share.decode_seconds for share in self.shares]
        require_close(self.window_decode_seconds, sum(shares), f"{where}: decode seconds of the window")
        require(self.up or not requests, f"{where} is down and has requests")

    def _token_seconds(self, context_tokens: int) -> float:
        """One more decoding request's part of a step, per token it generates."""
        decodes = self.decoding + 1
        return self.cost.decode_seconds(decodes, self.decode_context_tokens + context_tokens) / decodes

    def _set(self, request: Request, prefill_tokens: int, prefill_seconds: float, *, decoding: bool) -> None:
        self.queued_prefill_tokens += prefill_tokens - request.prefill_tokens
        self.queued_prefill_seconds += prefill_seconds - request.prefill_seconds
        request.prefill_tokens = prefill_tokens
        request.prefill_seconds = prefill_seconds
        if decoding is not request.decoding:
            change = 1 if decoding else -1
            self.decoding += change
            self.decode_context_tokens += change * request.known_tokens
            request.decoding = decoding
