"""`turbolens doctor`."""

from __future__ import annotations

import dataclasses
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import turbolens as tl
from turbolens.cli.server import Calls


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: Literal["ok", "warn", "fail"]
    what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor(Calls):
    """Look at this machine and at a server, and say what is wrong.

    Example: turbolens doctor --server localhost:50051
    """

    def run(self) -> None:
        found = [*_packages(), _torch(), self._server()]
        self.show(
            [dataclasses.asdict(finding) for finding in found],
            "\n".join(f"{finding.state:>5}  {finding.what}" for finding in found),
        )
        if any(finding.state == "fail" for finding in found):
            sys.exit(1)

    def _server(self) -> Finding:
        try:
            with self.connect(timeout=5) as lens:
                model = lens.model()
        except (tl.TurboLensError, RuntimeError, ValueError) as error:
            return Finding("fail", str(error))
        saes = ", ".join(sae.name for sae in model.saes) or "none"
        return Finding("ok", f"{lens!r} serves {model.name} on {model.device} ({model.dtype}); SAEs: {saes}")


def _packages() -> list[Finding]:
    packages = [Finding("ok", f"{name} {version(name)}") for name in ("turbolens", "grpcio", "protobuf")]
    return [Finding("ok", f"Python {platform.python_version()}"), *packages]


def _torch() -> Finding:
    try:
        return Finding("ok", f"torch {version('torch')}: {_gpu()}")
    except PackageNotFoundError:
        way_out = "pip install 'turbolens[server]'"
        return Finding("warn", f"no torch: this machine can call a server but not be one ({way_out})")
    except (ImportError, OSError) as error:
        return Finding("fail", f"torch cannot be imported, so no server runs here; install it anew ({error})")


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, runs on the CPU"
