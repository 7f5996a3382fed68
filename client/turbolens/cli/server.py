"""What every command that calls a server has in common."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import turbolens as tl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """A command that calls a server."""

    server: str | None = None
    """`host:port` of a server, several separated by commas, or `embedded` for one in this process; left out:
    TURBOLENS_TARGET, else localhost:50051."""
    token: str | None = None
    """What the server knows this caller by; better in TURBOLENS_TOKEN, where no list of processes shows it."""
    tls: bool = False
    """Speak TLS, with the system's certificates; one of the files below does so too."""
    tls_ca: str = ""
    """File of who may have signed the server's certificate; left out: TURBOLENS_TLS_CA."""
    tls_cert: str = ""
    """File of this caller's certificate; left out: TURBOLENS_TLS_CERT."""
    tls_key: str = ""
    """File of its key; left out: TURBOLENS_TLS_KEY."""
    json: bool = False
    """Print JSON."""

    def connect(self, **options: Any) -> tl.Lens:
        """A connection to it."""
        files = (self.tls_ca, self.tls_cert, self.tls_key)
        tls = tl.TLS.from_files(*files) if any(files) else self.tls or None
        return tl.connect(self.server, token=self.token, tls=tls, **options)

    def show(self, value: Any, text: object) -> None:
        """Print for programs or for people, as asked."""
        print(json.dumps(value, indent=1, default=str) if self.json else text)


def rows_of(table: tl.Table) -> list[dict[str, Any]]:
    """A table's rows for programs."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.values()]


def pairs(option: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
    """The two sides of a flag that is said as NAME=VALUE."""
    found = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, found, strict=True):
        if not equals or not name:
            raise ValueError(f"--{option} {text}: write {form}")
    return [(name, value) for name, _, value in found]


def numbers(option: str, texts: Sequence[str], of: str) -> dict[str, int]:
    """The numbers of a flag that is said of each SAE or reference."""
    found = pairs(option, texts, f"{of}=NUMBER")
    for name, number in found:
        if not number.isdecimal():
            raise ValueError(f"--{option} {name}={number}: write {of}=NUMBER")
    return {name: int(number) for name, number in found}
