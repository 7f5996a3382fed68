"""The one place where channels are made."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

import grpc

MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""Of an answer, the server's own bound."""
MAX_REQUEST_BYTES: Final = 16 * 2**20
"""Of a request, likewise: what is larger fails here, before it travels."""
_RETRY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICES: Final = ("ModelService", "FeatureService", "GenerationService")
# Everything here may be asked twice without harm: a request makes a picture and changes nothing.
_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [{"name": [{"service": f"turbolens.v1.{s}"} for s in _SERVICES], "retryPolicy": _RETRY}],
}
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class TLS:
    """How to talk to a server behind TLS."""

    root_certificates: bytes | None = None
    """PEM of who may have signed the server's certificate; None: the system's."""
    private_key: bytes | None = None
    """PEM of the caller's own key, where the server asks for one."""
    certificate_chain: bytes | None = None
    """PEM of the caller's own certificate."""


def _target(target: str) -> str:
    """Names go through DNS, so that calls spread over all addresses behind one."""
    return target if "://" in target or target.startswith(("unix:", "dns:", "ipv4:", "ipv6:")) else f"dns:///{target}"


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def sync_channel(target: str, tls: TLS | None) -> Any:
    """A channel for the sync client."""
    if tls is None:
        return grpc.insecure_channel(_target(target), options=_OPTIONS)
    return grpc.secure_channel(_target(target), _credentials(tls), options=_OPTIONS)


def async_channel(target: str, tls: TLS | None) -> Any:
    """A channel for the async client."""
    if tls is None:
        return grpc.aio.insecure_channel(_target(target), options=_OPTIONS)
    return grpc.aio.secure_channel(_target(target), _credentials(tls), options=_OPTIONS)
