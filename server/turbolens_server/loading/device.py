"""The device and the precision to serve in, and the versions that decide numerics there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

from turbolens_server.loading.errors import LoadError

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of a name, "auto" being a GPU where there is one.

    Raises:
        LoadError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"--device {name}: this PyTorch ({torch.__version__}) sees no GPU; use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of a name, "auto" being float16 on a GPU and else float32.

    Raises:
        LoadError: it is none that is served.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise LoadError(f"--dtype {name}: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def describe(device: torch.device) -> str:
    """A device for people: "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of what decides numerics."""
    try:
        own = version("turbolens")
    except PackageNotFoundError:
        own = "unknown"
    others = {name: version(name) for name in ("diffusers", "transformers")}
    return {"turbolens": own, "torch": torch.__version__} | others
