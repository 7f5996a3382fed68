"""Ports beside the service's own: health for probes, metrics for Prometheus."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import start_http_server

from turbolens_server.rpc.metrics import Metrics
from turbolens_server.rpc.transport import server_options


class SidePorts:
    """Opened as the service's port is, and closed after it."""

    def __init__(self, host: str, health: Any, metrics: Metrics) -> None:
        self._host = host
        self._health = health
        self._metrics = metrics
        self._server: Any = None
        self._http: Any = None

    async def open(self, health_port: int, metrics_port: int) -> None:
        """Listen; 0: not there.

        Raises:
            RuntimeError: a port cannot be bound; the text names it.
        """
        if health_port:
            # In the clear and for everybody: Kubernetes' probes speak neither TLS nor tokens. It says nothing else.
            self._server = grpc.aio.server(options=server_options())
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            self._server.add_insecure_port(f"{self._host}:{health_port}")
            await self._server.start()
        if metrics_port:
            try:
                self._http, _ = start_http_server(metrics_port, self._host, self._metrics.registry)
            except OSError as error:
                raise RuntimeError(f"metrics_port {metrics_port}: {error}") from error

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            await self._server.stop(0)
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
