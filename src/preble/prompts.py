"""What may be given as a prompt, and as a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, Union

from preble.errors import InvalidRequest, PrebleError, PromptTooLong, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from preble.sched.hashing import Tokens

Prompt: TypeAlias = Union[str, Sequence[int], "NDArray[np.integer]"]
"""Text, or token ids."""
MAX_IDS = 1 << 24
"""Token ids in a prompt at most, whatever the model's context: more than that is not even looked at."""
MAX_NAME = 1 << 16
"""Characters of a name at most."""


def check_text(prompt: str) -> None:
    """Reject a text without characters."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one character or token id")


def check_name(name: str, value: object) -> None:
    """Reject what cannot name anything: hashes and seeds are derived from its bytes."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {shown(value)}")
    if len(value) > MAX_NAME:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {MAX_NAME} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} must be valid text; {shown(value)} holds half a surrogate pair") from None


def is_long(prompt: object, length: int) -> bool:
    """Whether reading this prompt takes as long as that of a list of `length` token ids; an array is soon read."""
    try:
        return isinstance(prompt, Sequence) and len(prompt) >= length
    except Exception:  # a sequence of somebody's own: whoever reads it says what is wrong with it
        return False


def prompt_tokens(prompt: object) -> Tokens:
    """Token ids as int32 [n]; whether the model has them is for the caller to check."""
    try:
        return _prompt_tokens(prompt)
    except PrebleError:
        raise
    except Exception as error:  # whatever a sequence of somebody's own raises
        raise InvalidRequest(f"the prompt cannot be read as token ids: {shown(error)}") from error


def _prompt_tokens(prompt: object) -> Tokens:
    import numpy as np

    if isinstance(prompt, (bytes, bytearray)):
        raise InvalidRequest("the prompt is bytes: decode it to str, or give token ids")
    if not isinstance(prompt, (Sequence, np.ndarray)):
        hint = ": call its tolist()" if hasattr(prompt, "tolist") else ""
        raise InvalidRequest(
            f"the prompt must be a string or a sequence of token ids, not {type(prompt).__name__}{hint}"
        )
    if len(prompt) == 0:
        raise InvalidRequest("the prompt is empty: give at least one character or token id")
    if len(prompt) > MAX_IDS:
        raise PromptTooLong(f"the prompt has {len(prompt)} token ids; no more than {MAX_IDS} are taken")
    if isinstance(prompt[0], str):
        raise InvalidRequest("the prompt is a sequence of strings: use generate_many for several prompts")
    if isinstance(prompt[0], Mapping):
        raise InvalidRequest("the prompt is a sequence of messages: use chat or stream_chat for a conversation")
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
