"""The one place where channels are made, and where targets, tokens and certificates come from."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import socket
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast

import grpc

MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""Of an answer, the server's own bound."""
MAX_REQUEST_BYTES: Final = 16 * 2**20
"""Of a request, likewise: what is larger fails here, before it travels."""
DEFAULT_PORT: Final = 50051
# UNAVAILABLE alone: a server that is full says when to come back, and waiting for that here, not in gRPC, keeps its
# own words for a caller whose time does not suffice.
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
_HOST_PORT: Final = re.compile(r"(?P<host>\[[^\]\s]+\]|[^:\s\[\],/]+)(?::(?P<port>[0-9]{1,5}))?")
_TOKEN: Final = re.compile(r"[!-~]+")
_KEY: Final = re.compile(r"[a-z0-9_.-]+")
_TEXT: Final = re.compile(r"[ -~]*")
_SCHEMES: Final = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:", "passthrough:")


@dataclasses.dataclass(frozen=True, slots=True)
class TLS:
    """How to talk to a server behind TLS."""

    root_certificates: bytes | None = None
    """PEM of who may have signed the server's certificate; None: the system's."""
    private_key: bytes | None = None
    """PEM of the caller's own key, where the server asks for one."""
    certificate_chain: bytes | None = None
    """PEM of the caller's own certificate."""

    @classmethod
    def from_files(cls, ca: str | Path = "", certificate: str | Path = "", key: str | Path = "") -> TLS:
        """From files in PEM; empty: as None above.

        Raises:
            ValueError: a file cannot be read or is no PEM, or certificate and key do not belong together.
        """
        if bool(certificate) != bool(key):
            raise ValueError("TLS: of the caller's certificate and its key one is missing; give both or neither")
        # gRPC itself would say of wrong ones only that no server answers.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        named = f"ca {ca}"
        try:
            if ca:
                context.load_verify_locations(ca)
            named = f"certificate {certificate}, key {key}"
            if key:
                context.load_cert_chain(certificate, key, password="")
            return cls(*(Path(file).read_bytes() if file else None for file in (ca, key, certificate)))
        except OSError as error:
            raise ValueError(f"TLS: {named}: {error.strerror or error}") from error


Token = str | Callable[[], str]
"""A token, or what gives the current one, asked at every call."""
Metadata = Sequence[tuple[str, str | bytes]] | Mapping[str, str | bytes]
"""Pairs of keys and values."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """Where a server is and how it is convinced."""

    target: str
    """As gRPC reads it."""
    tls: TLS | None = None
    token: Token | None = None
    more: tuple[tuple[str, str | bytes], ...] = ()
    authority: str | None = None
    """Name that certificates are held to, where it is not the target's."""

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What every call brings."""
        if self.token is None:
            return (*_trace(), *self.more)
        token = self.token if isinstance(self.token, str) else _plain(self.token())
        return (("authorization", f"Bearer {token}"), *_trace(), *self.more)

    def options(self) -> list[tuple[str, Any]]:
        """Options of a channel."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.primary_user_agent", f"turbolens/{client_version()}"),
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ]
        if self.authority is not None:
            options.append(("grpc.default_authority", self.authority))
        return options


def _plain(token: str) -> str:
    """A token that can travel; gRPC's own error would not say what is wrong."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError("a token is plain ASCII without spaces or line ends; that of its file is none of it")
    return token


def _travels(key: object, value: object) -> bool:
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key.startswith("grpc-"):
        return False
    if key.endswith("-bin"):
        return isinstance(value, bytes)
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def pairs(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata that can travel, likewise.

    Raises:
        ValueError: a key or a value cannot.
    """
    given = tuple(metadata.items() if isinstance(metadata, Mapping) else metadata)
    for pair in given:
        if not (isinstance(pair, tuple) and len(pair) == 2 and _travels(*pair)):
            raise ValueError(
                f"metadata holds {pair!r}; give pairs of a key in lower case and a value of plain ASCII, or of bytes "
                "where the key ends in -bin"
            )
    return given


def _trace() -> tuple[tuple[str, str], ...]:
    """The caller's span, as W3C has it, where its program uses OpenTelemetry."""
    if "opentelemetry" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def client_version() -> str:
    """The SDK's version; empty where it is not installed."""
    try:
        return version("turbolens")
    except PackageNotFoundError:
        return ""


def connection(
    target: str | Sequence[str] | None,
    token: Token | None,
    metadata: Metadata,
    tls: TLS | bool | None,
    environment: Mapping[str, str] = os.environ,
) -> Connection:
    """Everything that was said of a server, and what was not from the environment.

    Args:
        target: one or several; None: TURBOLENS_TARGET, else localhost.
        token: None: TURBOLENS_TOKEN, else none.
        metadata: of every call.
        tls: True: with the system's certificates; False: in the clear, knowingly; None: by TURBOLENS_TLS_CA,
            TURBOLENS_TLS_CERT and TURBOLENS_TLS_KEY where one of them is set, else in the clear.
        environment: where those are.

    Raises:
        ValueError: a target cannot be one, a token or metadata cannot travel, or a token would in the clear.
    """
    said = target if target is not None else environment.get("TURBOLENS_TARGET") or f"localhost:{DEFAULT_PORT}"
    if not isinstance(said, str) and not said:
        raise ValueError("an empty list is no target; give host:port, or unix:path")
    several = [one.strip() for one in said.split(",")] if isinstance(said, str) else list(said)
    token = token if token is not None else environment.get("TURBOLENS_TOKEN") or None
    if isinstance(token, str):
        _plain(token)
    files = {name: environment.get(f"TURBOLENS_TLS_{name}", "") for name in ("CA", "CERT", "KEY")}
    if tls is None and any(files.values()):
        tls = TLS.from_files(files["CA"], files["CERT"], files["KEY"])
    secure = TLS() if tls is True else tls or None
    if token is not None and secure is None and tls is not False and not all(_is_local(one) for one in several):
        raise ValueError(
            "a token would travel in the clear, for everybody on the way to read: give tls=True, or tls=TLS(...), or "
            "tls=False where a mesh or a tunnel does it"
        )
    address, authority = _address(several)
    return Connection(address, secure, token, pairs(metadata), authority)


def _is_local(target: str) -> bool:
    host = target.rpartition(":")[0].strip("[]") if not target.startswith("unix:") else "localhost"
    return host in ("localhost", "127.0.0.1", "::1") or target in ("localhost", "embedded")


def _address(targets: Sequence[str]) -> tuple[str, str | None]:
    """One target as gRPC reads it, and the name that certificates are held to where that is another."""
    named = [_with_port(target) for target in targets]
    if len(named) == 1:
        # Names go through DNS, so that calls spread over all addresses behind one.
        return (named[0] if named[0].startswith(_SCHEMES) else f"dns:///{named[0]}"), None
    found: list[str] = []
    for one in named:
        if one.startswith(_SCHEMES):
            raise ValueError(f"{one}: of several targets each is a host:port")
        host, _, port = one.rpartition(":")
        try:
            addresses = socket.getaddrinfo(host.strip("[]"), int(port), socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise ValueError(f"{one}: {error}") from error
        found += [f"{cast(str, address[4][0])}:{port}" for address in addresses]
    return f"ipv4:{','.join(dict.fromkeys(found))}", named[0]


def _with_port(target: str) -> str:
    """gRPC takes 443 where there is no port, which no server of ours listens on."""
    if target.startswith(_SCHEMES):
        return target
    with contextlib.suppress(ValueError):
        return f"[{ipaddress.IPv6Address(target)}]:{DEFAULT_PORT}"
    match = _HOST_PORT.fullmatch(target)
    if match is None or not 0 < int(match["port"] or DEFAULT_PORT) < 65536:
        raise ValueError(f"{target!r} is no target; give host:port, or unix:path")
    return f"{match['host']}:{match['port'] or DEFAULT_PORT}"


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def sync_channel(to: Connection) -> Any:
    """A channel for the sync client."""
    if to.tls is None:
        return grpc.insecure_channel(to.target, options=to.options())
    return grpc.secure_channel(to.target, _credentials(to.tls), options=to.options())


def async_channel(to: Connection) -> Any:
    """A channel for the async client."""
    if to.tls is None:
        return grpc.aio.insecure_channel(to.target, options=to.options())
    return grpc.aio.secure_channel(to.target, _credentials(to.tls), options=to.options())
