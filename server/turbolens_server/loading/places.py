"""Where what is served should be: what can be said before anything heavy is imported."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from turbolens_server.config import ServerConfig
from turbolens_server.loading.errors import LoadError

EMBEDDED: Final = "mini"
"""The name of the model that ships with the package."""
EMBEDDED_SAES: Final = ("mini-saes", "mini-nested", "mini-temporal", "mini-attention")
"""The names of the sets of SAEs that ship beside it; it is served with the first where none is named."""
RANDOM: Final = "random:"
"""What the name of an architecture with random weights begins with."""


def is_random(model: str) -> bool:
    """Whether a model's name asks for random weights."""
    return model.startswith(RANDOM)


def local(name: str, flag: str) -> Path | None:
    """The local file or folder of a name; None: it is a hub id.

    Args:
        name: a path or hub id.
        flag: what asked for it, which begins the error.

    Raises:
        LoadError: it is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise LoadError(f"{flag} {name}: no such folder, and not a hub id like owner/name")
    return None


def problems(config: ServerConfig) -> list[str]:
    """All that is wrong with where a server is to look and listen, a line each."""
    more = [("--vae", config.vae)] if config.vae is not None else []
    more += [("--gate", config.gate)] if config.gate not in ("", EMBEDDED) else []
    more += [("--model-config", config.model_config)] if config.model_config is not None else []
    more += [("--lora", source.rpartition("=")[0] or source) for source in config.lora]
    found = nowhere(config.model, config.sae, more)
    for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens"):
        file = getattr(config, name)
        if file and not Path(file).is_file():
            found.append(f"--{name.replace('_', '-')} {file}: no such file")
    if taken := _refuses(config.host, config.port):
        found.append(f"cannot listen on {config.host}:{config.port}: {taken}")
    return found


def nowhere(model: str, saes: Iterable[str] = (), more: Iterable[tuple[str, str]] = ()) -> list[str]:
    """What is neither here nor a hub id, a line each.

    Args:
        model: as `--model` says it.
        saes: as `--sae` says them.
        more: flags and what each names.
    """
    named = [] if model == EMBEDDED or is_random(model) else [("--model", model)]
    found = []
    for flag, name in (*named, *(("--sae", _path_of(source)) for source in saes), *more):
        if flag == "--sae" and name in EMBEDDED_SAES:
            continue
        try:
            local(name, flag)
        except LoadError as error:
            found.append(str(error))
    return found


def _path_of(source: str) -> str:
    """What one `--sae` says of where: it may have a name or a block before it."""
    front, _, path = source.partition("=")
    return path if front and path and "/" not in front and not Path(source).expanduser().exists() else source


def _refuses(host: str, port: int) -> str | None:
    """Why nobody can listen there; None where one can, or where only trying tells."""
    if not 0 < port <= 65535:
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        return str(error.strerror)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            return str(error.strerror)
    return None
