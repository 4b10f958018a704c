"""Preble: serve LLMs on many GPUs from asyncio, every prompt where its prefix lies.

```python
import preble

async with preble.Cluster("path/to/model", replicas=2) as cluster:
    output = await cluster.generate("Once upon a time", max_tokens=64)
```

Importing the package is cheap: torch, numpy and the rest are loaded when a cluster starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preble.cluster import Cluster as Cluster
    from preble.errors import CheckpointError as CheckpointError
    from preble.errors import ClusterOverloaded as ClusterOverloaded
    from preble.errors import ClusterStateError as ClusterStateError
    from preble.errors import DeviceError as DeviceError
    from preble.errors import InvalidRequest as InvalidRequest
    from preble.errors import PrebleError as PrebleError
    from preble.errors import PromptTooLong as PromptTooLong
    from preble.errors import ReplicaCrashed as ReplicaCrashed
    from preble.errors import RequestFailed as RequestFailed
    from preble.errors import RequestTimeout as RequestTimeout
    from preble.errors import UnknownOption as UnknownOption
    from preble.errors import UnsupportedModel as UnsupportedModel
    from preble.health import ClusterHealth as ClusterHealth
    from preble.health import ReplicaHealth as ReplicaHealth
    from preble.outputs import Chunk as Chunk
    from preble.outputs import ClusterStats as ClusterStats
    from preble.outputs import Completion as Completion
    from preble.outputs import GenerationOutput as GenerationOutput
    from preble.outputs import ReplicaStats as ReplicaStats
    from preble.outputs import Timing as Timing
    from preble.outputs import TokenLogprob as TokenLogprob
    from preble.outputs import Usage as Usage
    from preble.sampling import SamplingParams as SamplingParams
    from preble.sched.placement import Placement as Placement
    from preble.stream import Stream as Stream

__version__ = "0.1.0"

_HOMES = {
    "preble.cluster": ("Cluster",),
    "preble.errors": (
        "CheckpointError",
        "ClusterOverloaded",
        "ClusterStateError",
        "DeviceError",
        "InvalidRequest",
        "PrebleError",
        "PromptTooLong",
        "ReplicaCrashed",
        "RequestFailed",
        "RequestTimeout",
        "UnknownOption",
        "UnsupportedModel",
    ),
    "preble.health": ("ClusterHealth", "ReplicaHealth"),
    "preble.outputs": (
        "Chunk",
        "ClusterStats",
        "Completion",
        "GenerationOutput",
        "ReplicaStats",
        "Timing",
        "TokenLogprob",
        "Usage",
    ),
    "preble.sampling": ("SamplingParams",),
    "preble.sched.placement": ("Placement",),
    "preble.stream": ("Stream",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'preble' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
