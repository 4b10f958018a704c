"""What may be given as a prompt, and as a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, Union

from preble.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from preble.sched.hashing import Tokens

Prompt: TypeAlias = Union[str, Sequence[int], "NDArray[np.integer]"]
"""Text, or token ids."""


def check_text(prompt: str) -> None:
    """Reject a text without characters."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one character or token id")


def check_name(name: str, value: object) -> None:
    """Reject what cannot name anything: hashes and seeds are derived from its bytes."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} must be valid text; {value!r} holds half a surrogate pair") from None


def prompt_tokens(prompt: object) -> Tokens:
    """Token ids as int32 [n]; whether the model has them is for the caller to check."""
    import numpy as np

    if isinstance(prompt, (bytes, bytearray)):
        raise InvalidRequest("the prompt is bytes: decode it to str, or give token ids")
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequest(f"the prompt must be a string or a sequence of token ids, not {type(prompt).__name__}")
    if len(prompt) == 0:
        raise InvalidRequest("the prompt is empty: give at least one character or token id")
    if isinstance(prompt[0], str):
        raise InvalidRequest("the prompt is a sequence of strings: use generate_many for several prompts")
    try:
        array = np.asarray(prompt)
    except ValueError as error:
        raise InvalidRequest(f"the prompt is not a flat sequence of token ids: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidRequest(
            f"token ids must be a flat sequence of integers, not {array.ndim}-dimensional {array.dtype.name}"
        )
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise InvalidRequest("a token id does not fit in 32 bits")
    return array.astype(np.int32)
