"""Exceptions, one for each kind of answer that is not a result."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import grpc


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    """One field of a request that the server refused."""

    field: str
    """Its path in the request: `edits[0].features[1].feature.index`."""
    description: str
    """What was received and what is allowed."""

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class TurboLensError(Exception):
    """Any error of a call.

    Attributes:
        code: gRPC's status code, by name.
        message: what happened.
        reason: the server's machine-readable reason, such as "QUEUE_FULL".
        request_id: the id under which the server's log has the call.
        violations: every field that was refused.
        retry_after: seconds after which to try again, where the server says so.
        cause: gRPC's own error.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        request_id: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
        cause: grpc.RpcError | None = None,
    ) -> None:
        super().__init__("\n  ".join([message, *map(str, violations)]) if len(violations) > 1 else message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.violations = violations
        self.retry_after = retry_after
        self.cause = cause


class InvalidRequest(TurboLensError):
    """The request cannot be served as it is; `violations` says which fields are wrong."""


class NotFound(TurboLensError):
    """There is no such feature or SAE."""


class Unavailable(TurboLensError):
    """No server answers, or its model is still loading."""


class Overloaded(TurboLensError):
    """The server's queue is full; try again after `retry_after` seconds."""


class DeadlineExceeded(TurboLensError):
    """The call took longer than its timeout."""


class Cancelled(TurboLensError):
    """The call was cancelled."""


class Unauthenticated(TurboLensError):
    """The server wants to know who calls."""


class PermissionDenied(TurboLensError):
    """The caller may not do this."""


class Unimplemented(TurboLensError):
    """The server does not know this call: it is older than this client, or is no TurboLens server."""


class Closed(TurboLensError):
    """The connection was closed before the call, or belongs to another event loop."""


class InternalError(TurboLensError):
    """The server failed; its log has the reason under `request_id`."""


EXCEPTIONS: Final[dict[grpc.StatusCode, type[TurboLensError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
}
"""Status codes and what they become; any other is a plain TurboLensError."""
_REFUSED_STREAM: Final = "RST_STREAM with error code 7"
"""What gRPC says where HTTP/2's REFUSED_STREAM has come back as often as it asks again by itself."""
_CALLS_END_S: Final = 0.5
"""In which some of a connection's calls are over, at a guess."""


def out_of_time(target: str, said: str = "its stream stood still") -> DeadlineExceeded:
    """What a call that was not answered in time raises."""
    message = f"{target} did not answer in time; give the call a longer timeout ({said})"
    return DeadlineExceeded(message, code="DEADLINE_EXCEEDED")


def _details(value: bytes) -> list[Any]:
    from google.protobuf.message import DecodeError
    from google.rpc import status_pb2

    try:
        return list(status_pb2.Status.FromString(value).details)
    except DecodeError:
        return []  # from a proxy on the way, not from our server: the status itself still counts


def from_rpc_error(error: Any, target: str) -> TurboLensError:
    """gRPC's error as ours, with the details that the server sent."""
    from google.rpc import error_details_pb2

    code: grpc.StatusCode = error.code()
    message = error.details() or code.name
    reason, request_id, retry_after = "", "", None
    violations: list[FieldViolation] = []
    for key, value in error.trailing_metadata() or ():
        if key == "x-request-id":
            request_id = str(value)
        elif key == "grpc-status-details-bin":
            for detail in _details(value):
                info, bad, retry = (
                    error_details_pb2.ErrorInfo(),
                    error_details_pb2.BadRequest(),
                    error_details_pb2.RetryInfo(),
                )
                if detail.Unpack(info):
                    reason = info.reason
                elif detail.Unpack(bad):
                    violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
                elif detail.Unpack(retry):
                    retry_after = retry.retry_delay.ToMilliseconds() / 1000
    kind = EXCEPTIONS.get(code, TurboLensError)
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        if _REFUSED_STREAM in message:
            # The server is there and has not looked at it: it takes so many calls at once on one connection.
            kind, retry_after = Overloaded, _CALLS_END_S
            message = f"{target} has as many calls on this connection as it takes at once ({message})"
        elif "handshake failed" in message or "verification check failed" in message:
            message = f"no TLS connection to {target}: the server's certificate and tls= do not agree ({message})"
        else:
            message = f"no TurboLens server answers at {target}; start one with `turbolens serve` ({message})"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"{target} did not answer in time; give the call a longer timeout ({message})"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        # gRPC gives a message over the size limit the status of a full queue, but waiting does not shrink it.
        kind = InvalidRequest
        message = f"too large for one message: ask for fewer seeds or features at once, or stream ({message})"
    return kind(
        message,
        code=code.name,
        reason=reason,
        request_id=request_id,
        violations=tuple(violations),
        retry_after=retry_after,
        cause=error,
    )
