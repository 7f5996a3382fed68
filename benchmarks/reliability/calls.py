"""What the SDK holds after very many calls, and what a call costs with everything on.

python -m benchmarks.reliability.calls
"""

from __future__ import annotations

import gc
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import tyro

import turbolens as tl
from benchmarks.fleet.simulation import Curve
from benchmarks.reliability.results import save, say
from benchmarks.reliability.servers import span_sink, started, timed
from benchmarks.served import AIM
from turbolens_server.bench import contenders as make
from turbolens_server.bench.contenders import Work
from turbolens_server.bench.timing import Contender, measure
from turbolens_server.loading.load import load_engine
from turbolens_server.rpc.tokens import make_token

_AT_ONCE: Final = Curve((1, 8), (0.0, 0.0), (0.0, 0.0))
_METRICS_PORT: Final = 52092


def own_memory_mib() -> float:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def growth(calls: int) -> dict[str, Any]:
    """Memory of a process that calls and calls, after the first tenth."""
    seen: list[list[float]] = []
    with timed(_AT_ONCE) as server, tl.connect(server.target) as lens:
        for number in range(calls + calls // 10):
            lens.generate("a big red star", seed=number, format="raw")
            if number % (calls // 10) == 0:
                gc.collect()
                seen.append([number, round(own_memory_mib(), 2)])
                say(f"{number} calls, {seen[-1][1]} MiB")
    grown = round(seen[-1][1] - seen[1][1], 2)
    return {"calls": calls, "grown_mib": grown, "watched": seen}


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    pair = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", pair[1], "-out", pair[0]], check=True, capture_output=True)
    return pair


def overhead(rounds: int, traces: bool) -> dict[str, Any]:
    """One picture of one step by the engine, and by a server with TLS, a token, metrics and traces, interleaved."""
    engine = load_engine()
    jobs = Work(1, 1, *engine.info.default_size).jobs()
    with tempfile.TemporaryDirectory() as name, span_sink() as (endpoint, sent):
        folder = Path(name)
        cert, key = certificate(folder)
        token, digest = make_token()
        tokens = folder / "tokens.toml"
        tokens.write_text(f'[[token]]\nname = "bench"\nsha256 = "{digest}"\n')
        flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--tokens", str(tokens), "--host", "localhost"]
        flags += ["--traces"] if traces else []
        to = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        with started(*flags, metrics_port=_METRICS_PORT, environment=to) as server:
            target = f"localhost:{server.target.rpartition(':')[2]}"
            tls = tl.TLS(cert.read_bytes())
            with tl.connect(target, tls=tls, token=token) as lens:
                contenders = [
                    Contender("engine", lambda: engine.run(jobs)),
                    Contender(
                        "server, all on", lambda: lens.generate(make.PROMPT, seed=0, format="raw"), {"engine": AIM}
                    ),
                ]
                rows = measure(contenders, rounds)
    compared = rows[1].comparisons[0]
    return {
        "rounds": rounds,
        "traces": traces,
        "span_kib_sent": sum(sent) // 1024,
        "engine_ms": round(rows[0].median_ms, 2),
        "server_ms": round(rows[1].median_ms, 2),
        "added_ms": [
            round(compared.added_ms.median, 2),
            round(compared.added_ms.low, 2),
            round(compared.added_ms.high, 2),
        ],
        "ratio": [round(compared.ratio.median, 3), round(compared.ratio.low, 3), round(compared.ratio.high, 3)],
        "verdict": compared.verdict,
    }


def main(calls: int = 10_000, rounds: int = 60, traces: bool = True) -> None:
    """Call.

    Args:
        calls: of one SDK client, after a tenth as many that do not count.
        rounds: in which engine and server are timed once each.
        traces: with spans on.
    """
    save("growth", growth(calls))
    save("overhead", overhead(rounds, traces))


if __name__ == "__main__":
    tyro.cli(main)
