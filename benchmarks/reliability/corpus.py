"""What a fuzzer has found to be of interest, kept as the smallest requests that show it.

A line of the file is one request: its method, its bytes in base64, and what the server made of it. Of interest are what
the server calls its own fault, each way to be refused (code, reason, field, words), and each field of a request that is
served. What is kept is where later runs start from, and what every run of the tests sends again.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message

from benchmarks.places import ROOT
from benchmarks.reliability.bad_requests import request_class
from turbolens_server.files import write_file

PLACE: Final = ROOT / "tests" / "server" / "rpc" / "corpus.jsonl"
OURS: Final = ("INTERNAL", "UNKNOWN")
"""What a server says that is at fault itself."""
MOST_BYTES: Final = 180_000
"""Of the file: what is smallest stays."""
_OF_THE_MOMENT: Final = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")
_VALUES: Final = re.compile(r"'[^']*'?|\"[^\"]*\"?|[^\sa-zA-Z_.,;:()]+|\b\w*\d\w*\b")
_TRIES: Final = 150
"""Requests sent to make one smaller."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    code: str
    reason: str = ""
    field: str = ""
    """The first that is wrong, without its place in a list."""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Kept:
    """One request of the corpus."""

    method: str
    """`Service.Method`."""
    data: bytes
    code: str


def name_of(method: MethodDescriptor) -> str:
    """As the corpus has it."""
    return f"{method.containing_service.name}.{method.name}"


def of_interest(method: MethodDescriptor, data: bytes, outcome: Outcome) -> frozenset[str]:
    """What a request shows, in words that are alike for requests that show the same."""
    if outcome.code in _OF_THE_MOMENT:
        return frozenset()
    if outcome.code != "OK":
        words = " ".join(_VALUES.sub(" ", outcome.text).split())[:80]
        return frozenset({" ".join((name_of(method), outcome.code, outcome.reason, outcome.field, words))})
    request = request_class(method).FromString(data)
    return frozenset(f"{name_of(method)} serves {path}" for path in _paths(request)) | {f"{name_of(method)} serves"}


def _paths(message: Message, above: str = "") -> Iterator[str]:
    """Fields that are set, at every depth; of a choice or a number of few values, which one."""
    for field, value in message.ListFields():
        path = f"{above}{field.name}"
        yield path
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else (value,):
            yield from _paths(one, f"{path}.")


def smaller(message: Message) -> Iterator[Message]:
    """A message with less in it, each way to leave something out, the most first."""
    for field, value in message.ListFields():
        without = _copy(message)
        without.ClearField(field.name)
        yield without
        if field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry):
            several = list(value)
            parts = [several[: len(several) // 2], several[len(several) // 2 :]] if len(several) > 1 else []
            for part in parts:
                fewer = _copy(without)
                getattr(fewer, field.name).extend(part)
                yield fewer
            if field.message_type is not None:
                for at, one in enumerate(several[:4]):
                    for less in smaller(one):
                        changed = _copy(message)
                        getattr(changed, field.name)[at].CopyFrom(less)
                        yield changed
        elif field.message_type is not None and not field.is_repeated:
            for less in smaller(value):
                changed = _copy(message)
                getattr(changed, field.name).CopyFrom(less)
                yield changed
        elif isinstance(value, str | bytes) and len(value) > 1:
            shorter = _copy(message)
            setattr(shorter, field.name, value[: len(value) // 2])
            yield shorter


def _copy(message: Message) -> Message:
    made = type(message)()
    made.CopyFrom(message)
    return made


def shorter(data: bytes) -> Iterator[bytes]:
    """Bytes with a piece left out, large pieces first."""
    size = len(data)
    while (size := size // 2) > 0:
        for at in range(0, len(data), size):
            yield data[:at] + data[at + size :]


async def minimised(method: MethodDescriptor, data: bytes, shows: Callable[[bytes], Awaitable[bool]]) -> bytes:
    """The smallest that is found to show the same."""
    tries = _TRIES
    again = True
    while again:
        again = False
        for candidate in _candidates(method, data):
            if len(candidate) >= len(data):
                continue
            if not (tries := tries - 1):
                return data
            if await shows(candidate):
                data, again = candidate, True
                break
    return data


def _candidates(method: MethodDescriptor, data: bytes) -> Iterator[bytes]:
    try:
        request = request_class(method).FromString(data)
    except DecodeError:
        yield from shorter(data)
        return
    plain = _copy(request)
    plain.DiscardUnknownFields()
    for message in (plain, *smaller(plain), *smaller(request)):
        yield message.SerializeToString()


def read(place: Path = PLACE) -> list[Kept]:
    """What is kept."""
    if not place.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in place.read_text().splitlines()]
    return [Kept(line["method"], base64.b64decode(line["data"]), line["code"]) for line in lines]


def write(kept: Iterable[Kept], place: Path = PLACE) -> None:
    """Keep these, faults of the server before all else, and of the others as many as there is room for."""
    lines, room = [], MOST_BYTES
    for one in sorted(kept, key=lambda one: (one.code not in OURS, len(one.data), one.method, one.data)):
        line = json.dumps({"method": one.method, "code": one.code, "data": base64.b64encode(one.data).decode()}) + "\n"
        if (room := room - len(line)) < 0:
            break
        lines.append(line)
    write_file(place, "".join(sorted(lines)))
