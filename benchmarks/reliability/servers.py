"""Servers as processes of their own, and what can be seen of one from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fleet.simulation import Curve

_STARTS_S = 120.0


@dataclasses.dataclass
class Server:
    """One process that serves."""

    process: subprocess.Popen[str]
    target: str
    metrics_port: int = 0
    log: list[str] = dataclasses.field(default_factory=list)

    def memory_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) / 1024

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metric(self, line: str) -> float:
        """A number of `/metrics`, by its name with labels; 0 where it is not there."""
        found = re.search(rf"^{re.escape(line)} (\S+)$", self._metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def handled(self, method: str) -> int:
        """Calls of a method that came to a handler of ours, however they ended."""
        line = rf'^turbolens_requests_total{{[^}}]*method="[^"]*{method}"[^}}]*}} (\S+)$'
        return sum(int(float(count)) for count in re.findall(line, self._metrics(), re.MULTILINE))

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as page:
            return str(page.read().decode())

    def send(self, sign: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(sign)


@contextlib.contextmanager
def started(*flags: str, metrics_port: int = 0, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`turbolens serve` with flags, and variables beside this process's own, on a free port, ready."""
    command = [str(Path(sys.prefix) / "bin" / "turbolens"), "serve", "--port", "0", "--log-format", "json", *flags]
    if metrics_port:
        command += ["--metrics-port", str(metrics_port)]
    # Pinned, so that nothing is compiled beside what is measured.
    variables = {"TURBOLENS_BACKEND": "torch", **os.environ, **(environment or {})}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    server = Server(process, "", metrics_port)
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.log.append(line)
            if line.startswith("{"):
                event = json.loads(line)
                if event.get("event") == "listening":
                    server.target = event["address"]
                if event.get("event") == "ready":
                    ready.set()
            del server.log[:-2000]

    threading.Thread(target=read, daemon=True).start()
    try:
        end = time.monotonic() + _STARTS_S
        while not ready.wait(0.2):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start:\n" + "".join(server.log[-20:]))
        yield server
    finally:
        _kill(process)


@contextlib.contextmanager
def timed(curve: Curve, settings: Mapping[str, Any] | None = None) -> Iterator[Server]:
    """The program with an engine that only takes its time, so that what is measured is all the rest."""
    command = [sys.executable, "-m", "benchmarks.fleet.timed_server", "--curve", json.dumps(dataclasses.asdict(curve))]
    command += ["--settings", json.dumps(dict(settings or {}))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            if not (port := process.stdout.readline()):
                errors.seek(0)
                raise RuntimeError(f"the server did not start:\n{errors.read()}")
            yield Server(process, f"127.0.0.1:{int(port)}", (settings or {}).get("metrics_port", 0))
        finally:
            _kill(process)


@contextlib.contextmanager
def span_sink() -> Iterator[tuple[str, list[int]]]:
    """What takes spans by OTLP over HTTP and throws them away: its address, and the sizes of what came."""
    sizes: list[int] = []

    class Sink(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sizes.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *_: object) -> None:
            """Nothing is said."""

    with http.server.HTTPServer(("127.0.0.1", 0), Sink) as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{sink.server_port}", sizes
        finally:
            sink.shutdown()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
