"""What a connection may do before a call is even looked at: gRPC's own options, each with what it keeps away."""

from __future__ import annotations

from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""Of an answer."""
MAX_REQUEST_BYTES: Final = 16 * 2**20
"""Of a request. Parsed, a message of small numbers or of empty parts takes many times its size, so this is far less
than answers may have, and still four masks of the largest size."""
MAX_STREAMS: Final = 100
"""Calls at once on one connection. Opened and reset without this bound, calls take memory faster than it is freed."""
MAX_CONNECTIONS: Final = 1024
HANDSHAKE_S: Final = 20.0
"""In which a new connection must have said that it speaks HTTP/2, and TLS where that is asked for."""
_IDENTITY_ONLY: Final = 1  # a bitset: bit 0 is "no compression"


def server_options(max_connection_age_s: float = 0) -> tuple[tuple[str, Any], ...]:
    """Options of a gRPC server.

    Args:
        max_connection_age_s: after which a connection is asked to end once its calls have, so that callers look up
            names again and find servers that were added; 0: never.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A message is unpacked whole before its size is looked at: 1 MB on the wire could become 1 GiB. Pictures do
        # not get smaller by it, so it is not offered at all; a compressed call is answered with UNIMPLEMENTED.
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        # Of those, one that says nothing is no caller's.
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        # Callers may keep quiet connections open with pings, since a long call must not die of them; who pings more
        # often than this is disconnected, since every ping costs work.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        # A caller whose machine is gone without a word is noticed, and its calls end.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.so_reuseport", 0),
    ]
    if max_connection_age_s:
        options.append(("grpc.max_connection_age_ms", int(max_connection_age_s * 1000)))
    return tuple(options)
