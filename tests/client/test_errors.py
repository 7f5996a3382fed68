"""Every refusal becomes one exception that says what to do."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from fake_server import refuse
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2 as details

import turbolens as tl

Violation = details.BadRequest.FieldViolation
BAD = details.BadRequest(
    field_violations=[
        Violation(field="seeds[0]", description="-1 must be at least 0"),
        Violation(field="sampling.steps", description="9 must be 1 to 4"),
    ]
)


def answers(*arguments, **options):
    return lambda context: refuse(context, *arguments, **options)


def test_a_refused_request_names_every_field(client, fake):
    info = details.ErrorInfo(reason="INVALID_REQUEST", domain="turbolens")
    fake.on["Generate"] = answers(grpc.StatusCode.INVALID_ARGUMENT, "2 fields are wrong", info, BAD, request_id="r-1")
    with pytest.raises(tl.InvalidRequest) as caught:
        client.generate("x")
    error = caught.value
    assert (error.code, error.reason, error.request_id) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "r-1")
    assert error.message == "2 fields are wrong"
    assert error.violations == (
        tl.FieldViolation("seeds[0]", "-1 must be at least 0"),
        tl.FieldViolation("sampling.steps", "9 must be 1 to 4"),
    )
    assert "sampling.steps: 9 must be 1 to 4" in str(error)
    assert isinstance(error.cause, grpc.RpcError)
    assert error.__suppress_context__  # the traceback shows our error alone


def test_a_full_queue_says_when_to_come_back(running, fake):
    retry = details.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    fake.on["Generate"] = answers(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry)
    with tl.connect(running.target, attempts=1) as client, pytest.raises(tl.Overloaded) as caught:
        client.generate("x")
    assert caught.value.retry_after == 1.5


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", tl.InvalidRequest),
        ("FAILED_PRECONDITION", tl.InvalidRequest),
        ("NOT_FOUND", tl.NotFound),
        ("UNAVAILABLE", tl.Unavailable),
        ("RESOURCE_EXHAUSTED", tl.Overloaded),
        ("DEADLINE_EXCEEDED", tl.DeadlineExceeded),
        ("CANCELLED", tl.Cancelled),
        ("UNAUTHENTICATED", tl.Unauthenticated),
        ("PERMISSION_DENIED", tl.PermissionDenied),
        ("UNIMPLEMENTED", tl.Unimplemented),
        ("INTERNAL", tl.InternalError),
        ("UNKNOWN", tl.InternalError),
        ("DATA_LOSS", tl.TurboLensError),
    ],
)
def test_every_status_has_its_exception(client, fake, code, kind):
    fake.on["SearchFeatures"] = answers(grpc.StatusCode[code], "so it is")
    with pytest.raises(tl.TurboLensError) as caught:
        client.search_features("x")
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert "so it is" in caught.value.message


def test_streams_fail_the_same_way(client, fake):
    fake.on["StreamGenerate"] = fake.on["StreamFeatures"] = answers(grpc.StatusCode.INVALID_ARGUMENT, "no", BAD)
    for stream in (client.stream_generate("x"), client.stream_features("x")):
        with pytest.raises(tl.InvalidRequest) as caught:
            list(stream)
        assert len(caught.value.violations) == 2


def test_the_async_client_fails_the_same_way(running):
    running.fake.on["Generate"] = running.fake.on["StreamGenerate"] = answers(
        grpc.StatusCode.INVALID_ARGUMENT, "no", BAD, request_id="r-2"
    )

    async def call():
        async with tl.aio.connect(running.target) as lens:
            with pytest.raises(tl.InvalidRequest) as unary:
                await lens.generate("x")
            with pytest.raises(tl.InvalidRequest) as stream:
                async for _ in lens.stream_generate("x"):
                    pass
            return unary.value, stream.value

    for error in asyncio.run(call()):
        assert error.request_id == "r-2"
        assert [v.field for v in error.violations] == ["seeds[0]", "sampling.steps"]


def test_details_that_are_none_do_not_hide_the_error(client, fake):
    def garbled(context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    fake.on["SearchFeatures"] = garbled
    with pytest.raises(tl.NotFound, match="gone"):
        client.search_features("x")


def test_a_deadline_of_the_call_or_of_the_connection(client, running, fake):
    fake.on["Generate"] = lambda context: time.sleep(0.5)
    with pytest.raises(tl.DeadlineExceeded, match="longer timeout"):
        client.generate("x", timeout=0.1)
    with tl.connect(running.target, timeout=0.1) as hasty, pytest.raises(tl.DeadlineExceeded):
        hasty.generate("x")


def test_nobody_there():
    with tl.connect("localhost:1") as client, pytest.raises(tl.Unavailable) as caught:
        client.generate("x")
    assert "localhost:1" in str(caught.value)
    assert "turbolens serve" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_moment_of_absence_is_bridged(client, fake):
    left = [2]

    def absent(context):
        if left[0]:
            left[0] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    fake.on["Generate"] = absent
    assert client.generate("x", seed=1).seed == 1
    assert left == [0]


def test_an_overloaded_server_is_not_asked_again_behind_the_callers_back(client, fake):
    fake.on["Generate"] = answers(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    with pytest.raises(tl.Overloaded):
        client.generate("x")
    assert len(fake.requests) == 1


def test_messages_over_grpcs_own_four_megabytes_pass(client):
    text = "x" * (5 * 2**20)
    assert client.generate(text, seed=1).provenance.run.prompt == text


def test_a_message_that_is_too_large_is_no_overload(client):
    with pytest.raises(tl.InvalidRequest, match="fewer seeds or features"):
        client.generate("x" * (17 * 2**20))
