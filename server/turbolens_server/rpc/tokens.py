"""Callers known by a token: a file of who they are, what they may do and how much of it.

The file holds hashes alone, so whoever reads it cannot call:

    [[token]]
    name = "alice"                        # in logs, and what fairness and quotas go by
    sha256 = "9f86d081884c7d65..."        # of the token, as `turbolens token` prints it
    scopes = ["generate", "extract"]      # left out: these two
    pictures_per_minute = 600             # left out: no quota
    pictures_in_flight = 32               # likewise

A token is random and long, so a plain hash keeps it: there is nothing to guess. The file is read again when it has
changed; one that cannot be read then leaves the callers as they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import time
import tomllib
from pathlib import Path
from typing import Any, Final, get_args

import tyro

from turbolens_server.config import ConfigError
from turbolens_server.logs import get_logger
from turbolens_server.rpc.callers import Caller, Scope
from turbolens_server.rpc.quotas import Quota

_NAME: Final = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_NAMES: Final = "name must be 1 to 64 letters, digits and _.@-"
_LOOK_EVERY_S: Final = 1.0
_BYTES: Final = 32
_KNOWN: Final = {"name", "sha256", "scopes", "pictures_per_minute", "pictures_in_flight"}


def make_token() -> tuple[str, str]:
    """A new token, and its hash for the file."""
    token = f"tl_{secrets.token_urlsafe(_BYTES)}"
    return token, _hash(token)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The callers of a file."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read; the text says what is wrong.
        """
        self._path = path
        self._changed = self._stamp()
        self._looked = time.monotonic()
        self._callers = _read(path)

    def find(self, token: str) -> Caller | None:
        """The caller of a token; None where there is none."""
        self._look()
        # By the hash of the token: how long this takes says nothing of any token.
        return self._callers.get(_hash(token))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            about = self._path.stat()
        except OSError:
            return None
        return about.st_mtime_ns, about.st_ino, about.st_size

    def _look(self) -> None:
        if time.monotonic() < self._looked + _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        if (changed := self._stamp()) == self._changed:
            return
        self._changed = changed
        try:
            read = _read(self._path)
        except ConfigError as error:
            get_logger().error("tokens kept", why=str(error))
            return
        known = {caller.name: caller for caller in self._callers.values()}
        for digest, caller in read.items():
            before = known.get(caller.name)
            if before is not None and before.quota is not None and before.quota.same_as(caller.quota):
                read[digest] = dataclasses.replace(caller, quota=before.quota)  # what was used stays used
        self._callers = read
        get_logger().info("tokens read", count=len(read))


def _read(path: Path) -> dict[str, Caller]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("token", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"tokens {path}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"tokens {path}: must hold tables [[token]]")
    found: dict[str, Caller] = {}
    for i, entry in enumerate(entries):
        digest, caller = _caller(f"tokens {path}: token {i + 1}", entry)
        if digest in found or caller.name in {other.name for other in found.values()}:
            raise ConfigError(f"tokens {path}: token {i + 1}: {caller.name} is there twice")
        found[digest] = caller
    return found


def _caller(where: str, entry: dict[str, Any]) -> tuple[str, Caller]:
    if unknown := sorted(entry.keys() - _KNOWN):
        raise ConfigError(f"{where}: no setting {', '.join(unknown)}; there are {', '.join(sorted(_KNOWN))}")
    name, digest = entry.get("name"), entry.get("sha256")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"{where}: {_NAMES}")
    if not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
        raise ConfigError(f"{where}: sha256 of {name} must be 64 hexadecimal digits, as `turbolens token` prints")
    scopes, known = entry.get("scopes", ["generate", "extract"]), get_args(Scope)
    if not (isinstance(scopes, list) and all(scope in known for scope in scopes)):
        raise ConfigError(f"{where}: scopes of {name} must be a list of {', '.join(known)}")
    for key in ("pictures_per_minute", "pictures_in_flight"):
        value = entry.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{where}: {key} of {name} must be a whole number from 1")
    quota = Quota(name, entry.get("pictures_per_minute"), entry.get("pictures_in_flight"))
    return digest, Caller(name, frozenset(scopes), quota)


@dataclasses.dataclass(frozen=True)
class MakeToken:
    """Make a token for a caller: print it, once, and its entry in the server's file.

    Example: `turbolens token alice`.
    """

    name: tyro.conf.Positional[str]
    """Who it is for."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(_NAMES)


def main(argv: list[str]) -> None:
    """Entry point of `turbolens token`."""
    command = tyro.cli(MakeToken, args=argv, prog="turbolens token")
    token, digest = make_token()
    if command.json:
        print(json.dumps({"name": command.name, "token": token, "sha256": digest, "scopes": ["generate", "extract"]}))
        return
    print(f"# the caller's, shown this once: {token}")
    print(f'[[token]]\nname = "{command.name}"\nsha256 = "{digest}"\nscopes = ["generate", "extract"]')
