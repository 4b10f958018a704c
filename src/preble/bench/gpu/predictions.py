"""What each figure should be, and what was expected of it before it was first measured.

Predictions are for an H100 (SXM, 80 GB). Where they come from: a copy at 3.0 TB/s and a large matrix product at 790
TFLOP/s, which such machines have shown; a kernel of a CUDA graph costs 2 to 4 microseconds besides its work; the rest
is counted in bytes, operations and instructions. They are not changed once there is a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

COPY = "device-to-device copy, read + write"
READ = "read alone"
MATMUL = "bf16 matrix product, 8192 x 8192 x 8192"
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (1024, 4096, 8192, 32_768)
EXTENDS = (2048, 4096, 8192, 16_384)
MIXED = "extend, 8 ragged chunks with and without prefixes"
SHARED = "decode attention, 64 requests on a common 8k prefix"
DECODE_BATCHES = (1, 32, 256)
PREFILLS = (2048, 4096)
IDLE_AHEAD = "GPU idle between decode steps, one step ahead"
IDLE_IN_STEP = "GPU idle between decode steps, not ahead"
PEER = "64 requests x (512 in + 128 out), to transformers' continuous batching"

KV_BYTES = 4096
"""Of a token in one layer of the shape of Llama-3-8B in bf16."""
COPY_RATE = 3.0e12
LAUNCHES = 6e-6
"""Seconds a layer's decode attention takes besides reading KV: two kernels, from start to the last program's end."""
REACHED = 0.93
"""Of the copy's rate, where reads are long."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A figure by its key."""

    key: str
    unit: str
    value: float
    """Expected."""
    why: str
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper bound; otherwise it is a lower one."""

    def met(self, value: float) -> bool | None:
        """Whether a figure reaches the goal; None without one."""
        if self.goal is None:
            return None
        return value <= self.goal if self.at_most else value >= self.goal


def decode_key(batch: int, context: int) -> str:
    """Of decode attention alone."""
    return f"decode attention, {batch} x {_thousands(context)}"


def extend_key(tokens: int) -> str:
    """Of prefill attention alone."""
    return f"extend, {_thousands(tokens)}"


def decode_model_key(batch: int) -> str:
    """Of whole decode steps."""
    return f"decode, 8B, batch {batch}, 1k context"


def prefill_key(tokens: int) -> str:
    """Of whole prefill steps."""
    return f"prefill, 8B, {_thousands(tokens)} prompts"


def cluster_key(workload: str, measure: str) -> str:
    """Of E2 beside round robin."""
    return f"{workload}: {measure}, E2 to round robin"


def decode_share(batch: int, context: int) -> float:
    """Predicted percentage of the copy's rate: the reads at their rate, and a constant."""
    seconds = batch * context * KV_BYTES / COPY_RATE
    return 100 * seconds / (LAUNCHES + seconds / REACHED)


def predictions() -> Iterator[Prediction]:
    """All of them, in the order of the table."""
    yield Prediction(COPY, "TB/s", 3.0, "seen on such a machine")
    yield Prediction(READ, "TB/s", 3.1, "as a copy, but the memory never turns from reading to writing")
    yield Prediction(MATMUL, "TFLOP/s", 790, "seen on such a machine: 80 % of the 989 on paper, bound by power")
    for context in CONTEXTS:
        for batch in BATCHES:
            yield Prediction(
                decode_key(batch, context),
                "% of copy",
                round(decode_share(batch, context)),
                f"{LAUNCHES * 1e6:.0f} us for two kernels, then KV at {REACHED:.0%} of the copy's rate; under 180 MB "
                "the constant is too large a share for the goal",
                goal=85,
            )
    extends = {2048: 330.0, 4096: 390.0, 8192: 430.0, 16_384: 450.0}
    for tokens in EXTENDS:
        yield Prediction(
            extend_key(tokens),
            "TFLOP/s",
            extends[tokens],
            "128 rows x 128 tokens take 2,048 cycles of tensor cores, 1,050 of exp2 and 1,200 to issue the rest; of "
            "these some 1,250 are not hidden; short prompts lose to the diagonal and to the last wave",
            goal=400 if tokens == 8192 else None,
        )
    yield Prediction(MIXED, "TFLOP/s", 330, "as 4k, with a longer tail: few tiles are long, and start first")
    yield Prediction(
        SHARED,
        "x plain",
        6.0,
        "plain reads 2.2 GB, mostly from the L2 cache at about 5 TB/s: 440 us; shared, 64 rows a tile: 35 us for "
        "8.6 GFLOP, 12 us for the tails, 8 us for partial answers, 15 us for five kernels",
        goal=3,
    )
    decodes = {
        1: (
            160.0,
            75.0,
            "matrix-vector products at 88 % of the bandwidth, 5.4 ms; 160 small kernels 0.5 ms; attention 0.3",
        ),
        32: (4250.0, 79.0, "thin products at 85 %, 5.6 ms; KV 1.5 ms; small kernels 0.5 ms"),
        256: (
            12_800.0,
            77.0,
            "products 6.8 ms, no longer bound by memory; KV 11.9 ms; the rest 1.3 ms: nothing overlaps",
        ),
    }
    for batch, (rate, share, why) in decodes.items():
        yield Prediction(decode_model_key(batch), "tok/s", rate, why)
        yield Prediction(f"{decode_model_key(batch)}, of the roofline", "%", share, why, goal=85)
    yield Prediction(
        prefill_key(2048),
        "tok/s",
        43_000,
        "14 GFLOP a token at 680 TFLOP/s, 20.5 us; attention 0.8 us, other kernels 1.5 us",
        goal=40_000,
    )
    yield Prediction(prefill_key(4096), "tok/s", 41_500, "as at 2k, and attention 1.5 us", goal=40_000)
    yield Prediction(
        IDLE_AHEAD,
        "%",
        0.5,
        "the next step is queued before one ends; what is left is a copy's start",
        goal=3,
        at_most=True,
    )
    yield Prediction(IDLE_IN_STEP, "%", 9.0, "0.7 ms of Python around a step of 7.5 ms; for comparison")
    yield Prediction(
        PEER,
        "x",
        5.0,
        "transformers launches 1,200 kernels a step, and without flash-attn copies K and V and reads a dense mask: "
        "about 45 ms a step against 8",
        goal=3,
    )
    yield from _cluster_predictions()


def _cluster_predictions() -> Iterator[Prediction]:
    hits = (
        "counted over the same requests with caches of 98,000 tokens that forget what was unused for longest: round "
        "robin finds {} of the prompts, one replica for each text {}; E2 keeps some texts twice"
    )
    expected = {
        "tool use": (0.45, hits.format("47 %", "79 %"), 1.2, 0.6),
        "long documents": (0.42, hits.format("31 %", "76 %"), 1.6, 0.5),
    }
    for workload, (computed, why, capacity, latency) in expected.items():
        yield Prediction(cluster_key(workload, "prompt tokens computed"), "x", computed, why)
        yield Prediction(
            cluster_key(workload, "requests/s, all at once"),
            "x",
            capacity,
            "from empty caches: the first use of a text costs both the same, and so do decode and Python",
        )
        yield Prediction(
            cluster_key(workload, "mean latency"),
            "x",
            latency,
            "fewer tokens to prefill, one's own and those ahead of one",
        )
        yield Prediction(
            cluster_key(workload, "p99 latency"),
            "x",
            latency,
            "whoever misses computes as much as before, but waits less",
        )


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)
