"""What is told to a worker process and what it tells, as bytes: msgpack, checked against the messages' own types.

The layout follows from the dataclasses' type hints: each becomes an array that starts with the class's name, and numpy
arrays become their bytes. A field that is added there travels at once. Decoding builds the dataclasses through their
constructors, checks every value's type, runs no code of the sender's choice, and holds at most a small multiple of
the payload's size.

msgspec is imported here and nowhere else: only where there are worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from operator import attrgetter, or_
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from preble.engine.frames import MAX_FRAME, FrameError
from preble.engine.messages import Command, Launch, News
from preble.errors import InvalidRequest

MAX_ITEMS = 1 << 20
"""Entries of one list at most: a payload's few bytes cannot ask for more memory than this needs."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Form:
    """How values of one type travel."""

    wire: Any
    """The type that msgspec checks."""
    pack: Callable[[Any], Any] | None = None
    """From a value to what msgspec encodes; `None` where they are the same."""
    unpack: Callable[[Any], Any] | None = None
    """From what msgspec decoded to the value; `None` where they are the same."""


def _form(hint: Any) -> _Form:
    """The form of what a type hint allows."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass_form(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is np.ndarray:
        return _array_form(np.dtype(get_args(arguments[1])[0]))
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return _sequence_form(origin, _form(arguments[0]))
    if origin in (Union, UnionType) and all(is_dataclass(one) for one in arguments):
        return _union_form(arguments)
    return _Form(hint)


@cache
def _dataclass_form(kind: type[Any]) -> _Form:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    forms = [_form(hints[name]) for name in names]
    by_keyword = any(field.kw_only for field in fields(kind))
    mirror = msgspec.defstruct(
        kind.__name__,
        [(name, form.wire) for name, form in zip(names, forms, strict=True)],
        tag=kind.__name__,
        array_like=True,
        forbid_unknown_fields=True,
    )
    values_of = _values_getter(names)
    packs = [(index, form.pack) for index, form in enumerate(forms) if form.pack is not None]
    unpacks = [(index, form.unpack) for index, form in enumerate(forms) if form.unpack is not None]

    def pack(value: Any) -> list[Any]:
        values = values_of(value)
        for index, convert in packs:
            values[index] = convert(values[index])
        return [kind.__name__, *values]

    def unpack(decoded: Any) -> Any:
        values = values_of(decoded)
        for index, convert in unpacks:
            values[index] = convert(values[index])
        return kind(**dict(zip(names, values, strict=True))) if by_keyword else kind(*values)

    return _Form(mirror, pack, unpack)


def _values_getter(names: Sequence[str]) -> Callable[[Any], list[Any]]:
    if len(names) < 2:  # attrgetter gives a tuple from two names on
        return lambda value: [getattr(value, name) for name in names]
    get = attrgetter(*names)
    return lambda value: list(get(value))


def _array_form(dtype: np.dtype[Any]) -> _Form:
    def pack(array: Any) -> bytes:
        return np.asarray(array, dtype).tobytes()

    def unpack(data: bytes) -> Any:
        if len(data) % dtype.itemsize:
            raise FrameError(f"{len(data)} bytes are no array of {dtype.name}")
        return np.frombuffer(bytearray(data), dtype)  # over bytes it would be read-only

    return _Form(bytes, pack, unpack)


def _sequence_form(kind: Any, item: _Form) -> _Form:
    entries: Any = (item.wire, ...) if kind is tuple else item.wire
    wire = Annotated[kind[entries], msgspec.Meta(max_length=MAX_ITEMS)]
    pack, unpack = item.pack, item.unpack
    if pack is None or unpack is None:
        return _Form(wire)
    return _Form(wire, lambda values: [pack(value) for value in values], lambda found: kind(map(unpack, found)))


def _union_form(kinds: Sequence[Any]) -> _Form:
    forms = {kind: _dataclass_form(kind) for kind in kinds}
    packs = {kind: form.pack for kind, form in forms.items()}
    unpacks = {form.wire: form.unpack for form in forms.values()}
    wire = reduce(or_, unpacks)
    return _Form(wire, lambda value: packs[type(value)](value), lambda found: unpacks[type(found)](found))  # type: ignore[misc]


def _scalar(value: object) -> object:
    """A numpy number as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process")


def _presentable(packed: Any) -> Any:
    """`packed` with the halves of surrogate pairs replaced, which msgpack cannot hold.

    They occur in no text that a model generates, so as a stop string they are never met; and in a log line, where they
    stand for a file name's odd bytes, they are shown as what they are: no characters.
    """
    if isinstance(packed, (list, tuple)):
        return [_presentable(one) for one in packed]
    if isinstance(packed, str):
        return packed.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return packed


class _Direction(Generic[T]):
    """The messages of one direction."""

    def __init__(self, hint: Any) -> None:
        form = _sequence_form(list, _form(hint))
        self._decoder = msgspec.msgpack.Decoder(form.wire)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_scalar)
        assert form.pack is not None
        assert form.unpack is not None
        self._pack, self._unpack = form.pack, form.unpack

    def encode(self, messages: Sequence[T]) -> list[bytes]:
        packed = self._pack(messages)
        try:
            payload = self._encoder.encode(packed)
        except UnicodeEncodeError:
            payload = self._encoder.encode(_presentable(packed))
        if len(payload) <= MAX_FRAME and len(messages) <= MAX_ITEMS:
            return [payload]
        if len(messages) == 1:
            raise FrameError(f"a {type(messages[0]).__name__} of {len(payload)} bytes does not fit in a frame")
        middle = len(messages) // 2
        return self.encode(messages[:middle]) + self.encode(messages[middle:])

    def decode(self, payload: bytes) -> list[T]:
        try:
            messages: list[T] = self._unpack(self._decoder.decode(payload))
        except (msgspec.MsgspecError, UnicodeDecodeError, InvalidRequest) as error:
            raise FrameError(f"a frame holds no message: {error}") from error
        return messages


_LAUNCH: _Direction[Launch] = _Direction(Launch)
_COMMANDS: _Direction[Command] = _Direction(Command)
_NEWS: _Direction[News] = _Direction(News)


def encode_launch(launch: Launch) -> bytes:
    """The payload of the first frame to a worker."""
    return _LAUNCH.encode([launch])[0]


def encode_commands(commands: Sequence[Command]) -> list[bytes]:
    """Payloads of the frames to a worker that follow, in order; one, unless the commands are too long for that.

    Raises:
        FrameError: a single command is longer than `MAX_FRAME`.
    """
    return _COMMANDS.encode(commands)


def encode_news(news: Sequence[News]) -> list[bytes]:
    """Payloads of frames to the parent; see `encode_commands`."""
    return _NEWS.encode(news)


def decode_launch(payload: bytes) -> Launch:
    """The message of the first frame to a worker.

    Raises:
        FrameError: it is not what `encode_launch` gives.
    """
    launches = _LAUNCH.decode(payload)
    if len(launches) != 1:
        raise FrameError(f"a frame holds {len(launches)} launches")
    return launches[0]


def decode_commands(payload: bytes) -> list[Command]:
    """The commands of one frame to a worker.

    Raises:
        FrameError: it is not what `encode_commands` gives.
    """
    return _COMMANDS.decode(payload)


def decode_news(payload: bytes) -> list[News]:
    """The messages of one frame from a worker.

    Raises:
        FrameError: it is not what `encode_news` gives.
    """
    return _NEWS.decode(payload)
