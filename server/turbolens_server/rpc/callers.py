"""Who calls, and what it may do: what fairness, quotas and logs go by."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, Protocol

from turbolens_server.rpc.errors import RpcError, no_token, not_allowed

Scope = Literal["generate", "extract", "admin"]
_NEEDS: Final[dict[str, Scope | None]] = {
    "turbolens.v1.GenerationService/Generate": "generate",
    "turbolens.v1.GenerationService/StreamGenerate": "generate",
    "turbolens.v1.FeatureService/ExtractFeatures": "extract",
    "turbolens.v1.FeatureService/StreamFeatures": "extract",
    "turbolens.v1.FeatureService/ExtractFeaturesBatch": "extract",
    "turbolens.v1.FeatureService/AttributeFeature": "extract",
    "turbolens.v1.AdminService/LoadSaes": "admin",
    "turbolens.v1.AdminService/UnloadSae": "admin",
    "turbolens.v1.AdminService/ReloadSae": "admin",
    # What reads what is known of the model, every caller may.
    "turbolens.v1.ModelService/GetModel": None,
    "turbolens.v1.FeatureService/ListFeatures": None,
    "turbolens.v1.FeatureService/GetFeature": None,
    "turbolens.v1.FeatureService/SearchFeatures": None,
    "turbolens.v1.FeatureService/NearestFeatures": None,
}
"""What is not here needs "admin": a method that was forgotten is closed, not open."""
_BEARER: Final = "bearer "


class Allowance(Protocol):
    """A quota."""

    def take(self, pictures: int) -> None:
        """Take pictures or raise."""
        ...

    def give_back(self, pictures: int, *, used: bool = True) -> None:
        """They are no longer in flight; `used` False: nor were they ever made."""
        ...

    def same_as(self, other: Any) -> bool:
        """Whether another allows the same."""
        ...


@dataclasses.dataclass(frozen=True)
class Caller:
    """One caller, who shares the server with the others."""

    name: str
    """Its token's name, else its certificate's, else its address."""
    scopes: frozenset[Scope] | None = None
    """What it may do; None: all that is served."""
    quota: Allowance | None = None


class KnownCallers(Protocol):
    """Callers by their tokens."""

    def find(self, token: str) -> Caller | None:
        """The caller of a token."""
        ...


def identify(peer: str, context: Any, known: KnownCallers | None) -> Caller:
    """Who calls.

    Args:
        peer: gRPC's name of where the call comes from.
        context: of the call.
        known: by token; None: this server asks for none.

    Raises:
        RpcError: UNAUTHENTICATED where a token is missing or unknown.
    """
    if known is None:
        return Caller(_certificate(context) or address(peer))
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    if not (isinstance(given, str) and given.lower().startswith(_BEARER)):
        raise no_token("this server asks for a token, and the call has none: metadata `authorization: Bearer TOKEN`")
    caller = known.find(given[len(_BEARER) :].strip())
    if caller is None:
        raise no_token("this server does not know the call's token", "TOKEN_UNKNOWN")
    return caller


def refused(caller: Caller, method: str) -> RpcError | None:
    """Why a caller may not call a method, "turbolens.v1.GenerationService/Generate"; None where it may."""
    needed = _NEEDS.get(method, "admin")
    if needed is None or caller.scopes is None or needed in caller.scopes:
        return None
    return not_allowed(caller.name, needed)


def address(peer: str) -> str:
    """Where a call comes from, without its port: all of an address's connections are one caller."""
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else peer


def _certificate(context: Any) -> str | None:
    """The common name that a caller's certificate proves; None where there is none."""
    names = context.auth_context().get("x509_common_name")
    return names[0].decode(errors="replace") if names else None
