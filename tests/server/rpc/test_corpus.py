"""Requests that a fuzzer found the server to call its own fault (`benchmarks.reliability.fuzz` keeps them)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.reliability.fuzz import CORPUS, Sender, bad_request, methods

KEPT = sorted(CORPUS.glob("*")) if CORPUS.exists() else []
BY_NAME = {f"{method.containing_service.name}.{method.name}": method for method in methods()}


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.name)
async def test_what_was_once_our_fault_is_the_callers(running, file: Path):
    method = BY_NAME[file.name.rpartition(".")[0]]
    assert await Sender(running.channel).send(method, file.read_bytes()) not in ("INTERNAL", "UNKNOWN")


async def test_a_few_hundred_more_are_the_callers_too(running):
    sender = Sender(running.channel)
    draw = random.Random(1)
    for _ in range(300):
        method = draw.choice(methods())
        await sender.send(method, bad_request(method, draw))
    assert sender.faults == []
    assert sender.codes["INVALID_ARGUMENT"] > 100
