"""TLS of the server: certificates from files, read again when they change, so that a renewal needs no restart."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path
from typing import Any

import grpc

from turbolens_server.config import ConfigError
from turbolens_server.logs import get_logger


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """Files in PEM."""

    certificate: Path
    """Of the server, with the chain that leads to who signed it."""
    key: Path
    client_ca: Path | None = None
    """Who may have signed callers' certificates, which are then asked for; None: callers need none."""

    def read(self) -> Any:
        """The files as gRPC takes them.

        Raises:
            ConfigError: a file cannot be read, or they do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
            if self.client_ca is not None:
                ssl.create_default_context(cafile=str(self.client_ca))
            pair = [(self.key.read_bytes(), self.certificate.read_bytes())]
            ca = self.client_ca.read_bytes() if self.client_ca else None
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(file) for file in (self.certificate, self.key, self.client_ca) if file)
            raise ConfigError(f"tls_cert, tls_key, tls_client_ca ({files}): {error}") from error
        return grpc.ssl_server_certificate_configuration(pair, root_certificates=ca)

    def stamps(self) -> tuple[int | None, ...]:
        """When each was last changed."""
        return tuple(_changed(file) for file in (self.certificate, self.key, self.client_ca))


def _changed(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_mtime_ns
    except OSError:
        return None


def server_credentials(files: TlsFiles) -> Any:
    """Credentials of a server, that look at the files at every new connection.

    Raises:
        ConfigError: as :meth:`TlsFiles.read`.
    """
    first, seen = files.read(), files.stamps()

    def fetch() -> Any:
        nonlocal seen
        if (stamps := files.stamps()) == seen:
            return None
        seen = stamps
        try:
            renewed = files.read()
        except ConfigError as error:
            get_logger().error("certificate kept", why=str(error))
            return None
        get_logger().info("certificate read")
        return renewed

    return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=files.client_ca is not None)
