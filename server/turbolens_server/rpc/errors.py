"""Errors on the wire: a `google.rpc.Status` with details, beside gRPC's own code and message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from turbolens_server.engine.types import NotFinite

DOMAIN: Final = "turbolens"
DETAILS_KEY: Final = "grpc-status-details-bin"
# gRPC drops a call's whole status where its trailing metadata pass 8 KiB, and text that is not ASCII grows on the way.
_MESSAGE_CHARS: Final = 400
_VIOLATIONS_BYTES: Final = 3000
# What errors of a GPU begin with, torch's AcceleratorError among them: after one, every later call repeats it.
_OF_A_GPU: Final = ("CUDA error", "HIP error", "Triton Error [CUDA]")
# Of those, what a smaller batch gets past.
_PASSING: Final = ("out of memory", "ALLOC_FAILED")
# Likewise, and what CPUs say.
_OF_MEMORY: Final = (*_PASSING, "not enough memory", "can't allocate memory", "bad allocation")


@dataclasses.dataclass(frozen=True)
class Violation:
    """One field of a request that cannot be served."""

    field: str
    """Its path: `edits[0].features[1].feature.index`."""
    description: str
    """What was received and what is allowed."""


class RpcError(Exception):
    """An error to answer with."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        quota: tuple[str, str] | None = None,
    ) -> None:
        if len(message) > _MESSAGE_CHARS:
            message = f"{message[:_MESSAGE_CHARS]}..."
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        self.quota = quota
        """Whose quota, and what of it, is used up."""

    def trailing_metadata(self, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
        """The details as trailing metadata; on overload also the key that gRPC's own retries honour.

        Of very many violations only the first travel; the metadata of the error's info count the rest.
        """
        number, _ = self.code.value
        status = status_pb2.Status(code=number, message=self.message)
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=DOMAIN, metadata={**self.metadata, "request_id": request_id}
        )
        details = [info]
        if self.violations:
            told = bad_request(self.violations)
            details.append(told)
            if left_out := len(self.violations) - len(told.field_violations):
                info.metadata["violations_left_out"] = str(left_out)
        if self.quota is not None:
            subject, description = self.quota
            failure = error_details_pb2.QuotaFailure()
            failure.violations.add(subject=subject, description=description)
            details.append(failure)
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        pairs: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString()), ("x-request-id", request_id)]
        if self.retry_after_s is not None:
            pairs.append(("grpc-retry-pushback-ms", str(int(self.retry_after_s * 1000))))
        return tuple(pairs)


def bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """As many violations as fit, in order; always the first."""
    told = error_details_pb2.BadRequest()
    room = _VIOLATIONS_BYTES
    for violation in violations:
        description = violation.description[:_MESSAGE_CHARS]
        field = error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=description)
        room -= field.ByteSize()
        if room < 0 and told.field_violations:
            break
        told.field_violations.append(field)
    return told


def invalid(violations: Sequence[Violation]) -> RpcError:
    """INVALID_ARGUMENT with every field that is wrong."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    message = f"{first.field}: {first.description}{more}"
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, message, "INVALID_REQUEST", violations=violations)


def not_found(what: str) -> RpcError:
    """NOT_FOUND for a resource name."""
    return RpcError(grpc.StatusCode.NOT_FOUND, what, "NOT_FOUND")


def overloaded(what: str, retry_after_s: float, reason: str = "QUEUE_FULL") -> RpcError:
    """RESOURCE_EXHAUSTED: the server is full for now; `what` says of what."""
    message = f"the server is full ({what}); try again in {retry_after_s:.1f} s"
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason, retry_after_s=retry_after_s)


def over_quota(name: str, quota: str, retry_after_s: float) -> RpcError:
    """RESOURCE_EXHAUSTED: a caller has had what it may have for now."""
    message = f"{name} has used up its quota of {quota}; try again in {retry_after_s:.1f} s"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return RpcError(code, message, "QUOTA_USED_UP", retry_after_s=retry_after_s, quota=(name, quota))


def no_token(message: str, reason: str = "TOKEN_MISSING") -> RpcError:
    """UNAUTHENTICATED: nobody knows who calls."""
    return RpcError(grpc.StatusCode.UNAUTHENTICATED, message, reason)


def not_allowed(name: str, scope: str) -> RpcError:
    """PERMISSION_DENIED: this caller may not do this."""
    message = f"{name} may not do this: its token lacks the scope {scope}"
    return RpcError(grpc.StatusCode.PERMISSION_DENIED, message, "SCOPE_MISSING", metadata={"scope": scope})


def malformed(kind: str) -> RpcError:
    """INVALID_ARGUMENT: bytes that are no message of this kind."""
    message = f"the bytes received are no {kind}; is the caller made for another version of this service?"
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, message, "MALFORMED_MESSAGE", metadata={"message": kind})


class Stalled(RpcError):
    """ABORTED: a stream's caller takes nothing, and what waits for it holds memory."""

    def __init__(self, after_s: float, message_bytes: int) -> None:
        message = f"the caller took nothing for {after_s:g} s; read a stream as it comes, or ask for less at once"
        super().__init__(
            grpc.StatusCode.ABORTED, message, "STREAM_NOT_READ", metadata={"seconds": f"{after_s:g}"}
        )  # fmt: skip
        self.message_bytes = message_bytes
        """Of the message that it did not take."""


def stopping() -> RpcError:
    """UNAVAILABLE: the server was told to stop; another may serve."""
    return RpcError(grpc.StatusCode.UNAVAILABLE, "the server is stopping", "STOPPING", retry_after_s=1.0)


def expired() -> RpcError:
    """DEADLINE_EXCEEDED: the caller's deadline passed before its turn came."""
    message = "the deadline passed in the queue"
    return RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, message, "EXPIRED_IN_QUEUE")


def not_finite(what: NotFinite, seed: int) -> RpcError:
    """INTERNAL: one picture of a request came to values that are not finite."""
    message = f"picture {what.job} (seed {seed}): {what}"
    metadata = {"seed_index": str(what.job), "seed": str(seed)}
    return RpcError(grpc.StatusCode.INTERNAL, message, "NON_FINITE", metadata=metadata)


def device_is_lost(error: Exception) -> bool:
    """Whether an error of the engine says that this process can use its GPU no more, whatever it asks of it."""
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and text.startswith(_OF_A_GPU)
        and not any(passing in text for passing in _PASSING)
    )


def says_out_of_memory(error: Exception) -> bool:
    """Whether an error of the engine is about memory, which a smaller batch may do with."""
    return isinstance(error, MemoryError | RuntimeError) and any(said in str(error) for said in _OF_MEMORY)


def out_of_memory(pictures: int) -> RpcError:
    """RESOURCE_EXHAUSTED: the device has not the memory, even for half of a batch."""
    message = f"the device has no memory left for {pictures} pictures at once; try again, or lower --max-batch"
    metadata = {"pictures": str(pictures)}
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return RpcError(code, message, "OUT_OF_MEMORY", retry_after_s=5.0, metadata=metadata)


def answer_too_large(size: int, most: int) -> RpcError:
    """RESOURCE_EXHAUSTED: the answer came to more than a message holds."""
    told = f"the answer has {size / 2**20:.1f} MiB, a message holds {most // 2**20}"
    message = f"{told}; ask for fewer seeds or features at once, or for the same by a stream"
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, "ANSWER_TOO_LARGE")


def loading() -> RpcError:
    """UNAVAILABLE: the model is not there yet."""
    return RpcError(grpc.StatusCode.UNAVAILABLE, "the model is loading", "LOADING", retry_after_s=1.0)
