"""How engines are to be made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose about engines; see `Cluster`."""

    dtype: str = "auto"
    page_size: int = 64
    kv_memory: int | str | None = None
    kv_dtype: str = "auto"
    attention: str = "auto"
    max_batched_tokens: int | None = None
    max_running: int = 256
    local_order: str = "hrrn"
