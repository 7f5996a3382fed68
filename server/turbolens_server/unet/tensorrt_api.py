"""What `tensorrt` and `tensorrt_rtx` do not have in common; the rest of the package uses what they share.

TensorRT builds for the GPU it runs on. TensorRT-RTX also builds without a GPU, for a compute capability by name.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Final, Literal

import torch

from turbolens_server.files import first_line
from turbolens_server.unet.backend import BackendError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
_MODULES: Final[dict[Flavour, str]] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT."""

    flavour: Flavour
    version: str
    api: Any
    """The module."""

    def __str__(self) -> str:
        return f"{self.flavour} {self.version}"

    def network_flags(self) -> int:
        """Flags of a network whose layers run in the types that the graph says."""
        flags = self.api.NetworkDefinitionCreationFlag
        # From TensorRT 11 on every network is strongly typed, and the flag may go.
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def aim(self, config: Any, target: str) -> None:
        """Make a builder's configuration build for a target such as "sm89".

        Raises:
            BackendError: it cannot build for that.
        """
        if self.flavour == "tensorrt":
            if target != (here := current_target()):
                raise BackendError(f"--target {target}: {self} builds for the GPU it runs on, here {here or 'none'}")
            return
        known = {name.lower(): value for name, value in self.api.ComputeCapability.__members__.items()}
        choices = sorted(name for name in known if name.startswith("sm"))
        if target not in choices:
            raise BackendError(f"--target {target}: {self} builds for {', '.join(choices)}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[target], 0)

    def messages(self) -> Messages:
        """A logger for this TensorRT."""
        base, severity = self.api.ILogger, self.api.ILogger.Severity

        class Logger(base):  # type: ignore[misc,valid-type]
            """Keeps errors, drops the rest."""

            def __init__(self) -> None:
                base.__init__(self)
                self.errors: list[str] = []

            def log(self, level: Any, text: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    self.errors.append(" ".join(text.split()))

        return Messages(Logger())


@dataclasses.dataclass(frozen=True)
class Messages:
    """What TensorRT complains of: it returns nothing and logs why."""

    logger: Any

    def last(self) -> str:
        """The last error, in one line."""
        return self.logger.errors[-1][:300] if self.logger.errors else "no reason given"


def find_tensorrt() -> TensorRT:
    """TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        BackendError: neither can be imported.
    """
    reasons = []
    for flavour, module in _MODULES.items():
        try:
            api = importlib.import_module(module)
            return TensorRT(flavour, api.__version__, api)
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(f"{module}: {first_line(error)}")
    raise BackendError(
        f"no TensorRT can be imported ({'; '.join(reasons)}); pip install 'turbolens[tensorrt]', or "
        "'turbolens[tensorrt-rtx]' for RTX GPUs"
    )


def current_target(device: torch.device | None = None) -> str | None:
    """Compute capability of a GPU as a target, such as "sm89"; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
