"""Who calls: what fairness, quotas and logs go by."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Scope = Literal["generate", "extract", "admin"]


@dataclasses.dataclass(frozen=True)
class Caller:
    """One caller, who shares the server with the others."""

    name: str
    """Its token's name, else its certificate's, else its address."""
    scopes: frozenset[Scope] | None = None
    """What it may do; None: all that is served."""


def anonymous(peer: str) -> Caller:
    """A caller known by its address alone; its ports are all one caller's."""
    kind, _, address = peer.partition(":")
    return Caller(address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else peer)


def of_certificate(context: Any) -> str | None:
    """The common name that a caller's certificate proves; None where there is none."""
    names = context.auth_context().get("x509_common_name")
    return names[0].decode(errors="replace") if names else None
