"""Which implementation serves on a GPU, kernel by kernel. On a CPU plain torch always does."""

from __future__ import annotations

from types import ModuleType
from typing import Final, Literal

from turbolens_server.kernels import plain

Kernel = Literal["encode_topk", "encode_jumprelu", "gather_decode", "apply_edits"]

SERVES_ON_CUDA: Final[dict[Kernel, Literal["plain", "fused"]]] = {
    "encode_topk": "fused",
    "encode_jumprelu": "fused",
    "gather_decode": "fused",
    "apply_edits": "fused",
}
"""The faster of the two on an H100 at the shapes of SDXL Turbo, by docs/performance.md."""


def implementation(kernel: Kernel) -> ModuleType:
    """The module whose function of that name serves on a GPU; `fused` needs the extra `triton`."""
    if SERVES_ON_CUDA[kernel] == "plain":
        return plain
    from turbolens_server.kernels import fused

    return fused
