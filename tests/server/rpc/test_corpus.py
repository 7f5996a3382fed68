"""Requests that a fuzzer found and kept (`benchmarks.reliability.fuzz --keep`), sent again."""

from __future__ import annotations

import random

from benchmarks.reliability import corpus
from benchmarks.reliability.bad_requests import bad_request, methods
from benchmarks.reliability.fuzz import Sender, small
from turbolens_proto.v1 import generation_service_pb2 as gs

BY_NAME = {corpus.name_of(method): method for method in methods()}
GENERATE = BY_NAME["GenerationService.Generate"]


async def test_what_a_fuzzer_kept_is_answered_or_the_callers_fault(running):
    kept = corpus.read()
    assert {one.method for one in kept} == BY_NAME.keys()
    assert {one.code for one in kept} >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert corpus.PLACE.stat().st_size < 200_000
    sender = Sender(running.channel)
    for one in kept:
        await sender.send(BY_NAME[one.method], one.data)
    assert sender.faults == []


async def test_a_few_hundred_more_are_the_callers_too(running):
    sender = Sender(running.channel)
    draw = random.Random(1)
    kept = corpus.read()
    for _ in range(300):
        method = draw.choice(methods())
        of_method = [one.data for one in kept if one.method == corpus.name_of(method)]
        await sender.send(method, bad_request(method, draw, of_method))
    assert sender.faults == []
    assert sender.codes["INVALID_ARGUMENT"] > 100


async def test_what_is_kept_is_small_and_shows_the_same(running, tmp_path):
    sender = Sender(running.channel)
    request = gs.GenerateRequest()
    request.run.source.prompt.text = "a red star" * 100
    request.run.seeds.extend(range(4))
    request.run.sampling.steps = 4096
    await sender.send(GENERATE, request.SerializeToString())
    await sender.send(GENERATE, b"\x0a\xff" + bytes(500))
    (steps,) = [shown for shown in sender.showed if "steps" in shown]
    kept = await small(sender, 2)
    corpus.write(kept, tmp_path / "corpus.jsonl")
    assert sorted(corpus.read(tmp_path / "corpus.jsonl"), key=str) == sorted(kept, key=str)
    least = gs.GenerateRequest.FromString(max((one.data for one in kept), key=len))
    assert least.run.sampling.steps == 4096
    assert not least.run.source.prompt.text[20:]
    again = Sender(running.channel)
    for one in kept:
        await again.send(GENERATE, one.data)
    assert steps in again.showed
    assert min(len(one.data) for one in kept) < 5


def test_faults_are_kept_before_all_else(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MOST_BYTES", 200)
    fault = corpus.Kept("GenerationService.Generate", b"x" * 60, "INTERNAL")
    many = [corpus.Kept("GenerationService.Generate", bytes([at]), "OK") for at in range(10)]
    corpus.write([*many, fault], tmp_path / "corpus.jsonl")
    kept = corpus.read(tmp_path / "corpus.jsonl")
    assert fault in kept
    assert 0 < len(kept) < 11
    assert corpus.read(tmp_path / "nothing") == []
