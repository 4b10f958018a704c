"""Every error that Preble raises on purpose.

One root, `PrebleError`; below it, what the caller did wrong (`InvalidRequest`, `CheckpointError`, `DeviceError`,
`ClusterStateError`) is kept apart from what went wrong while serving (`RequestTimeout`, `ReplicaCrashed`,
`RequestFailed`). The classes also derive from the closest builtin, so that `except ValueError` works as expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble.outputs import GenerationOutput


class PrebleError(Exception):
    """The root of everything Preble raises on purpose."""


class InvalidRequest(PrebleError, ValueError):
    """A prompt, option or argument cannot be served. Raised before any work is queued."""


class UnknownOption(InvalidRequest, TypeError):
    """A keyword that no Preble call knows, with the closest known one."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for one token in the model's context or in a replica's KV pages."""


class CheckpointError(PrebleError):
    """A model folder cannot be loaded; the message names the file or the tensors."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is intact, but its architecture, quantization or position encoding is not supported."""


class DeviceError(PrebleError):
    """A device does not exist, or lacks the memory for the weights and the KV pages asked for."""


class ClusterStateError(PrebleError, RuntimeError):
    """A cluster was used before `async with` entered it, after it left, in another event loop, or was entered twice; or
    it was left while the request ran."""


class ClusterOverloaded(PrebleError, RuntimeError):
    """`max_pending` requests are in flight, and `Cluster(overload="refuse")` lets nobody wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """In how many seconds to try again, from how fast requests end: between 0.01 and 60, later for each one
        refused."""


class RequestTimeout(PrebleError, TimeoutError):
    """The request's `timeout` passed, waiting included."""

    def __init__(self, message: str, partial: GenerationOutput | None = None) -> None:
        super().__init__(message)
        self.partial = partial
        """What had been generated; `None` before the first token."""


class RequestFailed(PrebleError, RuntimeError):
    """The engine could not continue this one request (the logits became NaN, say). Others are not affected."""


class ReplicaCrashed(PrebleError, RuntimeError):
    """The request was on several replicas when they failed, and may be the cause; or none came up within
    `restart_timeout`; or a replica could not be started. What failed last is in the message, and chained where it is
    known."""


def shown(value: object) -> str:
    """A value as an error's text shows it: cut off where it is long, and never an error itself."""
    try:
        text = repr(value)
    except Exception:  # anything may be handed to an API, and a number can be too long to print
        text = f"an unprintable {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}…"
